"""Surgery on trees of Cells, and the names that parameters bear afterwards."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, nn

from msft_peft.backend.arrays import to_numpy, write

# MindSpore's local parameter names -> those of torch modules, which checkpoint files speak.
_TORCH_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "embedding_table": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_NORMS_AND_TABLES = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def get_child(root: nn.Cell, path: str) -> nn.Cell:
    """The cell at a dotted path; the root itself for the empty path."""
    for key in path.split(".") if path else []:
        root = root._cells[key]
    return root


def replace_cells(root: nn.Cell, new: Mapping[int, nn.Cell]) -> None:
    """Put `new[id(cell)]` wherever that cell stands below `root`, in one walk, also where it stands twice.

    Names are not touched: call `refresh_names` after the last edit. `setattr` and `insert_child_to_cell` are of no use
    here: they rename parameters relative to the parent alone, and a `SequentialCell` runs from a list of its own.
    """
    for _, parent in list(root.cells_and_names()):
        hits = {key: new[id(child)] for key, child in parent._cells.items() if id(child) in new}
        parent._cells.update(hits)
        if hits and isinstance(parent, nn.SequentialCell):
            parent.cell_list = list(parent._cells.values())


def owners(root: nn.Cell) -> dict[int, list[str]]:
    """Paths of the cells below `root` that hold each parameter, by its `id`: more than one where weights are tied."""
    found: dict[int, list[str]] = {}
    for path, cell in root.cells_and_names():
        for p in cell._params.values():
            found.setdefault(id(p), []).append(path)
    return found


def inherit_mode(new: nn.Cell, old: nn.Cell) -> None:
    """Set `new` alone to training or evaluation, as `old` is; `set_train` would reach its children too."""
    new.add_flags(training=old.training)
    new._phase = old._phase


def remembered_modes(root: nn.Cell) -> Callable[[], None]:
    """A function that puts `root` and each cell below it back into the mode, training or evaluation, of now."""
    before = [(cell, cell.training, cell._phase) for _, cell in root.cells_and_names()]

    def restore() -> None:
        for cell, training, phase in before:
            cell.add_flags(training=training)
            cell._phase = phase

    return restore


def refresh_names(root: nn.Cell, prefix: str = "") -> None:
    """Make each `p.name` the path of p below `root`; without it optimizers, checkpoints and graphs see duplicates.

    Args:
        root: the outermost cell, or one inside it.
        prefix: what stands before those paths where `root` is not the outermost cell, see `names_prefix`.
    """
    root.update_parameters_name(prefix)
    for _, cell in root.cells_and_names():
        cell._is_check_and_refresh = False


def names_prefix(root: nn.Cell) -> str:
    """What stands before the paths below `root` in the names of its parameters: "base_model." for a Tuner's."""
    for path, p in root.parameters_and_names():
        if p.name.endswith(path):
            return p.name.removesuffix(path)
    return ""


def torch_name(owner: nn.Cell, local: str) -> str:
    """What torch calls the parameter `local` of the stock Cell `owner` (`gamma` -> `weight`); other names are kept."""
    if local == "embedding_weight":  # of MindFormers' embeddings
        return "weight"
    return _TORCH_NAMES.get(local, local) if isinstance(owner, _NORMS_AND_TABLES) else local


def torch_shape(owner: nn.Cell, local: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives this parameter: `nn.Conv1d` stores (out, in, 1, k), torch (out, in, k)."""
    is_conv1d = isinstance(owner, nn.Conv1d) and local == "weight"
    return shape[:2] + shape[3:] if is_conv1d and len(shape) == 4 else shape


class Named(NamedTuple):
    """A parameter, and how torch's files and MindSpore's name it below some root.

    Attributes:
        key, shape: its name and shape in torch's files.
        local: its path here.
        parameter: what holds it. It may be larger than `shape` says: then each of its `blocks` equal parts along the
            first axis begins with the numbers that count, and the rest are zeros (ranks padded for hot swapping).
        turned: it holds the transposed matrix.
        kept: (axis, indices): only these rows or columns are in the file; the others count for nothing.
    """

    key: str
    local: str
    parameter: Parameter
    shape: tuple[int, ...]
    blocks: int = 1
    turned: bool = False
    kept: tuple[int, tuple[int, ...]] | None = None

    def read(self) -> np.ndarray:
        """The numbers in `shape`; a view where nothing is padded."""
        stored = to_numpy(self.parameter)
        if self.kept is not None:
            return np.ascontiguousarray(stored[self._kept()])
        if self.turned:
            return np.ascontiguousarray(stored.T)
        if stored.size == math.prod(self.shape):
            return stored.reshape(self.shape)
        return np.ascontiguousarray(self._framed(stored)[self._corner()]).reshape(self.shape)

    def write(self, array: np.ndarray) -> None:
        """Write numbers of `shape`, in place."""
        if self.kept is not None:
            stored = np.zeros(self.parameter.shape, array.dtype)
            stored[self._kept()] = array
            write(self.parameter, stored)
            return
        if self.turned:
            write(self.parameter, np.ascontiguousarray(array.T))
            return
        if math.prod(self.parameter.shape) == math.prod(self.shape):
            write(self.parameter, array.reshape(self.parameter.shape))
            return
        stored = np.zeros(self.parameter.shape, array.dtype)
        self._framed(stored)[self._corner()] = array.reshape(self._split(self.shape))
        write(self.parameter, stored)

    def _kept(self) -> tuple[Any, ...]:
        assert self.kept is not None
        axis, indices = self.kept
        return (*(slice(None),) * axis, list(indices))

    def _split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.blocks, shape[0] // self.blocks, *shape[1:])

    def _framed(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(self._split(stored.shape))

    def _corner(self) -> tuple[slice, ...]:
        return tuple(slice(size) for size in self._split(self.shape))


def named_parameters(root: nn.Cell, prefix: str = "", tied: bool = False) -> Iterator[Named]:
    """Every parameter below `root`, once: `key` and `shape` as in torch's files, `local` its path here.

    Args:
        root: where to look.
        prefix: stands before the names.
        tied: give a parameter that stands in several places under each of its names, as torch's files have it.
    """
    seen = set()
    for path, cell in root.cells_and_names(name_prefix=prefix):
        for local, p in cell._params.items():
            if p is not None and (tied or id(p) not in seen):
                seen.add(id(p))
                dot = f"{path}." if path else ""
                shape = torch_shape(cell, local, tuple(p.shape))
                yield Named(dot + torch_name(cell, local), dot + local, p, shape)
