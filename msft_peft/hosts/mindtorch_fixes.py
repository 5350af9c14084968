"""What mindtorch 0.5.1 gets wrong on CPU, put right: without it, training on it goes wrong in silence.

Only for the release that these were found in, and only on CPU. Each is a few lines, and says what happens without it.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from msft_peft.errors import PeftWarning

KNOWN = "0.5.1"


@functools.cache
def apply() -> None:
    """Put it right, once a process; of another release nothing is changed, with a warning that says so."""
    if ms.get_context("device_target") != "CPU":
        return
    version = importlib.metadata.version("mindnlp")
    if version != KNOWN:
        warnings.warn(
            f"mindnlp {version} is not the release that this was tried with, {KNOWN}. On CPU that one computes wrong "
            "gradients in places, which msft_peft puts right there, and leaves alone here.",
            PeftWarning,
            stacklevel=4,
        )
        return
    mindtorch, cpu = importlib.import_module("mindtorch"), importlib.import_module("mindtorch._apis.cpu")
    patched: Any = Tensor  # what is private there is mindtorch's
    # Results of MindSpore's own ops have no device, and every operator of a Tensor asks for one.
    patched._device = mindtorch.device("cpu")
    _keep_gradients_of_moved_tensors(patched)
    _complete(cpu)
    serialization: Any = importlib.import_module("mindtorch.serialization")
    if not hasattr(serialization, "safe_globals"):  # a Trainer could not resume; mindtorch unpickles anything as it is
        serialization.safe_globals = contextlib.nullcontext


def _keep_gradients_of_moved_tensors(patched: Any) -> None:
    # Tensors were moved from CPU to CPU through numpy, which cuts the gradient: that of every difference was zero.
    move = patched._move_to

    def move_to(self: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        return self if device.type == self.device.type == "cpu" else move(self, device, non_blocking)

    patched._move_to = move_to


def _complete(cpu: Any) -> None:
    def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1.0) -> Tensor:
        return ops.add(input, ops.mul(ops.div(tensor1, tensor2), value))

    def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        return ops.add(ops.mul(input, beta), ops.mul(ops.bmm(batch1, batch2), alpha))

    norm = cpu.linalg_vector_norm

    def linalg_vector_norm(
        x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Tensor:
        return norm(x, ord, tuple(range(x.ndim)) if dim is None else dim, keepdim, dtype)

    if not hasattr(cpu, "addcdiv"):  # Adam and AdamW of mindtorch fail without it
        cpu.addcdiv = addcdiv
    cpu.baddbmm = baddbmm  # alpha and beta were swapped: Bloom computed other numbers
    cpu.linalg_vector_norm = linalg_vector_norm  # no norm over all axes: the Trainer's clipping of gradients failed


_NAMES = {
    ms.float16: "Float16",
    ms.float32: "Float32",
    ms.float64: "Float64",
    ms.bfloat16: "BFloat16",
    ms.int8: "Int8",
    ms.uint8: "UInt8",
    ms.int16: "Int16",
    ms.int32: "Int32",
    ms.int64: "Int64",
    ms.bool_: "Bool",
}


@contextlib.contextmanager
def plain_dtypes() -> Iterator[None]:
    """Inside the block dtypes have MindSpore's names.

    mindtorch gives them others, and MindSpore writes those into its checkpoints, which nothing reads again.
    """
    kind: Any = next((base for base in type(ms.float32).__mro__ if "__str__" in vars(base)), object)
    theirs = kind.__str__
    if str(ms.float32) == _NAMES[ms.float32]:
        yield
        return
    kind.__str__ = lambda dtype: _NAMES.get(dtype) or theirs(dtype)
    try:
        yield
    finally:
        kind.__str__ = theirs
