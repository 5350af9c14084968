"""One op per layer kind: how that layer applies a weight that comes from outside.

`op(x, w)` is what the base layer does with its own weight, bias left out; `op.mix(h, w)` mixes the output channels of
such a result: the second half of a low-rank product, which `op.add(y, delta)` adds to the layer's output. `op.rows(x)`
is x in the form that a chain of products is to have, from the input to `op.add`: there and back once instead of around
each product. `op.base(x, w)` is `op(x, w)` for the base weight itself. Weights come in torch's layout. Only kernels
that CPU, GPU and Ascend all have are used, and functions instead of Tensor methods, since mindnlp patches the latter.
"""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend.arrays import HALF_DTYPES


class Op(nn.Cell):
    """What all of them share."""

    def base(self, x: Tensor, w: Tensor) -> Tensor:
        return self.construct(x, w)

    def rows(self, x: Tensor) -> Tensor:
        return x

    def add(self, y: Tensor, delta: Tensor) -> Tensor:
        return ops.add(y, delta)


class DenseOp(Op):
    """y = x·Wᵀ for x (*, in) and W (out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        # One flat product: batched kernels are slower on CPU, and this is the form that sharding strategies address.
        if x.ndim == 2:
            return self.matmul(x, w)
        return ops.reshape(self.matmul(self.rows(x), w), (*x.shape[:-1], w.shape[0]))

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return self.construct(h, w)

    def rows(self, x: Tensor) -> Tensor:
        return x if x.ndim == 2 else ops.reshape(x, (-1, x.shape[-1]))

    def add(self, y: Tensor, delta: Tensor) -> Tensor:
        return ops.add(y, delta if delta.ndim == y.ndim else ops.reshape(delta, y.shape))


class EmbeddingOp(DenseOp):
    """y = c·W[ids] for ids (*) and W (vocabulary, dim).

    Args:
        scale: c, of layers that scale what they look up (`embed_scale` in transformers).
    """

    def __init__(self, scale: Any = 1.0) -> None:
        super().__init__()
        self.scale = float(scale)

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        y = ops.gather(w, x, 0)
        return y if self.scale == 1.0 else ops.mul(y, self.scale)

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        y = self.matmul(ops.reshape(h, (-1, h.shape[-1])), w)
        return ops.reshape(y, (*h.shape[:-1], w.shape[0]))


class ConvOp(Op):
    """y = x ∗ W for x (N, in, spatial...) and W (out, in / groups, kernel...), in one, two or three dimensions.

    Args:
        dims: number of spatial dimensions, 1 to 3.
        in_channels: channels of x. A weight with fewer input channels than x has is a grouped one.
        stride, dilation: one number per dimension.
        pad_mode: "same", "valid" or "pad".
        padding: with "pad", (before, after) per dimension in one flat tuple.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        pad_mode: str,
        padding: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.dims, self.in_channels = dims, in_channels
        # One dimension runs as two, of which the first has length one.
        lead = 1 if dims == 1 else 0
        self.stride, self.dilation = (1,) * lead + stride, (1,) * lead + dilation
        before, after = (0,) * lead + padding[0::2], (0,) * lead + padding[1::2]
        self.pad_mode = pad_mode
        self.padding: int | tuple[int, ...] = 0
        self.zero_pad: tuple[int, ...] = ()
        if pad_mode == "pad" and before == after:
            self.padding = before
        elif pad_mode == "pad":
            # MindSpore's functional convolutions take symmetric padding only: write the zeros first.
            pairs = list(zip(before, after, strict=True))
            self.pad_mode, self.zero_pad = "valid", tuple(n for pair in reversed(pairs) for n in pair)

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        groups = self.in_channels // w.shape[1]
        if self.dims == 1:
            x, w = ops.expand_dims(x, 2), ops.expand_dims(w, 2)
        if self.zero_pad:
            x = ops.pad(x, self.zero_pad)
        if self.dims == 3:
            y = ops.conv3d(x, w, None, self.stride, self.pad_mode, self.padding, self.dilation, groups)
        else:
            y = ops.conv2d(x, w, None, self.stride, self.pad_mode, self.padding, self.dilation, groups)
        return ops.squeeze(y, 2) if self.dims == 1 else y

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        groups = h.shape[1] // w.shape[1]
        if self.dims == 1:
            return ops.squeeze(ops.conv2d(ops.expand_dims(h, 2), ops.expand_dims(w, 2), groups=groups), 2)
        if self.dims == 3:
            return ops.conv3d(h, w, groups=groups)
        return ops.conv2d(h, w, groups=groups)


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 where it is in half precision, in which there are no inverses."""
    return ops.cast(x, ms.float32) if x.dtype in HALF_DTYPES else x


def add_bias(y: Tensor, bias: Parameter | None) -> Tensor:
    """Add `bias`, if there is one, along the last axis of y, whose dtype is kept."""
    return y if bias is None else ops.add(y, ops.cast(bias, y.dtype))
