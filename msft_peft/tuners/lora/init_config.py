"""Settings of LoRA's initialisations: HF's fields, defaults and checks."""

import os
from dataclasses import dataclass

from msft_peft.config import check_finite, check_types
from msft_peft.errors import ConfigError

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoftQConfig:
    """Settings of `init_lora_weights="loftq"`, see `init.loftq`.

    Args:
        loftq_bits: 4 (NormalFloat in blocks of 64) or 8 (integers, row by row).
        loftq_iter: how often to quantise and to correct in turn.

    Raises:
        ConfigError: a value that is no number.

    Differs: HF notices other numbers only when a model is wrapped, and so does this class: its files may hold them.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class EvaConfig:
    """Settings of `init_lora_weights="eva"`, see `eva.initialize_lora_eva_weights`.

    Args:
        rho: a layer may get up to r·rho of the ranks that all layers share; 1.0 leaves each its own r.
        tau: a component counts as found when its cosine similarity between two batches is at least this.
        use_label_mask: leave out the positions whose label is `label_mask_value`.
        label_mask_value: the label of positions that do not count.
        whiten: divide each component by the root of its singular value.
        adjust_scaling_factors: change a layer's lora_alpha with its rank, so that lora_alpha / r stays as it was.

    Raises:
        ConfigError: rho below 1, tau outside [0, 1], or a value of another type.

    Source: Paischer et al. 2024, arXiv:2410.07170.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_finite("rho", self.rho)
        if self.rho < 1.0:
            raise ConfigError(f"`rho` must be >= 1.0, got {self.rho}")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0, got {self.tau}")


@dataclass
class CordaConfig:
    """Settings of `init_lora_weights="corda"`, see `corda.preprocess_corda`.

    Args:
        cache_file: safetensors file for the decompositions: read if it is there, else written.
        covariance_file: safetensors file for the covariances, which serve any rank: read if it is there, else written.
        corda_method: "ipm" adapts the r components that matter most to the sampled inputs, "kpm" those that matter
            least, which preserves what the model knows of them.
        verbose: show a progress bar.
        use_float16_for_covariance: keep the covariances in half precision.
        prune_temporary_fields: forget the covariances when the decompositions are made.

    Raises:
        ConfigError: a value of another type.

    Source: Yang et al. 2024, arXiv:2406.05223.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))  # JSON has no paths
        check_types(self)


@dataclass
class LoraGAConfig:
    """Settings of `init_lora_weights="lora_ga"`, see `init.lora_ga`.

    Args:
        direction: which singular vectors of the gradient A and B get, one of `DIRECTIONS`.
        scale: how B is scaled, one of `SCALES`.
        stable_gamma: γ of scale="stable".

    Raises:
        ConfigError: a value of another type.

    Source: Wang et al. 2024, arXiv:2407.05000.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        check_types(self)
