"""SHiRA: a few numbers of the weight, at places drawn at random, are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import to_numpy
from msft_peft.backend.torch_random import TorchGenerator
from msft_peft.config import TargetedConfig, check_positive
from msft_peft.core.patch import Patch
from msft_peft.core.scale import Scale
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, LoadError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class ShiraConfig(TargetedConfig):
    """Settings of SHiRA.

    Args:
        r: a layer (out, in) has r·(out + in) trained numbers, as many as LoRA of this rank; the update's rank is not
            bounded by it.
        mask_type: "random"; or any other name, with a mask of your own in `config.mask_fn`.
        random_seed: of the random places, which are those that HF draws; None always draws the same, as in HF.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        init_weights: begin with zeros; False draws N(0, 1).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Attributes:
        mask_fn: (layer, r) or, with `mask_type="random"`, (layer, r, random_seed=...) -> a mask (out, in) of zeros and
            r·(out + in) ones; None for HF's random one.

    Raises:
        ConfigError: `r` is no positive number.
        NotImplementedError: when a model is wrapped: a layer of 214,748,364 numbers or more, for which torch draws
            otherwise.

    Source: Bhardwaj et al. 2024, arXiv:2406.13175, §3.
    Differs: GPT-2's `Conv1D`, `exclude_modules` and `layers_to_transform` work here.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern")

    peft_type: str | None = "SHIRA"
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        self.mask_fn: Callable[..., Any] | None = None


class ShiraPatch(Patch):
    """W' = W + s·ΔW, with ΔW[i, j] = v_k at the places (i, j)_k, and zero elsewhere.

    Weights:
        shira_weight (k,), k = r·(out + in): zeros.
        shira_indices (2, k), int32: rows and columns of the places; kept, but not trained.
    """

    reweighs = True

    def setup(self, site: Site, config: ShiraConfig) -> None:
        out, inputs = site.shape
        count = config.r * (out + inputs)
        if count > out * inputs:
            raise ConfigError(
                f"The set rank {config.r} results in more shira params than the total number of params in the base "
                f"layer {out * inputs} and this is not allowed: it is {site.path}."
            )
        self.r, self.scale = config.r, Scale(1.0)
        self.shira_weight = self.weight("shira_weight", (count,), "zeros" if config.init_weights else Normal(1.0))
        places = _places(site, config, count)
        self.shira_indices = self.weight("shira_indices", places.shape, places, fixed=True, dtype=ms.int32)

    def check_values(self, attribute: str, values: np.ndarray) -> None:
        sizes = np.array(self.site.shape)[:, None]
        if attribute == "shira_indices" and not ((values >= 0) & (values < sizes)).all():
            raise LoadError(f"there are places that a weight of shape {self.site.shape} does not have")

    @property
    def scaling(self) -> Any:
        """The factor s in effect."""
        return self.scale.value

    def delta_weight(self) -> Tensor:
        places = ops.transpose(self.shira_indices, (1, 0))
        return ops.scatter_nd(places, ops.mul(self.shira_weight, self.scale.value), self.site.shape)


def _places(site: Site, config: ShiraConfig, count: int) -> np.ndarray:
    """(2, count): rows and columns, in the order in which the weight is stored in torch."""
    out, inputs = site.shape
    if config.mask_fn is None:
        if config.mask_type != "random" and not config.inference_mode:
            raise ConfigError(
                f"mask_type={config.mask_type!r} is not 'random', so that the mask must come from you: set "
                "config.mask_fn to a function of (layer, r) that gives a mask (out, in)."
            )
        # Places of an adapter that is about to be loaded come from its file.
        drawn = TorchGenerator(config.random_seed).permutation(out * inputs, count)
        return np.stack(np.divmod(np.sort(drawn), inputs))
    seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    mask = config.mask_fn(site.layer, config.r, **seed)
    mask = mask if isinstance(mask, np.ndarray) else to_numpy(mask)
    found = np.stack(np.nonzero(mask == 1))
    if mask.shape != (out, inputs) or found.shape[1] != count:
        raise ConfigError(
            f"config.mask_fn gave a mask of shape {mask.shape} with {found.shape[-1]} ones for {site.path}: it must "
            f"be {(out, inputs)} with r·(out + in) = {count} ones."
        )
    return found


class ShiraModel(Tuner):
    """The base model with Shira adapters in it, and the switches over them."""


METHOD = Method(
    config=ShiraConfig,
    tuner=ShiraModel,
    patches={"dense": ShiraPatch},
    default_targets=USUAL | {"phi": ["q_proj", "v_proj"]},
    mixed=True,
)
