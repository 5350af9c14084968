"""Hot swapping: another adapter's numbers in the place of one that is in use, under compiled code."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.backend.graphs import drop_compiled
from msft_peft.config import PeftConfig
from msft_peft.core import switch
from msft_peft.core.adapter import Adapter, adapter_in, configs_of
from msft_peft.core.keys import PREFIX
from msft_peft.core.layer import TunerLayer, introduce
from msft_peft.core.tuner import base_of
from msft_peft.errors import AdapterNameError, ConfigError, LoadError, MergeError
from msft_peft.hosts import hf_names
from msft_peft.io.adapter import Tensors, read_tensors
from msft_peft.io.load import as_arrays, by_key
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.dora import DoraPatch
from msft_peft.tuners.lora.patch import LoraPatch

# What compiled code holds as constants, or the formula itself depends on.
_EQUAL = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
# The same, for what HF does not look at.
_CONSTANT = (
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "kasa_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
)
# Adapters that begin so belong to a base model whose weights were changed with them.
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def hotswap_adapter(
    model: nn.Cell,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace a LoRA adapter in the model by one from a directory or Hub repository, in place.

    Weights are overwritten; compiled code sees them and is not compiled again, provided that the scalings are equal or
    `prepare_model_for_compiled_hotswap` was called before. Layers that the new adapter does not have add nothing.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        model_name_or_path: a directory, or a repository id.
        adapter_name: the adapter in the model, which takes the new one's place.
        torch_device: HF's; MindSpore moves tensors to its device by itself.
        kwargs: `key_mapping`, `subfolder`, and `revision`, `token`, `cache_dir`, ... for `huggingface_hub`.

    Raises:
        ValueError: incompatible configs, see `check_hotswap_configs_compatible`; or no such adapter in the model.
        LoadError: a RuntimeError: tensors for layers that the adapter in the model does not have, or of a rank for
            which it has no room; layers with some of their weights and not all; or no weight at all. Nothing was
            changed.
        FileNotFoundError: no weights file.
    """
    files = {key: value for key, value in kwargs.items() if key != "key_mapping"}
    config = PeftConfig.from_pretrained(model_name_or_path, **files)
    _swap(model, read_tensors(model_name_or_path, **kwargs), adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Cell,
    state_dict: Mapping[str, Tensor | np.ndarray],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace a LoRA adapter in the model by tensors at hand, in place; see `hotswap_adapter`.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: the new adapter's, as `get_peft_model_state_dict` or `load_peft_weights` gives it.
        adapter_name: the adapter in the model.
        config: the new adapter's.
        parameter_prefix: HF's, to find weights by their names; they are found by structure here.

    Raises: as `hotswap_adapter`.
    """
    _swap(model, Tensors("The given state dict", as_arrays(state_dict)), adapter_name, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError if an adapter of `config1` cannot be swapped in for one of `config0`.

    Both must be LoRA, with the same `use_rslora`, `lora_dropout`, `alpha_pattern` and `use_dora`; ranks and
    `lora_alpha` may differ.
    """
    if config0.peft_type != config1.peft_type:
        raise ConfigError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}")
    if config0.peft_type != "LORA":
        raise ConfigError(f"Hotswapping only supports LORA but {config0.peft_type} was passed.")
    for name in _EQUAL:
        one, other = getattr(config0, name), getattr(config1, name)
        if one != other:
            raise ConfigError(f"Configs are incompatible: for {name}, {one} != {other}")


def prepare_model_for_compiled_hotswap(
    model: nn.Cell,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room for adapters of other ranks and scalings, so that swapping them in needs no recompilation.

    Call it after the first adapter is in the model. Weights are padded with zeros up to `target_rank`, which changes
    no output, and scalings become values that compiled code reads. Files and state dicts hold what they held before,
    without the padding. The padded weights are new Parameters: build the optimizer and the gradient function after it.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        target_rank: the highest rank that will come; None makes room for other scalings alone.
        config: HF's, which writes the target rank into configs; here they go on telling the adapter's own rank.
        check_compiled: "error", "warn" or "ignore": what HF does if the model is compiled already. Here compiled code
            is dropped, and compiled again when it is next called.

    Raises:
        ValueError: no LoRA layers, a rank below one that is there, or an adapter that is merged or has changed the
            base weights.

    Differs: HF's padded adapters are saved padded, and do not load again by their config.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled must be one of 'error', 'warn' or 'ignore', got {check_compiled!r}")
    held = [(layer, name, patch) for layer in switch.layers_of(base_of(model)) for name, patch in layer.held().items()]
    found = [(layer, name, patch) for layer, name, patch in held if isinstance(patch, LoraPatch)]
    if not found:
        raise ConfigError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    for layer, name, patch in found:
        _check_room(layer, name, patch, target_rank)
    for layer, name, patch in found:
        if target_rank is not None:
            for attribute, parameter in patch.padded(target_rank).items():
                layer.replace_weight(name, attribute, parameter)
        patch.scale.make_live(patch.dtype)
    drop_compiled()


def _check_room(layer: TunerLayer, name: str, patch: LoraPatch, rank: int | None) -> None:
    path = layer.site.path
    if layer.merged:
        raise MergeError("Adapters are merged into the base weights: unmerge the model first.")
    if name in layer.given:
        raise ConfigError(f"Adapter {name!r} has changed the base weights ({path}), so no other can take its place.")
    if rank is None:
        return
    if not patch.grows:
        raise ConfigError(
            f"The adapter {name!r} is of a variant whose weights cannot be padded ({path}): leave out target_rank."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank % layer.site.groups:
        raise ConfigError(f"target_rank must be an integer and a multiple of {layer.site.groups} at {path}: {rank!r}")
    if rank < patch.room:
        raise ConfigError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({patch.room}). "
            "This is not possible."
        )


def _swap(model: nn.Cell, tensors: Tensors, name: str, config: PeftConfig) -> None:
    base = base_of(model)
    adapter = adapter_in(base, name)
    check_hotswap_configs_compatible(adapter.config, config)
    assert isinstance(config, LoraConfig)
    _check_formula(adapter, config, base)
    arrays = by_key(tensors, adapter, base)
    _check_tensors(tensors, adapter, base, config, arrays)
    switch.unmerge_first(base, f"Adapter {name} cannot be replaced when the model is merged.")
    stale = False
    for patch in _patches(adapter, base).values():
        patch.r, patch.lora_alpha, patch.scale.initial = patch.settings(config)
        stale |= patch.scale.set(patch.scale.initial)
    entries = {PREFIX + key: named for key, named in adapter.entries(base).items()}
    # A tied weight has several keys, of which one is enough.
    given = {id(entries[key].parameter) for key in entries.keys() & arrays.keys()}
    for key, named in entries.items():
        if key in arrays:
            named.write(arrays[key])
        elif id(named.parameter) not in given:
            named.write(np.zeros(named.shape, np.float32))
    for path, patch in _patches(adapter, base).items():
        magnitude = f"{PREFIX}{path}.lora_magnitude_vector"
        if isinstance(patch, DoraPatch) and magnitude not in arrays:
            # The magnitude of a layer without an update is the base weight's own.
            vector = patch.lora_magnitude_vector
            write(vector, as_float32(to_numpy(patch.norm())).reshape(vector.shape))
    introduce(base)
    base.peft_config = configs_of(base) | {name: _config_of(adapter, config)}
    if stale:
        drop_compiled()


def _patches(adapter: Adapter, base: nn.Cell) -> dict[str, LoraPatch]:
    """Its Patches by HF's names of their layers, as in keys."""
    hf_name = hf_names(base)
    return {hf_name(path): patch for path, patch in adapter.patches.items() if isinstance(patch, LoraPatch)}


def _check_formula(adapter: Adapter, config: LoraConfig, base: nn.Cell) -> None:
    """Raise ConfigError if the new adapter needs more than other numbers."""
    for init in (getattr(adapter.config, "init", ""), config.init):
        if str(init).startswith(_RESIDUAL_INITS):
            raise ConfigError(
                f"An adapter with init_lora_weights={init!r} belongs to base weights that were changed with it, and "
                "cannot be swapped. Save it as a plain LoRA first."
            )
    for name in _CONSTANT:
        mine, new = getattr(adapter.config, name), getattr(config, name)
        if mine != new:
            raise ConfigError(f"Configs are incompatible: for {name}, {mine} != {new}")
    if any(adapter.name in layer.given for layer in switch.layers_of(base)):
        raise AdapterNameError(f"Adapter {adapter.name} has changed the base weights: delete it instead.")


def _check_tensors(
    tensors: Tensors, adapter: Adapter, base: nn.Cell, config: LoraConfig, arrays: dict[str, np.ndarray]
) -> None:
    """Raise LoadError, with all faults, if the tensors do not fit into the adapter's place."""
    wanted: dict[str, tuple[int, ...]] = {}
    own = {PREFIX + key: named.shape for key, named in adapter.entries(base).items()}
    faults = []
    for path, patch in _patches(adapter, base).items():
        rank, _, _ = patch.settings(config)
        if rank > patch.room or rank % patch.site.groups:
            faults.append(
                f"{path} needs rank {rank}, but the adapter in the model has room for {patch.room}: call "
                f"prepare_model_for_compiled_hotswap(model, target_rank={rank}) first"
            )
        here = {f"{PREFIX}{path}.{key}": patch.shape_at(attribute, rank) for attribute, key in patch.keys.items()}
        absent = sorted((here.keys() & own.keys()) - arrays.keys())
        if absent and arrays.keys() & here.keys():
            faults.append(f"{path} has some of its weights, but not {', '.join(absent)}")
        wanted |= here
    if not arrays.keys() & own.keys():
        faults.append(f"none of the {len(arrays)} tensors is a weight of the adapter in the model")
    whole = {key: shape for key, shape in own.items() if key not in wanted}
    extra = sorted(arrays.keys() - wanted.keys() - whole.keys())
    if extra:
        faults.append(f"unexpected keys found: {', '.join(extra)}")
    lost = sorted(whole.keys() - arrays.keys())
    if lost:
        faults.append(f"weights that the adapter trains whole are missing: {', '.join(lost)}")
    for key, shape in sorted((wanted | whole).items()):
        if key in arrays and arrays[key].shape != shape:
            faults.append(f"size mismatch for {key}: {arrays[key].shape}, but by its config it is {shape}")
    if faults:
        raise LoadError(
            f"Hot swapping the adapter did not succeed, {'; '.join(faults)}. Nothing was changed. ({tensors.origin})"
        )


def _config_of(adapter: Adapter, config: LoraConfig) -> LoraConfig:
    """The new adapter's config, for the layers that are adapted here."""
    new, old = copy.deepcopy(config), adapter.config
    for kept in (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "inference_mode",
    ):
        setattr(new, kept, copy.deepcopy(getattr(old, kept)))
    return new
