"""Cartridges: keys and values that stand for a long text, trained themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.config import PromptLearningConfig
from msft_peft.core.prompt import PREFIX_STATES, VirtualTokens
from msft_peft.errors import ConfigError
from msft_peft.registry import Method

# The key of all rows in HF's files.
ROWS = "prompt_embeddings"
_PARTS = ("frozen_embedding", "trainable_embedding")


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266): the key/value cache of a text, trained in its place.

    Args:
        num_frozen_tokens: how many tokens at its start are never trained. Attention sinks into the first one, so that
            training it is unstable.

    Raises:
        ConfigError: below 0, or more than there are tokens.
    """

    peft_type: str = "CARTRIDGE"
    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen, tokens = self.num_frozen_tokens, self.num_virtual_tokens
        if not isinstance(frozen, int) or frozen < 0:
            raise ConfigError(f"`num_frozen_tokens` must be >= 0, got {frozen!r}.")
        if tokens is not None and frozen > tokens:
            raise ConfigError(
                f"`num_frozen_tokens` must be <= `num_virtual_tokens`, got num_frozen_tokens={frozen} and "
                f"num_virtual_tokens={tokens}."
            )


class CartridgeEncoder(VirtualTokens):
    """The keys and values of all layers, (n, 2·L·K·D), as in `PrefixEncoder`: k frozen rows, then n - k trained ones.

    All are drawn from N(0, 1); `initialize_kv_prefix_from_text` and `initialize_kv_prefix_from_past_key_values` let
    them begin as a text.

    Args:
        config: a `CartridgeConfig`.
    """

    argument: ClassVar[str] = PREFIX_STATES
    frozen: ClassVar[tuple[str, ...]] = _PARTS[:1]

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        self.tokens = config.num_virtual_tokens
        drawn = self.table(2 * config.num_layers * config.token_dim).weight
        for attribute, rows in zip(_PARTS, np.split(drawn.asnumpy(), [config.num_frozen_tokens])):
            # A Parameter cannot be empty.
            setattr(self, attribute, Parameter(Tensor(rows), name=attribute) if len(rows) else None)

    def parts(self) -> dict[str, Parameter]:
        found = {path: getattr(self, path) for path in _PARTS}
        return {path: p for path, p in found.items() if p is not None}

    def virtual(self) -> Tensor:
        if self.frozen_embedding is None:
            return self.trainable_embedding
        if self.trainable_embedding is None:
            return self.frozen_embedding
        return ops.concat((self.frozen_embedding, self.trainable_embedding), 0)

    @property
    def weight(self) -> Tensor:
        """All rows, (n, 2·L·K·D)."""
        return self.virtual()


def pack(config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Both kinds of rows as HF's files have them: in one tensor."""
    rows = [arrays[path] for path in _PARTS if path in arrays]
    rest = {key: array for key, array in arrays.items() if key not in _PARTS}
    return {ROWS: np.concatenate(rows)} | rest if rows else rest


def unpack(config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of HF's files in the parts that a model has."""
    if ROWS not in arrays or config.num_frozen_tokens in (0, config.num_virtual_tokens):
        return dict(arrays)
    parts = dict(zip(_PARTS, np.split(arrays[ROWS], [config.num_frozen_tokens])))
    return parts | {key: array for key, array in arrays.items() if key != ROWS}


METHOD = Method(
    config=CartridgeConfig,
    prompt=CartridgeEncoder,
    identity_at_init=False,
    merges=False,
    pack=pack,
    unpack=unpack,
)
