"""Methods: what each PEFT method is, said once, in its own file, as data."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, cast

from msft_peft.config import PeftConfig
from msft_peft.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A PEFT method. The module-level `METHOD` in the method's own file is its registration; nothing else is.

    Attributes:
        config: its config class, which names the method (`peft_type`).
        patches: its Patch class for each kind of layer that it can work on.
        prompt: for a method without Patches, the `core.prompt.VirtualTokens` that it puts before the input.
        shared: a `core.patch.Shared`: weights that all Patches of an adapter read.
        variants: other Patch classes by kind of layer, by the name of the variant (`config.variant`).
        default_targets: usual target layers by the base model's `model_type`.
        settle: (copied config, the base model's config) -> None: fills in what depends on the architecture.
        choose: (config, the paths of its targets, in network order) -> those of them to adapt.
        find_targets: (config, the base model, Sites by path) -> the targets of a config that names none, or None where
            they are not known; in the place of `default_targets`.
        identity_at_init: a fresh adapter leaves the model's outputs as they are.
        merges: its weights can be folded into the base weights.
        mixed: may be active beside another method in one model.
        extras: (model, config, its cells by path, Patches at the targets, paths of tied embeddings, autocast,
            low_cpu_mem_usage) -> Patches beside those at the targets or in their place, by path.
        tuner: the class of `PeftModel.base_model`, a `core.tuner.Tuner`, where the method has calls of its own.
        pack, unpack: (config, arrays by key) -> the same as the safetensors file holds them, and back, where that is
            another form. `unpack` may also correct the config that came with the arrays.
    """

    config: type[PeftConfig]
    patches: Mapping[str, type] = field(default_factory=dict)
    prompt: type | None = None
    shared: type | None = None
    variants: Mapping[str, Mapping[str, type]] = field(default_factory=dict)
    default_targets: Mapping[str, list[str] | str] = field(default_factory=dict)
    settle: Callable[[Any, Mapping[str, Any]], None] | None = None
    choose: Callable[[Any, list[str]], list[str]] | None = None
    find_targets: Callable[..., list[str] | str | None] | None = None
    identity_at_init: bool = True
    merges: bool = True
    mixed: bool = False
    extras: Callable[..., dict[str, Any]] | None = None
    tuner: type | None = None
    pack: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    unpack: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """The method's `peft_type`, "LORA" for instance."""
        return str(self.config.peft_type)

    def patches_for(self, config: PeftConfig) -> Mapping[str, type]:
        """The Patch class for each kind of layer that this config asks for."""
        return self.variants.get(getattr(config, "variant", ""), self.patches)


METHODS: dict[str, Method] = {}


def discover(package: ModuleType) -> None:
    """Register the METHOD of every module of `package`.

    Raises:
        ConfigError: two methods have the same name.
    """
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        method = getattr(importlib.import_module(info.name), "METHOD", None)
        if method is None:
            continue
        if METHODS.get(method.name, method) is not method:
            raise ConfigError(f"two methods are called {method.name}: the second is in {info.name}")
        METHODS[method.name] = method


def method_of(config: PeftConfig) -> Method:
    """The method that `config` configures.

    Raises:
        ConfigError: it is no config of a registered method.
    """
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
    if config.peft_type not in METHODS:
        raise ConfigError(f"peft_type={config.peft_type!r} is not available; available are {sorted(METHODS)}")
    return METHODS[config.peft_type]


def peft_types() -> type[Enum]:
    """`PeftType`: the names of the registered methods, each equal to its string."""
    names = {name: name for name in sorted(METHODS)}
    found = cast("type[Enum]", Enum("PeftType", names, type=str))
    found.__doc__ = "The PEFT methods that this version has; `PeftType.LORA == 'LORA'`."
    return found


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A config object from a dict that holds a `peft_type`.

    Raises:
        ConfigError: no or an unknown `peft_type`, or a bad value.
    """
    return PeftConfig.from_dict(config_dict)
