"""Putting prepared adapters into a model, taking them out, and choosing which of them are in use."""

import warnings
from collections.abc import Iterable

from mindspore import nn

from msft_peft import hosts
from msft_peft.backend import arguments
from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.recompute import mark_again
from msft_peft.backend.tree import get_child, refresh_names, replace_cells
from msft_peft.config import PeftConfig
from msft_peft.core.adapter import Adapter, active_of, biases_of, configs_of, held_ids, invocations_of
from msft_peft.core.keys import narrowed
from msft_peft.core.layer import TunerLayer
from msft_peft.core.parameter import ParameterLayer, owner_of
from msft_peft.core.prepare import prepare
from msft_peft.core.prompt import Prompts, VirtualTokens, prompts_of, word_embeddings
from msft_peft.core.replication import restore_blocks
from msft_peft.core.routing import Routing, routing_of
from msft_peft.core.special_layers import tuner_layer
from msft_peft.core.wrapper import ModulesToSaveWrapper, Wrapper, wrappers
from msft_peft.errors import AdapterNameError, ConfigError, PeftWarning
from msft_peft.registry import method_of


def attach(model: nn.Cell, adapter: Adapter) -> None:
    """Put a prepared adapter into the model, inactive and frozen; one of the same name is replaced.

    The base model's own parameters are frozen, and nothing of them is copied.
    """
    _unmerge_for(model, adapter.name)
    keep = held_ids(model) | {id(p) for name in configs_of(model) for p in biases_of(model, name)}
    for p in model.get_parameters():
        if id(p) not in keep:
            p.requires_grad = False
    discard(model, adapter.name)
    prompts = prompts_of(model)
    enabled = all(wrapper.enabled for _, wrapper in wrappers(model)) and (prompts is None or prompts.enabled)
    if adapter.blocks is not None:
        adapter.blocks.put_into(model)
    _wrap(model, adapter)
    for path, held in (adapter.patches | adapter.modules).items():
        wrapper = get_child(model, path)
        wrapper.add(adapter.name, held)
        wrapper.set_requires_grad([adapter.name], False)
        wrapper.enable_adapters(enabled)
    if adapter.prompt is not None:
        _put_before(model, adapter.name, adapter.prompt, enabled)
    elif prompts is not None:
        del model.peft_prompts
    model.peft_config = configs_of(model) | {adapter.name: adapter.config}


def say_the_second_time(model: nn.Cell) -> None:
    """Warn of the adapters that are in a model already, of which one of the same name will be replaced."""
    if configs_of(model):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            PeftWarning,
            stacklevel=3,
        )


def _unmerge_for(model: nn.Cell, name: str) -> None:
    """Take all adapters out of the base weights again if one of them is `name`, which is about to be replaced."""
    layers = [w for _, w in wrappers(model) if isinstance(w, TunerLayer)]
    if any(name in layer.backups for layer in layers):
        warnings.warn(
            f"Adapter {name} is merged, and another one takes its place. Unmerging the model first.",
            PeftWarning,
            stacklevel=5,
        )
        for layer in layers:
            layer.unmerge()


def _put_before(model: nn.Cell, name: str, prompt: VirtualTokens, enabled: bool) -> None:
    """Put an encoder beside the model, idle and frozen."""
    prompts = prompts_of(model)
    if prompts is None:
        prompts = model.peft_prompts = Prompts(model, prompt.argument)
        prompts.enable(enabled)
    prompts.argument = prompt.argument
    prompts.put(name, prompt.set_train(model.training))
    prompts.set_requires_grad([name], False)
    # Looked for anew: the adapter may train the table whole.
    prompts.table = word_embeddings(model)


def _wrap(model: nn.Cell, adapter: Adapter) -> None:
    """Put wrappers where the adapter needs them and none stand yet."""
    routing, there = routing_of(model), {path for path, _ in wrappers(model)}
    new: dict[int, nn.Cell] = {}
    for path, patch in adapter.patches.items():
        if path not in there and patch.site.kind != "parameter":
            cell = get_child(model, path)
            new[id(cell)] = tuner_layer(cell, patch.site, routing)
    for path in set(adapter.modules) - there:
        cell = get_child(model, path)
        new[id(cell)] = ModulesToSaveWrapper(cell, routing)
    replace_cells(model, new)
    # Several parameters of one module: the wrapper with the longest path stands innermost.
    for path in sorted(set(adapter.patches) - there, key=len, reverse=True):
        site = adapter.patches[path].site
        if site.kind == "parameter":
            cell = get_child(model, owner_of(path))
            replace_cells(model, {id(cell): ParameterLayer(cell, site, routing)})


def discard(model: nn.Cell, name: str) -> None:
    """Take all that bears `name` out of the model; the wrappers stay, and without adapters act as the base layers."""
    if name in configs_of(model):
        for p in biases_of(model, name):
            p.requires_grad = False
    for _, wrapper in wrappers(model):
        wrapper.discard(name)
    prompts = prompts_of(model)
    if prompts is not None:
        prompts.drop(name)
    if name in configs_of(model):
        model.peft_config = {key: config for key, config in configs_of(model).items() if key != name}


def detach_all(model: nn.Cell) -> None:
    """Put the base layers themselves back in the place of all wrappers, and forget the adapters."""
    for _, wrapper in wrappers(model):
        for name in list(wrapper.held()):
            wrapper.discard(name)
    new: dict[int, nn.Cell] = {}
    for _, wrapper in wrappers(model):
        base = wrapper.base()
        while isinstance(base, Wrapper):
            base = base.base()
        new[id(wrapper)] = base
        wrapper.released()
    replace_cells(model, new)
    restore_blocks(model)
    for attribute in ("peft_config", "peft_active", "peft_prompts"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    # Not none: a PeftModel that is still called asks for it, and compiled code cannot make one.
    model.peft_routing = Routing()
    settle(model)


def activate(model: nn.Cell, names: Iterable[str], trainable: bool) -> None:
    """Make these adapters the active ones, trainable or frozen; all others are inactive and frozen.

    What cannot be trained stays frozen, with a warning that says why: it may be meant for inference.
    """
    names = list(names)
    use(model, names)
    stuck = untrainable(model, names) if trainable else {}
    for name, why in stuck.items():
        warnings.warn(f"Adapter {name} is active and stays frozen: {why}", PeftWarning, stacklevel=5)
    trained = [name for name in names if trainable and name not in stuck]
    for _, wrapper in wrappers(model):
        wrapper.set_requires_grad(wrapper.held(), False)
        wrapper.set_requires_grad(trained, True)
    prompts = prompts_of(model)
    if prompts is not None:
        prompts.set_requires_grad(prompts.held(), False)
        prompts.set_requires_grad(trained, True)
    for name in configs_of(model):
        for p in biases_of(model, name):
            p.requires_grad = name in trained


def untrainable(model: nn.Cell, names: Iterable[str]) -> dict[str, str]:
    """Those of the adapters whose weights cannot be trained as they are, and why."""
    patches = {
        name: [w.held()[name] for _, w in wrappers(model) if isinstance(w, TunerLayer) and name in w.held()]
        for name in names
    }
    reasons = {name: next(filter(None, (patch.untrainable() for patch in some)), "") for name, some in patches.items()}
    return {name: why for name, why in reasons.items() if why}


def use(model: nn.Cell, names: Iterable[str]) -> None:
    """Make these adapters the active ones and leave alone what is trainable."""
    names = list(names)
    for _, wrapper in wrappers(model):
        wrapper.activate(names)
    prompts = prompts_of(model)
    if prompts is not None:
        prompts.use(names)
    model.peft_active = tuple(names)
    routing_of(model).layers = tuple(w for _, w in wrappers(model) if isinstance(w, TunerLayer))
    wait(model)


def wait(model: nn.Cell) -> None:
    """Note which tokens the adapters in use wait for; none do while all are switched off."""
    enabled = any(wrapper.enabled for _, wrapper in wrappers(model))
    waiting = invocations_of(model, active_of(model)) if enabled else []
    routing_of(model).invocation = next(iter(waiting), None)


def settle(root: nn.Cell, prefix: str = "") -> None:
    """What must follow every edit of the tree.

    Parameters are named after their paths, recomputed blocks learn of what is new in them, compiled graphs go.
    """
    refresh_names(root, prefix)
    hosts.settle(root)
    mark_again(root)
    drop_compiled()


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Cell,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict | None = None,
) -> nn.Cell:
    """Put an adapter into `model` itself, active and trainable, with no `PeftModel` around it.

    Args:
        peft_config: what to build.
        model: changed in place.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: draw no random weights; they are NaN until `set_peft_model_state_dict` fills them.
        state_dict: adapter weights whose keys decide which layers get adapters, whatever the config's targets say;
            the weights themselves are not read.

    Returns:
        `model`, the same object.

    Raises:
        AdapterNameError: the name is taken, or cannot be one. For other errors see `prepare`.

    Differs: with `state_dict`, the config in the model names the layers that got adapters; HF leaves its targets as
    they are, so that the adapter cannot be loaded again by its own config.
    """
    given, model = model, hosts.as_cell(model)
    if arguments.adapter_name(adapter_name) in configs_of(model):
        raise AdapterNameError(f"Adapter with name '{adapter_name}' already exists.")
    if getattr(peft_config, "alora_invocation_tokens", None) is not None:
        raise ConfigError("alora_invocation_tokens needs get_peft_model: something must look for them in the input.")
    method_of(peft_config)  # it refuses what is no config
    if peft_config.is_prompt_learning:
        raise ConfigError(f"{peft_config.peft_type} puts nothing into a model's layers: use get_peft_model.")
    config = peft_config
    if state_dict is not None:
        config = narrowed(config, model, arguments.mapping("state_dict", state_dict))
    attach(model, prepare(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage))
    activate(model, [adapter_name], trainable=not peft_config.inference_mode)
    settle(model)
    return given
