"""Data parallel training: whether all workers hold the same adapter."""

import zlib

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size, get_rank

from msft_peft.backend.arrays import to_numpy
from msft_peft.errors import PeftError


def require_equal_adapters(model: nn.Cell) -> None:
    """Raise if the workers of a data parallel run do not train the same numbers from the same values.

    MindSpore sends no weights around: each worker draws its own, and only gradients are reduced. Workers that began
    with different adapters would train on, side by side, and never meet. Call this before the first step, on every
    worker. Alone, or without `mindspore.communication.init()`, it does nothing.

    Args:
        model: a model with trainable parameters.

    Raises:
        PeftError: the trainable parameters differ from those of another worker, in name, shape or bits.

    Cost: one collective of a few numbers.
    """
    if not GlobalComm.INITED or get_group_size() == 1:
        return
    trained = [(p.name, to_numpy(p)) for p in model.get_parameters() if p.requires_grad]
    mine = zlib.crc32(repr([(name, array.shape, str(array.dtype)) for name, array in trained]).encode())
    for _, array in trained:
        mine = zlib.crc32(array.tobytes(), mine)
    # Halves of 16 bits are exact in float32, which is what CPU collectives can carry.
    halves = Tensor(np.array([[mine >> 16, mine & 0xFFFF]], np.float32))
    every = ops.AllGather()(halves).asnumpy()
    others = [rank for rank, row in enumerate(every) if not np.array_equal(row, halves.asnumpy()[0])]
    if others:
        raise PeftError(
            f"Worker {get_rank()} does not hold the same trainable parameters as the workers {others}. Make the model "
            "and its adapter under the same mindspore.set_seed on each, or load the same files on each."
        )
