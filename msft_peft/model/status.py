"""What is where, and in what state: HF's layer and model status."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Parameter, nn

from msft_peft.core.adapter import active_of, configs_of
from msft_peft.core.layer import TunerLayer
from msft_peft.core.prompt import prompts_of
from msft_peft.core.tuner import base_of
from msft_peft.core.wrapper import ModulesToSaveWrapper, Wrapper, fixed_in, wrappers

IRREGULAR = "irregular"
# A layer of this kind is called so in HF's class names: "lora.Linear".
_KIND_NAMES = {
    "dense": "Linear",
    "embedding": "Embedding",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "parameter": "ParamWrapper",
}
_TOKENS = "TrainableTokensLayer"


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer, or of one that adapters train whole.

    Attributes:
        name: its path, as HF has it: below `model.base_model`, or below the model where adapters were injected.
        module_type: "lora.Linear", "ModulesToSaveWrapper", ...
        enabled: False while the adapters are switched off.
        active_adapters: the adapters in use in the model, also those that have nothing here.
        merged_adapters: those that are folded into the weights.
        requires_grad: adapter -> whether its weights here are trained; "irregular" if only some are.
        available_adapters: the adapters that have something here.
        devices: adapter -> where its weights are.
        quantization_backend: None; HF's, for base weights that are quantized.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The state of all adapted layers together; "irregular" stands where they disagree.

    Attributes:
        base_model_type: the base model's class; "other" where adapters were injected.
        adapter_model_type: HF's name of the tuner ("LoraModel"); "None" where adapters were injected.
        peft_types: adapter -> its method; empty where adapters were injected.
        trainable_params, total_params: counted in numbers.
        num_adapter_layers: how many layers adapters have something in.
        enabled, active_adapters, requires_grad, devices, quantization_backend: as of the layers.
        merged_adapters: those that are merged wherever they can be.
        available_adapters: all of them.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Cell) -> list[TunerLayerStatus]:
    """The state of every layer that adapters have something in, in network order.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        TypeError: it is no Cell, or its adapters are virtual tokens.
        ValueError: it has no adapter layers.
    """
    base = base_of(model)
    if prompts_of(base) is not None:
        raise TypeError("Layer and model status are of adapters in layers; prompt methods have none there.")
    prefix = "" if base is model else "model."
    found = [_layer_status(prefix + path, wrapper, base) for path, wrapper in wrappers(base)]
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT "
            "adapters injected in the model."
        )
    return found


def get_model_status(model: nn.Cell) -> TunerModelStatus:
    """The state of a model's adapters as a whole; "irregular" stands where its layers disagree.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        TypeError: it is no Cell.
        ValueError: it has no adapter layers.

    Differs: HF reports merged adapters as "irregular" as soon as there are layers that are trained whole, which
    cannot merge.
    """
    layers = get_layer_status(model)
    base = base_of(model)
    wrapped = base is not model
    configs = configs_of(base)
    available = sorted({name for layer in layers for name in layer.available_adapters})
    sizes = [(math.prod(p.shape), p.requires_grad) for p in model.get_parameters()]
    kinds = [type(config).__name__.removesuffix("Config") + "Model" for config in configs.values()]
    return TunerModelStatus(
        base_model_type=type(base).__name__ if wrapped else "other",
        adapter_model_type=kinds[0] if wrapped and kinds else "None",
        peft_types={name: str(config.peft_type) for name, config in configs.items()} if wrapped else {},
        trainable_params=sum(size for size, trainable in sizes if trainable),
        total_params=sum(size for size, _ in sizes),
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters=_agreed([layer.active_adapters for layer in layers]),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _agreed([layer.requires_grad[name] for layer in layers if name in layer.requires_grad])
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, [])}) for name in available
        },
    )


def _layer_status(name: str, wrapper: Wrapper, base: nn.Cell) -> TunerLayerStatus:
    held, kind = wrapper.held(), _module_type(wrapper, base)
    return TunerLayerStatus(
        name=f"{name}.token_adapter" if kind == _TOKENS else name,
        module_type=kind,
        enabled=wrapper.enabled,
        active_adapters=_active(wrapper, base),
        merged_adapters=wrapper.merged_adapters if isinstance(wrapper, TunerLayer) else [],
        requires_grad={key: _agreed([p.requires_grad for p in _trained(cell)]) for key, cell in held.items()},
        available_adapters=sorted(held),
        devices={key: _devices(cell.get_parameters()) for key, cell in held.items()},
    )


def _trained(cell: nn.Cell) -> list[Parameter]:
    """An adapter's parameters there, without what is never trained."""
    fixed = {id(p) for p in fixed_in(cell)}
    return [p for p in cell.get_parameters() if id(p) not in fixed]


def _module_type(wrapper: Wrapper, base: nn.Cell) -> str:
    if not isinstance(wrapper, TunerLayer):
        return type(wrapper).__name__
    if wrapper.held() and all(patch.auxiliary for patch in wrapper.held().values()):
        return _TOKENS
    kind = _KIND_NAMES.get(wrapper.site.kind, wrapper.site.kind)
    configs = configs_of(base)
    # A layer whose adapters were deleted is still named after the method of the others.
    methods = [str(configs[name].peft_type).lower() for name in wrapper.held() or configs]
    return f"{methods[0]}.{kind}" if methods else kind


def _active(wrapper: Wrapper, base: nn.Cell) -> list[str]:
    """The model's active adapters; the layer's own, if those of them that it has are not its active ones."""
    names = active_of(base)
    return names if tuple(n for n in names if n in wrapper.held()) == wrapper.active else list(wrapper.active)


def _devices(parameters: Iterable[Parameter]) -> list[str]:
    """Where the parameters are: MindSpore computes on one target, and moves tensors there by itself."""
    return [ms.get_context("device_target").lower()] if any(True for _ in parameters) else []


def _merged(layers: list[TunerLayerStatus]) -> list[str] | str:
    able = [layer for layer in layers if layer.module_type != ModulesToSaveWrapper.__name__]
    names = list(dict.fromkeys(name for layer in able for name in layer.merged_adapters))
    expected = [[name for name in names if name in layer.available_adapters] for layer in able]
    merged = [sorted(layer.merged_adapters) for layer in able]
    return names if merged == [sorted(some) for some in expected] else IRREGULAR


def _agreed(values: list[Any]) -> Any:
    """The value that all have, or "irregular"; False where there is none."""
    if not values:
        return False
    return values[0] if all(value == values[0] for value in values[1:]) else IRREGULAR
