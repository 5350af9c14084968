"""Prompt tuning: virtual tokens whose embeddings are trained themselves."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from mindspore import nn

from msft_peft.config import PromptLearningConfig, as_member
from msft_peft.core.prompt import VirtualTokens, vocabulary
from msft_peft.errors import ConfigError
from msft_peft.hosts import encode, tokenizer_name
from msft_peft.registry import Method


class PromptTuningInit(str, Enum):
    """What the virtual tokens begin as: random numbers, a text's tokens, or tokens drawn from the vocabulary."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (soft prompts; Lester et al. 2021, arXiv:2104.08691).

    Args:
        prompt_tuning_init: "RANDOM" draws from N(0, 1), "SAMPLE_VOCAB" takes tokens at random, "TEXT" those of a text.
        prompt_tuning_init_text: that text; repeated or cut off until there are as many as virtual tokens.
        tokenizer_name_or_path: what turns the text into tokens: a name or folder for transformers' AutoTokenizer, or,
            where transformers is not installed, one with a `tokenizer.json`. Or the tokenizer itself: anything that
            returns `input_ids` when it is called, a `tokenizers.Tokenizer`, or a function from text to a list of ids.
        tokenizer_kwargs: for `AutoTokenizer.from_pretrained`.

    Raises:
        ConfigError: an unknown way to begin, "TEXT" without a text or tokenizer, or `tokenizer_kwargs` without "TEXT".

    Differs: HF takes no tokenizer objects, and an unknown `prompt_tuning_init` for "RANDOM".
    """

    peft_type: str = "PROMPT_TUNING"
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: Any = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_init(PromptTuningInit)

    def _check_init(self, kind: type[Enum]) -> None:
        self.prompt_tuning_init = as_member("prompt_tuning_init", kind, self.prompt_tuning_init)
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be None.")
        elif self.tokenizer_kwargs:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; of a tokenizer that was given itself, its name."""
        given, self.tokenizer_name_or_path = self.tokenizer_name_or_path, None
        try:
            return super().to_dict() | {"tokenizer_name_or_path": tokenizer_name(given)}
        finally:
            self.tokenizer_name_or_path = given


class PromptEmbedding(VirtualTokens):
    """The virtual tokens E (n, d), trained directly.

    Args:
        config: a `PromptTuningConfig`.
        word_embeddings: where "TEXT" and "SAMPLE_VOCAB" take vectors from.
        undrawn: see `VirtualTokens`.

    Raises:
        ConfigError: the text has no tokens, or ones that the model does not know.
    """

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        loaded = config.inference_mode or self.undrawn
        self.embedding = self.table(config.token_dim, None if loaded else self._first(config, word_embeddings))

    def _first(self, config: Any, word_embeddings: nn.Cell | None) -> np.ndarray | None:
        """What the tokens begin as; None for random numbers."""
        if config.prompt_tuning_init not in ("TEXT", "SAMPLE_VOCAB"):
            return None
        if word_embeddings is None:
            raise ConfigError(f"prompt_tuning_init={config.prompt_tuning_init.value!r} needs the word embeddings.")
        vectors = vocabulary(word_embeddings)
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            return vectors[np.random.randint(0, len(vectors), self.tokens)]
        ids = encode(config.tokenizer_name_or_path, config.prompt_tuning_init_text, config.tokenizer_kwargs)
        if not ids or min(ids) < 0 or max(ids) >= len(vectors):
            raise ConfigError(
                f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} gives the tokens {ids}; the model has "
                f"embeddings for 0 to {len(vectors) - 1}. Is it another model's tokenizer?"
            )
        return vectors[np.resize(np.array(ids), self.tokens)]


METHOD = Method(config=PromptTuningConfig, prompt=PromptEmbedding, identity_at_init=False, merges=False)
