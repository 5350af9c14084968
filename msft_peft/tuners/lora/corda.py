"""CorDA's preparation: covariances of the layers' inputs, and the decompositions that weigh the weights with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from msft_peft.core.targets import match_pattern
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.io.adapter import read_arrays, write_arrays
from msft_peft.tuners.lora.capture import dense_targets, require_seen, rows_of, watching
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init import EIGENS, CordaEigens, base_weight, corda_eigens

_FIELDS = ("S_WC", "U_WC", "V_WC")


def preprocess_corda(
    model: nn.Cell,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Cell | None = None,
) -> None:
    """Prepare `get_peft_model(model, lora_config)` with `init_lora_weights="corda"`.

    Every linear layer that the config targets gets `eigens`, a `CordaEigens` of its rank. They stay with the layer
    until the adapter is in.

    Formula: the covariance of a layer's inputs X (positions, in), each call's divided by its largest number, is the
    mean of XᵀX over the calls.

    Args:
        model: the base model.
        lora_config: its `corda_config` names the method and the files.
        run_model: runs the model on samples, in PyNative (the mode is set meanwhile; hooks do not run inside ms.jit).
            About 256 samples, different ones. May be left out if one of the files is there.
        hooked_model: the model that `run_model` runs, if it is not `model`: one of the same layers.

    Raises:
        ConfigError: the config has no `corda_config`, `run_model` is missing or a layer saw nothing, inputs are not
            finite, the files do not fit, or the targets are no linear layers.

    Differs: the files are safetensors, not pickles. Inputs of any shape will do; HF takes batches of one.
    """
    if not isinstance(lora_config, LoraConfig):
        raise ConfigError(f"`lora_config` must be a LoraConfig, got {type(lora_config).__name__}")
    config = lora_config.corda_config
    if lora_config.init != "corda" or config is None:
        raise ConfigError(
            "CorDA needs LoraConfig(init_lora_weights='corda', corda_config=CordaConfig(...)), got "
            f"init_lora_weights={lora_config.init_lora_weights!r} and corda_config={config!r}."
        )
    sites = dense_targets(model, lora_config)
    ranks = {path: match_pattern(lora_config.rank_pattern, path, lora_config.r) for path in sites}
    if config.cache_file is not None and Path(config.cache_file).exists():
        eigens = _eigens_in(config.cache_file, sites)
    else:
        covariances = _covariances(model, lora_config, sites, run_model, hooked_model)
        bar = tqdm(sites.items(), desc="CorDA: decomposing", disable=not config.verbose)
        eigens = {
            path: corda_eigens(_weight(site, ranks[path]), covariances[path], ranks[path], config.corda_method)
            for path, site in bar
        }
        if config.cache_file is not None:
            arrays = {f"{p}.{EIGENS}.{name}": getattr(e, name) for p, e in eigens.items() for name in _FIELDS}
            write_arrays(config.cache_file, arrays)
        if not config.prune_temporary_fields:
            for path, site in sites.items():
                site.layer.covariance_matrix = covariances[path]
    for path, site in sites.items():
        setattr(site.layer, EIGENS, eigens[path])


def _weight(site: Site, r: int) -> np.ndarray:
    w = base_weight(site)
    if r > min(w.shape):
        raise ConfigError(
            f"CorDA has at most {min(w.shape)} components for {site.path} with weight {w.shape}, not r={r}."
        )
    return w


def _covariances(
    model: nn.Cell,
    lora_config: LoraConfig,
    sites: Mapping[str, Site],
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Cell | None,
) -> dict[str, np.ndarray]:
    config = lora_config.corda_config
    file = config.covariance_file
    if file is not None and Path(file).exists():
        found = read_arrays(file)
        missing = [p for p, s in sites.items() if p not in found or found[p].shape != (s.in_features, s.in_features)]
        if missing:
            raise ConfigError(
                f"{file} has no covariance, or one of another size, for {missing}: is it another model's?"
            )
        return found
    if run_model is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    watched = sites if hooked_model is None else dense_targets(hooked_model, lora_config)
    dtype = np.float16 if config.use_float16_for_covariance else np.float32
    sums: dict[str, np.ndarray] = {}
    calls = dict.fromkeys(sites, 0)

    def see(path: str, x: Tensor, y: Tensor) -> None:
        rows = rows_of(x, path)
        rows = rows / (rows.max() or 1.0)
        sums[path] = (sums.get(path, 0) + rows.T @ rows).astype(dtype)
        calls[path] = calls.get(path, 0) + 1

    with watching({path: site.layer for path, site in watched.items()}, see):
        run_model()
    require_seen(sites, calls, "run_model")
    means = {path: (sums[path] / calls[path]).astype(dtype) for path in sites}
    if not all(np.isfinite(mean).all() for mean in means.values()):
        raise ConfigError("The covariance overflowed: set use_float16_for_covariance=False.")
    if file is not None:
        write_arrays(file, means)
    return means


def _eigens_in(file: str, sites: Mapping[str, Site]) -> dict[str, CordaEigens]:
    arrays = read_arrays(file)
    missing = [path for path in sites if any(f"{path}.{EIGENS}.{name}" not in arrays for name in _FIELDS)]
    if missing:
        raise ConfigError(f"{file} has no decomposition for {missing}: is it another model's?")
    return {path: CordaEigens(*(arrays[f"{path}.{EIGENS}.{name}"] for name in _FIELDS)) for path in sites}
