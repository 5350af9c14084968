"""A LoRA's two factors, rewritten: as several, as one of several, at another scale, at a higher rank.

Factors are numpy arrays under the ends of their keys, "lora_A.weight" (r, in) and "lora_B.weight" (out, r).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from msft_peft.backend.arrays import as_float32
from msft_peft.errors import ConfigError, LoadError

Arrays = dict[str, np.ndarray]


def split_output(weights: Arrays, layer: str, parts: int, sizes: Sequence[int] | None) -> list[Arrays]:
    """One LoRA as several on the parts of its output, which share A.

    Raises:
        ConfigError: the parts are not so large.
    """
    a, b = weights["lora_A.weight"], weights["lora_B.weight"]
    rows = list(sizes) if sizes is not None and parts == len(sizes) else [b.shape[0] // parts] * parts
    if sum(rows) != b.shape[0]:
        raise ConfigError(f"{layer} has {b.shape[0]} rows, which {rows} do not make up: pass qkv_sizes.")
    pieces = np.split(b, np.cumsum(rows)[:-1])
    return [{"lora_A.weight": a, "lora_B.weight": np.ascontiguousarray(piece)} for piece in pieces]


def joined_output(parts: Mapping[str, Arrays], order: Sequence[str]) -> Arrays:
    """Several LoRAs, on the parts of one output, as one: with the same A of the same rank, else with their sum.

    Raises:
        LoadError: one of the parts is missing: how large it is cannot be told.
    """
    missing = [name for name in order if name not in parts]
    if missing:
        raise LoadError(f"{', '.join(missing)} must have adapters too: one layer holds all of {', '.join(order)}.")
    downs, ups = ([parts[name][f"lora_{x}.weight"] for name in order] for x in "AB")
    if all(down.shape == downs[0].shape and (down == downs[0]).all() for down in downs):
        return {"lora_A.weight": downs[0], "lora_B.weight": np.concatenate(ups)}
    rank, row = 0, 0
    up = np.zeros((sum(u.shape[0] for u in ups), sum(d.shape[0] for d in downs)), ups[0].dtype)
    for part in ups:
        up[row : row + part.shape[0], rank : rank + part.shape[1]] = part
        row, rank = row + part.shape[0], rank + part.shape[1]
    return {"lora_A.weight": np.concatenate(downs), "lora_B.weight": up}


def rescaled(weights: Arrays, factor: float) -> Arrays:
    """The update times `factor`, which goes into B."""
    if factor == 1:
        return weights
    b = weights["lora_B.weight"]
    return weights | {"lora_B.weight": (as_float32(b) * np.float32(factor)).astype(b.dtype)}


def filled(weights: Arrays, rank: int) -> Arrays:
    """The same update by factors of a higher rank."""
    a, b = weights["lora_A.weight"], weights["lora_B.weight"]
    more = rank - a.shape[0]
    if not more:
        return weights
    return {"lora_A.weight": np.pad(a, ((0, more), (0, 0))), "lora_B.weight": np.pad(b, ((0, 0), (0, more)))}
