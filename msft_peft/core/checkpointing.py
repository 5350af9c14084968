"""Gradient checkpointing: blocks whose activations are recomputed in the backward pass."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
from mindspore import nn

from msft_peft.backend import arguments
from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.recompute import is_recomputed, set_recompute
from msft_peft.backend.tree import get_child
from msft_peft.core.prompt import PREFIX_STATES, prompts_of
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import all_blocks, cell_lists, original

# Their kernels draw from seeds that cannot be set.
_UNREPEATABLE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def set_checkpointing(
    model: nn.Cell, enabled: bool, blocks: str | Sequence[str] | None = None, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Recompute a model's blocks in the backward pass, or keep their activations again.

    Args:
        model: the base model, with or without adapters.
        enabled: which of the two.
        blocks: path of the CellList of blocks, or those of several; looked for if None.
        kwargs: HF's `gradient_checkpointing_kwargs`: at most `use_reentrant`, whose two values give the same numbers.

    Raises:
        ConfigError: no blocks were found, `kwargs` has other keys, the blocks drop whole channels at random, or the
            model has prefixes.
    """
    prompts = prompts_of(model)
    prefixes = [] if prompts is None else [e for e in prompts.held().values() if e.argument == PREFIX_STATES]
    if enabled and prefixes:
        raise ConfigError(f"{prefixes[0].config.peft_type} does not work with gradient checkpointing.")
    unknown = sorted({*arguments.mapping("gradient_checkpointing_kwargs", kwargs or {})} - {"use_reentrant"})
    if unknown:
        raise ConfigError(f"gradient_checkpointing_kwargs: {unknown} mean nothing here; only use_reentrant is known.")
    module = original(model)
    if module is not model and blocks is None:  # it is no Cell: its library knows how to
        module.gradient_checkpointing_enable() if enabled else module.gradient_checkpointing_disable()
        return
    named = [blocks] if isinstance(blocks, str) else blocks
    paths = all_blocks(model) if named is None else arguments.strings("blocks", named)
    lists = cell_lists(model)
    lost = [path for path in paths if path not in lists]
    if lost or not paths:
        where = ", ".join(map(repr, lost)) or "none of the usual places"
        raise ConfigError(
            f"Cannot find the blocks of {type(model).__name__}: no CellList at {where}. Name the list of its blocks "
            f"with blocks=...; it has {lists or 'no CellList at all, so call recompute() on its Cells yourself'}."
        )
    found = [block for path in paths for block in get_child(model, path)]
    cells = [cell for block in found for _, cell in block.cells_and_names()]
    random = sorted({type(cell).__name__ for cell in cells if isinstance(cell, _UNREPEATABLE)})
    if enabled and random:
        raise ConfigError(f"{random} in the blocks would drop other channels when they are computed again.")
    if enabled and ms.get_seed() is None:
        warnings.warn(
            "No seed is set: code that you compile would draw other numbers in ops.dropout when blocks are computed "
            "again, and get wrong gradients. Call mindspore.set_seed(...) before you build the model.",
            PeftWarning,
            stacklevel=3,
        )
    for block in found:
        set_recompute(block, enabled)
    drop_compiled()


def is_checkpointing(model: nn.Cell) -> bool:
    """Whether any Cell of the model is recomputed, or its library does it."""
    theirs = getattr(original(model), "is_gradient_checkpointing", False)
    return bool(theirs) or any(is_recomputed(cell) for _, cell in model.cells_and_names())
