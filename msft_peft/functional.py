"""HF's `peft.functional`: adapters without a `PeftModel`, for libraries that inject them into models of their own.

Each function takes a `PeftModel` too, and does there what its method of the same name does.
"""

from collections.abc import Iterable
from typing import Any

from mindspore import nn

from msft_peft.core import switch
from msft_peft.core.adapter import active_of
from msft_peft.core.inject import inject_adapter_in_model
from msft_peft.core.tuner import base_of
from msft_peft.io.state import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Cell, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make one adapter, or several together, the active ones; see `Tuner.set_adapter`.

    Args:
        model: a model with injected adapters, or a `PeftModel`.
        adapter_name: a name or a list of names.
        inference_mode: leave them frozen. Otherwise they are trainable and all others frozen.
        layer_cls: HF's, to choose among tuners; all of them are one class here.

    Raises:
        AdapterNameError: a name is not there.
        MergeError: two of them train the same layer whole (`modules_to_save`).

    Differs: HF accepts a name that is not there, and every layer then acts as its base.
    """
    switch.set_adapter(base_of(model), adapter_name, inference_mode)


def set_requires_grad(model: nn.Cell, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze adapters, active or not. Build the optimizer and the gradient function afterwards.

    Args:
        model: a model with injected adapters, or a `PeftModel`.
        adapter_names: a name or several.
        requires_grad: False freezes.

    Raises:
        AdapterNameError: a name is not there.
    """
    switch.set_requires_grad(base_of(model), adapter_names, requires_grad)


def delete_adapter(model: nn.Cell, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str] | None:
    """Remove an adapter and its weights; if it was active alone, the first of the others becomes active.

    Args:
        model: a model with injected adapters, or a `PeftModel`.
        adapter_name: the adapter.
        prefix: HF's, to find the weights by their names ("lora_"); they are found by structure here.
        layer_cls: HF's, to choose among tuners; all of them are one class here.

    Returns:
        The names of the adapters that are active now; None if there are none.

    Raises:
        AdapterNameError: it is not there.
        MergeError: it is merged into the base weights.
    """
    base = base_of(model)
    switch.delete_adapter(base, adapter_name)
    return active_of(base) or None


def cast_adapter_dtype(model: nn.Cell, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give an adapter's half-precision weights float32, in which small updates are not lost.

    The weights become new Parameters of the same names: build the optimizer and the gradient function afterwards.
    Adapters that are made or loaded with `autocast_adapter_dtype=True`, the default, have float32 already.

    Args:
        model: a model with injected adapters, or a `PeftModel`.
        adapter_name: the adapter.
        autocast_adapter_dtype: False does nothing.

    Raises:
        AdapterNameError: it is not there.
    """
    if autocast_adapter_dtype:
        switch.cast_adapter_dtype(base_of(model), adapter_name)
