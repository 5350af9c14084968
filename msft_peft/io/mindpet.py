"""Checkpoints of MindPet and MindFormers <-> adapter directories of HF."""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from msft_peft.backend.arrays import to_numpy
from msft_peft.backend.files import replacing, replacing_all
from msft_peft.config import PeftConfig
from msft_peft.core.keys import PREFIX
from msft_peft.core.targets import match_pattern
from msft_peft.errors import ConfigError, LoadError, PeftWarning
from msft_peft.hosts.name_maps import NameMap, name_map
from msft_peft.io.adapter import (
    CKPT_NAME,
    PROMPT_ENCODER_NAME,
    SAFETENSORS_NAME,
    read_arrays,
    read_tensors,
    write_arrays,
)
from msft_peft.io.card import About, write_card
from msft_peft.io.factors import Arrays, filled, joined_output, rescaled, split_output
from msft_peft.io.mindpet_prefix import PROMPT, has_prefix, prefix_to_hf, prefix_to_mindpet
from msft_peft.io.pet_config import from_pet_config, to_pet_config

_ADAPTER = r"(?:\.mindpet_delta_adapter)?\.mindpet_delta_adapter_block\.mindpet_delta_adapter_(down|up)_sampler\."
_LOW = r"(?:\.mindpet_delta_low_rank_adapter)?\.mindpet_delta_low_rank_adapter_(down|up)_sampler\."
# The end of a parameter's name -> the weight's key in our files; older checkpoints say tk_delta, newer ones lora_A.
_ENDS: tuple[tuple[str, str, str], ...] = (
    (r"\.(?:mindpet|tk)_delta_lora_([abAB])", "LORA", "lora_{0}.weight"),
    (r"\.lora_([AB])\.weight", "LORA", "lora_{0}.weight"),
    (_ADAPTER + "(weight|bias)", "BOTTLENECK_ADAPTER", "adapter_{0}.{1}"),
    (_LOW + r"mindpet_delta_low_rank_adapter_weight_(left|right)", "LOW_RANK_ADAPTER", "adapter_{0}_{1}.weight"),
    (_LOW + "(bias)", "LOW_RANK_ADAPTER", "adapter_{0}.{1}"),
)
_TORCH = {"gamma": "weight", "beta": "bias", "embedding_table": "weight", "embedding_weight": "weight"}


def mindpet_to_peft(
    source: str | os.PathLike | Mapping[str, Any],
    save_directory: str | os.PathLike,
    config: PeftConfig | Mapping[str, Any] | str | os.PathLike | None = None,
    lora_alpha: float | None = None,
    architecture: str | None = None,
    modules_to_save: Sequence[str] = (),
    qkv_sizes: Sequence[int] | None = None,
) -> PeftConfig:
    """Write a checkpoint of MindPet or MindFormers as an adapter directory that HF peft and `PeftModel` load.

    Ranks and targets are read from the tensors. LoRA, adapters, low-rank adapters, and prefixes: MindFormers'
    (`ptuning2`, `prefixtuning`) and those of MindPet's `PrefixLayer`, whose MLPs are carried out.

    Args:
        source: a `.ckpt` or `.safetensors` file, or its tensors by name.
        save_directory: where to; made if it is not there. The files of an adapter that is there are replaced all at
            once, or none of them.
        config: what the tensors do not tell: a `pet_config` or run configuration (as `from_pet_config` takes it), or a
            config of ours. Prefixes need one with the model's sizes.
        lora_alpha: in the place of a config.
        architecture: "llama", "qwen2", "glm", "gpt2" or "mcore": rename the layers from MindFormers' names to HF's;
            None keeps the names.
        modules_to_save: MindFormers' or your own names of layers whose whole weights are in the file and were trained
            (a new head).
        qkv_sizes: rows of q, k and v in a layer that holds all three; equal thirds by default.

    Returns:
        The config that was written.

    Raises:
        ConfigError: the scaling of LoRA is not known, the config is of another method than the tensors, or sizes do
            not fit.
        LoadError: the file cannot be read, holds no tensors of one of these methods, those of several, or half a LoRA.

    Warns:
        PeftWarning: the file also holds other weights (of the base model), which are left out; or a prefix is for a
            model with rotary positions.
    """
    names, arrays = name_map(architecture), _read(source)
    given = _config_of(config, lora_alpha)
    if has_prefix(arrays):
        _check_kind("PREFIX_TUNING", given)
        found, fields_ = prefix_to_hf(arrays, given, names)
    else:
        found, fields_ = _layers(arrays, given, names, modules_to_save, qkv_sizes)
    made = PeftConfig.from_dict(fields_, origin="the checkpoint and its config")
    directory = Path(save_directory)
    keyed = {PREFIX * (key != PROMPT) + key: array for key, array in found.items()}
    with replacing_all(directory) as scratch:
        write_arrays(scratch / SAFETENSORS_NAME, keyed)
        made.save_pretrained(scratch)
        for gone in (CKPT_NAME, PROMPT_ENCODER_NAME):  # of an adapter that was here before
            (scratch / gone).touch()
    size = sum(array.size for array in found.values())
    write_card(directory, About(made, made.base_model_name_or_path, size))
    return made


def peft_to_mindpet(
    source: str | os.PathLike,
    path: str | os.PathLike,
    architecture: str | None = None,
    fused: bool = False,
    qkv_sizes: Sequence[int] | None = None,
    prefix_layers: str | None = None,
    **hub: Any,
) -> dict[str, Any]:
    """Write an adapter directory of HF as a checkpoint under MindPet's names, for MindPet, MindFormers or our `delta`.

    One rank and one alpha stand for all layers there. Where they differ, factors are filled up with zeros to the
    highest rank, and what is left of the scaling goes into B: the update is the same.

    Args:
        source: the directory, or a repository id.
        path: the file, `.ckpt` or `.safetensors`.
        architecture: as of `mindpet_to_peft`.
        fused: MindFormers' model holds q, k and v in one layer (`qkv_concat`).
        qkv_sizes: rows of q, k and v there.
        prefix_layers: where the model holds a `PrefixLayer` of MindPet in each layer: its path, with {} for the
            layer's number; None writes a prefix as MindFormers has it, in one encoder.
        hub: `subfolder`, and `revision`, `token`, ... for `huggingface_hub`.

    Returns:
        The `pet_config` that goes with it.

    Raises:
        ConfigError: the config is of a method, or has options, that MindPet has not; or `prefix_layers` does not fit.
        LoadError: the tensors cannot be read, or some have no counterpart; all of them are listed.
        FileNotFoundError: no weights file.
    """
    names, config = name_map(architecture), PeftConfig.from_pretrained(source, **hub)
    arrays = {key.removeprefix(PREFIX): array for key, array in read_tensors(source, **hub).arrays.items()}
    if config.peft_type == "PREFIX_TUNING":
        found, block = prefix_to_mindpet(arrays, config, names, prefix_layers)
    elif prefix_layers is not None:
        raise ConfigError(f"prefix_layers is for prefixes, and the adapter is of {config.peft_type}.")
    else:
        found, block = _layers_back(arrays, config, names, fused, qkv_sizes)
    _write(Path(path), found)
    return block


# --- from MindPet ----------------------------------------------------------------------------------------------------


def _config_of(config: Any, alpha: float | None) -> dict[str, Any]:
    """What is known beside the tensors, as fields of a config."""
    if config is None:
        return {} if alpha is None else {"lora_alpha": alpha}
    made = config if isinstance(config, PeftConfig) else from_pet_config(config)
    kept = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "runtime_config"}
    return kept | ({} if alpha is None else {"lora_alpha": alpha})


def _sorted_out(arrays: Arrays) -> tuple[str, dict[str, Arrays], Arrays]:
    """(peft_type, layer -> weights by key, the rest).

    Raises:
        LoadError: no delta weights, or those of several methods.
    """
    found: dict[str, dict[str, Arrays]] = {}
    rest: Arrays = {}
    for name, array in arrays.items():
        for end, kind, key in _ENDS:
            match = re.fullmatch(r"(.*?)" + end, name)
            if match:
                layer, *parts = match.groups()
                if kind == "LORA":
                    parts = [parts[0].upper()]
                found.setdefault(kind, {}).setdefault(layer, {})[key.format(*parts)] = array
                break
        else:
            rest[name] = array
    if len(found) != 1:
        what = f"those of several methods, {sorted(found)}" if found else "none"
        raise LoadError(
            f"Looked for weights of LoRA, adapters or low-rank adapters under MindPet's names and found {what}, among "
            f"{len(arrays)} tensors: {sorted(arrays)[:3]}, ..."
        )
    kind, layers = next(iter(found.items()))
    return kind, layers, rest


def _layers(
    arrays: Arrays, given: dict[str, Any], names: NameMap, whole: Sequence[str], sizes: Sequence[int] | None
) -> tuple[Arrays, dict[str, Any]]:
    kind, layers, rest = _sorted_out(arrays)
    _check_kind(kind, given)
    made = given | {"peft_type": kind, "exclude_modules": None}
    if kind == "LORA":
        layers, grown = _renamed_lora(layers, names, sizes)
        made |= _lora_fields(layers, given, grown)
    else:
        layers = {names.to_hf(layer)[0]: weights for layer, weights in layers.items()}
        made |= _adapter_fields(kind, layers)
    found = {f"{layer}.{key}": array for layer, weights in layers.items() for key, array in weights.items()}
    kept = _whole(rest, names, whole, given.get("bias") == "all")
    made |= {"target_modules": sorted(layers), "modules_to_save": [names.to_hf(name)[0] for name in whole] or None}
    return found | kept, made


def _renamed_lora(
    layers: dict[str, Arrays], names: NameMap, sizes: Sequence[int] | None
) -> tuple[dict[str, Arrays], dict[str, int]]:
    """LoRA's factors under HF's names of layers, and the ranks that those had which were joined.

    They are split and joined where one side has several layers for one of the other.
    """
    half = [layer for layer, weights in layers.items() if len(weights) != 2]
    if half:
        raise LoadError(f"One of LoRA's two factors is missing at {', '.join(sorted(half))}.")
    found: dict[str, Arrays] = {}
    parts: dict[str, dict[str, Arrays]] = {}
    for layer, weights in layers.items():
        targets = names.to_hf(layer)
        if len(targets) > 1:
            found |= dict(zip(targets, split_output(weights, layer, len(targets), sizes)))
        elif len(names.from_hf(targets[0], False)) > 1 and layer in names.from_hf(targets[0], False):
            parts.setdefault(targets[0], {})[layer] = weights
        else:
            found[targets[0]] = weights
    grown = {}
    for target, some in parts.items():
        found[target] = joined_output(some, names.from_hf(target, False))
        grown[target] = max(weights["lora_A.weight"].shape[0] for weights in some.values())
    return found, grown


def _lora_fields(layers: dict[str, Arrays], given: dict[str, Any], grown: Mapping[str, int]) -> dict[str, Any]:
    """Rank, alpha and their exceptions. Layers that were joined have a higher rank, and alpha grows with it."""
    if given.get("lora_alpha") is None:
        raise ConfigError("The tensors do not tell how LoRA is scaled: pass lora_alpha, or the pet_config.")
    ranks = {layer: weights["lora_A.weight"].shape[0] for layer, weights in layers.items()}
    alpha, common = given["lora_alpha"], min(ranks.values())
    said = given.get("r") if any(rank == given.get("r") for rank in ranks.values()) else common
    others = {layer: rank for layer, rank in ranks.items() if rank != said}
    alphas = {layer: _number(alpha * ranks[layer] / rank) for layer, rank in grown.items() if ranks[layer] != rank}
    return {"r": said, "lora_alpha": alpha, "rank_pattern": others, "alpha_pattern": alphas}


def _adapter_fields(kind: str, layers: dict[str, Arrays]) -> dict[str, Any]:
    """The sizes, which all layers must share.

    Raises:
        LoadError: they do not, or a weight is missing.
    """
    first = "adapter_down.weight" if kind == "BOTTLENECK_ADAPTER" else "adapter_down_left.weight"
    wanted = {key.format("down", "") for _, k, key in _ENDS if k == kind}
    short = [layer for layer, weights in layers.items() if first not in weights or len(weights) < 2 * len(wanted)]
    if short:
        raise LoadError(f"Weights are missing of the adapters at {', '.join(sorted(short))}.")
    shapes = {weights["adapter_down.bias"].shape[0] for weights in layers.values()}
    if kind == "BOTTLENECK_ADAPTER":
        if len(shapes) > 1:
            raise LoadError(f"The adapters have several bottleneck sizes, {sorted(shapes)}; a config has one.")
        return {"bottleneck_size": shapes.pop()}
    factors = {w["adapter_up.bias"].shape[0] // w["adapter_down.bias"].shape[0] for w in layers.values()}
    ranks = {w[first].shape[1] for w in layers.values()}
    if len(factors) > 1 or len(ranks) > 1:
        raise LoadError(f"The adapters have reduction factors {sorted(factors)} and ranks {sorted(ranks)}, not one.")
    return {"reduction_factor": factors.pop(), "low_rank_size": ranks.pop()}


def _whole(rest: Arrays, names: NameMap, whole: Sequence[str], biases: bool) -> Arrays:
    """What was trained beside the adapters, under HF's names; there is a warning of what else there is."""
    found, left = {}, []
    for name, array in rest.items():
        owner, _, leaf = name.rpartition(".")
        trained = any(owner == layer or owner.startswith(f"{layer}.") for layer in whole)
        if trained or (biases and leaf in ("bias", "beta")):
            found[f"{names.to_hf(owner)[0]}.{_TORCH.get(leaf, leaf)}"] = array
        else:
            left.append(name)
    if left:
        warnings.warn(
            f"{len(left)} other tensors of the checkpoint are left out, {sorted(left)[:3]} among them: weights of the "
            "base model, presumably. If some were trained, name their layers in modules_to_save.",
            PeftWarning,
            stacklevel=4,
        )
    return found


def _check_kind(kind: str, given: dict[str, Any]) -> None:
    if given.get("peft_type", kind) != kind:
        raise ConfigError(f"The checkpoint holds weights of {kind}, but the config is of {given['peft_type']}.")


# --- to MindPet ------------------------------------------------------------------------------------------------------

_NAMES = {
    "LORA": {"lora_A.weight": "mindpet_delta_lora_a", "lora_B.weight": "mindpet_delta_lora_b"},
    "BOTTLENECK_ADAPTER": {
        f"adapter_{part}.{leaf}": "mindpet_delta_adapter.mindpet_delta_adapter_block."
        f"mindpet_delta_adapter_{part}_sampler.{leaf}"
        for part in ("down", "up")
        for leaf in ("weight", "bias")
    },
    "LOW_RANK_ADAPTER": {
        f"adapter_{part}{ours}": f"mindpet_delta_low_rank_adapter.mindpet_delta_low_rank_adapter_{part}_sampler.{name}"
        for part in ("down", "up")
        for ours, name in (
            ("_left.weight", "mindpet_delta_low_rank_adapter_weight_left"),
            ("_right.weight", "mindpet_delta_low_rank_adapter_weight_right"),
            (".bias", "bias"),
        )
    },
}


def _layers_back(
    arrays: Arrays, config: PeftConfig, names: NameMap, fused: bool, sizes: Sequence[int] | None
) -> tuple[Arrays, dict[str, Any]]:
    known = _NAMES.get(str(config.peft_type))
    if known is None:
        raise ConfigError(f"MindPet has nothing like {config.peft_type}; {sorted(_NAMES)} and prefixes it has.")
    layers: dict[str, Arrays] = {}
    whole: Arrays = {}
    for key, array in arrays.items():
        end = next((end for end in known if key.endswith(f".{end}")), None)
        if end is None:
            whole[key] = array
        else:
            layers.setdefault(key.removesuffix(f".{end}"), {})[end] = array
    trained = getattr(config, "modules_to_save", None) or []
    strangers = [key for key in whole if not _is_trained(key, trained, getattr(config, "bias", "none"))]
    if strangers:
        raise LoadError(f"MindPet has no counterpart of these tensors: {sorted(strangers)}.")
    block = _block_of(config)
    if config.peft_type == "LORA":
        layers, block["lora_rank"], block["lora_alpha"] = _back(layers, config, names, fused, sizes)
    else:
        layers = {names.from_hf(layer, False)[0]: weights for layer, weights in layers.items()}
    block["target_modules"] = "|".join(sorted({re.escape(layer.rpartition(".")[2]) + "$" for layer in layers}))
    found = {f"{layer}.{known[end]}": array for layer, weights in layers.items() for end, array in weights.items()}
    for key, array in whole.items():
        owner, _, leaf = key.rpartition(".")
        found[f"{names.from_hf(owner.removesuffix('.base_layer'), False)[0]}.{leaf}"] = array
    return found, block


def _is_trained(key: str, layers: Sequence[str], bias: str) -> bool:
    inside = any(f".{layer}." in f".{key}" for layer in layers)
    return inside or (bias != "none" and key.endswith(".bias"))


def _block_of(config: PeftConfig) -> dict[str, Any]:
    """The pet_config, without what the tensors say themselves."""
    plain = config.to_dict() | {"modules_to_save": None, "target_modules": None, "exclude_modules": None}
    if config.peft_type == "LORA":
        plain |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "layers_to_transform": None}
        plain["layers_pattern"] = None
        if plain["bias"] == "lora_only":
            raise ConfigError("bias='lora_only' cannot be said in a pet_config.")
    return to_pet_config(PeftConfig.from_dict(plain, origin="the adapter's config"))


def _back(
    layers: dict[str, Arrays], config: Any, names: NameMap, fused: bool, sizes: Sequence[int] | None
) -> tuple[dict[str, Arrays], int, float]:
    """LoRA's factors under MindFormers' names, with one rank and one scaling for all."""
    scaled = {}
    for layer, weights in layers.items():
        r = match_pattern(config.rank_pattern, layer, config.r)
        alpha = match_pattern(config.alpha_pattern, layer, config.lora_alpha)
        scaled[layer] = (weights, alpha / (r**0.5 if config.use_rslora else r))
    common = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    evened = {layer: rescaled(weights, scale / common) for layer, (weights, scale) in scaled.items()}
    found: dict[str, Arrays] = {}
    parts: dict[str, dict[str, Arrays]] = {}
    for layer, weights in evened.items():
        targets = names.from_hf(layer, fused)
        if len(targets) > 1:
            found |= dict(zip(targets, split_output(weights, layer, len(targets), sizes)))
        elif fused and len(names.to_hf(targets[0])) > 1:
            parts.setdefault(targets[0], {})[layer] = weights
        else:
            found[targets[0]] = weights
    for target, some in parts.items():
        found[target] = joined_output(some, names.to_hf(target))
    rank = max(weights["lora_A.weight"].shape[0] for weights in found.values())
    alpha = common * rank
    return {layer: filled(weights, rank) for layer, weights in found.items()}, rank, _number(alpha)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


# --- files -----------------------------------------------------------------------------------------------------------


def _read(source: Any) -> Arrays:
    """The tensors of a checkpoint by name.

    Raises:
        LoadError: it cannot be read.
    """
    if isinstance(source, Mapping):
        return {name: to_numpy(value) for name, value in source.items()}
    path = Path(source)
    if path.suffix == ".safetensors":
        return read_arrays(path)
    try:
        return {name: to_numpy(p) for name, p in ms.load_checkpoint(str(path)).items() if hasattr(p, "asnumpy")}
    except (ValueError, RuntimeError, TypeError) as error:
        raise LoadError(f"{path} is no MindSpore checkpoint that can be read: {error}") from error


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_arrays(path, arrays)
        return
    if path.suffix != ".ckpt":
        raise ConfigError(f"{path} must end with .ckpt or .safetensors")
    entries = [{"name": name, "data": Tensor(np.ascontiguousarray(array))} for name, array in arrays.items()]
    with replacing(path) as temporary:
        ms.save_checkpoint(entries, str(temporary))
