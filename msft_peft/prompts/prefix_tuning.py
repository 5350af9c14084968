"""Prefix tuning: trained keys and values before those of the input, in every layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.config import PromptLearningConfig, check_count
from msft_peft.core.prompt import PREFIX_STATES, VirtualTokens
from msft_peft.errors import ConfigError
from msft_peft.registry import Method


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190); without a projection also P-Tuning v2 (arXiv:2110.07602).

    Args:
        init_weights: "zero" begins with keys and values that are zero; None draws from N(0, 1).
        encoder_hidden_size: the projection's width; by default `token_dim`.
        prefix_projection: let a small network make the keys and values.

    Raises:
        ConfigError: another `init_weights`, or a number that is none.
    """

    peft_type: str = "PREFIX_TUNING"
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("encoder_hidden_size", self.encoder_hidden_size)
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights must be None or 'zero', got {self.init_weights!r}")


class PrefixEncoder(VirtualTokens):
    """The keys and values of all layers, (n, 2·L·K·D): E itself, or with a projection W₂·tanh(W₁·e).

    A row holds, layer after layer, the key and then the value of each of the K heads. A config in inference mode has
    no projection: E itself is what stands before the input, and what HF's files hold.

    Args:
        config: a `PrefixTuningConfig`.
    """

    argument: ClassVar[str] = PREFIX_STATES

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        width = 2 * config.num_layers * config.token_dim
        # Twice as many for encoder and decoder does not hold here: one prefix serves both attentions of the decoder.
        self.tokens = config.num_virtual_tokens
        self.reparametrised = config.prefix_projection and not config.inference_mode
        zero = config.init_weights == "zero"
        if not self.reparametrised:
            self.embedding = self.table(width, np.zeros((self.tokens, width), np.float32) if zero else None)
            return
        hidden = config.encoder_hidden_size or config.token_dim
        self.embedding = self.table(config.token_dim)
        last = nn.Dense(hidden, width, weight_init="zeros", bias_init="zeros") if zero else nn.Dense(hidden, width)
        self.transform = nn.SequentialCell(nn.Dense(config.token_dim, hidden), _Tanh(), last)

    def virtual(self) -> Tensor:
        return self.transform(self.embedding.weight) if self.reparametrised else self.embedding.weight


class _Tanh(nn.Cell):
    """tanh; MindSpore's own kernel for CPU is wrong by up to 1e-4."""

    def construct(self, x: Tensor) -> Tensor:
        return 2.0 * ops.sigmoid(2.0 * x) - 1.0


METHOD = Method(config=PrefixTuningConfig, prompt=PrefixEncoder, identity_at_init=False, merges=False)
