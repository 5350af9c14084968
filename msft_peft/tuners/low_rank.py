"""What methods share that add a product of two thin matrices, however these are made."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from msft_peft.core.patch import Patch


class LowRankPatch(Patch):
    """y = W·x + b + B·A·x. A method writes `factors`, and sets `r` and `dropout` in `setup`."""

    r: int

    def dropped(self, probability: float) -> nn.Cell:
        """The dropout of the update's input."""
        return nn.Dropout(p=probability) if probability else nn.Identity()

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in)."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        b, a = self.factors()
        return self.op.add(y, self.op.mix(self.op(self.op.rows(self.dropout(self.cast(x))), a), b))

    def delta_weight(self) -> Tensor:
        b, a = self.factors()
        return ops.matmul(b, a)

    @property
    def batched_rank(self) -> int:
        return self.r if self.dtype == ms.float32 else 0

    def down(self) -> Tensor:
        return self.factors()[1]

    def up(self) -> Tensor:
        return ops.transpose(self.factors()[0], (1, 0))
