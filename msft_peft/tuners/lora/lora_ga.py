"""LoRA-GA's preparation: the gradients of the base weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from msft_peft.errors import ConfigError
from msft_peft.io.adapter import read_arrays, write_arrays
from msft_peft.tuners.lora.capture import dense_targets, require_seen, rows_of, watching
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init import GRADIENT


def preprocess_loraga(
    model: nn.Cell, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Prepare `get_peft_model(model, lora_config)` with `init_lora_weights="lora_ga"`.

    Every linear layer that the config targets gets the mean gradient of its weight over the backward passes of
    `train_step`. It stays with the layer until the adapter is in.

    Formula: for a layer y = W·x the gradient is Σ dyᵀ·x over the positions; dy and x are seen by hooks.

    Args:
        model: the base model. While `train_step` runs, the target weights are trainable; afterwards all is as it was.
        lora_config: with its `lora_ga_config`.
        train_step: runs forward and backward passes with `mindspore.value_and_grad(loss, None,
            model.trainable_params())`, made inside it, and updates nothing. In PyNative (the mode is set meanwhile;
            hooks do not run inside ms.jit). One batch will do, more are better.
        cache_file: safetensors file for the gradients: read if it is there, else written.

    Raises:
        ConfigError: the config is not for LoRA-GA, a layer saw no gradient or one that is not finite, the file does
            not fit, or the targets are no linear layers.

    Differs: the file is safetensors, not a pickle. HF initialises layers without a gradient like plain LoRA, silently.
    """
    if lora_config.init != "lora_ga" or lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    sites = dense_targets(model, lora_config)
    shapes = {path: (site.out_features, site.in_features) for path, site in sites.items()}
    if cache_file is not None and Path(cache_file).exists():
        arrays = read_arrays(cache_file)
        gradients = {path: arrays[key] for path in sites if (key := f"{path}.{GRADIENT}") in arrays}
        bad = [path for path in sites if path not in gradients or gradients[path].shape != shapes[path]]
        if bad:
            raise ConfigError(
                f"{cache_file} has no gradient, or one of another shape, for {bad}: is it another model's?"
            )
    else:
        sums: dict[str, np.ndarray] = {}
        passes = dict.fromkeys(sites, 0)

        def see(path: str, x: Tensor, y: Tensor) -> None:
            rows = rows_of(x, path)

            def collect(dy: Tensor) -> None:
                sums[path] = sums.get(path, 0) + rows_of(dy, path).T @ rows
                passes[path] += 1

            y.register_hook(collect)

        weights = [site.weight for site in sites.values()]
        before = [w.requires_grad for w in weights]
        try:
            for w in weights:
                w.requires_grad = True
            with watching({path: site.layer for path, site in sites.items()}, see):
                train_step()
        finally:
            for w, wanted in zip(weights, before, strict=True):
                w.requires_grad = wanted
        require_seen(sites, passes, "train_step")
        gradients = {path: sums[path] / passes[path] for path in sites}
        if cache_file is not None:
            write_arrays(cache_file, {f"{path}.{GRADIENT}": g for path, g in gradients.items()})
    for path, site in sites.items():
        setattr(site.layer, GRADIENT, gradients[path])
