"""LowRankAdapterDense and LowRankAdapterLayer: an adapter whose two matrices are low-rank products."""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, initializer

from msft_peft.delta.activation import Strategy, check_shardable, non_linearity, shard_activation
from msft_peft.delta.checks import DeltaValueError, check_dtypes, check_init, check_positive
from msft_peft.delta.dense import CastDense

# Under another name, since the classes have an argument of this one.
_non_linearity = non_linearity


class LowRankLinear(nn.Cell):
    """y = x·(L·R) + b.

    Weights: mindpet_delta_low_rank_adapter_weight_left (in, rank), mindpet_delta_low_rank_adapter_weight_right
        (rank, out): L and R; bias (out): zeros.

    Args:
        in_channels, out_channels, rank: sizes.
        weight_init: how L and R begin.
        param_init_type: dtype of the weights.
        compute_dtype: dtype of the products; the output has that of x.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        weight_init: Any,
        param_init_type: Any,
        compute_dtype: Any,
    ) -> None:
        super().__init__()
        self.out_channels, self.compute_dtype = out_channels, compute_dtype
        self.mindpet_delta_low_rank_adapter_weight_left = Parameter(
            initializer(weight_init, (in_channels, rank), param_init_type),
            name="mindpet_delta_low_rank_adapter_weight_left",
        )
        self.mindpet_delta_low_rank_adapter_weight_right = Parameter(
            initializer(weight_init, (rank, out_channels), param_init_type),
            name="mindpet_delta_low_rank_adapter_weight_right",
        )
        self.bias = Parameter(initializer("zeros", (out_channels,), param_init_type), name="bias")
        self.matmul_weight, self.matmul_input, self.bias_add = ops.MatMul(), ops.MatMul(), ops.BiasAdd()

    def construct(self, x: Tensor) -> Tensor:
        left = ops.cast(self.mindpet_delta_low_rank_adapter_weight_left, self.compute_dtype)
        right = ops.cast(self.mindpet_delta_low_rank_adapter_weight_right, self.compute_dtype)
        flat = ops.cast(ops.reshape(x, (-1, x.shape[-1])), self.compute_dtype)
        y = self.matmul_input(flat, self.matmul_weight(left, right))
        y = self.bias_add(y, ops.cast(self.bias, self.compute_dtype))
        return ops.reshape(ops.cast(y, x.dtype), (*x.shape[:-1], self.out_channels))


class LowRankAdapterLayer(nn.Cell):
    """y = x + f(x·(Dₗ·Dᵣ) + d)·(Uₗ·Uᵣ) + u: MindPet's low-rank adapter, with k = hidden // reduction_factor between.

    Weights: of two `LowRankLinear`, mindpet_delta_low_rank_adapter_down_sampler (hidden to k) and
        mindpet_delta_low_rank_adapter_up_sampler (k to hidden).

    Args:
        hidden_size: size of x.
        reduction_factor: k is this many times smaller.
        low_rank_size: rank of the products.
        low_rank_w_init: name of an initializer, or one; for all four matrices.
        non_linearity: name of f.
        param_init_type: dtype of the weights.
        compute_dtype: dtype of the products; the output has that of x.

    Inputs: x (*, hidden). Outputs: (*, hidden).

    Raises:
        DeltaTypeError (TypeError): a size is no int, low_rank_w_init or non_linearity of another type, a dtype none of
            those possible.
        DeltaValueError (ValueError): a size is not positive, reduction_factor larger than hidden_size, an unknown
            initializer.
        DeltaArgumentError (TypeError and ValueError): an unknown non_linearity.

    Source: Mahabadi et al. 2021, arXiv:2106.04647, §4 (the low-rank adapter).
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_positive(owner, hidden_size=hidden_size, reduction_factor=reduction_factor, low_rank_size=low_rank_size)
        _check_reduction(owner, reduction_factor, hidden_size)
        check_init(owner, "low_rank_w_init", low_rank_w_init, (1, 1), (str, Initializer))
        check_dtypes(owner, param_init_type=param_init_type, compute_dtype=compute_dtype)
        activation = _non_linearity(owner, non_linearity)
        self.bottleneck_size = hidden_size // reduction_factor
        settings = (low_rank_size, low_rank_w_init, param_init_type, compute_dtype)
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankLinear(hidden_size, self.bottleneck_size, *settings)
        self.mindpet_delta_low_rank_adapter_non_linear = activation
        self.mindpet_delta_low_rank_adapter_up_sampler = LowRankLinear(self.bottleneck_size, hidden_size, *settings)
        self.residual_add = ops.Add()

    def construct(self, input_tensor: Tensor) -> Tensor:
        h = self.mindpet_delta_low_rank_adapter_down_sampler(input_tensor)
        h = self.mindpet_delta_low_rank_adapter_non_linear(h)
        return self.residual_add(input_tensor, self.mindpet_delta_low_rank_adapter_up_sampler(h))

    def shard(
        self,
        strategy_matmul_down_sampler_weight: Strategy = None,
        strategy_matmul_down_sampler_input: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler_weight: Strategy = None,
        strategy_matmul_up_sampler_input: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Say how each operator is split over devices in semi-auto and auto parallel mode; None is data parallel.

        Args:
            strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input, strategy_bias_down_sampler: of
                Dₗ·Dᵣ, of x·(Dₗ·Dᵣ), of + d. No matrix is transposed in these products.
            strategy_non_linearity: of f.
            strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input, strategy_bias_up_sampler: the same of
                U and u.
            strategy_residual_add: of x + .

        Raises:
            DeltaValueError (ValueError): f is a log-softmax in one of those modes, or cannot be given a strategy.
        """
        owner, activation = type(self).__name__, self.mindpet_delta_low_rank_adapter_non_linear
        check_shardable(owner, activation)
        shard_activation(owner, activation, strategy_non_linearity)
        down = self.mindpet_delta_low_rank_adapter_down_sampler
        down.matmul_weight.shard(strategy_matmul_down_sampler_weight)
        down.matmul_input.shard(strategy_matmul_down_sampler_input)
        down.bias_add.shard(strategy_bias_down_sampler)
        up = self.mindpet_delta_low_rank_adapter_up_sampler
        up.matmul_weight.shard(strategy_matmul_up_sampler_weight)
        up.matmul_input.shard(strategy_matmul_up_sampler_input)
        up.bias_add.shard(strategy_bias_up_sampler)
        self.residual_add.shard(strategy_residual_add)


class LowRankAdapterDense(CastDense):
    """y = LowRankAdapterLayer(activation(x·Wᵀ + b)): a dense layer with MindPet's low-rank adapter after it.

    Weights: weight (out, in), bias (out), in float32; those of the `LowRankAdapterLayer` below
        `mindpet_delta_low_rank_adapter`.

    Args:
        in_channels, out_channels, weight_init, bias_init, has_bias, activation: as of `nn.Dense`.
        reduction_factor, low_rank_size, low_rank_w_init, non_linearity: as of `LowRankAdapterLayer`.
        param_init_type: dtype of the adapter's weights.
        compute_dtype: dtype of the products; the output has that of x.

    Inputs: x (*, in). Outputs: (*, out).

    Raises:
        DeltaTypeError (TypeError): a size is no int, has_bias no bool, an init, the activation, non_linearity or a
            dtype of another type.
        DeltaValueError (ValueError): a size is not positive, reduction_factor larger than out_channels, a Tensor of
            the wrong shape, an unknown initializer.
        DeltaKeyError (KeyError): an unknown activation.
        DeltaArgumentError (TypeError and ValueError): an unknown non_linearity.

    Source: Mahabadi et al. 2021, arXiv:2106.04647.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
    ) -> None:
        owner = type(self).__name__
        check_positive(
            owner,
            in_channels=in_channels,
            out_channels=out_channels,
            reduction_factor=reduction_factor,
            low_rank_size=low_rank_size,
        )
        _check_reduction(owner, reduction_factor, out_channels)
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, ms.float32, compute_dtype
        )
        self.reduction_factor = reduction_factor
        self.mindpet_delta_low_rank_adapter = LowRankAdapterLayer(
            out_channels,
            reduction_factor,
            low_rank_size,
            low_rank_w_init,
            non_linearity,
            param_init_type,
            compute_dtype,
        )

    def construct(self, input_tensor: Tensor) -> Tensor:
        return self.mindpet_delta_low_rank_adapter(super().construct(input_tensor))

    def shard(
        self,
        strategy_matmul_org: Strategy = None,
        strategy_bias_org: Strategy = None,
        strategy_activation_org: Strategy = None,
        strategy_matmul_down_sampler_weight: Strategy = None,
        strategy_matmul_down_sampler_input: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler_weight: Strategy = None,
        strategy_matmul_up_sampler_input: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Say how each operator is split over devices in semi-auto and auto parallel mode; None is data parallel.

        Args:
            strategy_matmul_org, strategy_bias_org, strategy_activation_org: of the dense layer.
            strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input, strategy_bias_down_sampler,
                strategy_non_linearity, strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input,
                strategy_bias_up_sampler, strategy_residual_add: see `LowRankAdapterLayer.shard`.

        Raises:
            DeltaValueError (ValueError): an activation is a log-softmax in one of those modes, or cannot be given a
                strategy.
        """
        check_shardable(type(self).__name__, self.activation)
        self.mindpet_delta_low_rank_adapter.shard(
            strategy_matmul_down_sampler_weight,
            strategy_matmul_down_sampler_input,
            strategy_bias_down_sampler,
            strategy_non_linearity,
            strategy_matmul_up_sampler_weight,
            strategy_matmul_up_sampler_input,
            strategy_bias_up_sampler,
            strategy_residual_add,
        )
        shard_activation(type(self).__name__, self.activation, strategy_activation_org)
        self.matmul.shard(strategy_matmul_org)
        if self.has_bias:
            self.bias_add.shard(strategy_bias_org)


def _check_reduction(owner: str, factor: int, size: int) -> None:
    if factor > size:
        raise DeltaValueError(f"{owner}: reduction_factor={factor} must not be larger than the layer's size, {size}")
