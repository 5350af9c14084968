"""Putting adapters into a model and taking them out: everything is prepared and checked before the tree is touched."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from mindspore import Parameter, nn

from msft_peft import hosts
from msft_peft.backend.arrays import to_numpy, write
from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.recompute import mark_again
from msft_peft.backend.tree import Named, get_child, named_parameters, owners, refresh_names, replace_cells
from msft_peft.config import PeftConfig, PromptLearningConfig, TargetedConfig
from msft_peft.core.checkpointing import is_checkpointing
from msft_peft.core.keys import BASE, BESIDE, PREFIX, narrowed
from msft_peft.core.layer import (
    ModulesToSaveWrapper,
    TunerLayer,
    Wrapper,
    outer_cells,
    site_of,
    tuner_layer,
    wrappers,
)
from msft_peft.core.naming import named_as_in_hf, translate
from msft_peft.core.parameter import ParameterLayer
from msft_peft.core.patch import Patch, place_of
from msft_peft.core.prompt import PREFIX_STATES, Prompts, VirtualTokens, completed, prompts_of, word_embeddings
from msft_peft.core.replication import Blocks, replicated, restore_blocks
from msft_peft.core.routing import Routing, routing_of
from msft_peft.core.targets import is_bypassed, match_targets, matches_name, resolve_targets
from msft_peft.core.tied import copies_of, say_ties, tied_embeddings
from msft_peft.errors import AdapterNameError, ConfigError, MergeError, NoMatchingPeftModuleError, PeftWarning
from msft_peft.hosts import Site, hf_names, model_config
from msft_peft.registry import Method, method_of

# Heads that task classes ask to be trained whole without knowing which of them a model has.
OPTIONAL_HEADS = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class Adapter:
    """A name, and all that bears it: in the model already, or prepared and still outside it.

    Attributes:
        name: the adapter's name.
        config: its config, targets resolved.
        patches: its Patch at each adapted layer's path.
        modules: its copy of each layer that it trains whole, by path.
        blocks: another list of blocks for the base model, if it asks for one.
        prompt: what it puts before the input, if its method does that.
    """

    name: str
    config: PeftConfig
    patches: dict[str, Patch]
    modules: dict[str, nn.Cell]
    blocks: Blocks | None = None
    prompt: VirtualTokens | None = None

    @property
    def prefix(self) -> str:
        """What stands before the keys of its tensors in HF's files."""
        return PREFIX if self.prompt is None else ""

    @property
    def inside(self) -> str:
        """What stands, after `prefix`, before the paths of the base model: beside a prompt it has no Tuner around."""
        return "" if self.prompt is None else BASE

    @property
    def targets(self) -> list[str]:
        """The paths of its target layers."""
        return [path for path, patch in self.patches.items() if not patch.auxiliary]

    def entries(self, model: nn.Cell) -> dict[str, Named]:
        """Its tensors by their keys in HF's files, see `core.keys.in_file`: weights, copies, and trained biases.

        `local` of each is the parameter's path once the adapter is in the model.
        """
        return self._tensors(model, {} if self.prompt is None else self.prompt.stored())

    def needed(self, model: nn.Cell) -> dict[str, Named]:
        """The tensors that loading must fill: `entries`, or all that a prompt's own encoder has."""
        if self.prompt is None or not self.prompt.reparametrised:
            return self.entries(model)
        return self._tensors(model, self.prompt.own())

    def accepted(self, model: nn.Cell) -> dict[str, Named]:
        """`needed`, and the keys of layers that share a weight with one before them: HF's files hold it again."""
        return self._tensors(model, {}, copies=True) if self.prompt is None else self.needed(model)

    def _tensors(self, model: nn.Cell, prompt: dict[str, Named], copies: bool = False) -> dict[str, Named]:
        place = f"prompt_encoder.{self.name}"
        found = {key: named._replace(local=f"{place}.{named.local}") for key, named in prompt.items()}
        hf_name, seen = hf_names(model), set()
        for path, patch in self.patches.items():
            for holder, attribute, suffix in patch.placed():
                if attribute in holder.unsaved or (id(getattr(holder, attribute)) in seen and not copies):
                    continue
                seen.add(id(getattr(holder, attribute)))
                p, (place, rest) = getattr(holder, attribute), place_of(suffix)
                local = ".".join(part for part in (path, place, self.name, rest) if part)
                key = f"{hf_name(path)}.{suffix}" if holder is patch else BESIDE + suffix
                shape, blocks = holder.shape_of(attribute), holder.blocks_of(attribute)
                found[key] = Named(key, local, p, shape, blocks, patch.turned, holder.kept_of(attribute))
        for path, module in self.modules.items():
            for named in named_parameters(module, tied=True):
                owner, _, leaf = f"{path}.{named.key}".rpartition(".")
                key = f"{self.inside}{hf_name(owner)}.{leaf}"
                local = f"{self.inside}{path}.modules_to_save.{self.name}.{named.local}"
                found[key] = named._replace(key=key, local=local)
        return found | self.biases(model)

    def biases(self, model: nn.Cell) -> dict[str, Named]:
        """The base model's biases that it trains in place, with the paths that they have once it is in."""
        kind = getattr(self.config, "bias", "none")
        if kind == "none":
            return {}
        held, hf_name = held_ids(model), hf_names(model)
        adapted = set(self.patches) | {path for path, w in wrappers(model) if isinstance(w, TunerLayer)}
        found = {}
        for named in named_parameters(model):
            owner, _, leaf = named.key.rpartition(".")
            while owner.removesuffix(".base_layer") in adapted - {owner}:
                owner = owner.removesuffix(".base_layer")
            if leaf != "bias" or id(named.parameter) in held or (kind != "all" and owner not in self.patches):
                continue
            if lies_inside(owner, self.modules):
                continue  # trained as a part of the whole layer, in the copy
            if owner in adapted:
                inner = f"{owner}."
                while inner.removesuffix(".") in adapted:  # more than one wrapper where parameters are adapted
                    inner += "base_layer."
                named = named._replace(key=inner + leaf, local=inner + named.local.rpartition(".")[2])
            place, _, leaf = named.key.rpartition(".")
            key = f"{hf_name(owner)}{place.removeprefix(owner)}.{leaf}"
            found[key] = named._replace(key=key)
        return found


def adapter_in(model: nn.Cell, name: str) -> Adapter:
    """The adapter `name` as it is in the model.

    Raises:
        AdapterNameError: there is none of that name.
    """
    if name not in configs_of(model):
        raise AdapterNameError(f"Adapter {name} not found. There are {sorted(configs_of(model))}.")
    found = [(path, w, w.held()[name]) for path, w in wrappers(model) if name in w.held()]
    patches = {path: cell for path, w, cell in found if isinstance(w, TunerLayer)}
    modules = {path: cell for path, w, cell in found if isinstance(w, ModulesToSaveWrapper)}
    prompts = prompts_of(model)
    prompt = None if prompts is None else prompts.held().get(name)
    return Adapter(name, configs_of(model)[name], patches, modules, prompt=prompt)


def prepare(
    model: nn.Cell, config: PeftConfig, name: str, autocast: bool = True, low_cpu_mem_usage: bool = False
) -> Adapter:
    """Build everything that an adapter needs, outside the model, which stays as it is.

    Args:
        model: the base model, with or without other adapters.
        config: what to build; it is copied, and the copy's targets are resolved.
        name: the adapter's name.
        autocast: keep the weights in float32 where the base is in half precision.
        low_cpu_mem_usage: draw no random weights, since they are about to be loaded; until then they are NaN.

    Raises:
        AdapterNameError: not a name for an adapter.
        NotImplementedError: the config asks for something that is not built; the field is named.
        ConfigError: an unknown method, a target that the method cannot work on, or no targets to be found.
        NoMatchingPeftModuleError: nothing in the model matches.
    """
    method = method_of(config)
    config.require_built()
    check_name(name)
    if isinstance(getattr(type(model), "peft_config", None), property):
        raise ConfigError(
            "The model is a PeftModel already. Add further adapters to it with add_adapter or load_adapter; its base "
            "model is get_base_model()."
        )
    _check_company(model, method)
    config = copy.deepcopy(config)
    if isinstance(config, PromptLearningConfig):
        return _prepare_prompt(model, config, name, low_cpu_mem_usage)
    assert isinstance(config, TargetedConfig)
    blocks = replicated(model, getattr(config, "layer_replication", None), len(configs_of(model).keys() - {name}))
    cells = outer_cells(model) if blocks is None else blocks.seen(model)
    # A config speaks HF's names; from here on `places` says where each of them is.
    places = named_as_in_hf(cells, hf_names(model))
    seen = {name: cells[path] for name, path in places.items()}
    translate(config, places)
    targets = resolve_targets(config, method, model, seen)
    config.target_modules = targets if isinstance(targets, str) else sorted(targets)
    if method.settle is not None:
        method.settle(config, model_config(model))
    sites = _sites(model, config, seen, match_targets(config, seen), places)
    _settle_fan_in_fan_out(config, sites.values())
    _check_bias(model, config, name)
    _check_parameters(model, config, name)
    tied, ensure = tied_embeddings(model, cells), getattr(config, "ensure_weight_tying", False)
    whole = _modules_to_save(config, seen)
    modules = {places[name]: cell for name, cell in whole.items()}
    if tied is not None and ensure and tied.paths & set(modules):
        modules |= {site.path: site.layer for site in tied}
    _say_paths(config, whole, seen)
    with _bare([w for _, w in wrappers(model) if isinstance(w, TunerLayer) and (w.merged or name in w.given)], name):
        patches = _patches(method, sites, config, autocast, low_cpu_mem_usage)
        if method.extras is not None:
            extras = method.extras(model, config, cells, patches, tied, autocast, low_cpu_mem_usage)
            # A Patch may stand in the place of one at a target, if it rides on another or is that one.
            new = {path: patch for path, patch in extras.items() if not patch.rides and patches.get(path) is not patch}
            _check_extras(model, new, set(patches), set(modules))
            patches |= extras
    _check_residual(model, name, patches)
    say_ties(tied, {*(path for path, patch in patches.items() if not patch.auxiliary), *modules}, ensure)
    return Adapter(name, config, patches, copies_of(modules, tied if ensure else None), blocks)


def _patches(
    method: Method, sites: dict[str, Site], config: TargetedConfig, autocast: bool, low_cpu_mem_usage: bool
) -> dict[str, Patch]:
    """A Patch for each site; the first one leads, if they share weights."""
    classes, given = method.patches_for(config), (config, autocast, low_cpu_mem_usage)
    if method.shared is None:
        return {path: classes[site.kind](site, *given) for path, site in sites.items()}
    shared = method.shared(sites.values(), *given)
    patches = {path: classes[site.kind](site, *given, shared) for path, site in sites.items()}
    next(iter(patches.values())).leads = True
    return patches


def _prepare_prompt(model: nn.Cell, config: PromptLearningConfig, name: str, low_cpu_mem_usage: bool) -> Adapter:
    """The same for a method that wraps nothing but the layers that are trained whole."""
    kind = cast("type[VirtualTokens]", method_of(config).prompt)
    completed(config, model)
    if kind.argument == PREFIX_STATES and is_checkpointing(model):
        raise ConfigError(f"{config.peft_type} does not work with gradient checkpointing.")
    modules = _modules_to_save(config, outer_cells(model))
    prompt = kind(config, word_embeddings(model), low_cpu_mem_usage)
    return Adapter(name, config, {}, copies_of(modules, None), prompt=prompt)


def _check_company(model: nn.Cell, method: Method) -> None:
    """What stands before the input and what stands in the model are not mixed, nor are two kinds of the former."""
    others = {str(config.peft_type) for config in configs_of(model).values()}
    prompting = method.prompt is not None
    if others - {method.name} and (prompting or prompts_of(model) is not None):
        raise ConfigError(
            f"Cannot combine adapters with different peft types. Found {min(others)} and {method.name}. Take the "
            "others out first: unload() for adapters in the model's layers, delete_adapter(name) for virtual tokens."
        )


def attach(model: nn.Cell, adapter: Adapter) -> None:
    """Put a prepared adapter into the model, inactive and frozen; one of the same name is replaced.

    The base model's own parameters are frozen, and nothing of them is copied.
    """
    _unmerge_for(model, adapter.name)
    keep = held_ids(model) | {id(p) for name in configs_of(model) for p in _biases_of(model, name)}
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
            cell = get_child(model, site.path)
            replace_cells(model, {id(cell): ParameterLayer(cell, site, routing)})


def discard(model: nn.Cell, name: str) -> None:
    """Take all that bears `name` out of the model; the wrappers stay, and without adapters act as the base layers."""
    if name in configs_of(model):
        for p in _biases_of(model, name):
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
        for p in _biases_of(model, name):
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


def invocations_of(model: nn.Cell, names: Iterable[str]) -> list[tuple[int, ...]]:
    """The token sequences that these adapters wait for, each once."""
    waiting = (getattr(configs_of(model)[name], "alora_invocation_tokens", None) for name in names)
    return list(dict.fromkeys(tuple(tokens) for tokens in waiting if tokens is not None))


def active_of(model: nn.Cell) -> list[str]:
    """The names of the adapters in use (or that would be, were they not disabled), in the order in which they act."""
    return [name for name in getattr(model, "peft_active", ()) if name in configs_of(model)]


def configs_of(model: nn.Cell) -> dict[str, PeftConfig]:
    """The configs of the adapters in the model, by name."""
    return getattr(model, "peft_config", {})


def settle(root: nn.Cell, prefix: str = "") -> None:
    """What must follow every edit of the tree.

    Parameters are named after their paths, recomputed blocks learn of what is new in them, compiled graphs go.
    """
    refresh_names(root, prefix)
    hosts.settle(root)
    mark_again(root)
    drop_compiled()


def check_name(name: str) -> None:
    """Raise AdapterNameError if `name` cannot name an adapter."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]{1,100}", name):
        raise AdapterNameError(
            f"{name!r} cannot name an adapter: it must be 1 to 100 of the characters A-Z, a-z, 0-9, _ and -, since it "
            "becomes a part of parameter names (MindSpore allows no others there) and a folder's name."
        )
    if hasattr(nn.CellDict, name) or hasattr(nn.CellDict(), name):
        raise AdapterNameError(f"{name!r} cannot name an adapter: MindSpore's Cells have an attribute of that name.")


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
    if adapter_name in configs_of(model):
        raise AdapterNameError(f"Adapter with name '{adapter_name}' already exists.")
    if getattr(peft_config, "alora_invocation_tokens", None) is not None:
        raise ConfigError("alora_invocation_tokens needs get_peft_model: something must look for them in the input.")
    method_of(peft_config)  # it refuses what is no config
    if peft_config.is_prompt_learning:
        raise ConfigError(f"{peft_config.peft_type} puts nothing into a model's layers: use get_peft_model.")
    config = peft_config if state_dict is None else narrowed(peft_config, model, state_dict)
    attach(model, prepare(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage))
    activate(model, [adapter_name], trainable=not peft_config.inference_mode)
    settle(model)
    return given


def _sites(
    model: nn.Cell, config: TargetedConfig, cells: dict[str, nn.Cell], paths: list[str], places: Mapping[str, str]
) -> dict[str, Site]:
    """The Sites at these of HF's names, by their places in the model."""
    method, variant = method_of(config), getattr(config, "variant", "")
    kinds, what = method.patches_for(config), f"{method.name} ({variant})" if variant else method.name
    found = {}
    for path in paths:
        cell = cells[path]
        site = site_of(cell, path)
        if site is None or site.kind not in kinds:
            raise ConfigError(
                f"Target module {path} ({type(cell).__name__}) is not supported. Currently, only these kinds of "
                f"layers are supported by {what}: {sorted(kinds)}. Name such layers, or 'all-linear'."
            )
        if is_bypassed(path, cells, model):
            raise ConfigError(
                f"Target module {path}: nn.MultiheadAttention reads the weight of this layer and never calls "
                "it, so that an adapter there would do nothing. Leave it out; modules_to_save trains it whole."
            )
        found[places[path]] = site
    return found


def _settle_fan_in_fan_out(config: TargetedConfig, sites: Iterable[Site]) -> None:
    """The layers know how they store their weights: a config that says otherwise is corrected, with a warning."""
    stored = {
        site.transposed if site.fan_in_fan_out is None else site.fan_in_fan_out
        for site in sites
        if site.kind == "dense"
    }
    said = getattr(config, "fan_in_fan_out", None)
    if said is None or len(stored) != 1 or said in stored:
        return
    kind = "torch.nn.Linear" if said else "Conv1D"
    warnings.warn(
        f"fan_in_fan_out is set to {said} but the target module is `{kind}`. Setting fan_in_fan_out to {not said}.",
        PeftWarning,
        stacklevel=4,
    )
    config.fan_in_fan_out = not said  # type: ignore[attr-defined]


def _check_bias(model: nn.Cell, config: TargetedConfig, name: str) -> None:
    """Biases are trained in place, so two adapters cannot both have their own."""
    biases = [getattr(other, "bias", "none") for key, other in configs_of(model).items() if key != name]
    mine = getattr(config, "bias", "none")
    if mine != "none" and getattr(config, "layer_replication", None):
        raise ConfigError(f"bias={mine!r} does not go with layer_replication: repeated blocks share their biases.")
    if (biases and mine != "none") or any(bias != "none" for bias in biases):
        raise ConfigError(
            f"Only 1 adapter with bias is supported, got bias={mine!r} for {name!r} beside {biases}. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )


def _check_parameters(model: nn.Cell, config: TargetedConfig, name: str) -> None:
    """Wrappers of parameters stand around each other in an order of their own, so all adapters must have the same."""
    mine = sorted(getattr(config, "target_parameters", None) or [])
    for key, other in configs_of(model).items():
        theirs = sorted(getattr(other, "target_parameters", None) or [])
        if key != name and theirs != mine:
            raise ConfigError(
                "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                f"parameters, but got {mine} for the new adapter and {theirs} for adapter '{key}'."
            )


def _check_extras(model: nn.Cell, extras: dict[str, Patch], targets: set[str], modules: set[str]) -> None:
    """A layer has one Patch of an adapter, and what is wrapped for its parameter is wrapped for nothing else."""
    there = dict(wrappers(model))
    for path, patch in extras.items():
        wanted = ParameterLayer if patch.site.kind == "parameter" else TunerLayer
        if path in targets or lies_inside(path, modules) or type(there.get(path, wanted)) not in (wanted, type):
            raise ConfigError(
                f"{path} is to be adapted twice: it is among target_modules or modules_to_save, or another adapter's, "
                "and among trainable_token_indices or target_parameters. target_modules=[] adapts no layers."
            )
        if wanted is ParameterLayer:
            beside = {other for other, extra in extras.items() if extra.site.path != patch.site.path}
            _check_owner(patch.site, there.get(path), targets | modules | beside)


def _check_owner(site: Site, there: Wrapper | None, others: Iterable[str]) -> None:
    """The module that holds a parameter is wrapped for that, and its own layers keep their paths."""
    inside = sorted(path for path in others if lies_inside(path, [site.path]))
    if inside:
        raise ConfigError(
            f"target_parameters: {site.path}, which holds {site.weight_name}, also holds what is to be adapted "
            f"otherwise: {', '.join(inside)}. Adapt one of them only."
        )
    if isinstance(there, ParameterLayer) and there.site.weight_name != site.weight_name:
        raise ConfigError(
            f"target_parameters: at {site.path} the adapters so far were for {there.site.weight_name}, and now "
            f"{site.weight_name} is asked for. Target the same parameters, or call `.unload()` to begin anew."
        )


def unmerged(model: nn.Cell, parameters: Iterable[Parameter]) -> contextlib.AbstractContextManager[None]:
    """Inside the block nothing is merged into these parameters; afterwards they are as they were."""
    wanted = {id(p) for p in parameters}
    layers = [w for _, w in wrappers(model) if isinstance(w, TunerLayer) and w.merged]
    return _bare([layer for layer in layers if wanted & {id(layer.weight), id(layer.bias)}])


@contextlib.contextmanager
def _bare(layers: list[TunerLayer], name: str = "") -> Iterator[None]:
    """Inside the block nothing is merged into the base weights, and they have what adapter `name` took from them.

    Afterwards they are as they were.
    """
    before = [
        (layer, layer.backups, [(p, to_numpy(p).copy()) for p in (layer.weight, layer.bias) if p is not None])
        for layer in layers
    ]
    try:
        for layer in layers:
            layer.backups = dict(layer.backups)
            layer.unmerge()
            if name in layer.given:
                layer.give_back(name)
        yield
    finally:
        for layer, backups, values in before:
            for p, value in values:
                write(p, value)
            layer.backups = backups
            layer.enable_adapters(layer.enabled)


def _check_residual(model: nn.Cell, name: str, patches: dict[str, Patch]) -> None:
    """What is taken from the base weights must have been computed from those weights themselves, and be theirs alone.

    Warns of adapters beside one that changes the base weights, under which the others were or will be made.
    """
    layers = [w for _, w in wrappers(model) if isinstance(w, TunerLayer)]
    mine = {patch.title for patch in patches.values() if patch.residual}
    given = [layer.adapters[key] for layer in layers for key in layer.given if key != name]
    others = {patch.title for patch in given if patch.alone}
    if any(key != name for key in configs_of(model)):
        others |= {patch.title for patch in patches.values() if patch.residual and patch.alone}
    for title in sorted(others):
        warnings.warn(
            f"{title} changes the base weights of the model and should thus not be used with other adapters. Consider "
            f"converting the {title} adapter into a normal LoRA adapter: save_pretrained(directory, "
            "path_initial_model_for_weight_conversion=...).",
            PeftWarning,
            stacklevel=4,
        )
    if not mine:
        return
    holders = owners(model)
    for path, patch in patches.items():
        # Replicated blocks share their weights as well.
        alike = [other for other, p in patches.items() if p.site.weight is patch.site.weight]
        tied = max(holders.get(id(patch.site.weight), []), alike, key=len) if patch.residual else []
        if len(tied) > 1:
            raise ConfigError(
                f"{patch.title} changes the weight of {path}, which is tied: {' and '.join(tied)} hold the same "
                "Parameter. Give one a copy first, or leave the layer out of target_modules."
            )
    if any(layer.merged for layer in layers):
        raise MergeError("This adapter's initial weights are taken from the base weights: unmerge the model first.")


def _modules_to_save(config: TargetedConfig | PromptLearningConfig, cells: dict[str, nn.Cell]) -> dict[str, nn.Cell]:
    """The layers to be trained whole, by path.

    Raises:
        NoMatchingPeftModuleError: a name matches nothing, unless it is one of the usual heads.
    """
    found: dict[str, nn.Cell] = {}
    for name in config.modules_to_save or []:
        hits = {path: cell for path, cell in cells.items() if matches_name(path, [name])}
        if not hits and name not in OPTIONAL_HEADS:
            raise NoMatchingPeftModuleError(
                f"modules_to_save={config.modules_to_save!r}: {name!r} matches none of the base model's {len(cells)} "
                "modules. Please check the name; it must be a module's whole path or the end of one from a dot on."
            )
        found |= hits
    for path, cell in found.items():
        adapted = [inner for inner, w in wrappers(cell) if isinstance(w, TunerLayer)]
        if adapted:
            raise ConfigError(
                f"modules_to_save={config.modules_to_save!r}: {path} is, or holds, a layer that another adapter of "
                "this model adapts, so it cannot be trained whole as well. Unload that adapter first."
            )
    originals = {path: cell.base() if isinstance(cell, Wrapper) else cell for path, cell in found.items()}
    return {path: cell for path, cell in originals.items() if not lies_inside(path.rpartition(".")[0], originals)}


def _say_paths(config: TargetedConfig, modules: dict[str, nn.Cell], cells: dict[str, nn.Cell]) -> None:
    """Write whole paths into `modules_to_save` where HF, for which a name is any end of a path, would take more."""
    names: list[str] = []
    for name in config.modules_to_save or []:
        here = [path for path in modules if matches_name(path, [name])]
        in_hf = [path for path in cells if path.endswith(name)]
        names += here if here and len(here) < len(in_hf) else [name]
    config.modules_to_save = list(dict.fromkeys(names)) or config.modules_to_save


def lies_inside(path: str, others: Iterable[str]) -> bool:
    """Whether `path` is one of `others` or below one."""
    return any(path == other or path.startswith(other + ".") for other in others)


def held_ids(model: nn.Cell) -> set[int]:
    """Identities of all parameters that belong to adapters, not to the base model."""
    return {id(p) for _, w in wrappers(model) for cell in w.held().values() for p in cell.get_parameters()}


def _biases_of(model: nn.Cell, name: str) -> list[Parameter]:
    """The biases that the adapter trains in place."""
    # Asked of every adapter whenever one is added: looking through the tree for each would be quadratic.
    if getattr(configs_of(model)[name], "bias", "none") == "none":
        return []
    return [named.parameter for named in adapter_in(model, name).biases(model).values()]
