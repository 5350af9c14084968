"""Tensors in and out of numpy and Parameters, with the dtypes that MindSpore's CPU kernels lack."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

HALF_DTYPES = (ms.float16, ms.bfloat16)
FLOAT_DTYPES = (ms.float16, ms.bfloat16, ms.float32, ms.float64)


def to_numpy(value: Tensor | Parameter | np.ndarray) -> np.ndarray:
    """A contiguous array with the same dtype (bfloat16 included); a view where MindSpore gives one."""
    return np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.asnumpy())


def as_float32(value: np.ndarray) -> np.ndarray:
    """Any float array as float32. bfloat16 is widened bit by bit: numpy has no bfloat16 of its own."""
    if value.dtype.name == "bfloat16":
        return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)


def write(p: Parameter, value: Any) -> None:
    """Copy `value` into `p`, in place and in p's dtype: the one way to write that compiled graphs see too.

    Raises:
        ValueError: the shapes differ (MindSpore would change p's shape without a word).
    """
    tensor = value if isinstance(value, Tensor) else Tensor(value)
    if tuple(tensor.shape) != tuple(p.shape):
        raise ValueError(f"cannot write a tensor of shape {tuple(tensor.shape)} into {p.name}: it is {tuple(p.shape)}")
    if p.has_init:
        p.init_data()
    # MindSpore 2.7 refuses to write in place into a parameter that wants a gradient, once it has had one.
    wants_gradient, p.requires_grad = p.requires_grad, False
    try:
        p.copy_(tensor)
    finally:
        p.requires_grad = wants_gradient
