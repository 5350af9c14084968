"""Which adapter serves which row of a batch, and from which token on: numbers that change with no recompilation.

They are Parameters held by a plain object, not by a Cell: compiled code reads their present values, and they are no
part of the model's own parameters.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend.arrays import write

# Rows that one batch may have. The tables have a fixed length, so that compiled code can write into them.
MOST_ROWS = 1024

_numbers = itertools.count()


class Routing:
    """What all adapted layers of one model share in a forward pass.

    Attributes:
        names: the adapters among which the rows of a batch are divided; empty while all rows go through the active
            ones. Compiled code takes it for a constant.
        rows: number of rows that are divided.
        invocation: the token ids from which on the active adapter acts; None if it acts on all tokens.
        layers: the adapted layers, for a Tuner that asks something of all of them in its forward.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        self.names: tuple[str, ...] = ()
        self.rows = 0
        self.invocation: tuple[int, ...] | None = None
        self.layers: tuple[Any, ...] = ()
        self._choice = _table(f"peft_choice_{number}", -1)
        self._starts = _table(f"peft_starts_{number}", 0)
        self._tasks = _table(f"peft_tasks_{number}", -1)

    def __deepcopy__(self, memo: dict) -> "Routing":
        # Compiled code tells Parameters apart by their names: tables of its own.
        twin = memo[id(self)] = Routing()
        twin.invocation, twin.layers = self.invocation, copy.deepcopy(self.layers, memo)
        return twin

    def choose(self, names: Sequence[str], chosen: Sequence[str]) -> None:
        """Send row i through the adapter `chosen[i]`, one of `names`; through the base layers alone if it is none."""
        _require_room(len(chosen))
        index = {name: i for i, name in enumerate(names)}
        table = np.full(MOST_ROWS, -1, np.int32)
        table[: len(chosen)] = [index.get(name, -1) for name in chosen]
        write(self._choice, table)
        self.names, self.rows = tuple(names), len(chosen)

    def clear(self) -> None:
        """Send all rows through the active adapters again."""
        self.names, self.rows = (), 0

    def start(self, tokens_left: Tensor, x: Tensor) -> Tensor:
        """Note for each row how many tokens there are from an invocation on; returns x, to be used instead of it.

        Args:
            tokens_left: (B,) int32; 0 where nothing was invoked.
            x: the model's input. What is computed from the returned one is computed after the note was taken.
        """
        return ops.depend(x, _filled(self._starts, tokens_left, 0))

    def note_tasks(self, task_ids: Tensor) -> Tensor:
        """Note for each row which task it is of, (B,), integers.

        Returns:
            What the model's inputs must depend on, so that the layers compute after the note was taken.
        """
        return _filled(self._tasks, ops.cast(task_ids, ms.int32), -1)

    def tasks(self, y: Tensor) -> Tensor:
        """(B,) int32: the task of each row of y; -1 where none was noted."""
        return self._rows(self._tasks, y)

    def repeat(self, rows: int, times: int) -> None:
        """Let each of the first `rows` rows stand for as many rows as `times` says, one after another."""
        _require_room(rows * times)
        for table in (self._choice, self._starts, self._tasks):
            values = table.asnumpy().copy()
            values[: rows * times] = np.repeat(values[:rows], times)
            write(table, values)
        if self.names:
            self.rows = rows * times

    def serves(self, name: str, y: Tensor) -> Tensor:
        """(B, 1, ...), bool: the rows of y that go through the adapter `name`."""
        self._require_rows(y)
        mine = ops.equal(self._rows(self._choice, y), self.names.index(name))
        return ops.reshape(mine, (-1,) + (1,) * (y.ndim - 1))

    def place(self, places: Sequence[int], y: Tensor) -> Tensor:
        """(B,) int32: for each row of y the one of `places` that belongs to its adapter.

        Args:
            places: for rows that no adapter serves, and then for each of `names`.
            y: (B, ...).
        """
        self._require_rows(y)
        # The index of rows that no adapter serves is -1.
        return ops.gather(Tensor(places, ms.int32), ops.add(self._rows(self._choice, y), 1), 0)

    def invoked(self, y: Tensor) -> Tensor:
        """(B, T, 1), bool: the tokens of y (B, T, features) from the invocation on."""
        place = ops.reshape(ops.range(0, y.shape[1], 1), (1, -1, 1))
        return place >= y.shape[1] - ops.reshape(self._rows(self._starts, y), (-1, 1, 1))

    def _require_rows(self, y: Tensor) -> None:
        if not isinstance(y, Tensor):
            raise TypeError(
                "adapter_names divides the rows of tensors, but a layer that adapters train (modules_to_save) returns "
                "something else, such as a tuple: train its parts instead, or run each adapter by itself."
            )
        if y.shape[0] != self.rows:
            raise ValueError(
                f"adapter_names divides a batch of {self.rows} rows, but a layer got a tensor whose first axis has "
                f"length {y.shape[0]}: adapter_names needs layers that keep the batch as their first axis."
            )

    def _rows(self, table: Parameter, y: Tensor) -> Tensor:
        # The tie to y keeps compiled code from reading the table before `start` has written it.
        return ops.depend(table, y)[: y.shape[0]]


def invocations(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Tokens left in each row of ids (B, T), int, from the last occurrence of `tokens` on; 0 where there is none.

    Returns:
        (B,) int32.
    """
    length = ids.shape[1]
    places = length - len(tokens) + 1
    if places < 1:
        return ops.zeros((ids.shape[0],), ms.int32)
    found = ops.equal(ids[:, :places], tokens[0])
    for offset in range(1, len(tokens)):
        found = ops.logical_and(found, ops.equal(ids[:, offset : offset + places], tokens[offset]))
    left = ops.reshape(length - ops.range(0, places, 1), (1, -1))
    # The last occurrence leaves the fewest tokens; none at all leaves a number out of reach.
    least = ops.min(ops.where(found, left, ops.full_like(left, length + 1)), 1)[0]
    return ops.cast(ops.where(least > length, ops.zeros_like(least), least), ms.int32)


def routing_of(model: nn.Cell) -> Routing:
    """The Routing of a base model; a new one if it has none."""
    if not hasattr(model, "peft_routing"):
        model.peft_routing = Routing()
    return model.peft_routing


def _filled(table: Parameter, values: Tensor, rest: int) -> Tensor:
    """Write values (B,) int32 into a table, and `rest` behind them."""
    _require_room(values.shape[0])
    return ops.assign(table, ops.concat((values, ops.full((MOST_ROWS - values.shape[0],), rest, dtype=ms.int32)), 0))


def _table(name: str, value: int) -> Parameter:
    return Parameter(Tensor(np.full(MOST_ROWS, value, np.int32)), name=name, requires_grad=False)


def _require_room(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"a batch divided by adapter_names or invocation tokens has at most {MOST_ROWS} rows: {rows}")
