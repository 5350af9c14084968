"""RoAd: the layer's outputs are rotated and stretched in pairs."""

from dataclasses import dataclass

from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL

# Angles for each output.
_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@dataclass
class RoadConfig(TargetedConfig):
    """Settings of RoAd.

    Args:
        variant: "road_1": one angle and length for each pair of outputs; "road_2": for each output; "road_4": for each
            output two of both, one for the cosine and one for the sine.
        group_size: an even divisor of the layers' outputs; within a group the output i pairs with i + group_size / 2.
        init_weights: begin as the identity; False draws angles from N(0, 0.5) and lengths from N(1, 0.5).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: an unknown variant, or a group size that is not even.

    Source: Liao & Monz 2024, arXiv:2409.00119, §3.
    Differs: GPT-2's `Conv1D`, `exclude_modules` and `layers_to_transform` work here.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern")

    peft_type: str | None = "ROAD"
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _SIZES:
            raise ConfigError(f"Invalid variant {self.variant} specified. Please choose from road_1, road_2 or road_4")
        if not isinstance(self.group_size, int) or self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(
                f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}."
            )


class RoadPatch(Patch):
    """y' = y ∘ c + ȳ ∘ s for y = W·x + b, with c = α·cos θ, s = α·sin θ, and ȳ = (-y₂, y₁) for each pair (y₁, y₂).

    Weights, n = out / 2, out or 2·out for the variants road_1, road_2 and road_4:
        road_theta (n,): zeros.
        road_alpha (n,): ones.
    """

    def setup(self, site: Site, config: RoadConfig) -> None:
        out = site.out_features
        if out % config.group_size:
            raise ConfigError(
                f"The out_features of the base layer must be divisible by group_size ({config.group_size}) when using "
                f"RoadLayer: {site.path} has {out}."
            )
        self.variant, self.group_size = config.variant, config.group_size
        size = int(_SIZES[config.variant] * out)
        self.road_theta = self.weight("road_theta", (size,), "zeros" if config.init_weights else Normal(0.5))
        self.road_alpha = self.weight("road_alpha", (size,), "ones" if config.init_weights else Normal(0.5, 1.0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """c and s, (out,) each."""
        if self.variant == "road_4":
            theta = ops.reshape(self.road_theta, (-1, 2, self.group_size))
            alpha = ops.reshape(self.road_alpha, (-1, 2, self.group_size))
            c, s = ops.mul(alpha[:, 0], ops.cos(theta[:, 0])), ops.mul(alpha[:, 1], ops.sin(theta[:, 1]))
            return ops.reshape(c, (-1,)), ops.reshape(s, (-1,))
        theta, alpha = self.road_theta, self.road_alpha
        c, s = ops.mul(alpha, ops.cos(theta)), ops.mul(alpha, ops.sin(theta))
        return (self.for_both(c), self.for_both(s)) if self.variant == "road_1" else (c, s)

    def for_both(self, values: Tensor) -> Tensor:
        """(out / 2,), a number for each pair -> (out,)."""
        halves = ops.reshape(values, (-1, 1, self.group_size // 2))
        return ops.reshape(ops.concat((halves, halves), 1), (-1,))

    def swapped(self, y: Tensor) -> Tensor:
        """ȳ for y (..., out)."""
        pairs = ops.reshape(y, (-1, 2, self.group_size // 2))
        return ops.reshape(ops.concat((ops.neg(pairs[:, 1:]), pairs[:, :1]), 1), y.shape)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        c, s = self.factors()
        y = ops.cast(y, self.dtype)
        return ops.add(ops.mul(y, c), ops.mul(self.swapped(y), s))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # What happens to an output happens to its row, and to its bias.
        columns = ops.transpose(w, (1, 0))
        w = ops.transpose(self.after(columns, columns), (1, 0))
        return w, b if b is None else self.after(b, b)


class RoadModel(Tuner):
    """The base model with Road adapters in it, and the switches over them."""


METHOD = Method(
    config=RoadConfig,
    tuner=RoadModel,
    patches={"dense": RoadPatch},
    default_targets=USUAL,
    mixed=True,
)
