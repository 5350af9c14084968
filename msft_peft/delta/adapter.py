"""AdapterDense and AdapterLayer: a bottleneck with a residual connection, after a layer."""

from collections import OrderedDict
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from msft_peft.delta.activation import Strategy, check_shardable, non_linearity, shard_activation
from msft_peft.delta.checks import check_dtypes, check_positive
from msft_peft.delta.dense import CastDense

_DOWN, _ACT, _UP = (f"mindpet_delta_adapter_{part}" for part in ("down_sampler", "non_linear", "up_sampler"))


class AdapterLayer(nn.Cell):
    """y = x + f(x·Dᵀ + d)·Uᵀ + u: MindPet's adapter.

    Weights, below `mindpet_delta_adapter_block`:
        mindpet_delta_adapter_down_sampler.weight (bottleneck, hidden), .bias (bottleneck): D and d.
        mindpet_delta_adapter_up_sampler.weight (hidden, bottleneck), .bias (hidden): U and u.
        Weights begin normal with σ = 0.01, biases at zero: close to the identity.

    Args:
        hidden_size: size of x.
        bottleneck_size: between the projections.
        non_linearity: name of f, one of those of `mindspore.nn.get_activation`.
        param_init_type: dtype of the weights.
        compute_dtype: dtype of the products; the output has that of x.

    Inputs: x (*, hidden). Outputs: (*, hidden).

    Raises:
        DeltaTypeError (TypeError): a size is no int, non_linearity no str, a dtype none of those possible.
        DeltaValueError (ValueError): a size is not positive.
        DeltaArgumentError (TypeError and ValueError): an unknown non_linearity.

    Source: Houlsby et al. 2019, arXiv:1902.00751.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_positive(owner, hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        check_dtypes(owner, param_init_type=param_init_type, compute_dtype=compute_dtype)
        activation = _non_linearity(owner, non_linearity)
        self.bottleneck_size, self.non_linearity_name = bottleneck_size, non_linearity
        settings = ("normal", "zeros", True, None, param_init_type, compute_dtype)
        self.mindpet_delta_adapter_block = nn.SequentialCell(
            OrderedDict(
                [
                    (_DOWN, CastDense(hidden_size, bottleneck_size, *settings)),
                    (_ACT, activation),
                    (_UP, CastDense(bottleneck_size, hidden_size, *settings)),
                ]
            )
        )
        self.residual_add = ops.Add()

    def construct(self, input_tensor: Tensor) -> Tensor:
        return self.residual_add(input_tensor, self.mindpet_delta_adapter_block(input_tensor))

    def shard(
        self,
        strategy_matmul_down_sampler: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Say how each operator is split over devices in semi-auto and auto parallel mode; None is data parallel.

        Args:
            strategy_matmul_down_sampler, strategy_bias_down_sampler: of x·Dᵀ and + d.
            strategy_non_linearity: of f.
            strategy_matmul_up_sampler, strategy_bias_up_sampler: of ·Uᵀ and + u.
            strategy_residual_add: of x + .

        Raises:
            DeltaValueError (ValueError): f is a log-softmax in one of those modes, or cannot be given a strategy.
        """
        owner, (down, activation, up) = type(self).__name__, self.mindpet_delta_adapter_block.cell_list
        check_shardable(owner, activation)
        shard_activation(owner, activation, strategy_non_linearity)
        down.matmul.shard(strategy_matmul_down_sampler)
        down.bias_add.shard(strategy_bias_down_sampler)
        up.matmul.shard(strategy_matmul_up_sampler)
        up.bias_add.shard(strategy_bias_up_sampler)
        self.residual_add.shard(strategy_residual_add)


# Under another name, since the classes have an argument of this one.
_non_linearity = non_linearity


class AdapterDense(CastDense):
    """y = AdapterLayer(activation(x·Wᵀ + b)): a dense layer with MindPet's adapter after it.

    Weights: weight (out, in), bias (out), in float32; those of the `AdapterLayer` below `mindpet_delta_adapter`.

    Args:
        in_channels, out_channels, weight_init, bias_init, has_bias, activation: as of `nn.Dense`.
        bottleneck_size, non_linearity: as of `AdapterLayer`.
        param_init_type: dtype of the adapter's weights.
        compute_dtype: dtype of the products; the output has that of x.

    Inputs: x (*, in). Outputs: (*, out).

    Raises:
        DeltaTypeError (TypeError): a size is no int, has_bias no bool; an init, the activation, non_linearity or a
            dtype of another type.
        DeltaValueError (ValueError): a size is not positive, a Tensor of the wrong shape, an unknown initializer.
        DeltaKeyError (KeyError): an unknown activation.
        DeltaArgumentError (TypeError and ValueError): an unknown non_linearity.

    Source: Houlsby et al. 2019, arXiv:1902.00751.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
    ) -> None:
        check_positive(type(self).__name__, bottleneck_size=bottleneck_size)
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, ms.float32, compute_dtype
        )
        self.bottleneck_size = bottleneck_size
        self.mindpet_delta_adapter = AdapterLayer(
            out_channels, bottleneck_size, non_linearity, param_init_type, compute_dtype
        )

    def construct(self, input_tensor: Tensor) -> Tensor:
        return self.mindpet_delta_adapter(super().construct(input_tensor))

    def shard(
        self,
        strategy_matmul_org: Strategy = None,
        strategy_bias_org: Strategy = None,
        strategy_activation_org: Strategy = None,
        strategy_matmul_down_sampler: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Say how each operator is split over devices in semi-auto and auto parallel mode; None is data parallel.

        Args:
            strategy_matmul_org, strategy_bias_org, strategy_activation_org: of the dense layer.
            strategy_matmul_down_sampler, strategy_bias_down_sampler, strategy_non_linearity,
                strategy_matmul_up_sampler, strategy_bias_up_sampler, strategy_residual_add: see `AdapterLayer.shard`.

        Raises:
            DeltaValueError (ValueError): an activation is a log-softmax in one of those modes, or cannot be given a
                strategy.
        """
        check_shardable(type(self).__name__, self.activation)
        self.mindpet_delta_adapter.shard(
            strategy_matmul_down_sampler,
            strategy_bias_down_sampler,
            strategy_non_linearity,
            strategy_matmul_up_sampler,
            strategy_bias_up_sampler,
            strategy_residual_add,
        )
        shard_activation(type(self).__name__, self.activation, strategy_activation_org)
        self.matmul.shard(strategy_matmul_org)
        if self.has_bias:
            self.bias_add.shard(strategy_bias_org)
