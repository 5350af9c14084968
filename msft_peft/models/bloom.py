"""BLOOM and its task heads, under HuggingFace's module and parameter names (BigScience 2022, arXiv:2211.05100).

A block is  h = x + Attention(LN(x)),  y = h + MLP(LN(h)).  Positions enter by ALiBi alone (Press et al. 2021,
arXiv:2108.12409): a head adds slope · position to the scores of each key, which a softmax cannot tell from
-slope · distance.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn

from msft_peft.backend.activations import gelu_tanh
from msft_peft.models.attention import attend, causal_mask, counted, remember, split_heads
from msft_peft.models.config import BloomConfig
from msft_peft.models.decoder import CausalLM, Decoder, QuestionAnswerer, SequenceClassifier, TokenClassifier
from msft_peft.models.layers import Embedding, LayerNorm, linear


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes (N,): 2^(-8i/n) for i = 1 ... n, with n the largest power of two that is not above N.

    The other N - n heads stand in between: they have the slopes for 2n heads at odd i.
    """
    n = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    slopes += [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return np.array(slopes, np.float32)


class BloomAttention(nn.Cell):
    """Causal self-attention; the projection holds queries, keys and values of one head after the other's."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.num_heads = config.n_head
        self.query_key_value = linear(width, 3 * width, True, std)
        self.dense = linear(width, width, True, std)
        self.out_dropout = nn.Dropout(p=config.hidden_dropout)
        self.dropout = config.attention_dropout

    def construct(self, x, mask, past=None, slot=None):
        """Attend from `x` (B, T, H) to itself and to `past`; return (B, T, H) and all keys and values."""
        q, k, v = split_heads(self.query_key_value(x), self.num_heads, True)
        if past is not None:
            k, v = remember(past[0], k, slot), remember(past[1], v, slot)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_dropout(self.dense(y)), k, v


class BloomMLP(nn.Cell):
    """W₂·GELU(W₁·x)."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.dense_h_to_4h = linear(width, 4 * width, True, std)
        self.dense_4h_to_h = linear(4 * width, width, True, std)
        self.dropout = nn.Dropout(p=config.hidden_dropout)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return self.dropout(self.dense_4h_to_h(gelu_tanh(self.dense_h_to_4h(x))))


class BloomBlock(nn.Cell):
    """One block: attention, then MLP, each on the normed input and added to it, or to the normed one."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = BloomAttention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = BloomMLP(config)
        self.adds_to_normed = config.apply_residual_connection_post_layernorm

    def construct(self, x, mask, past=None, slot=None):
        """Map (B, T, H) to (B, T, H); also return all keys and values."""
        normed = self.input_layernorm(x)
        y, k, v = self.self_attention(normed, mask, past, slot)
        x = y + (normed if self.adds_to_normed else x)
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed) + (normed if self.adds_to_normed else x), k, v


class BloomModel(Decoder):
    """The decoder without a head. `position_ids` have no effect: real tokens are counted by the attention mask."""

    config_class = BloomConfig
    base_model_prefix = "transformer"
    blocks = "h"

    def __init__(self, config: BloomConfig):
        super().__init__(config)
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, config.initializer_range)
        self.word_embeddings_layernorm = LayerNorm(width, config.layer_norm_epsilon)
        self.h = nn.CellList([BloomBlock(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(width, config.layer_norm_epsilon)
        self.slopes = Tensor(alibi_slopes(config.n_head).reshape((1, -1, 1, 1)))
        self.update_parameters_name()

    def enter(self, x, slots, length, position_ids, attention_mask):
        """Norm `x`; all blocks share the mask, (1 or B, N, T, S), which ALiBi is added to."""
        if attention_mask is None:
            places = Tensor(np.arange(length, dtype=np.float32))
        else:
            places = counted(attention_mask).astype(self.slopes.dtype).reshape((-1, 1, 1, length))
        mask = causal_mask(slots, length, attention_mask) + self.slopes * places
        return self.word_embeddings_layernorm(x), (mask,)

    def leave(self, x):
        """Norm."""
        return self.ln_f(x)

    def get_input_embeddings(self) -> nn.Cell:
        """Return `word_embeddings`."""
        return self.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `word_embeddings`."""
        self._cells["word_embeddings"] = embeddings


class BloomForCausalLM(CausalLM):
    """BLOOM with scores over the vocabulary."""

    config_class = BloomConfig
    body_class = BloomModel
    base_model_prefix = "transformer"


class BloomForSequenceClassification(SequenceClassifier):
    """BLOOM with class scores."""

    config_class = BloomConfig
    body_class = BloomModel
    base_model_prefix = "transformer"


class BloomForTokenClassification(TokenClassifier):
    """BLOOM with class scores of every token."""

    config_class = BloomConfig
    body_class = BloomModel
    base_model_prefix = "transformer"


class BloomForQuestionAnswering(QuestionAnswerer):
    """BLOOM with scores of where an answer starts and ends."""

    config_class = BloomConfig
    body_class = BloomModel
    base_model_prefix = "transformer"
