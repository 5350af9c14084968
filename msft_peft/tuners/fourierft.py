"""FourierFT: the weight's update is the inverse Fourier transform of a few trained numbers."""

import math
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.torch_random import TorchGenerator
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_patterns, check_positive, check_seed
from msft_peft.core.patch import Patch
from msft_peft.core.targets import match_pattern
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class FourierFTConfig(TargetedConfig):
    """Settings of FourierFT.

    Args:
        n_frequency: numbers trained in each layer.
        scaling: factor of the update.
        random_loc_seed: seed that the places of those numbers in the spectrum are drawn from, the same as in HF peft
            on torch. Files hold the numbers alone.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "fourier_only": which biases of the base model are trained.
        n_frequency_pattern: regex for the end of a layer's path -> its own n_frequency.
        init_weights: begin with an update of zero; False, the default, draws N(0, 1).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.
        NotImplementedError: when a model is wrapped: a layer of 214,748,364 numbers or more, for which torch draws
            otherwise.

    Source: Gao et al. 2024, arXiv:2405.03003, §3.
    """

    peft_type: str | None = "FOURIERFT"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        check_positive("n_frequency", self.n_frequency)
        check_patterns("n_frequency_pattern", self.n_frequency_pattern, check_positive)
        check_finite("scaling", self.scaling)
        check_seed("random_loc_seed", self.random_loc_seed)
        if self.bias != "fourierft_only":  # HF takes this too
            check_bias(self.bias, "fourier")


class FourierFTPatch(Patch):
    """ΔW = s·Re(IDFT₂(F)), the spectrum F zero but for n random places.

    Weights:
        fourierft_spectrum (n,): N(0, 1), or zeros with `init_weights`.
    """

    builds_delta = True

    def setup(self, site: Site, config: FourierFTConfig) -> None:
        n, size = match_pattern(config.n_frequency_pattern or {}, site.path, config.n_frequency), math.prod(site.shape)
        if n > size:
            raise ConfigError(
                "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
                f"value passed is {n} and the product is {size}: at {site.path}"
            )
        self.factor = config.scaling
        init = "zeros" if config.init_weights else Normal(1.0)
        self.fourierft_spectrum = self.weight("fourierft_spectrum", (n,), init)
        places = TorchGenerator(config.random_loc_seed).permutation(size, n)
        self.places = Tensor(places.reshape(-1, 1).astype(np.int32))

    def delta_weight(self) -> Tensor:
        spectrum = ops.cast(self.fourierft_spectrum, ms.float32)
        out, inputs = self.site.shape
        whole = ops.reshape(ops.scatter_nd(self.places, spectrum, (out * inputs,)), (out, inputs))
        return ops.cast(ops.mul(ops.real(ops.ifft2(whole)), self.factor), self.dtype)


class FourierFTModel(Tuner):
    """The base model with FourierFT adapters in it, and the switches over them."""


METHOD = Method(
    config=FourierFTConfig,
    tuner=FourierFTModel,
    patches={"dense": FourierFTPatch},
    default_targets=USUAL | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]},
    identity_at_init=False,
)
