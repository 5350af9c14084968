"""LoRADense: a dense layer with a low-rank update beside it."""

import math
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, initializer

from msft_peft.delta.activation import Strategy, check_shardable, shard_activation
from msft_peft.delta.checks import (
    DeltaTypeError,
    DeltaValueError,
    check_dropout,
    check_dtypes,
    check_init,
    check_positive,
)
from msft_peft.delta.dense import CastDense

_A_INIT = HeUniform(negative_slope=math.sqrt(5))


class LoRADense(CastDense):
    """y = activation(x·Wᵀ + b + s·dropout(x)·Aᵀ·Bᵀ), s = lora_alpha / lora_rank: MindPet's LoRA layer.

    Weights:
        weight (out, in), bias (out): of the dense layer; float32.
        mindpet_delta_lora_a (rank, in), mindpet_delta_lora_b (out, rank): A and B, in `param_init_type`.

    Args:
        in_channels, out_channels: sizes of the dense layer.
        lora_rank: r.
        lora_alpha: a number, not zero.
        lora_dropout: a float in [0, 1), while training.
        lora_a_init, lora_b_init: how A and B begin: a Tensor, a name, an Initializer or a number.
        param_init_type: dtype of A and B.
        compute_dtype: dtype of the products; the output has that of x.
        weight_init, bias_init, has_bias, activation: as of `nn.Dense`.

    Inputs: x (*, in). Outputs: (*, out), in the dtype of x.

    Raises:
        DeltaTypeError (TypeError): sizes or rank no int, lora_alpha no number, lora_dropout no float (0 is none),
            has_bias no bool, a dtype other than float16, float32 or bfloat16, an activation or an init of another
            type.
        DeltaValueError (ValueError): sizes or rank not positive, lora_alpha zero, lora_dropout outside [0, 1), a
            Tensor of the wrong shape, or an unknown initializer.
        DeltaKeyError (KeyError): an unknown activation.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        lora_a_init: Any = _A_INIT,
        lora_b_init: Any = "zeros",
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
    ) -> None:
        owner = type(self).__name__
        check_positive(owner, in_channels=in_channels, out_channels=out_channels, lora_rank=lora_rank)
        if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, int | float):
            raise DeltaTypeError(f"{owner}: lora_alpha must be an int or a float, got {lora_alpha!r}")
        if lora_alpha == 0:
            raise DeltaValueError(f"{owner}: lora_alpha must not be 0: the update would be nothing")
        check_dropout(owner, "lora_dropout", lora_dropout)
        check_dtypes(owner, param_init_type=param_init_type)
        check_init(owner, "lora_a_init", lora_a_init, (lora_rank, in_channels))
        check_init(owner, "lora_b_init", lora_b_init, (out_channels, lora_rank))
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, ms.float32, compute_dtype
        )
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.scaling = lora_alpha / lora_rank
        self.lora_dropout = nn.Dropout(p=lora_dropout)
        self.mindpet_delta_lora_a = Parameter(
            initializer(lora_a_init, (lora_rank, in_channels), param_init_type), name="mindpet_delta_lora_a"
        )
        self.mindpet_delta_lora_b = Parameter(
            initializer(lora_b_init, (out_channels, lora_rank), param_init_type), name="mindpet_delta_lora_b"
        )
        self.lora_a_matmul, self.lora_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.mul, self.add = ops.Mul(), ops.Add()

    def construct(self, input_tensor: Tensor) -> Tensor:
        x = self.flat(input_tensor)
        y = self.linear(x)
        h = self.lora_a_matmul(self.lora_dropout(x), ops.cast(self.mindpet_delta_lora_a, self.compute_dtype))
        delta = self.lora_b_matmul(h, ops.cast(self.mindpet_delta_lora_b, self.compute_dtype))
        delta = self.mul(delta, ops.cast(self.scaling, self.compute_dtype))
        return self.finished(self.add(y, delta), input_tensor)

    def shard(
        self,
        strategy_org_dense_matmul: Strategy = None,
        strategy_org_bias_add: Strategy = None,
        strategy_lora_dropout: Strategy = None,
        strategy_lora_a_matmul: Strategy = None,
        strategy_lora_b_matmul: Strategy = None,
        strategy_lora_mul: Strategy = None,
        strategy_lora_add: Strategy = None,
        strategy_activation: Strategy = None,
    ) -> None:
        """Say how each operator is split over devices in semi-auto and auto parallel mode; None is data parallel.

        Each strategy is a tuple with one tuple per input, as of `mindspore.ops.Primitive.shard`.

        Args:
            strategy_org_dense_matmul: of the layer's own product; W is (out, in) there, as A and B below are.
            strategy_org_bias_add: of its bias.
            strategy_lora_dropout: of the dropout on x.
            strategy_lora_a_matmul: of the product with A.
            strategy_lora_b_matmul: of the product with B.
            strategy_lora_mul: of the scaling.
            strategy_lora_add: of the sum of both ways.
            strategy_activation: of the activation.

        Raises:
            DeltaValueError (ValueError): the activation is a log-softmax in one of those modes, or has no primitive
                that a strategy could be set on; nothing is set then.
        """
        check_shardable(type(self).__name__, self.activation)
        shard_activation(type(self).__name__, self.activation, strategy_activation)
        self.matmul.shard(strategy_org_dense_matmul)
        if self.has_bias:
            self.bias_add.shard(strategy_org_bias_add)
        self.lora_dropout.dropout.shard(strategy_lora_dropout)
        self.lora_a_matmul.shard(strategy_lora_a_matmul)
        self.lora_b_matmul.shard(strategy_lora_b_matmul)
        self.mul.shard(strategy_lora_mul)
        self.add.shard(strategy_lora_add)
