"""Lily: neighbouring layers share A, all layers share several B, which a router of each layer mixes by the input."""

from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Initializer

from msft_peft.config import TargetedConfig, check_finite, check_positive
from msft_peft.core.patch import Patch, Shared, he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, MergeError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class LilyConfig(TargetedConfig):
    """Settings of Lily.

    Layers are alike if one name in `target_modules` means them and their weights have one shape; with a regex, if
    their weights have.

    Args:
        r: rank; two to four times that of LoRA, since fewer factors are trained.
        stride_A: so many alike layers in a row share one A.
        num_B: so many B are shared by all alike layers; at least 2.
        scaling: factor of the update.
        init_weights: begin with an update of zero; False draws B too.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Zhong et al. 2024, arXiv:2407.09946.
    Differs: files hold each factor once, those of HF at each of the layers that share it again (796 MiB for a model of
        3e9 parameters, here 36 MiB). HF reads ours too, to the same outputs, and warns of the copies that it misses.
        Where two names mean a layer, the longer one counts, in HF either. In a batch whose rows other adapters serve,
        a layer's mixture is that of the rows that it serves.
    """

    peft_type: str | None = "LILY"
    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("stride_A", self.stride_A)
        check_positive("num_B", self.num_B)
        if self.num_B < 2:
            raise ConfigError("`num_B` must be at least 2 for the router to be trained.")
        check_finite("scaling", self.scaling)


class LilyGroups(Shared):
    """Which layers share what.

    Attributes:
        first: (weight, path) -> the path of the first layer that has the same "lily_A" or "lily_B".
        made: (weight, path of that layer) -> the Parameter.
    """

    def setup(self, sites: list[Site], config: LilyConfig) -> None:
        self.made: dict[tuple[str, str], Parameter] = {}
        self.first: dict[tuple[str, str], str] = {}
        alike: dict[Any, list[str]] = {}
        for site in sites:
            alike.setdefault((_meant_by(site.path, config.target_modules), site.shape), []).append(site.path)
        for paths in alike.values():
            for place, path in enumerate(paths):
                self.first["lily_A", path] = paths[place - place % config.stride_A]
                self.first["lily_B", path] = paths[0]


def _meant_by(path: str, targets: Any) -> str:
    """The longest of the targets' names that means this layer; the targets themselves if they are a regex."""
    if isinstance(targets, str):
        return targets
    return max((name for name in targets if f".{path}".endswith(f".{name}")), key=len, default="")


class LilyPatch(Patch):
    """y = W·x + b + s·(Σₑ pₑ·Bₑ)ᵀ·h, h = A·x, with p the mean over all tokens of softmax(R·h).

    Weights:
        lily_A.weight (r, in): He-uniform with a = √5; the same in `stride_A` layers.
        lily_B.weight (num_B · r, out): zeros; the same in all alike layers.
        lily_router.weight (num_B, r): R, He-uniform with a = √5.
    """

    mingles = True

    def setup(self, site: Site, config: LilyConfig) -> None:
        self.r, self.num_B, self.scaling = config.r, config.num_B, config.scaling
        init_b = "zeros" if config.init_weights else he_uniform()
        self.lily_A = self.common("lily_A", (self.r, site.in_features), he_uniform())
        self.lily_B = self.common("lily_B", (self.num_B * self.r, site.out_features), init_b)
        self.lily_router = self.weight("lily_router.weight", (self.num_B, self.r), he_uniform())

    def common(self, name: str, shape: tuple[int, ...], init: str | Initializer) -> Parameter:
        """A weight that is new at the first of the layers that share it."""
        made, place = self.shared.made, (name, self.shared.first[name, self.site.path])
        if place not in made:
            made[place] = self.weight(f"{name}.weight", shape, init)
        self.keys[name] = f"{name}.weight"
        return made[place]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.op(self.cast(x), self.lily_A)
        p = ops.reshape(self.routed(h), (-1, self.num_B))
        return self.updated(h, ops.mean(p, 0), y)

    def routed(self, h: Tensor) -> Tensor:
        """(..., num_B): softmax(R·h)."""
        return ops.softmax(self.op.mix(h, self.lily_router), -1)

    def updated(self, h: Tensor, p: Tensor, y: Tensor) -> Tensor:
        """y with the update of h by the mixture p (num_B,)."""
        mixed = ops.matmul(ops.reshape(p, (1, -1)), ops.reshape(self.lily_B, (self.num_B, -1)))
        b = ops.transpose(ops.reshape(mixed, (self.r, -1)), (1, 0))
        return ops.add(y, ops.mul(self.op.mix(h, b), self.scaling))

    def served(self, rows: Tensor, x: Tensor, base: Tensor, y: Tensor) -> Tensor:
        h = self.op(self.cast(x), self.lily_A)
        p = self.routed(h)
        counts = ops.cast(ops.broadcast_to(rows, (*p.shape[:-1], 1)), p.dtype)
        total = ops.reduce_sum(ops.reshape(ops.mul(p, counts), (-1, self.num_B)), 0)
        mean = ops.div(total, ops.maximum(ops.reduce_sum(counts), 1.0))
        return ops.where(rows, self.updated(h, mean, base), y)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_mergeable()
        return w, b

    def check_mergeable(self) -> None:
        raise MergeError("Lily's update is another one for each input, so that no weight has it merged in.")


class LilyModel(Tuner):
    """The base model with Lily in it."""


METHOD = Method(
    config=LilyConfig,
    patches={"dense": LilyPatch},
    shared=LilyGroups,
    default_targets=USUAL,
    merges=False,
    tuner=LilyModel,
)
