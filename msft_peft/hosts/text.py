"""Texts to tokens and back, by the tokenizer in a model's folder and a library that the user has."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Protocol

from msft_peft.backend.hub import fetch_optional
from msft_peft.errors import ConfigError

BYTES = "bytes"
_FAST, _CONFIG = "tokenizer.json", "tokenizer_config.json"


class Text(Protocol):
    """What turns texts into tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        ...


class Bytes:
    """One token a byte, for models with a vocabulary of 256 and more; it needs no file and no library."""

    def encode(self, text: str) -> list[int]:
        """The bytes of the text in UTF-8."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that the bytes are; what is no byte is left out."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class _Fast:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


class _Transformers:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def open_tokenizer(source: str | os.PathLike, **hub: Any) -> Text | None:
    """The tokenizer in a folder or Hub repository; None if there is none. The name "bytes" needs no folder.

    Raises:
        ConfigError: there is one, and no library to read it: it says what to install; or it is broken.
    """
    if source == BYTES:
        return Bytes()
    path = fetch_optional(source, _FAST, **hub)
    if path is not None and importlib.util.find_spec("tokenizers") is not None:
        try:
            return _Fast(importlib.import_module("tokenizers").Tokenizer.from_file(str(path)))
        except Exception as error:  # the library's own exception is a bare Exception
            raise ConfigError(f"{path} is no tokenizer that can be read: {error}") from error
    if path is None and fetch_optional(source, _CONFIG, **hub) is None:
        return None
    if importlib.util.find_spec("transformers") is not None:
        try:
            return _Transformers(importlib.import_module("transformers").AutoTokenizer.from_pretrained(source, **hub))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the tokenizer of '{source}' cannot be read: {error}") from error
    library = "tokenizers" if path is not None else "transformers"
    raise ConfigError(f"'{source}' has a tokenizer, and no library is here to read it: pip install {library}")
