"""DeLoRA: a low-rank update whose length is learned apart from its direction."""

from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.config import (
    TargetedConfig,
    check_bias,
    check_finite,
    check_patterns,
    check_positive,
    check_probability,
)
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.targets import match_pattern
from msft_peft.core.tuner import Tuner
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class DeloraConfig(TargetedConfig):
    """Settings of DeLoRA.

    Args:
        r: rank.
        delora_lambda: what the learned length λ begins with.
        module_dropout: dropout of the update's input.
        bias: "none", "all" or "delora_only": which biases of the base model are trained.
        init_weights: begin with an update of zero; False draws all.
        rank_pattern, lambda_pattern: regex for the end of a layer's path -> its own r or λ.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Bini et al. 2025, arXiv:2503.18225, §3.
    """

    peft_type: str | None = "DELORA"
    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.lambda_pattern = self.rank_pattern or {}, self.lambda_pattern or {}
        check_positive("r", self.r)
        check_finite("delora_lambda", self.delora_lambda)
        check_patterns("rank_pattern", self.rank_pattern, check_positive)
        check_patterns("lambda_pattern", self.lambda_pattern, check_finite)
        check_probability("module_dropout", self.module_dropout)
        check_bias(self.bias, "delora")


class DeloraPatch(Patch):
    """ΔW = B·Ξ·A ∘ ‖W‖, with Ξ_ii = λ / (r·|a_i|·|b_i|), and ‖W‖ the lengths of W's columns when it was made.

    Weights:
        delora_A (r, in): He-uniform with a = √5.
        delora_B (out, r): zeros.
        delora_lambda (1,): λ.
        delora_w_norm (in,): ‖W‖; kept, but not trained.
    """

    def setup(self, site: Site, config: DeloraConfig) -> None:
        self.r = match_pattern(config.rank_pattern, site.path, config.r)
        length = match_pattern(config.lambda_pattern, site.path, config.delora_lambda)
        out, inputs = site.shape
        self.delora_A = self.weight("delora_A", (self.r, inputs), he_uniform())
        self.delora_B = self.weight("delora_B", (out, self.r), "zeros" if config.init_weights else he_uniform())
        self.delora_lambda = self.weight("delora_lambda", (1,), np.full(1, length, np.float32))
        norms = np.linalg.norm(as_float32(to_numpy(site.from_storage(site.weight))), axis=0)
        self.delora_w_norm = self.weight("delora_w_norm", (inputs,), norms, fixed=True)
        self.dropout = nn.Dropout(p=config.module_dropout) if config.module_dropout else nn.Identity()

    def lengths(self) -> Tensor:
        """(r,): the diagonal of Ξ."""
        squares = ops.reduce_sum(ops.square(self.delora_A), 1), ops.reduce_sum(ops.square(self.delora_B), 0)
        # Lengths below 1e-4 count as that; under the root, so that a zero vector has a gradient of zero.
        a, b = ops.rsqrt(ops.maximum(squares[0], 1e-8)), ops.rsqrt(ops.maximum(squares[1], 1e-8))
        return ops.mul(ops.mul(a, b), ops.div(self.delora_lambda, self.r))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.op(ops.mul(self.dropout(self.cast(x)), self.delora_w_norm), self.delora_A)
        return ops.add(y, self.op.mix(ops.mul(h, self.lengths()), self.delora_B))

    def delta_weight(self) -> Tensor:
        a = ops.mul(self.delora_A, ops.reshape(self.lengths(), (-1, 1)))
        return ops.mul(ops.matmul(self.delora_B, a), self.delora_w_norm)


class DeloraModel(Tuner):
    """The base model with Delora adapters in it, and the switches over them."""


METHOD = Method(
    config=DeloraConfig,
    tuner=DeloraModel,
    patches={"dense": DeloraPatch},
    default_targets=USUAL,
)
