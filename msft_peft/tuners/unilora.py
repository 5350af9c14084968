"""Uni-LoRA: every entry of every low-rank factor is one of the few numbers of one vector, chosen at random once."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Normal, Uniform

from msft_peft.config import TargetedConfig, check_finite, check_positive, check_probability
from msft_peft.core.patch import Shared
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, LoadError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch


@dataclass
class UniLoraConfig(TargetedConfig):
    """Settings of Uni-LoRA.

    Args:
        r: rank.
        proj_seed: seed of the choice, at least 0; the same as in HF peft.
        theta_d_length: how many numbers are trained, in all layers together.
        unilora_dropout: dropout of the update's input.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "unilora_only": which biases of the base model are trained.
        init_theta_d_bound: the vector is drawn from [-bound, bound].
        init_weights: False draws the vector from N(0, 1).
        save_indices: keep the choice in files; otherwise it is made again from the seed.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Li et al. 2025, arXiv:2506.00799, §3.
    Differs: `exclude_modules` works here. On a base model in half precision the scales stay in float32.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "UNILORA"
    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("theta_d_length", self.theta_d_length)
        if isinstance(self.proj_seed, bool) or not isinstance(self.proj_seed, int) or self.proj_seed < 0:
            raise ConfigError(f"`proj_seed` should be an integer of at least 0, got {self.proj_seed!r}")
        check_probability("unilora_dropout", self.unilora_dropout)
        check_finite("init_theta_d_bound", self.init_theta_d_bound)
        if self.init_theta_d_bound <= 0:
            raise ConfigError(f"`init_theta_d_bound` should be a positive float, got {self.init_theta_d_bound}.")
        if self.bias not in ("none", "all", "unilora_only"):
            raise ConfigError(f"`bias` should be 'none', 'all', or 'unilora_only', got {self.bias!r}.")


class UniLoraVector(Shared):
    """The vector of one adapter, and which of its numbers stands where.

    Weights:
        unilora_theta_d (length,): uniform.

    Attributes:
        places: by path of the layer, (r, in) and (out, r): for each entry of its A and B the number that it is.
        scales: for each number 1 / √n, of the n entries that it is; so the map from the vector to all entries keeps
            lengths.
    """

    def setup(self, sites: list[Site], config: UniLoraConfig) -> None:
        length, r = config.theta_d_length, config.r
        init = Uniform(config.init_theta_d_bound) if config.init_weights else Normal(1.0)
        self.unilora_theta_d = self.weight("unilora_theta_d", (length,), init)
        chosen = _choice(r * sum(site.in_features + site.out_features for site in sites), length, config.proj_seed)
        counts = np.bincount(chosen, minlength=length).astype(np.float32)
        self.scales = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0).astype(np.float32)
        self.places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for site in sites:
            a, b, chosen = np.split(chosen, np.cumsum((r * site.in_features, site.out_features * r)))
            self.places[site.path] = a.reshape(r, -1), b.reshape(-1, r)


def _choice(entries: int, length: int, seed: int) -> np.ndarray:
    """(entries,): numbers below `length` in random order, each as often as the others, or once more."""
    # With these calls, in this order, for HF's choice.
    rng = np.random.default_rng(seed)
    even, odd = divmod(entries, length)
    chosen = np.repeat(np.arange(length), even)
    if odd:
        chosen = np.concatenate([chosen, rng.choice(length, size=odd, replace=False)])
    rng.shuffle(chosen)
    return chosen


class UniLoraPatch(LowRankPatch):
    """ΔW = B·A, with A[i, j] = θ[k]·s[k] for some k = k(i, j), and B likewise; all layers share θ.

    Weights, never trained:
        unilora_indices_A (r, in), unilora_indices_B (out, r), int64: k.
        unilora_scales_A (r, in), unilora_scales_B (out, r): s[k] = 1 / √n, where n entries of the model are θ[k].
    """

    def setup(self, site: Site, config: UniLoraConfig) -> None:
        self.r, self.length, self.dropout = config.r, config.theta_d_length, self.dropped(config.unilora_dropout)
        self.unilora_indices_A, self.unilora_indices_B = (
            self.weight(f"unilora_indices_{which}", k.shape, k, fixed=True, saved=config.save_indices, dtype=ms.int64)
            for which, k in zip("AB", self.shared.places[site.path])
        )
        self.unilora_scales_A, self.unilora_scales_B = (
            self.weight(
                f"unilora_scales_{which}", k.shape, self.shared.scales[k], fixed=True, saved=config.save_indices
            )
            for which, k in zip("AB", self.shared.places[site.path])
        )

    def check_values(self, attribute: str, values: np.ndarray) -> None:
        if "indices" in attribute and not ((values >= 0) & (values < self.length)).all():
            raise LoadError(f"there are places that a vector of theta_d_length={self.length} does not have")

    def factors(self) -> tuple[Tensor, Tensor]:
        return (
            self.chosen(self.unilora_indices_B, self.unilora_scales_B),
            self.chosen(self.unilora_indices_A, self.unilora_scales_A),
        )

    def chosen(self, indices: Parameter, scales: Parameter) -> Tensor:
        """The factor of these places and scales."""
        return ops.mul(ops.gather(ops.cast(self.shared.unilora_theta_d, self.dtype), indices, 0), scales)


class UniLoraModel(Tuner):
    """The base model with Uni-LoRA in it."""


METHOD = Method(
    config=UniLoraConfig,
    patches={"dense": UniLoraPatch},
    shared=UniLoraVector,
    default_targets=USUAL,
    identity_at_init=False,
    tuner=UniLoraModel,
)
