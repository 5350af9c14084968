"""LoraConfig: HF peft 0.21.2's 42 fields."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msft_peft.config import (
    TargetedConfig,
    check_bias,
    check_finite,
    check_patterns,
    check_positive,
    check_probability,
    check_types,
)
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.tuners.lora.init_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from msft_peft.tuners.lora.variant_config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga", "mica")
# Of these a config can have one.
VARIANTS = ("dora", "alora", "mica", "kasa", "bdlora", "velora", "monteclora", "arrow")
SUB_CONFIGS = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "kasa_config": KasaConfig,
    "use_bdlora": BdLoraConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "arrow_config": ArrowConfig,
}


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never written to a file.

    Args:
        ephemeral_gpu_offload: HF's; there is nothing to offload to here, so True is refused.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(TargetedConfig):
    """Low-Rank Adaptation: W' = W + s·B·A with s = lora_alpha / r, or lora_alpha / √r with `use_rslora`.

    Every field of HF peft 0.21.2 is accepted and kept through JSON. One that asks for what MindSpore lacks raises
    NotImplementedError, with its name, when the config is applied to a model.

    Args:
        r: rank of the update.
        lora_alpha: numerator of the scaling s.
        lora_dropout: probability with which inputs of A are zeroed in training; not for embeddings.
        use_rslora: rank-stabilised scaling lora_alpha / √r.
        rank_pattern, alpha_pattern: a layer's path, its end or a regex for either -> its own r or lora_alpha.
        bias: "none", "all" or "lora_only": which biases of the base model are trained, in place.
        fan_in_fan_out: the layers store (in, out); corrected, with a warning, where the layer says otherwise.
        trainable_token_indices: rows of the input embedding (or {layer's name: rows}) to train beside; see
            `tuners/trainable_tokens.py`. An output layer tied to it follows.
        target_parameters: names of parameters to update that no layer applies, a mixture's experts for instance; see
            `parameter.py`.
        layer_replication: [start, end) ranges of the blocks that the model is to have instead of its own, over the
            same weights, each with an adapter of its own; such a model cannot be merged.
        ensure_weight_tying: where the model's input and output embeddings share a weight and one of them is adapted or
            trained whole, the other one is too, with the same update or copy.
        use_dora: learn a magnitude for each output beside the direction; see `dora.py`.
        lora_bias: B has a bias, which is scaled like its product; not for embeddings.
        alora_invocation_tokens: the adapter acts from the last occurrence of these token ids on, and before them the
            model is the base model, whose key/value cache it may share (activated LoRA; dense layers only).
        init_lora_weights: True (A He-uniform with a = √5, B zero), "gaussian" (A ~ N(0, 1/r), B zero), False (both
            drawn as True draws A: the adapter changes the output at once), or one that starts from the base weight or
            from data: "orthogonal", "olora", "pissa", "pissa_niter_<n>", "loftq", "corda", "eva", "lora_ga", "mica";
            see docs/initialisation.md.
        kasa_config: take the r smallest singular components out of the base weight, and give the update singular
            values of its own; see `kasa.py`. Dense layers only.
        use_bdlora: a `BdLoraConfig`: make A or B block-diagonal; see `bdlora.py`. Dense layers only.
        velora_config: keep the inputs of A for the backward pass in compressed form; see `velora.py`. Dense layers
            only.
        monteclora_config: train with the mean of random samples around A; see `monteclora.py`. Dense layers only.
        arrow_config: the adapter is a router over the others in the model; see `create_arrow_model`.
        loftq_config, eva_config, corda_config, lora_ga_config: settings of these, as objects or dicts.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    The other fields are HF's, for what MindSpore does not have: megatron_config and megatron_core, use_qalora and
    qalora_group_size, runtime_config.

    Raises:
        ConfigError: a value out of range, an unknown initialisation, or options that exclude each other.
        NotImplementedError: an unknown `bias` (HF's kind of error).

    Source: Hu et al. 2021, arXiv:2106.09685, §4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732;
        aLoRA: Greenewald et al. 2025, arXiv:2504.12397.
    Differs: HF notices a bad `r`, `lora_dropout` or `init_lora_weights` only when a model is wrapped.
    """

    peft_type: str | None = "LORA"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)  # HF keeps this one as a dict
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_ranks()
        check_probability("lora_dropout", self.lora_dropout)
        check_bias(self.bias, "lora")
        self._check_init()
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"lora_bias=True needs init_lora_weights=True or False, got {self.init_lora_weights!r}")
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.variant and self.variant not in VARIANTS:
            raise ConfigError(f"Invalid or unsupported variant combination: {self.variant}")
        self._check_invocation()
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", PeftWarning, stacklevel=3)

    def _check_ranks(self) -> None:
        check_positive("r", self.r)
        check_finite("lora_alpha", self.lora_alpha)
        check_patterns("rank_pattern", self.rank_pattern, check_positive)
        check_patterns("alpha_pattern", self.alpha_pattern, check_finite)

    def _check_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens == []:
            raise ConfigError("`alora_invocation_tokens` is an empty list: an adapter that waits for nothing")
        if tokens is not None and not all(type(token) is int for token in tokens):
            raise ConfigError(f"`alora_invocation_tokens` must be a list of token ids, got {tokens!r}")

    @property
    def init(self) -> bool | str:
        """`init_lora_weights`, in lower case if it is a name."""
        return self.init_lora_weights if isinstance(self.init_lora_weights, bool) else self.init_lora_weights.lower()

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, bool) and not (
            isinstance(init, str) and (self.init in INITS or str(self.init).startswith("pissa_niter_"))
        ):
            raise ConfigError(f"Unknown initialization init_lora_weights={init!r}; there are True, False, {INITS}")
        init = self.init
        if init == "loftq" and not self.loftq_config:
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if str(init).startswith("pissa_niter_") and not str(init).removeprefix("pissa_niter_").isdecimal():
            raise ConfigError(f"init_lora_weights={init!r}: 'pissa_niter_' must be followed by a number of iterations")
        self._settle_sub_configs()
        for name, wanted in (("loftq_config", "loftq"), ("eva_config", "eva"), ("corda_config", "corda")):
            if getattr(self, name) and init != wanted:
                warnings.warn(
                    f"`{name}` specified but will be ignored when `init_lora_weights` is not '{wanted}'.",
                    PeftWarning,
                    stacklevel=4,
                )

    def _settle_sub_configs(self) -> None:
        """Sub-configs as objects, whether they come as such, as dicts from a file, or not at all."""
        if self.init == "loftq":
            _made("loftq_config", LoftQConfig, self.loftq_config)
        for name, kind in SUB_CONFIGS.items():
            value = getattr(self, name)
            title = {"eva_config": "EVA", "corda_config": "CorDA"}.get(name)
            if value is None and title and name == f"{self.init}_config":
                warnings.warn(
                    f"`init_lora_weights` is '{self.init}' but `{name}` is not specified. Using default {title} "
                    "config.",
                    PeftWarning,
                    stacklevel=5,
                )
                setattr(self, name, kind())
            elif isinstance(value, Mapping):
                setattr(self, name, _made(name, kind, value))
            elif value is not None and not isinstance(value, kind):
                raise ConfigError(f"`{name}` must be a {kind.__name__} or a dict, got {type(value).__name__}")

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["runtime_config"]
        return fields

    @property
    def variant(self) -> str:
        """The variant of LoRA whose Patches are asked for; "" for plain LoRA."""
        chosen = {
            "dora": self.use_dora,
            "alora": self.alora_invocation_tokens is not None,
            "mica": self.init == "mica",
            "kasa": self.kasa_config is not None,
            "bdlora": self.use_bdlora is not None,
            "velora": self.velora_config is not None,
            "monteclora": self.monteclora_config is not None,
            "arrow": self.arrow_config is not None,
        }
        return " and ".join(name for name, asked in chosen.items() if asked)

    def require_built(self) -> None:
        for f in dataclasses.fields(self):
            if f.name in _NOT_BUILT:
                default = f.default_factory() if callable(f.default_factory) else f.default
                value = getattr(self, f.name)
                if value not in (default, None):
                    raise NotImplementedError(
                        f"LoraConfig.{f.name}={value!r} {_NOT_BUILT[f.name]}: leave it at {default!r}"
                    )


def _made(name: str, kind: type, fields: Mapping[str, Any]) -> Any:
    """A sub-config from a file's fields, among them those that are no arguments of its class."""
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := sorted(map(str, fields.keys() - {*known})):
        raise ConfigError(f"`{name}` has no field {', '.join(unknown)}; the fields of {kind.__name__} are {known}")
    late = {f.name for f in dataclasses.fields(kind) if not f.init}
    try:
        found = kind(**{key: value for key, value in fields.items() if key not in late})
        for key in late & fields.keys():
            setattr(found, key, fields[key])
        check_types(found)
    except ConfigError as error:
        raise ConfigError(f"`{name}`: {error}") from error
    return found


_NOT_BUILT = {
    "megatron_config": "is for Megatron's parallel linear layers, which exist in torch alone",
    "use_qalora": "is for a base that GPTQ has quantised in groups, and MindSpore has no layers for such weights",
    "runtime_config": "asks for layers on another device, and a MindSpore process has one device",
}
