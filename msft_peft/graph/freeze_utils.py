"""Which parameters of a network are trained, by their names."""

import os
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import yaml
from mindspore import Parameter, nn

from msft_peft.backend.arrays import FLOAT_DTYPES
from msft_peft.backend.graphs import drop_compiled
from msft_peft.errors import PeftWarning
from msft_peft.graph.exceptions import (
    BrokenYamlError,
    FreezeArgumentError,
    FreezeListError,
    FreezeModeError,
    FreezeTypeError,
    ModelConfigFreezeInfoError,
    ReadYamlFileError,
)

# What is trained in each mode.
_DELTA = ("lora", "prefixtuning", "adapter", "low_rank_adapter", "ptuning2")
_PATTERNS = {name: f"*mindpet_delta_{name}*" for name in _DELTA} | {"bitfit": "*bias"}
# Running averages, which no gradient reaches.
_STATISTICS = ("moving_mean", "moving_variance")


def freeze_modules(model: nn.Cell, include: list[str] | None = None, exclude: list[str] | None = None) -> None:
    """Freeze the parameters that match `include`, and unfreeze those that match `exclude`.

    A pattern is matched with a parameter's whole path; `*` stands for any string: `*`, `*dense*`, `*.dense.*.bias`. A
    parameter that matches both lists is left as it is. Build the optimizer afterwards.

    Args:
        model: the network.
        include: patterns of what to freeze.
        exclude: patterns of what to train; integers and running averages stay frozen.

    Raises:
        FreezeTypeError (TypeError): `model` is no Cell.
        FreezeArgumentError (ValueError): neither list is given.
        FreezeListError (TypeError): a list is empty, no list, or holds something else than strings.

    Warns:
        PeftWarning: a pattern matches nothing.
    """
    _check_model(model)
    if include is None and exclude is None:
        raise FreezeArgumentError("freeze_modules: `include` and `exclude` cannot both be None: say what to freeze.")
    _check_list("include", include)
    _check_list("exclude", exclude)
    parameters = list(model.parameters_and_names())
    frozen, trained = _matching(parameters, include), _matching(parameters, exclude)
    _set(parameters, frozen - trained, trained - frozen)


def freeze_delta(
    model: nn.Cell, mode: str, include: list[str] | None = None, exclude: list[str] | None = None
) -> None:
    """Freeze all but the parameters of a fine-tuning algorithm; then apply `freeze_modules(include, exclude)`.

    BitFit beside another algorithm is `freeze_delta(model, "lora", exclude=["*bias"])`; a new head is trained by
    `exclude=["*head*"]`.

    Args:
        model: the network, with delta Cells in it.
        mode: "lora", "prefixtuning", "adapter", "low_rank_adapter", "ptuning2", in any case, or "bitfit" (all that
            ends with "bias"; the `beta` of a LayerNorm is added by `exclude=["*beta"]`). R-Drop is a loss: it has no
            parameters, hence no mode.
        include: patterns of what to freeze in addition.
        exclude: patterns of what to train in addition.

    Raises:
        FreezeTypeError (TypeError): `model` is no Cell.
        FreezeModeError (ValueError): an unknown mode.
        FreezeListError (TypeError): as of `freeze_modules`; nothing is frozen then.

    Warns:
        PeftWarning: the network has no parameters of that algorithm, or a pattern matches nothing.

    Differs: MindPet leaves the algorithm's own parameters as they are, so that those which were frozen stay frozen;
    and with a mode like "LoRA" it freezes them too.
    """
    _check_model(model)
    known = mode.lower() if isinstance(mode, str) else mode
    if not isinstance(known, str) or known not in _PATTERNS:
        hint = " R-Drop is a loss, without parameters: use it with any of these." if known in _NO_MODES else ""
        raise FreezeModeError(f"freeze_delta: mode must be one of {sorted(_PATTERNS)}, got {mode!r}.{hint}")
    _check_list("include", include)
    _check_list("exclude", exclude)
    parameters = list(model.parameters_and_names())
    own = {path for path, _ in parameters if fnmatchcase(path, _PATTERNS[known])}
    if not own:
        warnings.warn(
            f"freeze_delta: mode={mode!r} freezes every parameter but those called {_PATTERNS[known]!r}, and "
            f"{type(model).__name__} has none. Put the delta Cells in first.",
            PeftWarning,
            stacklevel=2,
        )
    frozen, trained = _matching(parameters, include), _matching(parameters, exclude)
    everything = {path for path, _ in parameters}
    trainable = (own - (frozen - trained)) | (trained - frozen)
    _set(parameters, everything - trainable, trainable)


_NO_MODES = ("r_drop", "rdrop", "r-drop")


def freeze_from_config(model: nn.Cell, config_path: str) -> None:
    """Apply `freeze_modules` with the lists in a YAML file.

    The file holds `freeze:`, below it `include:`, `exclude:`, or both, each a list of patterns.

    Args:
        model: the network.
        config_path: the file.

    Raises:
        FreezeTypeError (TypeError): `model` is no Cell, or the path no string.
        ReadYamlFileError: there is no such file, it is a link, or (a BrokenYamlError) no YAML.
        ModelConfigFreezeInfoError: it has no `freeze`, or that is empty, no mapping, or has other keys.
        FreezeListError (TypeError): as of `freeze_modules`.

    Differs: MindPet refuses a file with one of the lists alone.
    """
    _check_model(model)
    if not isinstance(config_path, str):
        raise FreezeTypeError(f"freeze_from_config: config_path must be a string, got {type(config_path).__name__}")
    content = _read_yaml(config_path)
    if not isinstance(content, dict) or "freeze" not in content:
        raise ModelConfigFreezeInfoError(f"{config_path}: the key 'freeze' is missing; below it come the lists.")
    lists = content["freeze"]
    if not isinstance(lists, dict) or not lists:
        raise ModelConfigFreezeInfoError(
            f"{config_path}: 'freeze' must hold 'include', 'exclude' or both, got {lists!r}"
        )
    unknown = sorted(str(key) for key in set(lists) - {"include", "exclude"})
    if unknown:
        raise ModelConfigFreezeInfoError(
            f"{config_path}: 'freeze' has the keys {unknown}; it takes 'include' and 'exclude' only."
        )
    freeze_modules(model, **lists)


def _read_yaml(path: str) -> Any:
    if os.path.islink(path):
        raise ReadYamlFileError(f"{path} is a link, which is not followed: name the file itself.")
    if not os.path.isfile(path):
        raise ReadYamlFileError(f"{path} is no file.")
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BrokenYamlError(f"{path} is no valid YAML: {error}") from error


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Cell):
        raise FreezeTypeError(f"model must be a Cell, got {type(model).__name__}")


def _check_list(name: str, patterns: Any) -> None:
    if patterns is None:
        return
    if not isinstance(patterns, list) or not patterns or not all(isinstance(item, str) for item in patterns):
        raise FreezeListError(f"`{name}` must be a list of patterns, not an empty one, got {patterns!r}")


def _matching(parameters: Iterable[tuple[str, Parameter]], patterns: list[str] | None) -> set[str]:
    """The paths that any of the patterns matches."""
    found: set[str] = set()
    for pattern in patterns or ():
        hits = {path for path, _ in parameters if fnmatchcase(path, pattern)}
        if not hits:
            warnings.warn(
                f"{pattern!r} matches no parameter of the network; it must match a whole path, with * for any string.",
                PeftWarning,
                stacklevel=3,
            )
        found |= hits
    return found


def _set(parameters: Iterable[tuple[str, Parameter]], frozen: set[str], trained: set[str]) -> None:
    for path, p in parameters:
        if path in frozen:
            p.requires_grad = False
        elif path in trained and p.dtype in FLOAT_DTYPES and not path.endswith(_STATISTICS):
            p.requires_grad = True
    # A compiled step goes on with the gradients that it was compiled for.
    drop_compiled()
