"""Layers under HF's parameter names, with formulas that are fast on CPU and need only stock operators."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import Normal, initializer


def linear(inputs: int, outputs: int, bias: bool, std: float) -> nn.Dense:
    """Build a Dense (weight (outputs, inputs), bias (outputs,)) initialised as HF does: N(0, std²) and zeros."""
    return nn.Dense(inputs, outputs, weight_init=Normal(std), bias_init="zeros", has_bias=bias)


class Embedding(mint.nn.Embedding):
    """Rows of `weight` (vocab, H) by index; the row `padding_idx` starts at zero and gets no gradient.

    It is mint's Embedding (same attributes) over a gather that every backend has in graph mode too.
    """

    def __init__(self, vocab: int, width: int, std: float, padding_idx: int | None = None):
        weight = initializer(Normal(std), (vocab, width), ms.float32)
        super().__init__(vocab, width, _weight=weight)
        self.padding_idx = padding_idx
        if padding_idx is not None and not self.weight.has_init:
            self.weight[padding_idx] = 0.0

    def construct(self, input: Tensor) -> Tensor:  # noqa: A002 mint's name
        """Look up `input` (...), integers, as (..., H)."""
        rows = ops.gather(self.weight, input, 0)
        if self.padding_idx is not None and self.training:
            padding = ops.expand_dims(ops.equal(input, self.padding_idx), -1)
            rows = ops.where(padding, ops.stop_gradient(rows), rows)
        return rows


class LayerNorm(mint.nn.LayerNorm):
    """y = (x - mean) / √(var + ε) · weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float):
        super().__init__((width,), eps)

    def construct(self, input: Tensor) -> Tensor:  # noqa: A002 mint's name
        """Normalise `input` (..., H)."""
        centred = input - ops.mean(input, -1, keep_dims=True)
        scale = ops.rsqrt(ops.mean(centred * centred, -1, keep_dims=True) + self.eps)
        return centred * scale * self.weight + self.bias


class RMSNorm(nn.Cell):
    """y = x / √(mean(x²) + ε) · weight over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = Parameter(initializer("ones", (width,), ms.float32), name="weight")
        self.variance_epsilon = eps

    def construct(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., H)."""
        wide = x.astype(ms.float32)
        scale = ops.rsqrt(ops.mean(wide * wide, -1, keep_dims=True) + self.variance_epsilon)
        return (wide * scale).astype(x.dtype) * self.weight


def silu(x: Tensor) -> Tensor:
    """x·σ(x)."""
    return x * ops.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x) with the exact normal distribution function."""
    return x * 0.5 * (1.0 + ops.erf(x * 0.7071067811865476))


def gelu_tanh(x: Tensor) -> Tensor:
    """x·σ(2√(2/π)·(x + 0.044715·x³)): the tanh form of GELU, through the faster and more exact sigmoid."""
    return x * ops.sigmoid(x * (1.5957691216057308 + 0.07135481282553484 * x * x))


def tanh(x: Tensor) -> Tensor:
    """2·σ(2x) - 1; MindSpore's own tanh on CPU is off by up to 1e-4."""
    return 2.0 * ops.sigmoid(2.0 * x) - 1.0


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": ops.relu,
    "silu": silu,
    "swish": silu,
    "tanh": tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that HF's `hidden_act` names.

    Raises:
        ValueError: it is not built here.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act '{name}' is not built; supported: {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]
