"""Configs speak HF's names of layers; a model whose library has names of its own is found by either."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msft_peft.config import TargetedConfig
from msft_peft.core.targets import ALL_LINEAR, matches_name
from msft_peft.errors import ConfigError

# Names of parameters: each a layer's name and a leaf.
_OF_PARAMETERS = ("target_parameters",)
# Names of layers in lists, some of which may be regexes instead; and as keys of dicts.
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", *_OF_PARAMETERS)
_FIELDS = (*_LISTS, "trainable_token_indices")


def named_as_in_hf(paths: Iterable[str], hf_name: Callable[[str], str]) -> dict[str, str]:
    """What HF calls a layer -> its path, for the layers at these paths."""
    return {hf_name(path): path for path in paths}


def translate(config: TargetedConfig, places: Mapping[str, str]) -> None:
    """Write HF's names into a config that names layers as the model does; what HF's names already match is kept.

    Args:
        config: changed in place.
        places: see `named_as_in_hf`.

    Raises:
        ConfigError: two keys of a dict mean the same layer.
    """
    if all(name == path for name, path in places.items()):
        return
    for field in _FIELDS:
        said = getattr(config, field, None)
        if isinstance(said, str) and said.lower() != ALL_LINEAR:
            hits = [name for name, path in places.items() if re.fullmatch(said, path)]
            if hits and not any(re.fullmatch(said, name) for name in places):
                setattr(config, field, _shortest(hits, 1, places))
        elif isinstance(said, dict):
            setattr(config, field, _with_keys_translated(field, said, places))
        elif field in _LISTS and said and not isinstance(said, str):
            ends = [name.rpartition(".") if field in _OF_PARAMETERS else (name, "", "") for name in said]
            new = [one + dot + leaf for layer, dot, leaf in ends for one in _translated(layer, places)]
            setattr(config, field, list(dict.fromkeys(new)))


def _with_keys_translated(field: str, said: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    pairs = [(new, name) for name in said for new in _translated(name, places)]
    if len(pairs) > len(dict(pairs)):
        names = [new for new, _ in pairs]
        raise ConfigError(f"{field}: two of {list(said)} name the same layer; to HF they are {names}.")
    return {new: said[name] for new, name in pairs}


def _translated(name: str, places: Mapping[str, str]) -> list[str]:
    hits = [hf for hf, path in places.items() if matches_name(path, [name])]
    if not hits or any(matches_name(hf, [name]) for hf in places):
        return [name]
    return _shortest(hits, name.count(".") + 1, places)


def _shortest(hits: list[str], parts: int, places: Mapping[str, str]) -> list[str]:
    """Names of this many parts that match these of HF's names and no others; or the whole names."""
    ends = sorted({".".join(name.split(".")[-parts:]) for name in hits})
    return ends if {name for name in places if matches_name(name, ends)} == set(hits) else sorted(hits)
