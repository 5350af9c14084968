"""AdaLoraConfig: HF peft 0.21.2's fields, those of LoRA among them."""

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from msft_peft.config import TargetedConfig, check_finite, check_positive
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.tuners.lora.config import LoraConfig

# Fields of LoraConfig that mean something here; the others must be left as they are.
_OF_LORA = set("r lora_alpha lora_dropout fan_in_fan_out bias init_lora_weights rank_pattern peft_type".split())


@dataclass
class AdaLoraConfig(LoraConfig):
    """Settings of AdaLoRA: of LoRA's `lora_alpha`, `lora_dropout`, `fan_in_fan_out`, `bias`, `init_lora_weights`.

    Args:
        init_r: rank of every layer at first.
        target_r: average rank of the layers at the end.
        total_step: number of steps of the whole training; must be given.
        tinit, tfinal: steps at the beginning without pruning, and at the end with the final ranks.
        deltaT: prune every so many steps.
        beta1, beta2: smoothing of the weights' importance, and of its uncertainty.
        orth_reg_weight: of the penalty ‖A·Aᵀ - I‖ + ‖Bᵀ·B - I‖ that the model's forward adds to the loss.
        rank_pattern: written by the schedule: a layer's path and ".lora_E" -> which of its ranks are in use. The
            others are not in files.
        init_lora_weights: True (A, B ~ N(0, 0.02), E zero) or False (all N(0, 1)).

    Raises:
        ConfigError: no `total_step`, a schedule without steps to prune in, or a number out of range.

    Source: Zhang et al. 2023, arXiv:2303.10512.
    Differs: what HF takes from LoRA and ignores (rsLoRA, `alpha_pattern`, other initialisations, ...) is refused.
    """

    # Its keys are no patterns, see `check_pattern`.
    patterned: ClassVar[tuple[str, ...]] = ()

    peft_type: str | None = "ADALORA"
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern, None
        super().__post_init__()
        self.rank_pattern = pattern
        if self.use_dora:
            raise ConfigError(f"{self.peft_type} does not support DoRA.")
        if self.loftq_config:
            raise ConfigError(f"{self.peft_type} does not support LOFTQ.")
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored.If you intended to set the initial rank, "
                "use `init_r` instead.",
                PeftWarning,
                stacklevel=3,
            )
        self._check_schedule()
        for name, kept in (pattern or {}).items():
            if not isinstance(kept, list) or not all(type(one) is bool for one in kept):
                raise ConfigError(f"`rank_pattern[{name!r}]` must be a list of True and False, got {kept!r}")
            if len(kept) != self.init_r:
                raise ConfigError(
                    f"`rank_pattern[{name!r}]` must say it of init_r = {self.init_r} ranks, got {len(kept)}"
                )

    def _check_schedule(self) -> None:
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        for name in ("init_r", "target_r", "deltaT"):
            check_positive(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            check_finite(name, getattr(self, name))
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}")
        check_finite("orth_reg_weight", self.orth_reg_weight)
        if self.orth_reg_weight < 0:
            raise ConfigError(
                "`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or "
                "increase `total_step`."
            )

    def check_pattern(self, known: Iterable[str]) -> None:
        """Raise ConfigError if `rank_pattern` names what is not among the layers that are known."""
        unknown = sorted(set(self.rank_pattern or {}) - set(known))
        if unknown:
            raise ConfigError(
                f"`rank_pattern` names {unknown}, which are no layers that AdaLoRA adapts here: {sorted(known)}."
            )

    def require_built(self) -> None:
        inherited = {f.name for f in dataclasses.fields(LoraConfig)} - _OF_LORA - _COMMON
        for f in dataclasses.fields(self):
            default: Any = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in inherited and getattr(self, f.name) not in (default, None):
                raise NotImplementedError(
                    f"AdaLoraConfig.{f.name}={getattr(self, f.name)!r} is LoRA's, and not built for AdaLoRA: leave it "
                    f"at {default!r}"
                )
        if not isinstance(self.init_lora_weights, bool):
            raise NotImplementedError(
                f"AdaLoraConfig.init_lora_weights={self.init_lora_weights!r}: there are True and False"
            )


# Those of all methods.
_COMMON = {f.name for f in dataclasses.fields(TargetedConfig)}
