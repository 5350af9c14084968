"""Some blocks of a model run several times, as layers of their own over the same weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from msft_peft.backend.recompute import mark_again
from msft_peft.backend.tree import get_child, replace_cells
from msft_peft.core.wrapper import outer_cells
from msft_peft.errors import ConfigError
from msft_peft.hosts import PLACES, blocks_path


@dataclass(frozen=True)
class Blocks:
    """Another list of blocks for a model.

    Attributes:
        path: where the list stands.
        ranges: which blocks of the old list make the new one.
        cells: the new list. A block's first occurrence is the block itself, further ones are copies of its Cells that
            hold the same Parameters.
    """

    path: str
    ranges: tuple[tuple[int, int], ...]
    cells: nn.CellList

    def seen(self, model: nn.Cell) -> dict[str, nn.Cell]:
        """`outer_cells` of the model as it will be."""
        found: dict[str, nn.Cell] = {}
        for path, cell in outer_cells(model).items():
            if path == self.path:
                found[path] = self.cells
                found |= {f"{path}.{inner}": c for inner, c in outer_cells(self.cells).items()}
            elif not path.startswith(self.path + "."):
                found[path] = cell
        return found

    def put_into(self, model: nn.Cell) -> None:
        old = get_child(model, self.path)
        model.peft_replicated = (self.ranges, self.path, old)
        replace_cells(model, {id(old): self.cells})
        _say_length(model, len(self.cells))


def replicated(model: nn.Cell, ranges: Sequence[Sequence[int]] | None, adapters: int) -> Blocks | None:
    """The blocks that `ranges` ask for; None if the model has them already, or none are asked for.

    Args:
        model: the base model, which stays as it is.
        ranges: [start, end) pairs of block indices, one after the other: [[0, 4], [2, 5]] runs blocks 2 and 3 twice.
        adapters: number of adapters that are in the model.

    Raises:
        ConfigError: the model has no known list of blocks, a range lies outside it, or other adapters in the model
            were made for other blocks, those included that have been deleted since.

    Source: HF peft's `layer_replication`; Kim et al. 2023, arXiv:2312.15166 (depth up-scaling).
    """
    wanted = tuple((int(start), int(end)) for start, end in ranges or ())
    there = getattr(model, "peft_replicated", ((),))[0]
    if wanted == there:
        return None
    if adapters or there:
        raise ConfigError(
            f"layer_replication={[list(r) for r in wanted]}: the adapters in the model were made for "
            f"{[list(r) for r in there] or 'its own blocks'}. All adapters of a model have the same blocks; call "
            "`.unload()` to begin anew."
        )
    path = blocks_path(model)
    if path is None:
        raise ConfigError(
            "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible "
            f"architectures: a CellList at one of {', '.join(PLACES)}."
        )
    blocks = list(get_child(model, path))
    wrong = [list(r) for r in wanted if not 0 <= r[0] < r[1] <= len(blocks)]
    if wrong:
        raise ConfigError(f"layer_replication: {wrong} are no ranges [start, end) of {path}, which has {len(blocks)}.")
    new: list[nn.Cell] = []
    for start, end in wanted:
        for block in blocks[start:end]:
            new.append(_twin(block) if any(block is other for other in new) else block)
    return Blocks(path, wanted, nn.CellList(new, auto_prefix=False))


def restore_blocks(model: nn.Cell) -> None:
    """Put a model's own list of blocks back."""
    if not hasattr(model, "peft_replicated"):
        return
    _, path, old = model.peft_replicated
    replace_cells(model, {id(get_child(model, path)): old})
    _say_length(model, len(old))
    del model.peft_replicated


def _twin(block: nn.Cell) -> nn.Cell:
    """A copy that holds the same Parameters."""
    mark_again(block)  # what MindSpore's own `recompute` leaves in a block cannot be copied
    return copy.deepcopy(block, {id(p): p for p in block.get_parameters()})


def _say_length(model: nn.Cell, length: int) -> None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = length
