"""GraLoRA: the weight is divided into k×k blocks, each with a low-rank update of its own."""

import math
from dataclasses import dataclass

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Uniform

from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.scale import Scale
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class GraloraConfig(TargetedConfig):
    """Settings of GraLoRA.

    Args:
        r: rank of each column of blocks, which its k blocks share out; a multiple of `gralora_k`.
        hybrid_r: rank of a plain low-rank update beside it; 0 for none.
        alpha: numerator of the scaling alpha / (r + hybrid_r).
        gralora_dropout: dropout of the update's input.
        gralora_k: blocks along each side; it must divide a layer's inputs and outputs.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "gralora_only": which biases of the base model are trained.
        init_weights: begin with an update of zero; False draws all.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Jung et al. 2025, arXiv:2505.20355, §3.
    Differs: `exclude_modules` works here.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "GRALORA"
    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("gralora_k", self.gralora_k)
        check_finite("alpha", self.alpha)
        check_probability("gralora_dropout", self.gralora_dropout)
        check_bias(self.bias, "gralora")
        if self.hybrid_r:
            check_positive("hybrid_r", self.hybrid_r)
        if self.r % self.gralora_k:
            raise ConfigError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")


class GraloraPatch(Patch):
    """ΔW[block j, n] = s·B_jn·A_jn for j, n = 1 ... k, and with `hybrid_r` s·B·A besides.

    Weights, with columns of blocks n that read in/k inputs, and rows of blocks j that make out/k outputs:
        gralora_A (k, in/k, r): the A_jn of column n, for all j one after the other; drawn as He-uniform.
        gralora_B (k, r, out/k): the B_jn of row j, for all n one after the other; zeros.
        gralora_A_general.weight (hybrid_r, in), gralora_B_general.weight (out, hybrid_r), with `hybrid_r` alone.
    """

    def setup(self, site: Site, config: GraloraConfig) -> None:
        out, inputs = site.shape
        self.k, self.r, self.hybrid = config.gralora_k, config.r, config.hybrid_r > 0
        for what, n in (("in_features", inputs), ("out_features", out)):
            if n % self.k:
                raise ConfigError(f"{what} should be divisible by gralora_k, but got {n} and {self.k} at {site.path}")
        self.scale = Scale(config.alpha / (config.r + config.hybrid_r))
        # He-uniform with a = √5 of each block by itself.
        drawn_a, drawn_b = Uniform(1 / math.sqrt(inputs / self.k)), Uniform(1 / math.sqrt(self.r))
        self.gralora_A = self.weight("gralora_A", (self.k, inputs // self.k, self.r), drawn_a)
        init_b = "zeros" if config.init_weights else drawn_b
        self.gralora_B = self.weight("gralora_B", (self.k, self.r, out // self.k), init_b)
        if self.hybrid:
            self.general_A = self.weight(
                "gralora_A_general.weight", (config.hybrid_r, inputs), he_uniform(), "general_A"
            )
            last = "zeros" if config.init_weights else he_uniform()
            self.general_B = self.weight("gralora_B_general.weight", (out, config.hybrid_r), last, "general_B")
        self.dropout = nn.Dropout(p=config.gralora_dropout) if config.gralora_dropout else nn.Identity()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        k, x = self.k, self.cast(x)
        parts = ops.reshape(self.dropout(x), (-1, k, x.shape[-1] // k))
        h = ops.matmul(ops.transpose(parts, (1, 0, 2)), self.gralora_A)
        # (column n, row, j, rank) -> (j, row, column n, rank): what each row of blocks gets from all columns.
        h = ops.transpose(ops.reshape(h, (k, -1, k, self.r // k)), (2, 1, 0, 3))
        made = ops.matmul(ops.mul(ops.reshape(h, (k, -1, self.r)), self.scale.value), self.gralora_B)
        y = ops.add(y, ops.reshape(ops.transpose(made, (1, 0, 2)), y.shape))
        if self.hybrid:
            h = ops.mul(self.op(self.dropout(x), self.general_A), self.scale.value)
            y = ops.add(y, self.op.mix(h, self.general_B))
        return y

    def delta_weight(self) -> Tensor:
        k, (out, inputs) = self.k, self.site.shape
        a = ops.transpose(ops.reshape(self.gralora_A, (k, inputs // k, k, self.r // k)), (2, 0, 1, 3))
        blocks = ops.matmul(a, ops.reshape(self.gralora_B, (k, k, self.r // k, out // k)))
        delta = ops.reshape(ops.transpose(blocks, (0, 3, 1, 2)), (out, inputs))
        if self.hybrid:
            delta = ops.add(delta, ops.matmul(self.general_B, self.general_A))
        return ops.mul(delta, self.scale.value)


class GraloraModel(Tuner):
    """The base model with Gralora adapters in it, and the switches over them."""


METHOD = Method(
    config=GraloraConfig,
    tuner=GraloraModel,
    patches={"dense": GraloraPatch},
    default_targets=USUAL,
)
