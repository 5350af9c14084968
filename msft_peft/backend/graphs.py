"""Compiled graphs never notice a changed Python attribute, so every switch must drop them."""

import importlib
from types import ModuleType

import mindspore as ms


def _compiler() -> ModuleType | None:
    """The module that holds MindSpore's caches of compiled graphs: it moved between 2.7 and 2.10."""
    for name in ("mindspore.graph.api", "mindspore.common.api"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "ms_compile_cache") and hasattr(module, "cells_compile_cache"):
            return module
    return None


_COMPILER = _compiler()


def compiled_count() -> int | None:
    """How many graphs this process has compiled and still holds; None where MindSpore does not tell."""
    if _COMPILER is None:
        return None
    return len(_COMPILER.ms_compile_cache) + sum(len(graphs) for graphs in _COMPILER.cells_compile_cache.values())


def drop_compiled() -> None:
    """Forget every compiled graph of the process, a user's own `ms.jit` step included; the next call compiles anew.

    Cost: nothing while nothing is compiled, else 5-95 ms and the recompilation. Not reached: graphs made with
    `capture_mode="bytecode"`.
    """
    if compiled_count() == 0:
        return
    for _ in range(3):
        try:
            ms.ms_memory_recycle()
            return
        except RuntimeError as error:
            # MindSpore walks its table of Cells while the garbage collector may drop one of them: walk again.
            if "changed size" not in str(error):
                raise
    ms.ms_memory_recycle()
