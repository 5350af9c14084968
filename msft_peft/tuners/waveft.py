"""WaveFT: the weight's update is the inverse wavelet transform of a few trained numbers."""

import math
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.torch_random import TorchGenerator
from msft_peft.backend.wavelets import FAMILIES, NAMES, high_pass, low_pass
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_patterns, check_positive, check_seed
from msft_peft.core.patch import Patch, Shared
from msft_peft.core.targets import match_pattern
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class WaveFTConfig(TargetedConfig):
    """Settings of WaveFT.

    Args:
        n_frequency: numbers trained in each layer.
        scaling: factor of the update.
        wavelet_family: "db1" (Haar) to "db10", "sym2" to "sym10" or "coif1" to "coif4". A number acts on as many rows
            and columns of the update as the filter is long, and costs their product.
        use_idwt: transform; False lets the numbers themselves be the update.
        random_loc_seed: seed that the places of those numbers are drawn from, the same as in HF peft on torch. Files
            hold the numbers alone.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "waveft_only": which biases of the base model are trained.
        n_frequency_pattern: regex for the end of a layer's path -> its own n_frequency.
        proportional_parameters: share out the numbers of all layers by their sizes, whatever the patterns say.
        init_weights: begin with an update of zero; False draws N(0, 0.01²).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or an unknown `wavelet_family`; when a model is wrapped: one without
            filters, unless `use_idwt` is False.
        NotImplementedError: when a model is wrapped: a layer of 214,748,364 numbers or more, for which torch draws
            otherwise.

    Source: Bilican et al. 2025, arXiv:2505.12532, §3.
    Differs: families that HF's config takes and that it has no filters for, "db11" to "coif17", fail there in the
        forward pass, and are refused here. So is "coif5", whose filter has a wrong length in HF.
    """

    peft_type: str | None = "WAVEFT"
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        check_positive("n_frequency", self.n_frequency)
        check_patterns("n_frequency_pattern", self.n_frequency_pattern, check_positive)
        check_finite("scaling", self.scaling)
        check_seed("random_loc_seed", self.random_loc_seed)
        check_bias(self.bias, "waveft")
        if self.wavelet_family not in NAMES:
            raise ConfigError(
                f"Wavelet family {self.wavelet_family} not supported. Supported wavelet families are: {list(FAMILIES)}"
            )


class Allotment(Shared):
    """How many numbers each layer of an adapter trains."""

    def setup(self, sites: list[Site], config: WaveFTConfig) -> None:
        patterns = config.n_frequency_pattern or {}
        self.counts = {site.path: match_pattern(patterns, site.path, config.n_frequency) for site in sites}
        if config.proportional_parameters:
            sizes = {site.path: math.prod(site.shape) for site in sites}
            whole, numbers = sum(sizes.values()), config.n_frequency * len(sizes)
            self.counts = {path: max(1, round(size / whole * numbers)) for path, size in sizes.items()}


class WaveFTPatch(Patch):
    """ΔW = s·IDWT₂(C), the coefficients C of one level zero but for n random places.

    A coefficient acts where its wavelet, which is shorter than the filter's length squared, lies: ΔW is the sum of n
    such patches, each times a trained number, and no transform of the whole is taken.

    Weights:
        waveft_spectrum (n,): zeros.
    """

    reweighs = True

    def setup(self, site: Site, config: WaveFTConfig) -> None:
        n, (out, inputs) = self.shared.counts[site.path], site.shape
        if n > out * inputs:
            raise ConfigError(
                "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
                f"value passed is {n} and the product is {out * inputs}: at {site.path}"
            )
        self.waveft_spectrum = self.weight("waveft_spectrum", (n,), "zeros" if config.init_weights else Normal(0.01))
        rows, columns = np.divmod(TorchGenerator(config.random_loc_seed).permutation(out * inputs, n), inputs)
        waves = np.ones((n, 1))
        if config.use_idwt:
            rows, columns, waves = _waves(rows, columns, site.shape, config.wavelet_family)
        self.size = (out * inputs,)
        self.waves = Tensor((waves * config.scaling).reshape(n, -1).astype(np.float32))
        self.places = Tensor((rows * inputs + columns).reshape(-1, 1).astype(np.int32))

    def delta_weight(self) -> Tensor:
        spectrum = ops.reshape(ops.cast(self.waveft_spectrum, ms.float32), (-1, 1))
        values = ops.reshape(ops.mul(spectrum, self.waves), (-1,))
        return ops.cast(ops.reshape(ops.scatter_nd(self.places, values, self.size), self.site.shape), self.dtype)


def _waves(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], family: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What coefficients (n,) at these places contribute: rows (n, l, 1), columns (n, 1, l) and factors (n, l, l).

    The four quarters of the coefficients are approximation, horizontal, vertical and diagonal details.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"There are no filters of the wavelet family {family}, only of {list(FAMILIES)}; with use_idwt=False none "
            "are needed."
        )
    h = low_pass(family)
    filters = np.stack([h, high_pass(h)])
    (i, low), (j, left) = (_halves(k, size, len(h)) for k, size in zip((rows, columns), shape, strict=True))
    # The quarter above on the right has the details down the columns, as in PyWavelets' order of the three.
    rows, down = _spread(i, filters[1 - left], shape[0])
    columns, across = _spread(j, filters[1 - low], shape[1])
    return rows[:, :, None], columns[:, None, :], down[:, :, None] * across[:, None, :]


def _halves(places: np.ndarray, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places along one side of the weight -> places in their half of the coefficients, and 1 for the first half.

    There are length - 2 coefficients more than numbers, and an even number; the trained ones are in the middle.
    """
    half = (size + length - 1) // 2
    places = places + (2 * half - size) // 2
    first = places < half
    return np.where(first, places, places - half), first.astype(int)


def _spread(k: np.ndarray, taps: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, length) that coefficients k (n,) act on through taps (n, length), which become zero outside."""
    length = taps.shape[1]
    places = 2 * k[:, None] + np.arange(length) - (length - 2)
    inside = (places >= 0) & (places < size)
    return np.where(inside, places, 0), np.where(inside, taps, 0.0)


class WaveFTModel(Tuner):
    """The base model with WaveFT adapters in it, and the switches over them."""


METHOD = Method(
    config=WaveFTConfig,
    tuner=WaveFTModel,
    shared=Allotment,
    patches={"dense": WaveFTPatch},
    default_targets={kind: targets for kind, targets in USUAL.items() if kind not in ("btlm", "rwkv", "rwkv7")}
    | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]},
)
