"""Normal numbers that a seed determines, in Python and in compiled code."""

from mindspore import Tensor, nn, ops


class SeededNormal(nn.Cell):
    """Numbers from N(0, 1), float32, of a tensor's shape; others at each call.

    Args:
        seed: of two cells with one seed the first calls are equal, the second ones, and so on.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        # The kernel takes what fits into 31 bits.
        seed %= 2**31 - 1
        self.draw = ops.StandardNormal(seed=seed, seed2=seed + 1)

    def construct(self, like: Tensor) -> Tensor:
        return self.draw(ops.shape(like))
