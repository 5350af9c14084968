"""From an adapter of any additive method to a LoRA adapter: an SVD of what it adds to each layer's weight."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.backend.files import replacing_all
from msft_peft.backend.tree import Named
from msft_peft.config import PeftConfig, TargetedConfig
from msft_peft.core.adapter import Adapter, adapter_in
from msft_peft.core.layer import TunerLayer
from msft_peft.core.targets import match_pattern
from msft_peft.core.wrapper import wrappers
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import hf_names
from msft_peft.io.adapter import PREFIX, save_prompt_encoder, save_tensors
from msft_peft.tuners.lora.combine import truncated_svd
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.exact import prepare_exactly


def convert_to_lora(
    model: nn.Cell,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter that is nearest to an adapter of another method; the model stays as it is.

    Each layer's update Δ becomes B·A, its best approximation of the rank: Δ = U·S·Vᵀ, B = U·S and A = Vᵀ, cut to it.
    Where Δ has no more than that rank the conversion is exact.

    Args:
        model: a `PeftModel`, its `base_model`, or a model that adapters were injected into.
        rank: an int: the rank of all layers. A float in (0, 1]: for each layer the least rank that keeps this share of
            Δ's energy (the sum of its squared singular values); `rank_pattern` then names each layer's.
        adapter_name: the adapter to convert.
        progressbar: show one.
        compile_kwargs: HF's, for torch.compile; there is nothing to compile here, so it must be None.

    Returns:
        The config (scaling 1) and the weights by their keys in HF's files; layers that the adapter trains whole are
        among them.

    Raises:
        AdapterNameError: there is no such adapter.
        TypeError: the adapter does more than add to weights, or sits on layers that LoRA cannot hold; they are named.
        ConfigError: a rank that makes no sense or exceeds a layer's weight, or biases that are trained in place.
        NotImplementedError: `compile_kwargs` is given.

    Differs: HF converts dense layers only, drops `task_type` and the base model's name from the config, and converts a
    DoRA adapter although its magnitudes are lost. An adapter that took its start from the base weights (PiSSA) is
    converted against the untouched ones.
    """
    adapter = _converted(model, rank, adapter_name, progressbar, compile_kwargs)
    assert isinstance(adapter.config, LoraConfig)
    return adapter.config, {
        PREFIX + key: Tensor(to_numpy(named.parameter).reshape(named.shape).copy())
        for key, named in sorted(_entries(adapter, model).items())
    }


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Cell,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what `convert_to_lora` makes into a folder, as a LoRA adapter that HF peft opens too.

    Its files take the place of an adapter's that is there all at once, or not at all.

    Args:
        path: the folder; made if it is not there.
        model, rank, adapter_name, progressbar, compile_kwargs: see `convert_to_lora`.

    Raises:
        NotADirectoryError: the path is a file. For the rest see `convert_to_lora`.
    """
    if Path(path).is_file():
        raise NotADirectoryError(f"Provided path ({path}) should be a directory, not a file")
    adapter = _converted(model, rank, adapter_name, progressbar, compile_kwargs)
    with replacing_all(Path(path)) as scratch:
        save_tensors(scratch, adapter.name, _entries(adapter, model))
        save_prompt_encoder(scratch, adapter, wanted=False)
        adapter.config.save_pretrained(scratch)


def _entries(adapter: Adapter, model: nn.Cell) -> dict[str, Named]:
    return adapter.entries(_holder(model))


def _converted(
    model: nn.Cell, rank: float, name: str, progressbar: bool, compile_kwargs: dict[str, Any] | None
) -> Adapter:
    """The LoRA adapter, outside the model."""
    if compile_kwargs is not None:
        raise NotImplementedError("compile_kwargs are torch.compile's; the SVD is LAPACK's here: leave them at None")
    if not isinstance(model, nn.Cell):
        raise TypeError(f"`model` must be a mindspore.nn.Cell, got {type(model).__name__}")
    _check_rank(rank)
    base = _holder(model)
    source = adapter_in(base, name)
    layers = _layers(base, source)
    if isinstance(source.config, LoraConfig):
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            PeftWarning,
            stacklevel=3,
        )
    factors = {
        path: _factors(path, _delta(layer, name), rank)
        for path, layer in tqdm(layers.items(), desc="Converting", disable=not progressbar)
    }
    # A config speaks HF's names.
    hf_name = hf_names(base)
    ranks = {hf_name(path): len(a) for path, (a, _) in factors.items()}
    adapter = prepare_exactly(base, _config(source.config, rank, ranks), name, set(factors))
    for path, patch in adapter.patches.items():
        for attribute, value in zip(patch.keys, factors[path], strict=True):
            p = getattr(patch, attribute)
            write(p, value.reshape(p.shape))
    return Adapter(name, adapter.config, adapter.patches, source.modules)


def _check_rank(rank: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"rank must be an int (a rank) or a float (a threshold), got {rank!r}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank <= 0:
        raise ConfigError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")


def _holder(model: nn.Cell) -> nn.Cell:
    """The cell below which the adapters sit.

    Raises:
        TypeError: there are none.
    """
    for _, cell in model.cells_and_names():
        if "peft_config" in vars(cell):
            return cell
    raise TypeError(
        f"Could not detect any layer that supports LoRA conversion: this {type(model).__name__} has no adapters."
    )


def _layers(base: nn.Cell, source: Adapter) -> dict[str, TunerLayer]:
    """The layers to convert, by path.

    Raises:
        ConfigError: the adapter trains biases in place, which are none of its layers.
        TypeError: there are none, or one that cannot be converted.
    """
    bias = getattr(source.config, "bias", "none")
    if bias != "none":
        raise ConfigError(f"The adapter's config sets bias={bias}, this is not supported right now.")
    layers = {path: w for path, w in wrappers(base) if isinstance(w, TunerLayer) and source.name in w.held()}
    if not layers:
        raise TypeError(f"Could not detect any layer that supports LoRA conversion: {source.name!r} adapts none.")
    unfit = [path for path, layer in layers.items() if not layer.supports_lora_conversion(source.name)]
    if unfit:
        raise TypeError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(unfit)}. There, the "
            f"{source.config.peft_type} adapter {source.name!r} does more than add to the weight, or the weight is "
            "that of a grouped convolution or of no layer (target_parameters)."
        )
    return layers


def _delta(layer: TunerLayer, name: str) -> np.ndarray:
    """What the adapter adds to the layer's untouched weight, as the matrix (out, in) that B·A is to be."""
    patch = layer.adapters[name]
    delta = as_float32(to_numpy(patch.delta_weight()))
    if name in layer.given:
        delta = delta - as_float32(to_numpy(patch.delta_of(layer.given[name])))
    return delta.T if layer.site.kind == "embedding" else delta.reshape(len(delta), -1)


def _factors(path: str, delta: np.ndarray, rank: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the rank, or of the least that keeps the share `rank` of the energy.

    Raises:
        ConfigError: the rank exceeds the matrix's sides.
    """
    if isinstance(rank, int):
        if rank > min(delta.shape):
            raise ConfigError(
                f"The chosen rank {rank} is larger than the weight shape ({min(delta.shape)}), please choose a lower "
                f"rank. The weight is that of {path}."
            )
        return truncated_svd(delta, rank)
    a, b = truncated_svd(delta, min(delta.shape))
    energy = np.cumsum(np.square(b).sum(axis=0))
    kept = 1 if energy[-1] == 0 else 1 + int(np.argmax(energy / energy[-1] >= rank))
    return a[:kept], b[:, :kept]


def _config(source: PeftConfig, rank: float, ranks: Mapping[str, int]) -> LoraConfig:
    """A config of scaling 1 for these layers' ranks, by HF's names, with the source's targets."""
    shared = {f.name: getattr(source, f.name) for f in fields(TargetedConfig) if f.name != "peft_type"}
    shared["layer_replication"] = getattr(source, "layer_replication", None)
    if isinstance(rank, int):
        return LoraConfig(**shared, r=rank, lora_alpha=rank)
    pattern = dict(ranks)
    if any(match_pattern(pattern, path, None) != r for path, r in ranks.items()):
        # A path that is the end of another one: HF takes the first pattern that fits either.
        pattern = {f"^{re.escape(path)}": r for path, r in ranks.items()}
    return LoraConfig(**shared, r=1, lora_alpha=1, rank_pattern=pattern, alpha_pattern=dict(pattern))
