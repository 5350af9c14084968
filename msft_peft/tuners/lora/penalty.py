"""What some of LoRA's variants want added to the loss."""

from collections.abc import Iterable
from typing import Any

from mindspore import nn

from msft_peft.core.patch import Reference
from msft_peft.tuners.lora.patch import LoraPatch


class Penalty(nn.Cell):
    """Call it with no arguments where the loss is computed: what KaSA and MonteCLoRA add to it, a scalar.

    Formula: the sum of the layers' terms for KaSA, and their mean for MonteCLoRA. It is 0.0 if no adapter has any.

    Args:
        sums, means: the Patches whose terms are summed, or averaged. They are no children of this Cell.
    """

    def __init__(self, sums: Iterable[LoraPatch], means: Iterable[LoraPatch]) -> None:
        super().__init__(auto_prefix=False)
        self.sums = tuple(Reference(patch) for patch in sums)
        self.means = tuple(Reference(patch) for patch in means)

    def construct(self) -> Any:
        total = 0.0
        for reference in self.sums:
            total = total + reference.cell.penalty()
        for reference in self.means:
            total = total + reference.cell.penalty() / len(self.means)
        return total
