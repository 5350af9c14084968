"""LoKr: the delta weight is a Kronecker product."""

import math
from dataclasses import dataclass

from mindspore import Tensor, ops

from msft_peft.core.patch import he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.lycoris import LycorisConfig, LycorisPatch, rebuilt


@dataclass
class LoKrConfig(LycorisConfig):
    """Settings of LoKr; those that are not here are `LycorisConfig`'s.

    Args:
        decompose_both: factor the left matrix too, where r is small enough for that to save anything.
        decompose_factor: the size of the left matrix: this number, or the largest divisor up to it; -1 for the divisor
            next to the square root.
        rank_dropout_scale: let the rows that `rank_dropout` leaves count for those that it does not.
        init_weights: begin with a delta of zero, by a left matrix of zeros; "lycoris" for a right one of zeros; False
            draws all.

    Raises:
        ConfigError: an unknown `init_weights`.

    Source: Yeh et al. 2023, arXiv:2309.14859, §3 (LyCORIS); Edalati et al. 2022, arXiv:2212.10650 (KronA).
    """

    peft_type: str | None = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(f"`init_weights` must be True, False or 'lycoris', got {self.init_weights!r}")


class LoKrPatch(LycorisPatch):
    """ΔW = s·W₁ ⊗ W₂, each of the two a matrix or a low-rank product.

    Weights, for out = a·b, in = c·d, and a kernel of size K (1 for a dense layer):
        lokr_w1 (a, c), or lokr_w1_a (a, r) and lokr_w1_b (r, c).
        lokr_w2 (b, d, kernel...), or lokr_w2_a (b, r) and lokr_w2_b (r, d·K), where r is small enough; with
            `use_effective_conv2d` lokr_t2 (r, r, kernel...), lokr_w2_a (r, b) and lokr_w2_b (r, d).
    """

    def setup(self, site: Site, config: LoKrConfig) -> None:
        super().setup(site, config)
        self.makes_up = config.rank_dropout_scale
        out, inputs, *kernel = site.shape
        self.builds_delta = self.builds_delta and bool(kernel)  # dense layers have a thinner route
        (a, b), (c, d) = (factors(n, config.decompose_factor) for n in (out, inputs))
        self.sizes = (a, b, c, d)
        left, right = _inits(config.init_weights)
        self.whole_1 = not (config.decompose_both and self.r < max(a, c) / 2)
        self.whole_2 = not self.r < max(b, d) / 2
        if self.whole_1:
            self.lokr_w1 = self.weight("lokr_w1", (a, c), left)
        else:
            self.lokr_w1_a = self.weight("lokr_w1_a", (a, self.r), left)
            self.lokr_w1_b = self.weight("lokr_w1_b", (self.r, c), he_uniform())
        if self.whole_2:
            self.lokr_w2 = self.weight("lokr_w2", (b, d, *kernel), right)
        elif self.by_itself:
            core = (self.r, self.r, *kernel, *(1,) * (2 - len(kernel)))
            self.lokr_t2 = self.weight("lokr_t2", core, he_uniform())
            self.lokr_w2_a = self.weight("lokr_w2_a", (self.r, b), he_uniform())
            self.lokr_w2_b = self.weight("lokr_w2_b", (self.r, d), right)
        else:
            self.lokr_w2_a = self.weight("lokr_w2_a", (b, self.r), he_uniform())
            self.lokr_w2_b = self.weight("lokr_w2_b", (self.r, d * math.prod(kernel)), right)

    def left(self) -> Tensor:
        """(a, c): W₁, scaled."""
        return self.scaled(self.lokr_w1 if self.whole_1 else ops.matmul(self.lokr_w1_a, self.lokr_w1_b))

    def right(self) -> Tensor:
        """(b, d·K): W₂."""
        if self.whole_2:
            w = self.lokr_w2
        elif self.by_itself:
            w = rebuilt(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            w = ops.matmul(self.lokr_w2_a, self.lokr_w2_b)
        return ops.reshape(w, (self.sizes[1], -1))

    def added(self, x: Tensor) -> Tensor:
        if self.site.kind != "dense" or (self.training and self.rank_drop is not None):
            return super().added(x)
        # (W₁ ⊗ W₂)·x for x as a matrix (c, d) is W₁·x·W₂ᵀ: the product itself is never built.
        a, b, c, d = self.sizes
        h = ops.reshape(ops.matmul(ops.reshape(x, (-1, d)), ops.transpose(self.right(), (1, 0))), (-1, c, b))
        y = ops.matmul(ops.reshape(ops.transpose(h, (0, 2, 1)), (-1, c)), ops.transpose(self.left(), (1, 0)))
        return ops.reshape(ops.transpose(ops.reshape(y, (-1, b, a)), (0, 2, 1)), (*x.shape[:-1], a * b))

    def delta_weight(self) -> Tensor:
        a, b, c, d = self.sizes
        left = ops.reshape(self.left(), (a, 1, c, 1, 1))
        right = ops.reshape(self.right(), (1, b, 1, d, -1))
        return ops.reshape(ops.mul(left, right), self.site.shape)


def factors(n: int, near: int = -1) -> tuple[int, int]:
    """n as the product of two numbers: of `near` itself, or of the largest divisor up to both it and √n."""
    if near > 0 and n % near == 0:
        return near, n // near
    most = math.isqrt(n) if near == -1 else min(near, math.isqrt(n))
    small = max((m for m in range(1, most + 1) if n % m == 0), default=1)
    return small, n // small


def _inits(init_weights: bool | str) -> tuple[object, object]:
    """How W₁ and the last factor of W₂ begin."""
    if init_weights == "lycoris":
        return he_uniform(), "zeros"
    return ("zeros" if init_weights else he_uniform()), he_uniform()


class LoKrModel(Tuner):
    """The base model with LoKr adapters in it, and the switches over them."""


METHOD = Method(
    config=LoKrConfig,
    tuner=LoKrModel,
    patches=dict.fromkeys(("dense", "conv1d", "conv2d"), LoKrPatch),
    default_targets=USUAL,
    mixed=True,
)
