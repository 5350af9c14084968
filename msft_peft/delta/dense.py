"""The dense layer that the delta Cells extend: `nn.Dense` with a dtype to compute in."""

from typing import Any

from mindspore import Tensor, nn, ops

from msft_peft.delta.activation import output_activation
from msft_peft.delta.checks import check_bool, check_dtypes, check_init, check_positive


class CastDense(nn.Dense):
    """y = activation(x·Wᵀ + b), with the product computed in `compute_dtype`.

    It is an `nn.Dense`, so that code which initialises or looks for those finds it.

    Args:
        in_channels, out_channels: sizes.
        weight_init, bias_init: how W (out, in) and b (out) begin.
        has_bias: whether there is b.
        activation: a name, Cell, Primitive, or None.
        dtype: of the parameters.
        compute_dtype: of the product.

    Raises:
        DeltaTypeError, DeltaValueError, DeltaKeyError: an argument is none of these; before anything is made.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any,
        bias_init: Any,
        has_bias: bool,
        activation: Any,
        dtype: Any,
        compute_dtype: Any,
    ) -> None:
        owner = type(self).__name__
        check_positive(owner, in_channels=in_channels, out_channels=out_channels)
        check_bool(owner, "has_bias", has_bias)
        check_dtypes(owner, compute_dtype=compute_dtype)
        check_init(owner, "weight_init", weight_init, (out_channels, in_channels))
        check_init(owner, "bias_init", bias_init, (out_channels,))
        activation_cell = output_activation(owner, activation)
        super().__init__(in_channels, out_channels, weight_init, bias_init, has_bias, None, dtype)
        self.compute_dtype = compute_dtype
        self.activation = activation_cell
        self.activation_flag = activation_cell is not None

    def flat(self, x: Tensor) -> Tensor:
        """x (*, in) -> (rows, in) in the dtype to compute in."""
        return ops.cast(ops.reshape(x, (-1, x.shape[-1])), self.compute_dtype)

    def linear(self, x: Tensor) -> Tensor:
        """x (rows, in) -> x·Wᵀ + b (rows, out)."""
        y = self.matmul(x, ops.cast(self.weight, self.compute_dtype))
        return self.bias_add(y, ops.cast(self.bias, self.compute_dtype)) if self.has_bias else y

    def finished(self, y: Tensor, x: Tensor) -> Tensor:
        """y (rows, out), activated, in the dtype of x (*, in) and as (*, out)."""
        if self.activation_flag:
            y = self.activation(y)
        return ops.reshape(ops.cast(y, x.dtype), (*x.shape[:-1], self.out_channels))

    def construct(self, x: Tensor) -> Tensor:
        return self.finished(self.linear(self.flat(x)), x)
