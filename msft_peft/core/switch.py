"""The switches over the adapters in a base model, whatever stands around it.

Each checks first and changes then, and ends by dropping the process's compiled graphs, so that the next call of the
model, of a `ms.jit` step around it or of `Model.train` compiles anew.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from msft_peft.backend import arguments
from msft_peft.backend.arrays import HALF_DTYPES, as_float32, to_numpy
from msft_peft.backend.graphs import drop_compiled
from msft_peft.core import inject
from msft_peft.core.adapter import active_of, adapter_in, configs_of, invocations_of
from msft_peft.core.layer import TunerLayer
from msft_peft.core.prompt import prompts_of
from msft_peft.core.wrapper import ModulesToSaveWrapper, wrappers
from msft_peft.errors import AdapterNameError, ConfigError, MergeError, PeftWarning
from msft_peft.hosts import as_cell


def layers_of(model: nn.Cell) -> list[TunerLayer]:
    """Every adapted layer, in network order."""
    return [wrapper for _, wrapper in wrappers(model) if isinstance(wrapper, TunerLayer)]


def require(model: nn.Cell, names: str | Iterable[str]) -> list[str]:
    """The names as a list, each once.

    Raises:
        AdapterNameError: one of them is not there.
    """
    names = arguments.adapter_names(names)
    there = configs_of(model)
    missing = [name for name in names if name not in there]
    if missing:
        raise AdapterNameError(f"Adapter {', '.join(map(str, missing))} not found. There are {sorted(there)}.")
    return names


def set_adapter(model: nn.Cell, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make one adapter, or several together, the active ones; see `Tuner.set_adapter`."""
    names = require(model, adapter_name)
    if prompts_of(model) is not None and len(names) > 1:
        raise ConfigError(f"Adapters {names} cannot be active together: one of them alone can stand before the input.")
    for path, wrapper in wrappers(model):
        both = [name for name in names if name in wrapper.held()]
        if isinstance(wrapper, ModulesToSaveWrapper) and len(both) > 1:
            raise MergeError(f"Adapters {both} cannot be active together: each trains its own copy of {path}.")
    waiting = invocations_of(model, names)
    if len(waiting) > 1:
        raise ConfigError(f"Adapters {names} cannot be active together: they wait for different tokens, {waiting}.")
    unmerge_first(model, "Adapter cannot be set when the model is merged.")
    inject.activate(model, names, trainable=not inference_mode)
    drop_compiled()


def require_some(model: nn.Cell, names: str | Iterable[str]) -> list[str]:
    """As `require`; AdapterNameError also if there are no names at all."""
    found = require(model, names)
    if not found:
        raise AdapterNameError(f"no adapter is named. There are {sorted(configs_of(model))}.")
    return found


def set_requires_grad(model: nn.Cell, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze adapters, active or not; see `Tuner.set_requires_grad`."""
    names, requires_grad = require_some(model, adapter_names), bool(requires_grad)
    stuck = inject.untrainable(model, names) if requires_grad else {}
    if stuck:
        raise ConfigError(" ".join(f"Adapter {name} cannot be trained: {why}" for name, why in stuck.items()))
    for _, wrapper in wrappers(model):
        wrapper.set_requires_grad(names, requires_grad)
    prompts = prompts_of(model)
    if prompts is not None:
        prompts.set_requires_grad(names, requires_grad)
    for name in names:
        for bias in adapter_in(model, name).biases(model).values():
            bias.parameter.requires_grad = requires_grad
    drop_compiled()


def delete_adapter(model: nn.Cell, adapter_name: str) -> None:
    """Remove an adapter and its weights; see `Tuner.delete_adapter`."""
    configs = configs_of(model)
    if arguments.adapter_name(adapter_name) not in configs:
        raise AdapterNameError(f"Adapter {adapter_name} does not exist. There are {sorted(configs)}.")
    check_not_merged(model, [adapter_name])
    was_active = adapter_name in active_of(model)
    inject.discard(model, adapter_name)
    # An adapter that takes this name later is not active for it.
    inject.use(model, active_of(model))
    left = configs_of(model)
    if was_active and not active_of(model) and left:
        heir = min(left)
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {heir}.",
            PeftWarning,
            stacklevel=4,
        )
        set_adapter(model, heir, inference_mode=left[heir].inference_mode)
    drop_compiled()


def check_not_merged(model: nn.Cell, names: Iterable[str]) -> None:
    """Raise MergeError if one of these adapters, which are to be deleted, is merged."""
    merged = {name for layer in layers_of(model) for name in layer.merged_adapters}
    stuck = [name for name in names if name in merged]
    if stuck:
        raise MergeError(f"Cannot delete adapter(s) {stuck} while they are merged. Please unmerge them first.")


def unmerge(model: nn.Cell) -> None:
    """Take merged adapters out of the base weights again; see `Tuner.unmerge_adapter`."""
    merged = [layer for layer in layers_of(model) if layer.merged]
    if not merged:
        warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=3)
    for layer in merged:
        layer.unmerge()
    drop_compiled()


def unmerge_first(model: nn.Cell, why: str) -> None:
    """Unmerge, with a warning that says why, if anything is merged."""
    if any(layer.merged for layer in layers_of(model)):
        warnings.warn(f"{why} Unmerging the model first.", PeftWarning, stacklevel=4)
        unmerge(model)


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Cell, multiplier: float) -> Iterator[None]:
    """Multiply what all LoRA adapters add inside a `with` block; afterwards it is as before, also after an exception.

    Compiled code sees it: it is compiled anew at both ends of the block, unless `prepare_model_for_compiled_hotswap`
    has made the scalings live.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        multiplier: 0 acts like the base model, 0.5 like half of the adapter.

    Raises:
        TypeError: `multiplier` is no number.
        ConfigError: `model` is no model.
        ValueError: the model has no layers with a scaling.
        MergeError: adapters are merged; a scaling cannot reach what is in the base weights.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [layer for layer in layers_of(as_cell(model)) if layer.scales()]
    if not layers:
        raise ConfigError("scaling is only supported for models with `LoraLayer`s")
    for layer in layers:
        layer.check_unmerged()
    before = [{name: scale.number for name, scale in layer.scales().items()} for layer in layers]
    for layer, numbers in zip(layers, before):
        layer.rescale({name: number * multiplier for name, number in numbers.items()})
    try:
        yield
    finally:
        for layer, numbers in zip(layers, before):
            layer.rescale({name: number for name, number in numbers.items() if name in layer.held()})


def cast_adapter_dtype(model: nn.Cell, adapter_name: str) -> None:
    """Give an adapter's half-precision weights float32; see `msft_peft.functional.cast_adapter_dtype`."""
    (name,) = require(model, arguments.adapter_name(adapter_name))
    made: dict[int, Parameter] = {}
    for layer in layers_of(model):
        if name in layer.held() and layer.held()[name].dtype in HALF_DTYPES:
            _to_float32(layer, name, made)
    drop_compiled()


def _to_float32(layer: TunerLayer, name: str, made: dict[int, Parameter]) -> None:
    """New Parameters in the place of an adapter's weights here: a Parameter cannot change its dtype.

    `made` has those that took the place of others, by the `id` of these: layers may share them.
    """
    patch = layer.adapters[name]
    for holder, attribute, _ in patch.placed():
        old = getattr(holder, attribute)
        if old.dtype not in HALF_DTYPES:
            continue
        if id(old) not in made:
            new = Parameter(Tensor(as_float32(to_numpy(old))), name=old.name, requires_grad=old.requires_grad)
            made[id(old)] = new
        layer.replace_weight(name, attribute, made[id(old)], shared=holder is not patch)
    patch.dtype = ms.float32
