"""Which layers the keys of a state dict mean: targets without a word about targets."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from mindspore import nn

from msft_peft.backend.tree import named_parameters
from msft_peft.config import PeftConfig, TargetedConfig
from msft_peft.core.layer import site_of
from msft_peft.core.targets import match_targets, resolve_targets
from msft_peft.core.wrapper import outer_cells
from msft_peft.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning
from msft_peft.hosts import hf_names
from msft_peft.registry import method_of

# Where HF's wrappers put the base model; part of every key in an adapter's files.
PREFIX = "base_model.model."
# And where they put it when there is no tuner in between.
BASE = "base_model."
# Stands before what all layers of an adapter share: it lies beside the base model, and not in it.
BESIDE = "../"


def in_file(prefix: str, key: str) -> str:
    """A key as files have it: "base_model.model." + "up.vera_lambda_b", but "base_model.vera_A" for "../vera_A"."""
    return BASE + key.removeprefix(BESIDE) if key.startswith(BESIDE) else prefix + key


def narrowed(config: PeftConfig, model: nn.Cell, keys: Iterable[str]) -> PeftConfig:
    """The config with the layers that `keys` hold adapter weights of as its targets.

    The config is returned as it is where its own targets are those layers; otherwise there is a warning.

    Args:
        config: its targets may be left out.
        model: the base model.
        keys: of adapter weights, with HF's prefix or without.

    Raises:
        NoMatchingPeftModuleError: no key belongs to a layer of the model.
    """
    if not isinstance(config, TargetedConfig):
        return config
    hf_name = hf_names(model)
    cells, keys = {hf_name(path): cell for path, cell in outer_cells(model).items()}, list(keys)
    paths, strangers = _owners(keys, model, cells)
    if not paths:
        raise NoMatchingPeftModuleError(
            f"None of the {len(keys)} keys in the given state_dict holds a weight of an adapter at a layer of the "
            f"model, {keys[:3]} for instance. Keys are paths of layers with the weight's name: "
            f"'layers.0.q_proj.lora_A.weight', with '{PREFIX}' before it or not."
        )
    own = _own_targets(config, model, cells)
    if own == paths and not strangers:
        return config
    warnings.warn(
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. This is not necessarily an issue and can be ignored if this was the intent. The state_dict wins. "
        f"Layers that only the config names: {sorted(own - paths)}; that only the state_dict names: "
        f"{sorted(paths - own)}; keys that no layer of the model owns: {strangers}.",
        PeftWarning,
        stacklevel=4,
    )
    listed = replace(
        config, target_modules=sorted(paths), exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
    if _own_targets(listed, model, cells) == paths:
        return listed
    # One path may be the end of another: say exactly these.
    return replace(listed, target_modules="|".join(re.escape(path) for path in sorted(paths)))


def _owners(keys: list[str], model: nn.Cell, cells: Mapping[str, nn.Cell]) -> tuple[set[str], list[str]]:
    """The layers that own adapter weights among `keys`, and the keys that nothing owns."""
    base = {named.key for named in named_parameters(model)}
    paths, strangers = set(), []
    for key in keys:
        if key.startswith(BASE) and not key.startswith(PREFIX):
            continue  # what all layers share
        below = key if _owner(key, cells) else key.removeprefix(PREFIX)
        owner = _owner(below, cells)
        if owner and site_of(cells[owner], owner) is not None:
            # A base weight itself (a trained bias, a head that is saved whole) asks for no adapter.
            paths |= set() if below in base or ".base_layer." in below else {owner}
        elif below not in base:
            strangers.append(key)
    return paths, strangers


def _owner(key: str, cells: Collection[str]) -> str:
    """The longest path among `cells` that `key` lies below; empty if there is none."""
    parts = key.split(".")
    ends = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((path for path in ends if path in cells), "")


def _own_targets(config: TargetedConfig, model: nn.Cell, cells: Mapping[str, nn.Cell]) -> set[str]:
    """What the config's own targets match; nothing where they match nothing or there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            method = method_of(config)
            targets = resolve_targets(config, method, model, cells)
            found = match_targets(replace(config, target_modules=targets), cells)
            return set(found if method.choose is None else method.choose(config, found))
        except (ConfigError, NoMatchingPeftModuleError):
            return set()
