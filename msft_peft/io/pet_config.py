"""MindFormers' `pet_config`: what its run files say about fine-tuning, as our configs, and back."""

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from mindspore import nn

from msft_peft.config import PeftConfig
from msft_peft.core.layer import site_of
from msft_peft.core.wrapper import outer_cells
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import output_head

Plain = dict[str, Any]


@dataclass(frozen=True)
class PetType:
    """How the keys of one `pet_type` read as fields of a config.

    Attributes:
        peft_type: of the config.
        fields: key -> (field, MindFormers' default).
        fixed: fields that are always so.
        without: key -> (what is passed over in silence, what to say of other values).
        targeted: it takes `target_modules` and what goes with them.
    """

    peft_type: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    targeted: bool = True

    @property
    def keys(self) -> set[str]:
        return {"pet_type", *self.fields, *self.without, *(_TARGETING if self.targeted else ())}


_TARGETING = ("target_modules", "exclude_layers", "freeze_include", "freeze_exclude")
_DTYPE = ((None,), "dtypes are no part of a config: pass autocast_adapter_dtype to get_peft_model")
_INIT = "MindFormers does not obey it either: A begins He-uniform and B at zero"
_NO_DROPOUT = ((0, 0.0, None), "a prefix has no dropout here, as in HF peft")
_SERVING = "it is for serving with MindFormers alone; here adapters are loaded one by one"
_MODEL_SIZES = {"num_layers": "num_layers", "num_heads": "num_attention_heads", "hidden_size": "token_dim"}

PET_TYPES: dict[str, PetType] = {
    "lora": PetType(
        "LORA",
        {"lora_rank": ("r", 8), "lora_alpha": ("lora_alpha", 16), "lora_dropout": ("lora_dropout", 0.01)},
        without={
            "lora_a_init": ((None, "normal"), _INIT),
            "lora_b_init": ((None, "zero", "zeros"), _INIT),
            "param_init_type": _DTYPE,
            "compute_dtype": _DTYPE,
        },
    ),
    "slora": PetType(
        "LORA",
        {"lora_rank": ("r", 8), "lora_alpha": ("lora_alpha", 8), "lora_dropout": ("lora_dropout", 0.0)},
        fixed={"inference_mode": True},
        without={
            "lora_num": ((None, 1), _SERVING),
            "lora_extra_vocab_size": ((None, 0), _SERVING),
            "lora_dtype": ((None, "float16"), _SERVING),
            "adapter_path": ((None,), _SERVING),
        },
    ),
    "ptuning2": PetType(
        "PREFIX_TUNING",
        {
            "pre_seq_len": ("num_virtual_tokens", 128),
            "prefix_projection": ("prefix_projection", False),
            "projection_dim": ("encoder_hidden_size", 128),
        },
        without={"dropout_prob": _NO_DROPOUT},
        targeted=False,
    ),
    "prefixtuning": PetType(
        "PREFIX_TUNING",
        {"prefix_token_num": ("num_virtual_tokens", 128), "mid_dim": ("encoder_hidden_size", 512)},
        fixed={"prefix_projection": True},
        without={"dropout_rate": _NO_DROPOUT},
        targeted=False,
    ),
    "adapter": PetType(
        "BOTTLENECK_ADAPTER",
        {"bottleneck_size": ("bottleneck_size", 64), "non_linearity": ("non_linearity", "gelu")},
    ),
    "low_rank_adapter": PetType(
        "LOW_RANK_ADAPTER",
        {
            "reduction_factor": ("reduction_factor", 1),
            "low_rank_size": ("low_rank_size", 1),
            "low_rank_w_init": ("low_rank_w_init", "xavier_uniform"),
            "non_linearity": ("non_linearity", "gelu"),
        },
    ),
    "bitfit": PetType("BITFIT", {}),
}


def from_pet_config(source: Mapping[str, Any] | str | os.PathLike, model: nn.Cell | None = None) -> PeftConfig:
    """The config that a `pet_config` of MindFormers describes.

    Args:
        source: the `pet_config` itself; or what holds one: a run configuration, as a dict, a YAML text or a file.
        model: the network. `target_modules` is resolved to its layers then: the dense layers that MindFormers would
            take, without the output head. Without it, a regex says the same of the layers' names; `freeze_exclude`
            cannot be understood without it, unless it asks for biases.

    Raises:
        ConfigError: no or several `pet_config`, an unknown `pet_type` (MindFormers trains nothing then, with no more
            than a line in the log), unknown keys, which are named, a bad value, or a broken file.

    Warns:
        PeftWarning: a key that has no counterpart has another value than its default; or the run configuration saves
            the strategies of trainable parameters alone.
    """
    settings, sizes = _found(_read(source))
    name = settings.get("pet_type")
    if name not in PET_TYPES:
        raise ConfigError(f"pet_config has pet_type={name!r}; it must be one of {sorted(PET_TYPES)}.")
    kind = PET_TYPES[str(name)]
    _check_keys(settings, kind, str(name))
    for key, (passed, text) in kind.without.items():
        if settings.get(key) not in passed:
            warnings.warn(f"pet_config has {key}={settings[key]!r}, which is left out: {text}.", PeftWarning, 2)
    given = {ours: _or(settings.get(key), default) for key, (ours, default) in kind.fields.items()}
    if kind.targeted:
        given |= _targets(settings, model)
    else:
        given |= {ours: sizes[key] for key, ours in _MODEL_SIZES.items() if sizes.get(key) is not None}
    return PeftConfig.from_dict({"peft_type": kind.peft_type, **given, **kind.fixed}, origin="pet_config")


def to_pet_config(config: PeftConfig) -> Plain:
    """The `pet_config` block that says what `config` does.

    Raises:
        ConfigError: MindFormers has no such method, or `config` says what a `pet_config` cannot; all such fields are
            named.
    """
    fitting = [(name, kind) for name, kind in PET_TYPES.items() if _fits(kind, config)]
    if not fitting:
        known = sorted({kind.peft_type for kind in PET_TYPES.values()})
        raise ConfigError(f"{config.peft_type} has no pet_config; {', '.join(known)} have.")
    name, kind = fitting[0]
    said = {ours for ours, _ in kind.fields.values()} | set(kind.fixed) | set(_MODEL_SIZES.values())
    said |= {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "auto_mapping", "revision"}
    said |= {"inference_mode", "fan_in_fan_out", "target_modules", "exclude_modules"} | ({"bias"} & _names(config))
    plain = type(config)()
    unsaid = [f.name for f in fields(config) if f.name not in said and _differs(config, plain, f.name)]
    if unsaid:
        raise ConfigError(
            f"A pet_config of type {name!r} cannot say {', '.join(unsaid)}: "
            f"{ {key: getattr(config, key) for key in unsaid} }. Take these out first."
        )
    found: Plain = {"pet_type": name} | {key: getattr(config, ours) for key, (ours, _) in kind.fields.items()}
    if not kind.targeted:
        return found
    targets, excluded = getattr(config, "target_modules", None), getattr(config, "exclude_modules", None)
    if targets is not None:
        found["target_modules"] = _by_name("target_modules", targets, _TARGET)
    if excluded is not None:
        found["exclude_layers"] = [_by_name("exclude_modules", excluded, _SUBTREE)]
    if getattr(config, "bias", "none") == "all":
        found["freeze_exclude"] = ["*bias"]
    return found


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(source: Any) -> Plain:
    """A mapping from a mapping, a YAML text or a file."""
    origin = "the given text"
    if isinstance(source, os.PathLike) or (isinstance(source, str) and "\n" not in source and ":" not in source):
        origin = str(source)
        if not Path(source).is_file():
            raise ConfigError(f"{origin} is no file; a pet_config is a dict, a YAML text, or a file that holds one.")
        source = Path(source).read_text(encoding="utf-8")
    if isinstance(source, str):
        try:
            source = yaml.safe_load(source)
        except yaml.YAMLError as error:
            raise ConfigError(f"{origin} is no valid YAML: {error}") from error
    if not isinstance(source, Mapping):
        raise ConfigError(f"{origin} holds no mapping, so no pet_config, but {type(source).__name__}.")
    return dict(source)


def _found(content: Plain) -> tuple[Plain, Plain]:
    """The pet_config in a mapping, and what stands beside it: the model's own settings."""
    if "pet_type" in content:
        return content, {}
    places = [(holder, holder["pet_config"]) for holder in _mappings(content) if holder.get("pet_config") is not None]
    if len(places) != 1:
        raise ConfigError(f"Found {len(places)} blocks called pet_config where there must be one. Pass that block.")
    holder, settings = places[0]
    if not isinstance(settings, Mapping):
        raise ConfigError(f"pet_config must be a mapping, got {settings!r}")
    strategy = (content.get("parallel") or {}).get("strategy_ckpt_config") or {}
    if strategy and strategy.get("only_trainable_params", True):
        warnings.warn(
            "parallel.strategy_ckpt_config.only_trainable_params is not False: the strategy file then leaves out the "
            "frozen base weights, and MindFormers can neither transform nor merge the checkpoints by it.",
            PeftWarning,
            stacklevel=3,
        )
    return dict(settings), dict(holder)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping in nested data."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)


def _check_keys(settings: Plain, kind: PetType, name: str) -> None:
    unknown = sorted(str(key) for key in set(settings) - kind.keys)
    if unknown:
        near = {key: difflib.get_close_matches(key, kind.keys, 1, 0.5) for key in unknown}
        hints = [f"{key} (did you mean {close[0]}?)" if close else key for key, close in near.items()]
        raise ConfigError(
            f"pet_config of type {name!r} has unknown keys: {', '.join(hints)}. It takes {sorted(kind.keys)}."
        )


# --- targets ---------------------------------------------------------------------------------------------------------

# MindFormers matches the beginning of a child's own name, at each level; a regex of ours is for a whole path.
_TARGET = (r"(.*\.)?(?=(?:", r"))[^.]*")
_SUBTREE = (r"(.*\.)?(?=(?:", r"))[^.]*(\..*)?")


def _targets(settings: Plain, model: nn.Cell | None) -> Plain:
    regex, excluded = settings.get("target_modules"), settings.get("exclude_layers")
    found: Plain = {}
    if regex is not None:
        found["target_modules"] = "".join((_TARGET[0], _inside_a_name("target_modules", regex), _TARGET[1]))
    if excluded:
        pattern = "|".join(_inside_a_name("exclude_layers", item) for item in excluded)
        found["exclude_modules"] = "".join((_SUBTREE[0], pattern, _SUBTREE[1]))
    if model is not None and regex is not None:
        found = {"target_modules": _layers(found, model)}
    return found | _trained_beside(settings, model)


_IN_A_PATH = {".": "[^.]", "$": "(?![^.])", "^": ""}


def _inside_a_name(key: str, regex: Any) -> str:
    """The same regex for a part of a path: its dots match no dots between names, its $ the end of a name.

    Raises:
        ConfigError: it is no str.
    """
    if not isinstance(regex, str):
        raise ConfigError(f"pet_config: {key} must hold regular expressions, got {regex!r}")
    parts, in_class, skip = [], False, False
    for char in regex:
        if skip or char == "\\":
            skip = not skip
        elif char in "[]":
            in_class = char == "["
        elif not in_class:
            char = _IN_A_PATH.get(char, char)
        parts.append(char)
    return "".join(parts)


def _layers(given: Plain, model: nn.Cell) -> list[str]:
    """The paths of the dense layers that the regexes mean in `model`.

    Raises:
        ConfigError: there are none.
    """
    cells, head = outer_cells(model), output_head(model)
    wanted, excluded = (re.compile(given.get(key, "(?!)")) for key in ("target_modules", "exclude_modules"))
    hits = [path for path in cells if wanted.fullmatch(path) and not excluded.fullmatch(path)]
    sites = {path: site_of(cells[path], path) for path in hits if cells[path] is not head}
    paths = [path for path, site in sites.items() if site is not None and site.kind == "dense"]
    if not paths:
        raise ConfigError(
            f"pet_config: no dense layer of {type(model).__name__} has a name that the target_modules match."
        )
    return paths


def _trained_beside(settings: Plain, model: nn.Cell | None) -> Plain:
    """What is trained beside the adapters: biases, or whole layers."""
    frozen, trained = settings.get("freeze_include") or [], settings.get("freeze_exclude") or []
    if frozen:
        raise ConfigError(
            f"pet_config has freeze_include={frozen!r}: all but the adapters is frozen already, and an adapter is "
            "trained as a whole. Leave it out; model.set_requires_grad freezes adapters."
        )
    if not trained:
        return {}
    if trained == ["*bias"]:
        return {"bias": "all"}
    if model is None:
        raise ConfigError(f"pet_config has freeze_exclude={trained!r}: pass the model, to find the layers it means.")
    owners = {
        path
        for path, cell in outer_cells(model).items()
        for name in cell._params
        if any(fnmatchcase(f"{path}.{name}", pattern) for pattern in trained)
    }
    if not owners:
        raise ConfigError(f"pet_config: freeze_exclude={trained!r} matches no parameter of {type(model).__name__}.")
    return {"modules_to_save": sorted(owners)}


def _by_name(key: str, targets: Any, wrap: tuple[str, str]) -> str:
    """A regex for children's own names that means the same layers.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(targets, str) and targets.startswith(wrap[0]) and targets.endswith(wrap[1]):
        return targets.removeprefix(wrap[0]).removesuffix(wrap[1]).replace("(?![^.])", "$").replace("[^.]", ".")
    names = [] if isinstance(targets, str) else sorted(set(targets))
    if not names or any("." in name for name in names):
        raise ConfigError(
            f"{key}={targets!r}: MindFormers matches the names of single layers, so only a list of such names can be "
            "said in a pet_config."
        )
    return "|".join(f"{name}$" for name in names)


# --- comparing -------------------------------------------------------------------------------------------------------


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _names(config: PeftConfig) -> set[str]:
    return {f.name for f in fields(config)}


def _differs(config: PeftConfig, plain: PeftConfig, name: str) -> bool:
    return getattr(config, name) != getattr(plain, name)


def _fits(kind: PetType, config: PeftConfig) -> bool:
    fixed = [(name, value) for name, value in kind.fixed.items() if name != "inference_mode"]
    return kind.peft_type == config.peft_type and all(getattr(config, name) == value for name, value in fixed)
