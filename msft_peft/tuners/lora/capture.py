"""What flows through layers: their inputs, and the gradients of their weights, by hooks (in PyNative only)."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.tree import remembered_modes
from msft_peft.core.layer import site_of
from msft_peft.core.naming import named_as_in_hf, translate
from msft_peft.core.targets import match_targets, resolve_targets
from msft_peft.core.wrapper import outer_cells
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site, hf_names
from msft_peft.registry import method_of
from msft_peft.tuners.lora.config import LoraConfig


def dense_targets(model: nn.Cell, config: LoraConfig) -> dict[str, Site]:
    """The linear layers of `model` that the config means, by HF's names of them.

    Raises:
        ConfigError: there are none. NoMatchingPeftModuleError: the targets match nothing.
    """
    cells, config = outer_cells(model), copy.copy(config)
    places = named_as_in_hf(cells, hf_names(model))
    seen = {name: cells[path] for name, path in places.items()}
    translate(config, places)
    config.target_modules = resolve_targets(config, method_of(config), model, seen)
    sites = {name: site_of(seen[name], name) for name in match_targets(config, seen)}
    found = {name: site for name, site in sites.items() if site is not None and site.kind == "dense"}
    if not found:
        raise ConfigError(
            f"No linear layer is among target_modules={config.target_modules!r}, and only such are used."
        )
    return found


@contextlib.contextmanager
def in_pynative() -> Iterator[None]:
    """PyNative mode inside the block, and no graph that was compiled outside it."""
    mode = ms.get_context("mode")
    drop_compiled()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)
        drop_compiled()


@contextlib.contextmanager
def watching(cells: Mapping[str, nn.Cell], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block, `see(path, input, output)` after every call of one of the cells."""

    def hook_of(path: str) -> Callable[[nn.Cell, Any, Any], None]:
        def hook(cell: nn.Cell, inputs: Any, output: Any) -> None:
            see(path, inputs[0] if isinstance(inputs, tuple | list) else inputs, output)

        return hook

    handles = [cell.register_forward_hook(hook_of(path)) for path, cell in cells.items()]
    try:
        with in_pynative():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Cell) -> Iterator[None]:
    """Evaluation mode inside the block; each Cell's own mode is restored after it."""
    restore = remembered_modes(model)
    model.set_train(False)
    try:
        yield
    finally:
        restore()


def rows_of(x: Tensor, path: str) -> np.ndarray:
    """A layer's input or output as a matrix, one row a position.

    Raises:
        ConfigError: it holds NaN or infinity.
    """
    rows = as_float32(to_numpy(x)).reshape(-1, x.shape[-1])
    if not np.isfinite(rows).all():
        raise ConfigError(f"Invalid value found in input, please check your input data: NaN or infinity at {path}.")
    return rows


def require_seen(sites: Mapping[str, Any], seen: Mapping[str, int], what: str) -> None:
    """Raise ConfigError if some layers were never called: in a compiled step hooks do not run."""
    missing = [path for path in sites if not seen.get(path)]
    if missing:
        raise ConfigError(
            f"{what} ran, but these layers saw nothing: {missing}. It must call the model itself, in PyNative: hooks "
            "do not run inside ms.jit."
        )
