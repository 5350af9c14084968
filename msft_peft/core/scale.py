"""How much an adapter counts: a factor that compiled code takes for a constant, or reads anew in each call."""

import itertools
from typing import Any

from mindspore import Parameter, Tensor

from msft_peft.backend.arrays import write

_numbers = itertools.count()


class Scale:
    """A factor in a Patch's formula.

    It is no Cell and no attribute of one, so that its Parameter is not among the model's; compiled code reads it all
    the same.

    Attributes:
        initial: what the adapter's config says.
        value: what is in effect: a number, which compiled code holds as a constant, or a Parameter, which it reads.
    """

    def __init__(self, initial: float) -> None:
        self.initial = initial
        self.value: Any = initial

    @property
    def live(self) -> bool:
        """Whether compiled code sees a change."""
        return isinstance(self.value, Parameter)

    @property
    def number(self) -> float:
        return self.value.asnumpy().item() if self.live else self.value

    def set(self, number: float) -> bool:
        """Write the factor, in place if it is live; whether compiled code that holds the old one must be dropped."""
        if self.live:
            write(self.value, Tensor([number], self.value.dtype))
            return False
        changed = number != self.value
        self.value = number
        return changed

    def __deepcopy__(self, memo: dict) -> "Scale":
        twin = Scale(self.initial)
        twin.value = self.number
        if self.live:
            twin.make_live(self.value.dtype)
        return twin

    def make_live(self, dtype: Any) -> None:
        """Let compiled code see every later change; `dtype` is that of the weights that it multiplies."""
        if not self.live:
            # Compiled code tells Parameters apart by their names.
            self.value = Parameter(Tensor([self.value], dtype), name=f"scale_{next(_numbers)}", requires_grad=False)
