"""What LoHa and LoKr share: a delta weight built from small factors, and two kinds of dropout for it.

Source: LyCORIS, Yeh et al. 2023, arXiv:2309.14859.
"""

from dataclasses import dataclass, field
from typing import Any

from mindspore import Parameter, Tensor, nn, ops

from msft_peft.config import TargetedConfig, check_finite, check_patterns, check_positive, check_probability
from msft_peft.core.patch import Patch
from msft_peft.core.scale import Scale
from msft_peft.core.targets import match_pattern
from msft_peft.hosts import Site


@dataclass
class LycorisConfig(TargetedConfig):
    """Settings that LoHa and LoKr share.

    Args:
        r: rank.
        alpha: numerator of the scaling alpha / r.
        rank_dropout: probability that a row of the delta weight is left out of a training step.
        module_dropout: probability that the whole delta is left out of a training step.
        use_effective_conv2d: factor a convolution's kernel by itself, of rank r in every direction; without it the
            kernel is a part of the input side.
        rank_pattern, alpha_pattern: regex for the end of a layer's path -> its own r or alpha.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        check_positive("r", self.r)
        check_finite("alpha", self.alpha)
        check_patterns("rank_pattern", self.rank_pattern, check_positive)
        check_patterns("alpha_pattern", self.alpha_pattern, check_finite)
        check_probability("rank_dropout", self.rank_dropout)
        check_probability("module_dropout", self.module_dropout)


class LycorisPatch(Patch):
    """y = W·x + b + (s·factors)·x, with the delta or some of its rows left out at random while training."""

    # Whether the rows that are left count for those that are not.
    makes_up = True

    def setup(self, site: Site, config: Any) -> None:
        self.r = match_pattern(config.rank_pattern, site.path, config.r)
        self.scale = Scale(match_pattern(config.alpha_pattern, site.path, config.alpha) / self.r)
        self.rank_drop = nn.Dropout(p=config.rank_dropout) if config.rank_dropout else None
        self.module_drop = nn.Dropout(p=config.module_dropout) if config.module_dropout else None
        self.builds_delta = not (config.rank_dropout or config.module_dropout)
        kernel = site.shape[2:]
        # Kernels of size one have nothing to factor.
        self.by_itself = config.use_effective_conv2d and any(size != 1 for size in kernel)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.added(self.cast(x))
        if self.training and self.module_drop is not None:
            # Dropout of a single number: it is in, or it is out.
            delta = ops.mul(delta, _drawn(self.module_drop, 1, delta))
        return ops.add(y, delta)

    def added(self, x: Tensor) -> Tensor:
        """What the delta weight makes of x."""
        w = self.delta_weight()
        return self.op(x, w if not self.training or self.rank_drop is None else self.thinned(w))

    def thinned(self, w: Tensor) -> Tensor:
        """w with some of its rows set to zero."""
        rows = self.site.shape[0]
        left = _drawn(self.rank_drop, rows, w)
        if self.makes_up:
            # At least one counts as left, so that nothing is divided by zero.
            left = ops.div(left, ops.maximum(ops.reduce_mean(left), 1.0 / rows))
        return ops.mul(w, ops.reshape(left, (-1,) + (1,) * (len(self.site.shape) - 1)))

    def scaled(self, x: Tensor) -> Tensor:
        """s·x."""
        return ops.mul(x, self.scale.value)


def _drawn(dropout: nn.Dropout, count: int, like: Tensor) -> Tensor:
    """(count,): zeros and ones, zero with the dropout's probability."""
    return ops.cast(dropout(ops.ones((count,), like.dtype)) != 0, like.dtype)


def rebuilt(core: Parameter, out: Parameter, inner: Parameter) -> Tensor:
    """(out, in, kernel...): Σ_ij core[i, j, kernel...]·out[i, o]·inner[j, n], for core (r, r, kernel...)."""
    rank, kernel = core.shape[0], core.shape[2:]
    by_inner = ops.matmul(ops.transpose(ops.reshape(core, (rank, rank, -1)), (0, 2, 1)), inner)
    whole = ops.matmul(ops.transpose(out, (1, 0)), ops.reshape(by_inner, (rank, -1)))
    whole = ops.reshape(whole, (out.shape[1], -1, inner.shape[1]))
    return ops.reshape(ops.transpose(whole, (0, 2, 1)), (out.shape[1], inner.shape[1], *kernel))
