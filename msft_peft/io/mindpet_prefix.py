"""Prefixes of MindPet and MindFormers <-> HF's `prompt_embeddings`.

There are two kinds. MindFormers has one encoder for all layers, as HF has: a table of (tokens, layers · 2 · width), or
an MLP over a smaller one. MindPet's `PrefixLayer` has a table and an MLP in each layer, which make that layer's rows.
HF's files hold the rows themselves, so an MLP is carried out on the way there.
"""

import re
import warnings
from typing import Any

import numpy as np

from msft_peft.backend.arrays import as_float32
from msft_peft.errors import ConfigError, LoadError, PeftWarning
from msft_peft.hosts.name_maps import NameMap
from msft_peft.io.factors import Arrays

PROMPT = "prompt_embeddings"
_ENCODER = re.compile(r"(?:.*\.)?mindpet_delta_(?:ptuning2|prefixtuning)_(prefix|(?:embedding|trans|dense).*)")
_LAYER = re.compile(r"(?:(.*)\.)?mindpet_delta_prefixtuning_(input_tokens|(?:wte|control_trans)\..*)")
# tanh of this is 1 in float32, and of 0 it is 0: an MLP that begins with it passes W₂ᵀ through as it is.
_SATURATED = 20.0


def has_prefix(arrays: Arrays) -> bool:
    """Whether a checkpoint holds a prefix of one kind or the other."""
    return any(_ENCODER.fullmatch(name) or _LAYER.fullmatch(name) for name in arrays)


def prefix_to_hf(arrays: Arrays, given: dict[str, Any], names: NameMap) -> tuple[Arrays, dict[str, Any]]:
    """The prefix of a checkpoint as HF has it, (tokens, layers · 2 · width), and the fields of its config.

    Args:
        arrays: the checkpoint's tensors by name.
        given: fields that are known: num_layers, num_attention_heads and, for prefixes in the layers, token_dim.
        names: the architecture's names, which tell whether its positions are rotary.

    Raises:
        ConfigError: the sizes are not told, or are not the tensors'.
        LoadError: tensors are missing.
    """
    if any(_LAYER.fullmatch(name) for name in arrays):
        table, layers = _of_layers(arrays, given)
    else:
        table, layers = _of_encoder(arrays), given.get("num_layers", 0)
    heads = given.get("num_attention_heads")
    if not layers or not heads or table.shape[1] % (2 * layers * heads):
        raise ConfigError(
            f"A prefix of {table.shape[1]} numbers for each token does not divide into num_layers={layers} and "
            f"num_attention_heads={heads}: pass the run configuration, or a PrefixTuningConfig with both."
        )
    warn_of_positions(names)
    sizes = {"num_virtual_tokens": table.shape[0], "num_layers": layers, "token_dim": table.shape[1] // (2 * layers)}
    fields_ = given | {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": None} | sizes
    return {PROMPT: table.astype(np.float32)}, fields_


def prefix_to_mindpet(
    arrays: Arrays, config: Any, names: NameMap, prefix_layers: str | None
) -> tuple[Arrays, dict[str, Any]]:
    """HF's prefix under MindPet's names, and the pet_config that goes with it.

    Args:
        arrays: the adapter's tensors.
        config: its PrefixTuningConfig.
        names: as of `prefix_to_hf`.
        prefix_layers: the path of a layer's `PrefixLayer`, with {} for its number; None for MindFormers' encoder.

    Raises:
        ConfigError: `prefix_layers` has no {}, or the config does not say how many layers there are.
        LoadError: the adapter has no prefix.
    """
    table = arrays.get(PROMPT)
    if table is None:
        raise LoadError(f"The adapter has no {PROMPT}: found {sorted(arrays)}.")
    if prefix_layers is not None:
        found, block = _to_layers(table, config.num_layers, prefix_layers)
    else:
        stem, tokens = "mindpet_delta_ptuning2_", table.shape[0]
        found = {f"{stem}prefix": np.arange(tokens, dtype=np.int64), f"{stem}embedding.embedding_table": table}
        block = {"pet_type": "ptuning2", "pre_seq_len": tokens, "prefix_projection": False, "dropout_prob": 0.0}
    warn_of_positions(names)
    return found, block


def warn_of_positions(names: NameMap) -> None:
    """Warn of an architecture with rotary positions, which the two sides count differently."""
    if names.rotary:
        warnings.warn(
            "MindFormers counts positions from the first token after the prefix, HF peft from the prefix on: with "
            "rotary positions the results are others, unless position_ids that begin at 0 are passed.",
            PeftWarning,
            stacklevel=5,
        )


def _of_encoder(arrays: Arrays) -> np.ndarray:
    own = {m[1]: as_float32(array) for name, array in arrays.items() if (m := _ENCODER.fullmatch(name))}
    table = own.get("embedding.embedding_table")
    if table is None:
        raise LoadError(f"The prefix's embedding_table is missing: found {sorted(own)}.")
    for first, last in (("trans.0", "trans.2"), ("dense_in", "dense_out")):
        if f"{first}.weight" in own:
            return _mlp(table, own, first, last, "the prefix")
    return table


def _of_layers(arrays: Arrays, given: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The rows of every layer's own prefix, key before value, beside each other; and how many layers these are."""
    owners: dict[str, Arrays] = {}
    for name, array in arrays.items():
        if match := _LAYER.fullmatch(name):
            owners.setdefault(match[1] or "", {})[match[2]] = as_float32(array)
    told = given.get("num_layers") or len(owners)
    if told != len(owners):
        raise ConfigError(f"num_layers={told}, but the checkpoint has prefixes in {len(owners)} layers.")
    width = given.get("token_dim")
    rows = []
    for owner in sorted(owners, key=_natural):
        own = owners[owner]
        if "wte.embedding_table" not in own:
            raise LoadError(f"The prefix of {owner or 'the only layer'} lacks its wte.embedding_table.")
        out = _mlp(own["wte.embedding_table"], own, "control_trans.0", "control_trans.2", f"the prefix of {owner!r}")
        # MindPet's own layer makes one half, and takes it for the key and for the value.
        halves = {width: [out, out], 2 * width: [out]}.get(out.shape[1]) if width else None
        if halves is None:
            raise ConfigError(
                f"The prefix of {owner!r} has {out.shape[1]} numbers for each token, neither token_dim={width} nor "
                "twice that: pass the run configuration, or a PrefixTuningConfig with the width of a key."
            )
        rows += halves
    tokens = sorted({part.shape[0] for part in rows})
    if len(tokens) > 1:
        raise LoadError(f"The layers' prefixes have {tokens} tokens; an adapter has one number of them.")
    return np.concatenate(rows, axis=1), len(owners)


def _mlp(table: np.ndarray, own: Arrays, first: str, last: str, whose: str) -> np.ndarray:
    needed = [f"{part}.{leaf}" for part in (first, last) for leaf in ("weight", "bias")]
    missing = [name for name in needed if name not in own]
    if missing:
        raise LoadError(f"Tensors of {whose} are missing: {', '.join(missing)}.")
    h = np.tanh(table @ own[f"{first}.weight"].T + own[f"{first}.bias"])
    return h @ own[f"{last}.weight"].T + own[f"{last}.bias"]


def _to_layers(table: np.ndarray, layers: int | None, path: str) -> tuple[Arrays, dict[str, Any]]:
    """A `PrefixLayer` for each layer that makes exactly its rows: W₂ᵀ holds them, and each token picks its own."""
    if path.count("{}") != 1:
        raise ConfigError(f"prefix_layers={path!r} must hold {{}} once, for a layer's number.")
    if not layers or table.shape[1] % (2 * layers):
        raise ConfigError(f"A prefix of {table.shape[1]} numbers for each token is not one of num_layers={layers}.")
    tokens, eye = table.shape[0], np.eye(table.shape[0], dtype=np.float32)
    found: Arrays = {}
    for number, rows in enumerate(np.split(as_float32(table), layers, axis=1)):
        stem = f"{path.format(number)}.mindpet_delta_prefixtuning_"
        found |= {
            f"{stem}input_tokens": np.arange(tokens, dtype=np.int32),
            f"{stem}wte.embedding_table": _SATURATED * eye,
            f"{stem}control_trans.0.weight": eye,
            f"{stem}control_trans.0.bias": np.zeros(tokens, np.float32),
            f"{stem}control_trans.2.weight": np.ascontiguousarray(rows.T),
            f"{stem}control_trans.2.bias": np.zeros(rows.shape[1], np.float32),
        }
    return found, {"pet_type": "prefixtuning", "prefix_token_num": tokens, "mid_dim": tokens, "dropout_rate": 0.0}


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]
