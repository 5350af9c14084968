"""Texts into tokens, by whatever tokenizer a user has; none is imported before it is asked for."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from msft_peft.backend.hub import fetch
from msft_peft.errors import ConfigError


def encode(tokenizer: Any, text: str, kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens of a text, with those that the tokenizer puts around every text.

    Args:
        tokenizer: a name or folder; or a `tokenizers.Tokenizer`, or what returns `input_ids` or a list when called.
        text: the text.
        kwargs: for transformers' `AutoTokenizer.from_pretrained`, with a name or folder.

    Raises:
        ConfigError: it cannot be read, or is no tokenizer.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = _opened(tokenizer, kwargs or {})
    encoded = tokenizer(text) if callable(tokenizer) else _method(tokenizer)(text)
    ids = encoded["input_ids"] if hasattr(encoded, "keys") else getattr(encoded, "ids", encoded)
    try:
        return [int(token) for token in ids]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"tokenizer_name_or_path={tokenizer!r} turned the text into {type(encoded).__name__}, wanted a list of "
            "token ids, or something with input_ids or ids."
        ) from error


def tokenizer_name(tokenizer: Any) -> str | None:
    """What a config file says of a tokenizer."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    if isinstance(tokenizer, os.PathLike):
        return os.fspath(tokenizer)
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _method(tokenizer: Any) -> Any:
    if not callable(getattr(tokenizer, "encode", None)):
        raise ConfigError(
            f"tokenizer_name_or_path must be a name, a folder, a tokenizer or a function, got {tokenizer!r}"
        )
    return tokenizer.encode


def _opened(name: str | os.PathLike, kwargs: Mapping[str, Any]) -> Any:
    if importlib.util.find_spec("transformers") is not None:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(name, **kwargs)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tokenizer_name_or_path={name!r} cannot be opened: {error}") from error
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError(
            f"tokenizer_name_or_path={name!r} needs transformers or tokenizers: install one of them, or give a "
            "tokenizer or a function from text to a list of ids instead of its name."
        )
    from tokenizers import Tokenizer

    try:
        path = fetch(name, "tokenizer.json")
    except FileNotFoundError as error:
        raise ConfigError(f"tokenizer_name_or_path={name!r}: {error}") from error
    if path is None:
        raise ConfigError(f"tokenizer_name_or_path={name!r} has no tokenizer.json, and transformers is not installed.")
    return Tokenizer.from_file(str(path))
