"""Prefixes and cartridges that begin as a text: its keys and values, as the model itself has them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, ops

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.config import PeftConfig
from msft_peft.core.prompt import PREFIX_STATES, VirtualTokens
from msft_peft.errors import ConfigError
from msft_peft.hosts import encode
from msft_peft.io.adapter import SAFETENSORS_NAME, read_tensors, write_arrays
from msft_peft.prompts.cartridge import ROWS, CartridgeConfig, pack


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first keys and values of a cache as the rows of a prefix.

    Args:
        past_key_values: a pair (key, value) for each layer, each (1, K, S, D); or a cache with `to_legacy_cache()`.
        num_virtual_tokens: how many to take, n.

    Returns:
        (n, 2·L·K·D): layer after layer, the key and then the value of each of the K heads.

    Raises:
        TypeError: it is no cache.
        ValueError: it is empty, of several texts, too short, or its layers differ in their heads.
    """
    layers = _pairs(past_key_values)
    arrays = [to_numpy(part) for pair in layers for part in pair]
    if not arrays:
        raise ValueError("Empty `past_key_values`.")
    first = arrays[0]
    if first.ndim != 4:
        raise ValueError(f"Expected key/value tensors with rank 4, got key.ndim={first.ndim}.")
    if first.shape[0] != 1:
        raise ValueError(f"`past_key_values` must be of one text (batch=1). Got batch={first.shape[0]}.")
    for i, array in enumerate(arrays):
        layer = f"layer {i // 2} of `past_key_values` has shape {array.shape}"
        if array.ndim != 4 or (array.shape[:2], array.shape[3]) != (first.shape[:2], first.shape[3]):
            raise ValueError(f"Inconsistent heads: {layer}, the first {first.shape}.")
        if array.shape[2] < num_virtual_tokens:
            raise ValueError(f"Need at least {num_virtual_tokens} cached tokens, got {array.shape[2]}: {layer}.")
    # (2L, K, n, D) -> (n, 2L, K, D)
    packed = np.stack([array[0, :, :num_virtual_tokens] for array in arrays]).transpose(2, 0, 1, 3)
    return Tensor(np.ascontiguousarray(packed).reshape(num_virtual_tokens, -1))


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a prefix or cartridge begin as a cache; compiled code sees it.

    Args:
        model: a `PeftModel`.
        adapter_name: the adapter; by default the active one.
        past_key_values, num_virtual_tokens: see `prompt_embeddings_from_past_key_values`; by default as many as the
            adapter has.

    Returns:
        The rows that it begins with, (n, 2·L·K·D).

    Raises:
        ConfigError: the adapter has no keys and values of its own (a projection makes them, say).
        TypeError, ValueError: see `prompt_embeddings_from_past_key_values`.
    """
    encoder = _prefix_of(model, adapter_name)
    count = encoder.tokens if num_virtual_tokens is None else num_virtual_tokens
    rows = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    encoder.load_prompt_embeddings(rows)
    return rows


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix or cartridge begin as the keys and values that the base model has for a text.

    Args:
        model: a `PeftModel` whose base model can return its cache.
        tokenizer: of transformers or `tokenizers`, a name or folder, or a function from text to a list of ids.
        text: at least as many tokens as the adapter has.
        use_chat_template: the text is what a system says, where the tokenizer has a template for chats.
        max_length: cut the text off after so many tokens.
        adapter_name, num_virtual_tokens: see `initialize_kv_prefix_from_past_key_values`.

    Raises: as there, and
        ConfigError: no tokenizer, or the base model takes no `use_cache`.
    """
    _prefix_of(model, adapter_name)
    tokens = _tokens(tokenizer, text, use_chat_template)[:max_length]
    ids = Tensor(np.array([tokens], np.int32))
    training = model.training
    model.set_train(False)
    try:
        with model.disable_adapter():
            outputs = model(input_ids=ids, attention_mask=ops.ones_like(ids), use_cache=True)
    finally:
        model.set_train(training)
    return initialize_kv_prefix_from_past_key_values(
        model,
        adapter_name=adapter_name,
        past_key_values=outputs[PREFIX_STATES],
        num_virtual_tokens=num_virtual_tokens,
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike], *, output_path: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """Write one cartridge that is several in a row; it freezes as many tokens as the first of them.

    Args:
        adapter_paths: folders of saved adapters, two at least.
        output_path: the folder for the new one.
        safe_serialization: must be True: pickles are read here, and not written.

    Raises:
        ConfigError: less than two, one that is no cartridge, or of other models, or one that trains layers whole.
        NotImplementedError: `safe_serialization=False`.

    Differs: HF drops the layers that were trained whole, silently.
    """
    if not safe_serialization:
        raise NotImplementedError("compose_cartridge_adapters writes safetensors only: leave safe_serialization=True.")
    if len(adapter_paths) < 2:
        raise ConfigError("Need at least 2 adapters to compose.")
    configs: list[CartridgeConfig] = []
    for path in adapter_paths:
        config = PeftConfig.from_pretrained(path)
        if not isinstance(config, CartridgeConfig):
            raise ConfigError(f"Adapter at '{path}' is not a CARTRIDGE adapter (got {config.peft_type}).")
        configs.append(config)
    first = configs[0]
    for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        values = [getattr(config, name) for config in configs]
        if any(value != values[0] for value in values):
            raise ConfigError(f"Incompatible CARTRIDGE configs for attribute '{name}': {values}.")
    if any(config.modules_to_save for config in configs):
        raise ConfigError("modules_to_save: layers that were trained whole cannot be put in a row.")
    whole = np.concatenate([_rows(path) for path in adapter_paths])
    Path(output_path).mkdir(parents=True, exist_ok=True)
    replace(first, num_virtual_tokens=len(whole)).save_pretrained(output_path)
    write_arrays(Path(output_path) / SAFETENSORS_NAME, {ROWS: whole})


def _prefix_of(model: Any, adapter_name: str | None) -> VirtualTokens:
    """The encoder of an adapter whose rows are keys and values, and its own weights."""
    name = model.active_adapter if adapter_name is None else adapter_name
    config = model.peft_config[name]
    encoder = model.prompt_encoder[name] if config.is_prompt_learning else None
    if encoder is None or encoder.argument != PREFIX_STATES:
        raise ConfigError(f"Adapter '{name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {config.peft_type}).")
    if encoder.reparametrised:
        raise ConfigError(
            f"Adapter '{name}' cannot begin as a cache: with `prefix_projection=True` a network makes it."
        )
    return encoder


def _pairs(past_key_values: Any) -> list[tuple[Any, Any]]:
    legacy = getattr(past_key_values, "to_legacy_cache", None)
    found = legacy() if callable(legacy) else past_key_values
    try:
        return [(layer[0], layer[1]) for layer in found]
    except (TypeError, IndexError, KeyError) as error:
        raise TypeError(
            "Unsupported `past_key_values` type. Expected a pair (key, value) for each layer, or a cache with "
            f"`to_legacy_cache()`, got {type(past_key_values).__name__}."
        ) from error


def _tokens(tokenizer: Any, text: str, use_chat_template: bool) -> list[int]:
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        said = [{"role": "system", "content": text}]
        try:
            return list(
                tokenizer.apply_chat_template(said, tokenize=True, add_generation_prompt=False, return_dict=False)
            )
        except (TypeError, ValueError):
            pass  # it has no template, or is not transformers'
    return encode(tokenizer, text)


def _rows(path: str | os.PathLike) -> np.ndarray:
    """All rows of a saved cartridge, from either of its files."""
    arrays = {key.rpartition(".")[2]: array for key, array in read_tensors(path).arrays.items()}
    return as_float32(arrays[ROWS] if ROWS in arrays else pack(None, arrays)[ROWS])
