"""Adapters that took over a part of the base weight, rewritten as plain LoRA for the untouched base."""

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from msft_peft.backend import arguments
from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.tree import Named
from msft_peft.config import PeftConfig
from msft_peft.core.adapter import Adapter
from msft_peft.errors import ConfigError, LoadError
from msft_peft.io.adapter import PREFIX, Tensors, read_tensors
from msft_peft.tuners.lora.config import LoraConfig

# The factors' ends in a state dict, and where their rank is.
_A, _B = ".lora_A.weight", ".lora_B.weight"
_AXES = {_A: 0, _B: 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}


def as_plain_lora(
    adapter: Adapter, entries: Mapping[str, Named], initial: str | os.PathLike
) -> tuple[dict[str, Named], PeftConfig]:
    """The adapter's entries and config as a plain LoRA of twice the rank, for the base model as it was before.

    Formula: the base lost s·B₀·A₀, so that beside it s·B·A stands for s·(B·A - B₀·A₀) = s·[B, -B₀]·[A; A₀] on the
    untouched base. The rank doubles, and lora_alpha with it (by √2 with `use_rslora`), so that s stays.

    Args:
        adapter: the trained adapter.
        entries: what would be saved of it, by key.
        initial: where the adapter was saved before its first step; or a folder with a folder of its name in it.

    Raises:
        ConfigError: the adapter is no LoRA, or its initialisation changes no base weight or does so by more than
            s·B₀·A₀ (LoftQ), or it has `target_parameters`.
        FileNotFoundError: nothing is saved there.
        LoadError: what is saved there does not fit the adapter.

    Differs: HF needs the initial adapter saved with `init_lora_weights=True` in its config, and refuses `use_rslora`
    beside a rank or alpha pattern. It subtracts the initial values of adapters that left the base alone, too.
    """
    config = adapter.config
    if not isinstance(config, LoraConfig) or not any(patch.residual for patch in adapter.patches.values()):
        raise ConfigError(
            f"path_initial_model_for_weight_conversion: the adapter {adapter.name!r} did not change the base weights, "
            "so there is nothing to convert. Save it without."
        )
    if config.init == "loftq":
        raise ConfigError(
            "path_initial_model_for_weight_conversion: LoftQ quantises the base weights, which no LoRA can undo. Save "
            "the adapter without: loading it quantises the base again."
        )
    if config.kasa_config is not None:
        raise ConfigError(
            "path_initial_model_for_weight_conversion: KaSA cuts the base weights by more than its initial adapter "
            "says. Save the adapter without: loading it cuts the base again."
        )
    if config.target_parameters:
        raise ConfigError(
            "path_initial_model_for_weight_conversion does not work with target_parameters: save without."
        )
    below = Path(initial) / adapter.name
    started = read_tensors(below if below.is_dir() else initial)
    # A Site's own path is HF's, as those in the keys are.
    changed = {patch.site.path + suffix for patch in adapter.patches.values() if patch.residual for suffix in (_A, _B)}
    found = _initial_factors(started, {key: entries[key].shape for key in changed}, adapter.name)
    twice = {}
    for key in entries:
        suffix = next((suffix for suffix in _AXES if key.endswith(suffix)), None)
        if suffix is None:
            continue
        now = as_float32(entries[key].read())
        # A layer that left its base alone (an embedding) has nothing to give back, but shares the rank.
        before = found.get(key, np.zeros_like(now))
        both = np.concatenate([now, -before if suffix == _B else before], _AXES[suffix])
        p = Parameter(Tensor(both, entries[key].parameter.dtype), name=entries[key].parameter.name)
        twice[key] = entries[key]._replace(parameter=p, shape=both.shape, blocks=1)
    return {**entries, **twice}, _of_twice_the_rank(config)


def minus_initial(now: Mapping[str, Tensor], initial: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An adapter's tensors by key, with the factors of its beginning joined to its own: [A; A₀] and [B, -B₀].

    Args:
        now: the adapter's tensors; what is no factor is kept as it is.
        initial: those that it began with, by keys without the prefix.
        prefix: what the keys of `now` begin with.

    Raises:
        LoadError: a factor has none to be joined with, or one of another size.
    """
    found, faults = dict(arguments.mapping("output_state_dict", now)), []
    for key, value in now.items():
        suffix = next((suffix for suffix in _AXES if key.endswith(suffix)), None)
        if suffix is None:
            continue
        before, axis = initial.get(key.removeprefix(prefix)), _AXES[suffix]
        if before is None:
            faults.append(f"{key} is missing")
            continue
        one, other = to_numpy(value), to_numpy(before)
        if np.delete(one.shape, axis).tolist() != np.delete(other.shape, axis).tolist():
            faults.append(f"{key} has the shape {other.shape} beside {one.shape}")
            continue
        joined = np.concatenate([one, -other if axis == 1 else other], axis)
        found[key] = Tensor(joined)
    if faults:
        raise LoadError(f"The initial adapter does not fit: {'; '.join(faults)}.")
    return found


def _initial_factors(started: Tensors, wanted: Mapping[str, tuple[int, ...]], name: str) -> dict[str, np.ndarray]:
    # A checkpoint's names have the adapter's name in them.
    held = {
        key.replace(f".{started.adapter or name}.weight", ".weight"): value for key, value in started.arrays.items()
    }
    found = {key: as_float32(held[full]) for key in wanted if (full := PREFIX + key) in held or (full := key) in held}
    faults = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    faults += [
        f"{key}: the file has shape {found[key].shape}, the adapter {wanted[key]}"
        for key in sorted(found)
        if found[key].shape != tuple(wanted[key])
    ]
    if faults:
        raise LoadError(
            f"{started.origin} does not hold the initial values of the adapter {name!r}: {'; '.join(faults)}. Nothing "
            "was written. Save the adapter right after it is made, before the first step."
        )
    return found


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    config = copy.deepcopy(config)
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.corda_config = config.lora_ga_config = None
    return config
