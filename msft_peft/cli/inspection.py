"""`msft-peft inspect`: what an adapter is, told from its files."""

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from msft_peft import auto
from msft_peft.backend.arrays import as_float32
from msft_peft.config import PeftConfig
from msft_peft.core.keys import PREFIX
from msft_peft.core.targets import match_pattern
from msft_peft.io.adapter import read_tensors
from msft_peft.io.card import briefly
from msft_peft.model import PeftModel

_DESCRIPTION = """\
Tell what an adapter is: method, rank, targets, number and size of its weights, norms layer by layer, and whether it
changes the model at all. The base model is not needed, except with --with-base.
"""
_EPILOG = """\
The update of a LoRA layer is the norm of what it adds to the weight: s·‖B·A‖, s the scaling. An adapter whose every
update is zero does nothing: it was never trained. For other methods only the base model can tell: see --with-base.

  msft-peft inspect my-adapter
  msft-peft inspect someone/their-lora --json | jq .parameters
"""
# (A, B) of LoRA: the update is B·A.
_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "inspect",
        help="tell what an adapter is and whether it does anything",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("adapter", help="folder or Hub repository")
    command.add_argument("--subfolder", help="folder below it")
    command.add_argument("--revision", help="branch, tag or commit of a repository")
    command.add_argument("--with-base", action="store_true", help="load the base model too: tells of every method")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what `inspect_adapter` finds."""
    options = {key: getattr(arguments, key) for key in ("subfolder", "revision") if getattr(arguments, key)}
    found = inspect_adapter(arguments.adapter, **options)
    if arguments.with_base:
        config = PeftConfig.from_pretrained(arguments.adapter, **options)
        kind = getattr(auto, f"Auto{PeftModel._for_task(config).__name__}")
        report = kind.from_pretrained(arguments.adapter, **options).load_report
        found["does_something"] = report.does_something
    print(json.dumps(found, indent=2) if arguments.json else _told(found))


def inspect_adapter(source: str, **hub: Any) -> dict[str, Any]:
    """What an adapter's files say of it, as plain data.

    Raises:
        ConfigError, FileNotFoundError, LoadError, HubError: they are missing or broken.
    """
    config = PeftConfig.from_pretrained(source, **hub)
    tensors = read_tensors(source, **hub)
    layers = _layers(tensors.arrays, config)
    updates = [layer.get("update") for layer in layers]
    return {
        "adapter": str(source),
        "file": str(tensors.origin),
        "method": str(config.peft_type),
        "task": None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type)),
        "base_model": config.base_model_name_or_path,
        **{name: getattr(config, name) for name in ("r", "lora_alpha", "target_modules") if hasattr(config, name)},
        "tensors": len(tensors.arrays),
        "parameters": sum(array.size for array in tensors.arrays.values()),
        "bytes": sum(array.nbytes for array in tensors.arrays.values()),
        "dtypes": sorted({array.dtype.name for array in tensors.arrays.values()}),
        "finite": all(bool(np.isfinite(as_float32(array)).all()) for array in tensors.arrays.values()),
        "does_something": True if any(updates) else None if None in updates else False,
        "layers": layers,
    }


def _layers(arrays: Mapping[str, np.ndarray], config: PeftConfig) -> list[dict[str, Any]]:
    """Each layer's tensors with their norms; for LoRA the norm of its update."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for key, array in sorted(arrays.items()):
        layer, weight = _split(key.removeprefix(PREFIX))
        grouped.setdefault(layer, {})[weight] = array
    return [_layer(name, weights, config) for name, weights in grouped.items()]


def _split(key: str) -> tuple[str, str]:
    """A key as the layer's path and the weight's name, which may have a dot: lora_A.weight."""
    parts = key.split(".")
    tuner = parts[-2] if len(parts) > 2 and parts[-1] in ("weight", "bias") else ""
    own = 2 if "_" in tuner and (tuner[-1].isupper() or "magnitude" in tuner) else 1
    return ".".join(parts[:-own]), ".".join(parts[-own:])


def _layer(name: str, weights: Mapping[str, np.ndarray], config: PeftConfig) -> dict[str, Any]:
    told: dict[str, Any] = {
        "layer": name,
        "parameters": sum(array.size for array in weights.values()),
        "shapes": {weight: list(array.shape) for weight, array in weights.items()},
        "norms": {weight: float(np.linalg.norm(as_float32(array))) for weight, array in weights.items()},
    }
    for a, b in _FACTORS:
        if {a, b} <= set(weights):
            told["rank"] = min(int(weights[a].shape[0]), int(weights[b].shape[1]))
            update = _update(name, weights[a], weights[b], config)
            if set(weights) == {a, b} and update is not None:  # a bias, or DoRA's magnitudes, would have their part
                told["update"] = update
    return told


def _update(name: str, a: np.ndarray, b: np.ndarray, config: PeftConfig) -> float | None:
    """s·‖B·A‖, by ‖B·A‖² = ⟨BᵀB, A·Aᵀ⟩: nothing of the weight's size is made. None for a convolution in groups."""
    a = as_float32(a).astype(np.float64).reshape(len(a), -1)
    b = as_float32(b).astype(np.float64).reshape(len(b), -1)
    r = a.shape[0]
    if r != b.shape[1]:
        return None
    patterns: dict[str, Any] = getattr(config, "alpha_pattern", None) or {}
    alpha: Any = match_pattern(patterns, name, getattr(config, "lora_alpha", 1))
    scaling = alpha / (math.sqrt(r) if getattr(config, "use_rslora", False) else r)
    return abs(scaling) * math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))


_ANSWERS = {
    True: "yes",
    False: "no: every update is zero, it was never trained",
    None: "unknown without the base model (--with-base)",
}


def _told(found: Mapping[str, Any]) -> str:
    facts = {
        "adapter": found["adapter"],
        "method": found["method"] + (f" for {found['task']}" if found["task"] else ""),
        "base model": found["base_model"] or "not named",
        **{name.replace("_", " "): found[name] for name in ("r", "lora_alpha", "target_modules") if name in found},
        "weights": f"{found['parameters']:,} in {found['tensors']} tensors, {_size(found['bytes'])}, "
        + ", ".join(found["dtypes"]),
        "does anything": _ANSWERS[found["does_something"]],
    }
    if not found["finite"]:
        facts["WARNING"] = "some weights are not finite (NaN or infinite)"
    lines = [f"{name:<15}{briefly(value)}" for name, value in facts.items()]
    width = max((len(layer["layer"]) for layer in found["layers"]), default=5)
    lines += ["", f"{'layer':<{width}}  {'rank':>4}  {'weights':>10}  {'update':>10}  norms"]
    for layer in found["layers"]:
        update = f"{layer['update']:.4g}" if "update" in layer else "-"
        norms = "  ".join(f"{weight} {norm:.4g}" for weight, norm in layer["norms"].items())
        rank, count = layer.get("rank", "-"), layer["parameters"]
        lines.append(f"{layer['layer'] or '-':<{width}}  {rank:>4}  {count:>10,}  {update:>10}  {norms}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
