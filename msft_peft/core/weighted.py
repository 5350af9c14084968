"""What every method needs that makes an adapter of others."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real

from mindspore import nn

from msft_peft.backend import arguments
from msft_peft.backend.tree import names_prefix
from msft_peft.core import inject
from msft_peft.core.adapter import Adapter, adapter_in, configs_of
from msft_peft.core.tuner import Tuner
from msft_peft.core.wrapper import copy_of
from msft_peft.errors import AdapterNameError, ConfigError


def parts_of(model: nn.Cell, adapters: Sequence[str], weights: Sequence[float], name: str) -> list[Adapter]:
    """The adapters that a new one, called `name`, is to be made of.

    Raises:
        AdapterNameError: the new name is taken, or an adapter is not there.
        ConfigError: not a finite weight for each.
    """
    there = configs_of(model)
    if arguments.adapter_name(name) in there:
        raise AdapterNameError(f"Adapter with name '{name}' already exists.")
    if isinstance(adapters, str) or not adapters:
        raise AdapterNameError(f"`adapters` must be a list of the adapters to combine, got {adapters!r}")
    for one in arguments.adapter_names(adapters):
        if one not in there:
            raise AdapterNameError(f"Adapter {one} does not exist. There are {sorted(there)}.")
    if not isinstance(weights, Collection) or not all(isinstance(weight, Real) for weight in weights):
        raise ConfigError(f"`weights` must be a list with a number for each adapter, got {weights!r}")
    if len(weights) != len(adapters):
        raise ConfigError(f"There must be a weight for each adapter: got {len(weights)} for {len(adapters)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"The weights must be finite numbers, got {list(weights)}")
    return [adapter_in(model, one) for one in adapters]


def whole_modules(parts: Sequence[Adapter]) -> dict[str, nn.Cell]:
    """The layers that one of the parts trains whole.

    Raises:
        ConfigError: two of them train the same one.
    """
    by_path: dict[str, dict[str, nn.Cell]] = {}
    for part in parts:
        for path, module in part.modules.items():
            by_path.setdefault(path, {})[part.name] = module
    clashes = sorted(path for path, held in by_path.items() if len(held) > 1)
    if clashes:
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(clashes)} such instance(s): {', '.join(clashes)}."
        )
    return {path: module for path, held in by_path.items() for module in held.values()}


def union_of(parts: Sequence[Adapter], field: str) -> list[str] | str:
    """The union of what the parts' configs name in a field, `target_modules` for instance.

    Raises:
        ConfigError: some are lists and some are regexes.
    """
    targets = [getattr(part.config, field) or [] for part in parts]
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in targets)
    if any(isinstance(target, str) for target in targets):
        raise ConfigError(
            f"all adapter configs should follow the same target modules type. Combining adapters with `{field}` "
            "type being a mix of list/set and string is not supported."
        )
    return sorted({name for target in targets for name in target})


def put_beside(tuner: Tuner, made: Adapter, modules: Mapping[str, nn.Cell]) -> None:
    """Put the new adapter in, inactive and frozen, with copies of the layers that its parts train whole."""
    made = replace(made, modules={path: copy_of(module) for path, module in modules.items()})
    prefix = names_prefix(tuner)
    inject.attach(tuner.model, made)
    inject.settle(tuner, prefix)
