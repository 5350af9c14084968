"""Super-Tuning: the numbers of the weight that are largest, or smallest, are trained."""

import warnings
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.config import TargetedConfig, check_finite
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, LoadError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class SupertuningConfig(TargetedConfig):
    """Settings of Super-Tuning.

    Args:
        sparsity: share of each weight's numbers that are not trained.
        select_top: train the largest numbers; False takes the smallest.
        r: rank of a LoRA update beside, with which the method is called Supra; None for none.
        lora_alpha: this counts lora_alpha / r; None for 2·r.
        lora_dropout: dropout of its input.
        init_weights: begin with zeros; False draws the numbers from N(0, 1), and LoRA's B as its A.
        save_precomputed_indices: files hold the places; without them these are found again in the base weights, which
            must then be the same to the bit.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or `lora_alpha` without `r`.

    Source: arXiv:2607.09287.
    Differs: of numbers of the same size those that stand first are taken; HF takes what torch's `topk` finds, on each
        device in its own way, so that an adapter without places in its file may get others, in half precision above
        all. Adapters with places in their files and without may be in one model. GPT-2's `Conv1D`, `exclude_modules`
        and `layers_to_transform` work here.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern")

    peft_type: str | None = "SUPERTUNING"
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparsity", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be in [0.0, 1.0), got {getattr(self, name)}")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("lora_alpha is set but r is None — Supra mode requires an explicit r.")
        if self.r is not None:
            if not isinstance(self.r, int) or self.r <= 0:
                raise ConfigError(f"r must be a positive integer or None, got {self.r!r}")
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
            check_finite("lora_alpha", self.lora_alpha)
        if not self.save_precomputed_indices:
            warnings.warn(
                "save_precomputed_indices=False: sparse-support indices will be recomputed from base weight "
                "magnitudes at load time. This assumes the base model is identical to training time.",
                PeftWarning,
                stacklevel=3,
            )


class SupertuningPatch(Patch):
    """W' = W + ΔW + s·B·A, s = alpha / r, with ΔW = v_k at the places i_k, where |W| is largest, and zero elsewhere.

    Weights, for k trained numbers:
        supertuning_values (k,): zeros.
        supertuning_indices (k,), int32: places in the flattened weight; kept, but not trained.
        supertuning_lora_A.weight (r, in), with `r`: He-uniform with a = √5.
        supertuning_lora_B.weight (out, r), with `r`: zeros.
    """

    def setup(self, site: Site, config: SupertuningConfig) -> None:
        out, inputs = site.shape
        count = int(out * inputs * (1 - config.sparsity))
        if count < 1:
            raise ConfigError(
                f"sparsity={config.sparsity} leaves no trainable entries for a weight with {out * inputs} elements: "
                f"no parameter of {site.path} would be adapted. Lower the sparsity."
            )
        self.size, self.supertuning_rank = (out * inputs,), config.r or 0
        init_values, init_b = ("zeros", "zeros") if config.init_weights else (Normal(1.0), he_uniform())
        self.supertuning_values = self.weight("supertuning_values", (count,), init_values)
        places = _places(as_float32(to_numpy(site.from_storage(site.weight))), count, config.select_top)
        self.supertuning_indices = self.weight(
            "supertuning_indices",
            (count,),
            places,
            fixed=True,
            saved=config.save_precomputed_indices,
            dtype=ms.int32,
        )
        # Dropout is of the low-rank update's input alone, so that with it there is no one weight to apply.
        self.reweighs = not (config.r and config.lora_dropout)
        if config.r:
            self.lora_scaling = (config.lora_alpha or 0.0) / config.r
            self.supertuning_lora_A = self.weight("supertuning_lora_A.weight", (config.r, inputs), he_uniform())
            self.supertuning_lora_B = self.weight("supertuning_lora_B.weight", (out, config.r), init_b)
            self.dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout else nn.Identity()

    def check_values(self, attribute: str, values: np.ndarray) -> None:
        if attribute == "supertuning_indices" and not ((values >= 0) & (values < self.size[0])).all():
            raise LoadError(f"there are places that a weight of shape {self.site.shape} does not have")

    def sparse(self) -> Tensor:
        """The trained numbers at their places."""
        places = ops.reshape(self.supertuning_indices, (-1, 1))
        return ops.reshape(ops.scatter_nd(places, self.supertuning_values, self.size), self.site.shape)

    def delta_weight(self) -> Tensor:
        if not self.supertuning_rank:
            return self.sparse()
        product = ops.matmul(self.supertuning_lora_B, self.supertuning_lora_A)
        return ops.add(self.sparse(), ops.mul(product, self.lora_scaling))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.reweighs:
            return super().after(x, y)
        x = self.cast(x)
        h = ops.mul(self.op(self.dropout(x), self.supertuning_lora_A), self.lora_scaling)
        return ops.add(ops.add(y, self.op(x, self.sparse())), self.op.mix(h, self.supertuning_lora_B))


def _places(w: np.ndarray, count: int, largest: bool) -> np.ndarray:
    """(count,): where |w| is largest, the largest first, or where it is smallest; of equals those that stand first."""
    score = np.abs(w).ravel()
    score = -score if largest else score
    edge = np.partition(score, count - 1)[count - 1]
    within = np.flatnonzero(score < edge)
    places = np.concatenate([within, np.flatnonzero(score == edge)[: count - within.size]])
    return places[np.argsort(score[places], kind="stable")]


class SupertuningModel(Tuner):
    """The base model with Super-Tuning adapters in it, and the switches over them."""


METHOD = Method(
    config=SupertuningConfig,
    tuner=SupertuningModel,
    patches={"dense": SupertuningPatch},
    default_targets=USUAL,
)
