"""PEANuT: a small network turns the base weight into its own update."""

from dataclasses import dataclass

from mindspore import Tensor, nn, ops

from msft_peft.backend.activations import ACTIVATIONS
from msft_peft.config import TargetedConfig, check_finite, check_positive
from msft_peft.core.patch import he_uniform
from msft_peft.core.scale import Scale
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch


@dataclass
class PeanutConfig(TargetedConfig):
    """Settings of PEANuT.

    Args:
        r: width of the network, and rank of the update.
        depth: how many encoders, and as many decoders, stand between A and B.
        act_fn: the network's activation, by its name in transformers.
        scaling: factor of the update.
        init_weights: begin with an update of zero; False draws B as well.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or an unknown activation.

    Source: Zhong et al. 2024, arXiv:2410.01870, §3.
    Differs: GPT-2's `Conv1D` works here.
    """

    peft_type: str | None = "PEANUT"
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if not isinstance(self.depth, int) or self.depth < 0:
            raise ConfigError(f"`depth` can only be a non-negative integer, got {self.depth!r}.")
        check_finite("scaling", self.scaling)
        if self.act_fn not in ACTIVATIONS:
            raise ConfigError(f"Unsupported `act_fn`: {self.act_fn}. Must be one of {sorted(ACTIVATIONS)}.")


class PeanutPatch(LowRankPatch):
    """W' = W + s·B·H, with H = f(A·W), depth times H ↦ f(Eᵢ·H), and back again H ↦ f(Dᵢ·H) + the H before Eᵢ.

    So the update is what the network makes of each column of W: of rank r, and applied as such. Several adapters each
    read the base weight, not what others made of it.

    Weights, He-uniform with a = √5 but for B:
        peanut_A.weight (r, out).
        peanut_B.weight (out, r): zeros.
        peanut_encoders.i.weight, peanut_decoders.i.weight (r, r), depth of each: E and D.
    """

    reads_base = True

    def setup(self, site: Site, config: PeanutConfig) -> None:
        self.r, self.depth, self.scale = config.r, config.depth, Scale(config.scaling)
        self.activation = ACTIVATIONS[config.act_fn]
        self.dropout = nn.Identity()
        square, init = (config.r, config.r), he_uniform()
        self.peanut_A = self.weight("peanut_A.weight", (config.r, site.out_features), init)
        init_b = "zeros" if config.init_weights else init
        self.peanut_B = self.weight("peanut_B.weight", (site.out_features, config.r), init_b)
        self.encoders = tuple(f"peanut_encoders_{i}" for i in range(config.depth))
        self.decoders = tuple(f"peanut_decoders_{i}" for i in range(config.depth))
        for name in (*self.encoders, *self.decoders):
            stem, _, number = name.rpartition("_")
            setattr(self, name, self.weight(f"{stem}.{number}.weight", square, init))

    @property
    def scaling(self) -> object:
        """The factor s in effect."""
        return self.scale.value

    def factors(self) -> tuple[Tensor, Tensor]:
        h = self.activation(ops.matmul(self.peanut_A, self.base_weight()))
        kept: tuple[Tensor, ...] = ()
        for name in self.encoders:
            kept = (h, *kept)
            h = self.activation(ops.matmul(getattr(self, name), h))
        for name, before in zip(self.decoders, kept):
            h = ops.add(self.activation(ops.matmul(getattr(self, name), h)), before)
        return ops.mul(self.peanut_B, self.scale.value), h

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Not additive: what is added changes with the base weight, so unmerging must not compute it anew.
        return ops.add(w, self.delta_weight()), b


class PeanutModel(Tuner):
    """The base model with PEANuT adapters in it, and the switches over them."""


METHOD = Method(config=PeanutConfig, tuner=PeanutModel, patches={"dense": PeanutPatch}, default_targets=USUAL)
