"""GPT-2 and its task heads, under HuggingFace's module and parameter names (Radford et al. 2019).

A block is  h = x + Attention(LN(x)),  y = h + MLP(LN(h)),  with learned positions and one projection for queries, keys
and values. Its dense layers are `Conv1D`s, which store their weights as (inputs, outputs).
"""

from __future__ import annotations

from typing import ClassVar

from mindspore import nn

from msft_peft.models.attention import attend, attend_beside, causal_mask, remember, split_heads
from msft_peft.models.config import GPT2Config
from msft_peft.models.decoder import CausalLM, Decoder, QuestionAnswerer, SequenceClassifier, TokenClassifier
from msft_peft.models.layers import Conv1D, Embedding, LayerNorm, activation, check_length


def _residual_std(config: GPT2Config) -> float:
    """The deviation of what adds to the residual stream at first: smaller, the more layers add to it."""
    return config.initializer_range * (2 * config.n_layer) ** -0.5


class GPT2Attention(nn.Cell):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        width = config.n_embd
        self.num_heads = config.n_head
        self.c_attn = Conv1D(3 * width, width, config.initializer_range)
        self.c_proj = Conv1D(width, width, _residual_std(config))
        self.resid_dropout = nn.Dropout(p=config.resid_pdrop)
        self.dropout = config.attn_pdrop
        self.scale = (width // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= index + 1

    def construct(self, x, mask, past=None, slot=None, beside=()):
        """Attend from `x` (B, T, H) to itself and to `past`; return (B, T, H) and all keys and values.

        See `attend_beside` for `beside`; what that gives is not projected.
        """
        q, k, v = split_heads(self.c_attn(x), self.num_heads)
        if past is not None:
            k, v = remember(past[0], k, slot), remember(past[1], v, slot)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0, self.scale)
        y = self.resid_dropout(self.c_proj(y))
        return y + attend_beside(q, beside) if len(beside) else y, k, v

    def keys_and_values(self, x):
        """The keys and values of `x` (B, T, H), (B, N, T, D) each."""
        _, k, v = split_heads(self.c_attn(x), self.num_heads)
        return k, v


class GPT2MLP(nn.Cell):
    """W₂·act(W₁·x)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = Conv1D(inner, config.n_embd, config.initializer_range)
        self.c_proj = Conv1D(config.n_embd, inner, _residual_std(config))
        self.act = activation(config.activation_function)
        self.dropout = nn.Dropout(p=config.resid_pdrop)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPT2Block(nn.Cell):
    """One block: attention, then MLP, each on the normed input and added to it."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, index)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def construct(self, x, mask, past=None, slot=None):
        """Map (B, T, H) to (B, T, H); also return all keys and values."""
        y, k, v = self.attn(self.ln_1(x), mask, past, slot)
        x = x + y
        return x + self.mlp(self.ln_2(x)), k, v


class GPT2Model(Decoder):
    """The decoder without a head.

    Raises:
        ValueError: the config asks for cross attention, or for an activation that is not built.
    """

    config_class: ClassVar[type[GPT2Config]] = GPT2Config
    base_model_prefix = "transformer"
    buffers = r"\.attn\.(bias|masked_bias)"
    blocks = "h"

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        if config.get("add_cross_attention", False):
            raise ValueError("GPT2Model is a decoder by itself, but the config has add_cross_attention=True.")
        self.wte = Embedding(config.vocab_size, config.n_embd, config.initializer_range)
        self.wpe = Embedding(config.n_positions, config.n_embd, config.initializer_range)
        self.drop = nn.Dropout(p=config.embd_pdrop)
        self.h = nn.CellList([GPT2Block(config, i) for i in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.update_parameters_name()

    def positions(self, slots, length, attention_mask):
        """The slots themselves."""
        if slots.shape[0] > 1:  # one token may have a slot in a cache that is longer than the text
            check_length(length, self.config.n_positions)
        return slots.reshape((1, -1))

    def enter(self, x, slots, length, position_ids, attention_mask):
        """Add the positions' embeddings; all blocks share the mask."""
        return self.drop(x + self.wpe(position_ids)), (causal_mask(slots, length, attention_mask),)

    def leave(self, x):
        """Norm."""
        return self.ln_f(x)

    def get_input_embeddings(self) -> nn.Cell:
        """Return `wte`."""
        return self.wte

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `wte`."""
        self._cells["wte"] = embeddings


class GPT2LMHeadModel(CausalLM):
    """GPT-2 with scores over the vocabulary."""

    config_class = GPT2Config
    body_class = GPT2Model
    base_model_prefix = "transformer"
    buffers = GPT2Model.buffers


class GPT2ForSequenceClassification(SequenceClassifier):
    """GPT-2 with class scores."""

    config_class = GPT2Config
    body_class = GPT2Model
    base_model_prefix = "transformer"
    buffers = GPT2Model.buffers


class GPT2ForTokenClassification(TokenClassifier):
    """GPT-2 with class scores of every token."""

    config_class = GPT2Config
    body_class = GPT2Model
    base_model_prefix = "transformer"
    buffers = GPT2Model.buffers


class GPT2ForQuestionAnswering(QuestionAnswerer):
    """GPT-2 with scores of where an answer starts and ends."""

    config_class = GPT2Config
    body_class = GPT2Model
    base_model_prefix = "transformer"
    buffers = GPT2Model.buffers
