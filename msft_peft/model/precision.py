"""Which parameters are kept in which precision, and which precision the adapters' inputs have."""

import contextlib
from collections.abc import Iterator
from typing import Any

import mindspore as ms
from mindspore import Parameter, nn

from msft_peft.backend.arrays import FLOAT_DTYPES, HALF_DTYPES
from msft_peft.backend.graphs import drop_compiled
from msft_peft.core.layer import TunerLayer
from msft_peft.core.prompt import prompts_of
from msft_peft.core.tuner import base_of
from msft_peft.core.wrapper import wrappers
from msft_peft.errors import ConfigError, MergeError
from msft_peft.hosts import as_cell


def cast_mixed_precision_params(model: nn.Cell, dtype: Any) -> None:
    """Give what is frozen `dtype`, and what is trained float32: half the memory, and no small update is lost.

    In place: the Parameters stay the same objects. What is no floating point number keeps its dtype. Outputs have the
    base layers' dtype.

    Args:
        model: a model, with or without adapters.
        dtype: `ms.float16`, `ms.bfloat16`, `ms.float32` or `ms.float64`.

    Raises:
        ConfigError: another dtype.
        MergeError: adapters are merged; what was kept to take them out again has the old dtype.
    """
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be a floating point type of MindSpore such as ms.float16, got {dtype!r}")
    base = base_of(model)
    layers = [wrapper for _, wrapper in wrappers(base) if isinstance(wrapper, TunerLayer)]
    if any(layer.merged for layer in layers):
        raise MergeError("Cannot cast the parameters while adapters are merged: call unmerge_adapter() first.")
    for p in as_cell(model).get_parameters():
        _cast(p, ms.float32 if p.requires_grad else dtype)
    for layer in layers:
        for patch in layer.held().values():
            patch.dtype = next((getattr(patch, attribute).dtype for attribute in patch.keys), patch.dtype)
    prompts = prompts_of(base)
    if prompts is not None:
        prompts.measure(base)
    drop_compiled()


def halves_to_float32(model: nn.Cell) -> None:
    """Give the half-precision parameters float32, in place."""
    for p in model.get_parameters():
        if p.dtype in HALF_DTYPES:
            _cast(p, ms.float32)


def _cast(p: Parameter, dtype: Any) -> None:
    if p.dtype in FLOAT_DTYPES and p.dtype != dtype:
        if p.has_init:
            p.init_data()
        p.set_dtype(dtype)


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Cell, active: bool = True) -> Iterator[None]:
    """Inside the block adapters take their inputs in the dtype that they come in; compiled code is dropped twice.

    Normally an input is cast to the dtype of the adapter's weights.

    Args:
        model: a model with adapters.
        active: False changes nothing.

    Raises:
        ConfigError: the model has no adapted layers (HF does nothing then, silently).
    """
    if not active:
        yield
        return
    layers = [wrapper for _, wrapper in wrappers(base_of(model)) if isinstance(wrapper, TunerLayer)]
    patches = [patch for layer in layers for patch in layer.held().values()]
    if not patches:
        raise ConfigError("disable_input_dtype_casting: this model has no adapted layers, so nothing is cast in it.")
    before = [patch.casts_input for patch in patches]
    _set_casts(patches, [False] * len(patches))
    try:
        yield
    finally:
        _set_casts(patches, before)


def _set_casts(patches: list[Any], values: list[bool]) -> None:
    for patch, value in zip(patches, values, strict=True):
        patch.casts_input = value
    drop_compiled()
