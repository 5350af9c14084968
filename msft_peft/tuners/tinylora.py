"""TinyLoRA: the largest singular vectors of each weight, mixed anew by one tiny vector that layers may share."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Uniform

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.torch_random import TorchGenerator
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability, check_seed
from msft_peft.core.patch import Shared
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch


@dataclass
class TinyLoraConfig(TargetedConfig):
    """Settings of TinyLoRA.

    Args:
        r: how many singular vectors of each side are kept; no more than the weight has.
        u: length of the trained vectors.
        weight_tying: which share of the layers does without a vector of its own: with 0 each has one, with 1 all share
            one.
        projection_seed: seed of the random matrices; each layer adds its place among the targets to it.
        save_projection: keep the random matrices in files; otherwise they are drawn again from the seed.
        init_v_bound: with "uniform", the vectors are drawn from [-bound, bound].
        tinylora_dropout: dropout of the update's input; of an embedding's low-rank values.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "tinylora_only": which biases of the base model are trained.
        init_weights: begin with an update of zero; "uniform" or False draws the vectors.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: "Learning to Reason in 13 Parameters" (2026), arXiv:2602.04118.
    Differs: `exclude_modules` works here. A second adapter is numbered by its own targets, in HF by those of the first
        one. `init_weights=False` leaves HF's vectors with what was in memory. The random matrices that are drawn again
        are torch's to about the last bit, with no warning.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "TINYLORA"
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | Literal["uniform"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("u", self.u)
        check_finite("weight_tying", self.weight_tying)
        if not 0.0 <= self.weight_tying <= 1.0:
            raise ConfigError(
                f"`weight_tying` should be a float between 0.0 and 1.0 but the value passed is {self.weight_tying}"
            )
        check_seed("projection_seed", self.projection_seed)
        check_finite("init_v_bound", self.init_v_bound)
        check_probability("tinylora_dropout", self.tinylora_dropout)
        check_bias(self.bias, "tinylora")
        if self.init_weights not in (True, False, "uniform"):
            raise ConfigError(f"Unknown initialization init_weights={self.init_weights!r}: True, False or 'uniform'")


class TinyLoraVectors(Shared):
    """The vectors of one adapter, one for each group of neighbouring layers.

    Weights:
        tinylora_v.0, tinylora_v.1, ... (u,): zeros.

    Attributes:
        numbers: by path of the layer, its place among the targets.
        groups: by path, the attribute of its vector.
    """

    def setup(self, sites: list[Site], config: TinyLoraConfig) -> None:
        groups = max(1, round(len(sites) * (1.0 - config.weight_tying)))
        size = max(1, len(sites) // groups)
        self.numbers = {site.path: number for number, site in enumerate(sites)}
        group_of = {path: min(number // size, groups - 1) for path, number in self.numbers.items()}
        self.groups = {path: f"tinylora_v_{group}" for path, group in group_of.items()}
        for group in sorted(set(group_of.values())):
            init = "zeros" if config.init_weights is True else Uniform(config.init_v_bound)
            setattr(self, f"tinylora_v_{group}", self.weight(f"tinylora_v.{group}", (config.u,), init))


class TinyLoraPatch(LowRankPatch):
    """ΔW = B·(Σᵢ vᵢ·Pᵢ)·A, with B = U·√S and A = √S·Vᵀ of the r largest singular values of W, and random Pᵢ.

    Weights, never trained:
        tinylora_A (r, in), tinylora_B (out, r).
        tinylora_P (u, r, r): N(0, 1 / r).
    """

    def setup(self, site: Site, config: TinyLoraConfig) -> None:
        self.r, self.u = min(config.r, *site.shape), config.u
        self.dropout = self.dropped(config.tinylora_dropout)
        self.group = self.shared.groups[site.path]
        rows, columns = site.shape
        b, a = ("zeros", "zeros") if self.undrawn else _singular(site, self.r)
        self.tinylora_A = self.weight("tinylora_A", (self.r, columns), a, fixed=True)
        self.tinylora_B = self.weight("tinylora_B", (rows, self.r), b, fixed=True)
        drawn = TorchGenerator(config.projection_seed + self.shared.numbers[site.path])
        shape = (config.u, self.r, self.r)
        self.tinylora_P = self.weight(
            "tinylora_P", shape, drawn.normal(shape, 1.0 / self.r**0.5), fixed=True, saved=config.save_projection
        )

    def vector(self) -> Parameter:
        """(u,): the trained vector of this layer's group."""
        return getattr(self.shared, self.group)

    def factors(self) -> tuple[Tensor, Tensor]:
        v = ops.reshape(ops.cast(self.vector(), self.dtype), (1, self.u))
        mixture = ops.matmul(v, ops.reshape(self.tinylora_P, (self.u, -1)))
        return self.tinylora_B, ops.matmul(ops.reshape(mixture, (self.r, self.r)), self.tinylora_A)


class TinyLoraEmbeddingPatch(TinyLoraPatch):
    """The same for the table of an embedding: tinylora_A (r, dim), tinylora_B (vocabulary, r)."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        b, a = self.factors()
        return ops.add(y, self.op.mix(self.dropout(self.op(x, b)), ops.transpose(a, (1, 0))))

    @property
    def batched_rank(self) -> int:
        return 0


def _singular(site: Site, r: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, r) and (r, columns): the base weight's first r singular vectors, each with the root of its value."""
    u, s, v = np.linalg.svd(as_float32(to_numpy(site.from_storage(site.weight))), full_matrices=False)
    root = np.sqrt(s[:r])
    return u[:, :r] * root, root[:, None] * v[:r]


class TinyLoraModel(Tuner):
    """The base model with TinyLoRA in it."""


METHOD = Method(
    config=TinyLoraConfig,
    patches={"dense": TinyLoraPatch, "embedding": TinyLoraEmbeddingPatch},
    shared=TinyLoraVectors,
    default_targets=USUAL,
    tuner=TinyLoraModel,
)
