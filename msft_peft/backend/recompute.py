"""Recomputation: what a block computed on the way forward is computed again on the way back, and not kept.

In PyNative this is done by a cell that calls the block's `construct` under MindSpore's own recomputation, made afresh
for each call; in compiled code by marks that the compiler reads. `Cell.recompute` sets both, once and for all: it
notes the block's trainable parameters, and leaves those without a gradient that become trainable later. So an adapter
that is put into such a block would not learn, silently; hence `mark_again`.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common._register_for_recompute import recompute_registry

from msft_peft.backend.noise import SeededNormal

_MARK = "recompute_"
# Not by `import`: the package has a function of that name too.
_seeds: Any = importlib.import_module("mindspore.common.seed")


class _Call(nn.Cell):
    """One call of a block, as a function of tensors alone: gradients reach those in tuples, lists and dicts too."""

    def __init__(self, block: nn.Cell, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(auto_prefix=False)
        self.tensors: list[Tensor] = []
        # In a tuple, so that the block is no child of this cell and keeps its parameters' names.
        self.parts = (block, _taken(args, self.tensors), _taken(kwargs, self.tensors))
        self.seeds = _Seeds(block)

    def construct(self, *tensors: Tensor) -> Any:
        block, args, kwargs = self.parts
        with self.seeds.replayed():
            return block.construct(*_given(args, tensors), **_given(kwargs, tensors))

    def trainable_params(self, recurse: bool = True) -> list:
        return self.parts[0].trainable_params(recurse)

    def get_mixed_precision_type(self) -> Any:
        return self.parts[0].get_mixed_precision_type()


class _Seeds:
    """The random numbers of a call, so that its repetition draws the same.

    `ops.dropout` and other functions take a new seed at each call, which depends on how many there were. The kernels
    of `nn.Dropout` and `SeededNormal` go on drawing from where they were, and no one can ask them where: so such cells
    call a function here.
    What draws from MindSpore's default generator (`mint`) is repeated by MindSpore.
    """

    def __init__(self, block: nn.Cell) -> None:
        self.drawing = [cell for _, cell in block.cells_and_names() if type(cell) in _REPEATABLE]
        seed = _seeds._GLOBAL_SEED
        # Without a seed kernels draw one that nobody can ask for: then this call has one of its own.
        self.own = seed is None
        self.start = (int(np.random.default_rng().integers(1, 2**31 - 1)) if self.own else seed, _counts())
        self.ran = False

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """What is drawn inside the block is the same each time; from the second time on, nothing outside notices."""
        before = _seeds._GLOBAL_SEED, _seeds._KERNEL_SEED
        again, self.ran = self.ran or self.own, True
        if again:
            _seeds._GLOBAL_SEED, _seeds._KERNEL_SEED = self.start[0], dict(self.start[1])
        for cell in self.drawing:
            cell.__dict__["construct"] = functools.partial(_REPEATABLE[type(cell)], cell)
        try:
            yield
        finally:
            for cell in self.drawing:
                del cell.__dict__["construct"]
            if again:
                _seeds._GLOBAL_SEED, _seeds._KERNEL_SEED = before


def _counts() -> dict:
    """How often each kernel has taken a seed."""
    return dict(_seeds._KERNEL_SEED)


def _drop(cell: nn.Dropout, x: Tensor) -> Tensor:
    return ops.dropout(x, _rate(cell), cell.training)


def _draw(cell: SeededNormal, like: Tensor) -> Tensor:
    return ops.standard_normal(like.shape)


# How a cell draws by functions that can be repeated.
_REPEATABLE = {nn.Dropout: _drop, SeededNormal: _draw}


def _rate(cell: nn.Dropout) -> float:
    return 1.0 - cell.keep_prob if cell.p is None else cell.p


class _Place:
    """Where a tensor stood."""

    def __init__(self, index: int) -> None:
        self.index = index


def _taken(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with places instead of tensors; those are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _taken(inner, tensors) for key, inner in value.items()}
    return type(value)([_taken(inner, tensors) for inner in value]) if type(value) in (tuple, list) else value


def _given(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The inverse of `_taken`."""
    if isinstance(value, _Place):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _given(inner, tensors) for key, inner in value.items()}
    return type(value)([_given(inner, tensors) for inner in value]) if type(value) in (tuple, list) else value


class _Recomputation:
    """What PyNative calls in a block's place."""

    def __init__(self, block: nn.Cell) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self.block, args, kwargs)
        if not call.tensors:
            return self.block.construct(*args, **kwargs)
        return recompute_registry.get()(call.construct)(*call.tensors)


def is_recomputed(block: nn.Cell) -> bool:
    """Whether `set_recompute`, or the user's own `Cell.recompute`, was called on this very cell."""
    return block._recompute_cell is not None


def set_recompute(block: nn.Cell, wanted: bool) -> None:
    """Switch the recomputation of a block on or off. Compiled graphs do not see it: drop them."""
    block._cells.pop("_recompute_cell", None)  # where MindSpore puts its own, as a child
    for _, cell in block.cells_and_names():
        cell._has_config_recompute = False
        if cell._scope is not None and cell._scope.startswith(_MARK):
            cell._scope = cell._scope.removeprefix(_MARK) or None
        if wanted and type(cell) is nn.Dropout and not cell.dropout.Seed0 and not cell.dropout.Seed1:
            # With no seed the two kernels in compiled code, of the forward pass and of its repetition, would differ.
            first, second = np.random.default_rng().integers(1, 2**31 - 1, 2).tolist()
            cell.dropout = ops.Dropout(1.0 - _rate(cell), first, second)
    if wanted:
        block._recompute(True, False)
    block.__dict__["_recompute_cell"] = _Recomputation(block) if wanted else None


def mark_again(root: nn.Cell) -> None:
    """Bring all recomputed blocks below `root` up to date with what was put into them since."""
    for _, cell in list(root.cells_and_names()):
        # A user's `recompute(use_reentrant=False)` holds a function, which notes no parameters.
        if isinstance(cell._recompute_cell, nn.Cell | _Recomputation):
            set_recompute(cell, True)
