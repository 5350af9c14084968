"""MindPet's own package, as far as it still runs.

It imports one module of MindFormers, whose packages import hundreds of others as they begin: here they begin empty.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mindspore import nn, ops


class EmptyPackages:
    """Finds MindFormers' packages without what their `__init__` does; its modules are found as ever."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "mindformers":
            return None
        for folder in path if path is not None else sys.path:
            place = Path(folder) / name.rpartition(".")[2]
            if place.is_dir():
                spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [str(place)]
                return spec
        return None


def is_there() -> bool:
    return all(importlib.util.find_spec(name) for name in ("mindpet", "mindformers"))


def load(name: str) -> ModuleType:
    """A module of MindPet."""
    if not any(isinstance(finder, EmptyPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, EmptyPackages())
    return importlib.import_module(name)


def revived(cell: nn.Cell) -> nn.Cell:
    """A MindPet Cell that runs: Cells had a `cast` of their own once, and its low-rank adapter counts on that."""
    for _, inner in cell.cells_and_names():
        if type(inner).__name__ == "LowRankLinear":
            inner.cast = ops.Cast()
    return cell
