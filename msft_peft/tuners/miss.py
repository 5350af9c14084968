"""MiSS: one block of rows is shared by all shards of the weight."""

from dataclasses import dataclass

from mindspore import Tensor, nn, ops

from msft_peft.config import TargetedConfig, check_bias, check_positive, check_probability
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class MissConfig(TargetedConfig):
    """Settings of MiSS.

    Args:
        r: height of the shared block, at most a layer's inputs.
        miss_dropout: dropout of the update's input.
        mini_r: width of the block with `init_weights="mini"`; it must divide the outputs.
        init_weights: True begins with zeros; "mini" too, with a block that also repeats along the outputs; "bat" with
            a block for each r outputs, which multiplies the weight besides; False draws the block.
        bias: "none", "all" or "miss_only": which biases of the base model are trained.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or an unknown `init_weights`.

    Source: Kang et al. 2024, arXiv:2409.15371.
    """

    peft_type: str | None = "MISS"
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("mini_r", self.mini_r)
        check_probability("miss_dropout", self.miss_dropout)
        check_bias(self.bias, "miss")
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ConfigError(f"`init_weights` must be True, False, 'bat' or 'mini', got {self.init_weights!r}")

    @property
    def variant(self) -> str:
        return "bat" if self.init_weights == "bat" else ""


class MissPatch(Patch):
    """W'[:, j] = W[:, j] + D[j mod r]: y = y₀ + (Σ of x's shards of r numbers)·D.

    Weights:
        miss_block (r, out): zeros; (r, mini_r) where it repeats along the outputs.
    """

    def setup(self, site: Site, config: MissConfig) -> None:
        out, inputs = site.shape
        if config.r > inputs:
            raise ConfigError(f"`r` ({config.r}) must be less than or equal to the {inputs} inputs of {site.path}")
        width = config.mini_r if config.init_weights == "mini" else out
        if out % width:
            raise ConfigError(f"`mini_r` ({width}) must divide the {out} outputs of {site.path}")
        self.r, self.repeats = config.r, out // width
        init = "zeros" if config.init_weights else he_uniform()
        self.miss_block = self.weight("miss_block", (self.r, width), init)
        self.dropout = nn.Dropout(p=config.miss_dropout) if config.miss_dropout else nn.Identity()

    def block(self) -> Tensor:
        """(r, out)."""
        return self.miss_block if self.repeats == 1 else ops.tile(self.miss_block, (1, self.repeats))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.dropout(self.cast(x))
        missing = -x.shape[-1] % self.r
        rows = ops.reshape(x, (-1, x.shape[-1]))
        if missing:
            rows = ops.concat((rows, ops.zeros((rows.shape[0], missing), rows.dtype)), 1)
        sums = ops.reduce_sum(ops.reshape(rows, (rows.shape[0], -1, self.r)), 1)
        return ops.add(y, ops.reshape(ops.matmul(sums, self.block()), y.shape))

    def delta_weight(self) -> Tensor:
        inputs = self.site.in_features
        shards = -(-inputs // self.r)
        return ops.tile(ops.transpose(self.block(), (1, 0)), (1, shards))[:, :inputs]


class BatPatch(Patch):
    """W' = W + (W·D + D) in blocks of r×r, each row of blocks with its own D.

    Weights:
        miss_block (out / r, r, r): zeros.
    """

    reweighs = True

    def setup(self, site: Site, config: MissConfig) -> None:
        out, inputs = site.shape
        if inputs % config.r or out % config.r:
            raise ConfigError(
                f"The weight matrix must be fully divisible into [r, r] blocks: r={config.r}, but {site.path} has "
                f"{out} outputs and {inputs} inputs."
            )
        self.r = config.r
        self.miss_block = self.weight("miss_block", (out // self.r, self.r, self.r), "zeros")

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r, block = self.r, ops.cast(self.miss_block, w.dtype)
        parts = ops.transpose(ops.reshape(w, (w.shape[0] // r, r, w.shape[1] // r, r)), (2, 0, 1, 3))
        parts = ops.add(parts, ops.add(ops.matmul(parts, block), block))
        return ops.reshape(ops.transpose(parts, (1, 2, 0, 3)), w.shape), b


class MissModel(Tuner):
    """The base model with Miss adapters in it, and the switches over them."""


METHOD = Method(
    config=MissConfig,
    tuner=MissModel,
    patches={"dense": MissPatch},
    variants={"bat": {"dense": BatPatch}},
    default_targets=USUAL,
)
