"""Data parallel training: what the workers must agree on, since MindSpore gives them nothing of it by itself."""

import hashlib
import os

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank

from msft_peft.backend.arrays import to_numpy, write
from msft_peft.core.adapter import configs_of, held_ids
from msft_peft.core.layer import TunerLayer
from msft_peft.core.prompt import prompts_of
from msft_peft.core.tuner import base_of
from msft_peft.core.wrapper import wrappers
from msft_peft.errors import ConfigError, PeftError


def broadcast_adapter(model: nn.Cell, root: int = 0) -> None:
    """Give every worker the adapters of one: call it on all of them, before the first step.

    What is sent is what adapters hold and what they train in place: weights of all adapters, copies of
    `modules_to_save`, biases. The base model is not: load the same one everywhere. Bit for bit, in any dtype, in one
    message.

    Args:
        model: a model with adapters; every worker has the same adapters in it.
        root: the rank of the worker that sends.

    Raises:
        ConfigError: no adapters; `root` is no worker; or an adapter changed the base weights by its own initial values
            (PiSSA and its like), which then do not go with another worker's. Use the same seed, or save and load.
        PeftError: the workers have other adapters than each other, see `check_equal_adapters`.
        RuntimeError: `mindspore.communication.init()` was not called under msrun.
    """
    parameters, workers = _adapter_parameters(model), _workers()
    if not 0 <= root < workers:
        raise ConfigError(f"root={root} is none of the {workers} workers 0 to {workers - 1}")
    layers = [wrapper for _, wrapper in wrappers(base_of(model)) if isinstance(wrapper, TunerLayer)]
    changed = sorted({name for layer in layers for name in layer.given})
    if changed:
        raise ConfigError(
            f"broadcast_adapter: adapters {changed} took their initial values out of the base weights, which would "
            "not go with another worker's. Give all workers the same seed, or save on one and load on all of them."
        )
    if workers == 1:
        return
    _require_same([_layout(parameters)], "Their adapters differ in names, shapes or dtypes. Nothing was sent.")
    # Communication on CPU knows floats alone: two bytes travel as a whole number, which float32 holds exactly.
    raw = b"".join(to_numpy(p).tobytes() for p in parameters)
    padded = raw + bytes(len(raw) % 2)
    sent = Tensor(np.frombuffer(padded, np.uint16).astype(np.float32))
    (got,) = ops.Broadcast(root)((sent,))
    received = got.asnumpy().astype(np.uint16).tobytes()
    start = 0
    for p in parameters:
        old = to_numpy(p)
        write(p, Tensor(np.frombuffer(received, old.dtype, old.size, start).reshape(old.shape).copy()))
        start += old.nbytes


def check_equal_adapters(model: nn.Cell) -> None:
    """Make sure that all workers hold the same adapters, to the bit: call it on all of them.

    Workers that begin with different adapters train on without an error, each on a model of its own.

    Raises:
        ConfigError: no adapters.
        PeftError: they differ; the ranks that differ from rank 0 are named. It is raised on all workers.
        RuntimeError: `mindspore.communication.init()` was not called under msrun.
    """
    parameters = _adapter_parameters(model)
    if _workers() == 1:
        return
    _require_same(
        [_layout(parameters), *(to_numpy(p).tobytes() for p in parameters)],
        "Each would train a model of its own. Call broadcast_adapter(model) before the first step, or give all "
        "workers the same seed; if they were equal then, gradients were not reduced.",
    )


def _adapter_parameters(model: nn.Cell) -> list[Parameter]:
    base = base_of(model)
    if not configs_of(base):
        raise ConfigError(f"{type(model).__name__} has no adapters: call get_peft_model first.")
    held, prompts = held_ids(base), prompts_of(base)
    before = [] if prompts is None else [p for cell in prompts.held().values() for p in cell.get_parameters()]
    return [p for p in base.get_parameters() if id(p) in held or p.requires_grad] + before


def _workers() -> int:
    """How many workers there are.

    Raises:
        RuntimeError: msrun started several, but this one has not joined them.
    """
    workers, started = get_group_size(), int(os.environ.get("MS_WORKER_NUM", "1"))
    if workers != started and started > 1:
        raise RuntimeError(
            f"msrun started {started} workers, but this process sees {workers}: call mindspore.communication.init() "
            "before anything else."
        )
    return workers


def _layout(parameters: list[Parameter]) -> bytes:
    return "\n".join(f"{p.name} {tuple(p.shape)} {p.dtype}" for p in parameters).encode()


def _require_same(parts: list[bytes], why: str) -> None:
    """Raise PeftError on all workers if these bytes differ between them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    mine = np.frombuffer(digest.digest(), np.uint16).astype(np.float32)
    every = ops.AllGather()(Tensor(mine)).asnumpy().reshape(-1, mine.size)
    others = [rank for rank in range(len(every)) if (every[rank] != every[0]).any()]
    if others:
        raise PeftError(
            f"The adapters of worker {', '.join(map(str, others))} are not those of worker 0 (this is worker "
            f"{get_rank()} of {len(every)}). {why}"
        )
