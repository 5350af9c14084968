"""Building an adapter outside the model: all that can fail fails here, before the tree is touched."""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from mindspore import Parameter, nn

from msft_peft.backend.arrays import to_numpy, write
from msft_peft.backend.tree import owners
from msft_peft.config import PeftConfig, PromptLearningConfig, TargetedConfig
from msft_peft.core.adapter import Adapter, check_name, configs_of, lies_inside
from msft_peft.core.checkpointing import is_checkpointing
from msft_peft.core.layer import TunerLayer, site_of
from msft_peft.core.naming import named_as_in_hf, translate
from msft_peft.core.parameter import ParameterLayer, owner_of
from msft_peft.core.patch import Patch
from msft_peft.core.prompt import PREFIX_STATES, VirtualTokens, completed, prompts_of, word_embeddings
from msft_peft.core.replication import replicated
from msft_peft.core.targets import is_bypassed, match_targets, matches_name, resolve_targets
from msft_peft.core.tied import copies_of, say_ties, tied_embeddings
from msft_peft.core.wrapper import Wrapper, outer_cells, wrappers
from msft_peft.errors import ConfigError, MergeError, NoMatchingPeftModuleError, PeftWarning
from msft_peft.hosts import Site, hf_names, model_config
from msft_peft.registry import Method, method_of

# Heads that task classes ask to be trained whole without knowing which of them a model has.
OPTIONAL_HEADS = ("classifier", "score", "qa_outputs")


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
    if method.choose is not None:
        sites = {path: sites[path] for path in method.choose(config, list(sites))}
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
            owner = owner_of(path)
            beside = {other for other in extras if owner_of(other) != owner}
            _check_owner(owner, patch.site, there.get(path), targets | modules | beside)


def _check_owner(owner: str, site: Site, there: Wrapper | None, others: Iterable[str]) -> None:
    """The module that holds a parameter is wrapped for that, and its own layers keep their paths."""
    inside = sorted(path for path in others if lies_inside(path, [owner]))
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
