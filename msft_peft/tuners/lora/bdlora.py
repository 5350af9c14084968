"""BD-LoRA: one factor is block-diagonal, so that devices that share a layer need not talk about the update."""

from mindspore import Tensor, ops
from mindspore.common.initializer import HeUniform

from msft_peft.core.patch import he_uniform
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.patch import LoraPatch


class BdLoraPatch(LoraPatch):
    """LoRA whose A or B is block-diagonal: A = diag(A₁, …, Aₙ) with Aᵢ (r/n, in/n), or B with Bᵢ (out/n, r/n).

    Weights:
        lora_A (r, in), or (r, in/n), the blocks one below the other: He-uniform, with a = 0 where it has blocks.
        lora_B (out, r), or (out, r/n): zeros.

    Source: HF peft's `use_bdlora`; block-diagonal LoRA for serving with tensor parallelism.
    Differs: HF fails on layers that store their weight transposed (Conv1D), and in merging where B has blocks and
    `lora_bias` is set; the former work here, the latter is refused at once.
    """

    factored = False

    def setup(self, site: Site, config: LoraConfig) -> None:
        self.blocks_in_a, self.blocks_in_b = _places(site, config)
        self.blocks, self.grows = config.use_bdlora.nblocks, not (self.blocks_in_a or self.blocks_in_b)
        if config.init not in (True, False, "gaussian"):
            raise ConfigError(
                f"use_bdlora does not go with init_lora_weights={config.init_lora_weights!r}: what that computes has "
                "no blocks. Choose True, False or 'gaussian'."
            )
        if self.blocks_in_b and config.lora_bias:
            raise ConfigError(f"lora_bias=True does not go with a block-diagonal B: {site.path}.")
        super().setup(site, config)
        out, into = site.shape
        if self.blocks_in_a:
            _check_divisible(site, self.blocks, in_features=into, r=self.r)
            self.lora_A = self.weight("lora_A.weight", (self.r, into // self.blocks), HeUniform())
        elif self.blocks_in_b:
            _check_divisible(site, self.blocks, out_features=out, r=self.r)
            init = "zeros" if config.init else he_uniform()
            self.lora_B = self.weight("lora_B.weight", (out, self.r // self.blocks), init)

    def hidden(self, x: Tensor) -> Tensor:
        return self.scaled(self.by_blocks(x, self.lora_A)) if self.blocks_in_a else super().hidden(x)

    def update(self, x: Tensor) -> Tensor:
        return self.by_blocks(self.hidden(x), self.lora_B) if self.blocks_in_b else super().update(x)

    def by_blocks(self, x: Tensor, w: Tensor) -> Tensor:
        """x·diag(W₁, …, Wₙ)ᵀ for w (out, in/n), which has the blocks one below the other."""
        n, out = self.blocks, w.shape[0]
        parts = ops.transpose(ops.reshape(x, (-1, n, w.shape[1])), (1, 0, 2))
        y = ops.matmul(parts, ops.transpose(ops.reshape(w, (n, out // n, -1)), (0, 2, 1)))
        return ops.reshape(ops.transpose(y, (1, 0, 2)), (*x.shape[:-1], out))

    def full(self, w: Tensor) -> Tensor:
        """diag(W₁, …, Wₙ) as one matrix."""
        n, (rows, columns) = self.blocks, w.shape
        blocks = ops.reshape(w, (n, rows // n, 1, columns))
        # Each block times its row of the identity: itself in its own place, zero in the others.
        return ops.reshape(ops.mul(blocks, ops.reshape(ops.eye(n, n, w.dtype), (n, 1, n, 1))), (rows, n * columns))

    def shape_at(self, attribute: str, rank: int) -> tuple[int, ...]:
        shape = super().shape_at(attribute, rank)
        return (shape[0], rank // self.blocks) if attribute == "lora_B" and self.blocks_in_b else shape

    def down(self) -> Tensor:
        return self.scaled(self.full(self.lora_A)) if self.blocks_in_a else super().down()

    def up(self) -> Tensor:
        return ops.transpose(self.full(self.lora_B), (1, 0)) if self.blocks_in_b else super().up()

    def delta_weight(self) -> Tensor:
        return ops.matmul(ops.transpose(self.up(), (1, 0)), self.down())


def _places(site: Site, config: LoraConfig) -> tuple[bool, bool]:
    """Whether A, and whether B, has blocks here.

    Raises:
        ConfigError: both; or neither, with `match_strict`.
    """
    bd = config.use_bdlora
    in_a, in_b = (
        any(part in site.path for part in parts or []) for parts in (bd.target_modules_bd_a, bd.target_modules_bd_b)
    )
    if in_a and in_b:
        raise ConfigError(f"Target {site.path} matches both A and B block-diagonal patterns: {bd}. Keep one.")
    if bd.match_strict and not in_a and not in_b:
        raise ConfigError(
            f"Target {site.path} matches neither A nor B block-diagonal patterns: {bd}. If it is to have plain LoRA, "
            "set match_strict=False in BdLoraConfig."
        )
    return in_a, in_b


def _check_divisible(site: Site, blocks: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size % blocks:
            raise ConfigError(f"use_bdlora: {name}={size} of {site.path} is not divisible by nblocks={blocks}.")
