"""Which cells of a model a config means."""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mindspore import nn

from msft_peft.config import TargetedConfig
from msft_peft.core.layer import site_of
from msft_peft.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning
from msft_peft.hosts import Site, model_config, output_head
from msft_peft.registry import Method

ALL_LINEAR = "all-linear"
# Heads of classification models, which "all-linear" leaves alone since they are trained whole.
CLASSIFIER_NAMES = ("classifier", "score")

T = TypeVar("T")


def match_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that is `path`, the end of it from a dot on, or a regex for either."""
    for pattern, value in patterns.items():
        if _pattern_matches(pattern, path):
            return value
    return default


def matches_name(path: str, names: Iterable[str]) -> bool:
    """Whether `path` is one of `names`, or ends with one of them from a dot on."""
    return any(path == name or path.endswith("." + name) for name in names)


def resolve_targets(
    config: TargetedConfig, method: Method, model: nn.Cell, cells: Mapping[str, nn.Cell]
) -> list[str] | str:
    """`config.target_modules` with "all-linear" and None replaced by what they stand for in `model`.

    Args:
        config: says what is wanted.
        method: has the usual targets.
        model: the base model.
        cells: every cell of it that could be meant, by dotted path.

    Raises:
        ConfigError: none given, and no usual targets are known for the model's architecture.
    """
    targets = config.target_modules
    if targets is None:
        model_type = str(model_config(model).get("model_type"))
        targets = method.default_targets.get(model_type)
        if method.find_targets is not None:
            targets = method.find_targets(config, model, _sites(cells, model))
        if targets is None and getattr(config, "target_parameters", None):
            return []
        if targets is None:
            sites = {path: site for path, site in _sites(cells, model).items() if site.kind in method.patches}
            raise ConfigError(
                f"Please specify `target_modules` in `peft_config`: no default is known for {type(model).__name__} "
                f"(model_type={model_type!r}). Its layers that {method.name} can adapt: {_summary(sites)}."
            )
        if targets != ALL_LINEAR:
            return targets if isinstance(targets, str) else list(targets)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        head = output_head(model)
        heads = CLASSIFIER_NAMES if head is None and config.task_type == "SEQ_CLS" else ()
        dense = [path for path, site in _sites(cells, model).items() if site.kind == "dense"]
        return [path for path in dense if cells[path] is not head and path not in heads]
    return targets


def is_bypassed(path: str, cells: Mapping[str, nn.Cell], model: nn.Cell) -> bool:
    """Whether the Cell around a layer reads its weight and never calls it: a wrapper there would do nothing."""
    outer = path.rpartition(".")[0]
    return isinstance(cells.get(outer) if outer else model, nn.MultiheadAttention)


def match_targets(config: TargetedConfig, cells: Mapping[str, nn.Cell]) -> list[str]:
    """The paths among `cells` that `config` targets, in network order.

    Args:
        config: its `target_modules` resolved (a list or a regex). None are needed where it targets parameters.
        cells: every cell that could be meant, by dotted path.

    Raises:
        NoMatchingPeftModuleError: nothing matched (the nearest names are given), or all that did was excluded.
    """
    if not config.target_modules and getattr(config, "target_parameters", None):
        return []
    wanted = [path for path in cells if _is_wanted(config, path)]
    kept = [path for path in wanted if not _is_excluded(config, path)]
    if wanted and not kept:
        raise NoMatchingPeftModuleError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` and "
            f"`modules_to_save` configuration: {len(wanted)} modules matched, {_shorten(wanted)}."
        )
    if not kept:
        raise NoMatchingPeftModuleError(_no_match(config, cells))
    if config.exclude_modules and not any(is_named(config.exclude_modules, path) for path in cells):
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            PeftWarning,
            stacklevel=2,
        )
    parameters = getattr(config, "target_parameters", None) or []
    for field in config.patterned:
        patterns = sorted(getattr(config, field, {}))
        unmatched = [p for p in patterns if not any(_pattern_matches(p, path) for path in [*kept, *parameters])]
        if unmatched:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )
    return kept


def _pattern_matches(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def is_named(targets: Sequence[str] | str, path: str) -> bool:
    """Whether a path is among `targets`: matched whole by a regex, or equal to a name of a list or ending with one."""
    return re.fullmatch(targets, path) is not None if isinstance(targets, str) else matches_name(path, targets)


def _is_wanted(config: TargetedConfig, path: str) -> bool:
    targets = config.target_modules or []
    if isinstance(targets, str) or config.layers_to_transform in (None, []) or path in targets:
        return is_named(targets, path)  # a whole path says which layer it means
    return matches_name(path, targets) and _layer_index(config, path) in _as_list(config.layers_to_transform)


def _layer_index(config: TargetedConfig, path: str) -> int | None:
    """The index of the block that holds `path`: the first number in it, so that experts' numbers do not count."""
    for pattern in _as_list(config.layers_pattern) or [r"[^.]*"]:
        prefix = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        found = re.match(rf"{prefix}{pattern}\.(\d+)\.", path)
        if found:
            return int(found.group(1))
    return None


def _is_excluded(config: TargetedConfig, path: str) -> bool:
    if config.exclude_modules and is_named(config.exclude_modules, path):
        return True
    # A layer that is trained whole, and all inside it, cannot carry an adapter as well.
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in config.modules_to_save or [])


def _no_match(config: TargetedConfig, cells: Mapping[str, nn.Cell]) -> str:
    targets = config.target_modules
    text = f"Target modules {targets!r} not found in the base model: they match none of its {len(cells)} modules. "
    if config.layers_to_transform not in (None, []):
        text += (
            f"layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} were "
            "applied as well. "
        )
    if not isinstance(targets, str):
        leaves = sorted({path.rpartition(".")[2] for path in cells})
        near = {n for t in targets or [] for n in difflib.get_close_matches(t.rpartition(".")[2], leaves, 3, 0.5)}
        if near:
            text += f"Nearest names: {', '.join(sorted(near))}. "
    else:
        text += "A string is a regex that must match a module's whole path; for a plain name, pass a list. "
    return text + "Please check the target modules and try again, or pass 'all-linear'."


def _sites(cells: Mapping[str, nn.Cell], model: nn.Cell) -> dict[str, Site]:
    found = {path: site_of(cell, path) for path, cell in cells.items() if not is_bypassed(path, cells, model)}
    return {path: site for path, site in found.items() if site is not None}


def _summary(sites: Mapping[str, Any]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in sites})) or "none"


def _shorten(paths: Sequence[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (", ..." if len(paths) > most else "")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]
