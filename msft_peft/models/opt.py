"""OPT and its task heads, under HuggingFace's module and parameter names (Zhang et al. 2022, arXiv:2205.01068).

A block is  h = x + Attention(LN(x)),  y = h + W₂·act(W₁·LN(h)),  with learned positions; in opt-350m the norms stand
behind the sums instead (`do_layer_norm_before=False`), and the embeddings are narrower than the blocks
(`word_embed_proj_dim`): a projection on either side makes up for it.
"""

from __future__ import annotations

from typing import ClassVar

import mindspore as ms
from mindspore import Tensor, nn, ops

from msft_peft.models.attention import attend, causal_mask, counted, heads_first, remember
from msft_peft.models.config import OPTConfig
from msft_peft.models.decoder import CausalLM, Decoder, QuestionAnswerer, SequenceClassifier
from msft_peft.models.layers import Embedding, LayerNorm, activation, check_length, linear
from msft_peft.models.pretrained import PreTrainedModel

_NORM_EPS = 1e-5


def _norm(config: OPTConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, _NORM_EPS, config.layer_norm_elementwise_affine)


class OPTLearnedPositionalEmbedding(Embedding):
    """Embeddings of positions from -1, for padding, on: row p + 2 is that of position p."""

    def __init__(self, positions: int, width: int, std: float):
        super().__init__(positions + 2, width, std)
        self.offset = 2

    def construct(self, position_ids: Tensor) -> Tensor:
        """Look up `position_ids` (...) as (..., H)."""
        return super().construct(position_ids + self.offset)


class OPTAttention(nn.Cell):
    """Causal self-attention."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        width, bias, std = config.hidden_size, config.enable_bias, config.init_std
        self.head_dim = width // config.num_attention_heads
        self.k_proj = linear(width, width, bias, std)
        self.v_proj = linear(width, width, bias, std)
        self.q_proj = linear(width, width, bias, std)
        self.out_proj = linear(width, width, bias, std)
        self.out_dropout = nn.Dropout(p=config.dropout)
        self.dropout = config.attention_dropout

    def construct(self, x, mask, past=None, slot=None):
        """Attend from `x` (B, T, H) to itself and to `past`; return (B, T, H) and all keys and values."""
        q = heads_first(self.q_proj(x), self.head_dim)  # (B, N, T, D)
        k, v = heads_first(self.k_proj(x), self.head_dim), heads_first(self.v_proj(x), self.head_dim)
        if past is not None:
            k, v = remember(past[0], k, slot), remember(past[1], v, slot)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_dropout(self.out_proj(y)), k, v


class OPTDecoderLayer(nn.Cell):
    """One block: attention, then MLP, each added to its input, with a norm before it or after the sum."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        width, bias, std = config.hidden_size, config.enable_bias, config.init_std
        self.norms_first = config.do_layer_norm_before
        self.self_attn = OPTAttention(config)
        self.activation_fn = activation(config.activation_function)
        self.self_attn_layer_norm = _norm(config)
        self.fc1 = linear(width, config.ffn_dim, bias, std)
        self.fc2 = linear(config.ffn_dim, width, bias, std)
        self.final_layer_norm = _norm(config)
        self.dropout = nn.Dropout(p=config.dropout)

    def construct(self, x, mask, past=None, slot=None):
        """Map (B, T, H) to (B, T, H); also return all keys and values."""
        y, k, v = self.self_attn(self.self_attn_layer_norm(x) if self.norms_first else x, mask, past, slot)
        x = x + y
        if not self.norms_first:
            x = self.self_attn_layer_norm(x)
        y = self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(x) if self.norms_first else x)))
        x = x + self.dropout(y)
        return x if self.norms_first else self.final_layer_norm(x), k, v


class OPTDecoder(Decoder):
    """The decoder.

    Raises:
        ValueError: the config asks for an activation that is not built, or for dropped layers.
    """

    config_class = OPTConfig

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        if config.layerdrop:
            raise ValueError(
                f"OPT is not built to drop layers, but the config has layerdrop={config.layerdrop}. Pass 0."
            )
        self.width = config.word_embed_proj_dim
        hidden, std = config.hidden_size, config.init_std
        self.embed_tokens = Embedding(config.vocab_size, self.width, std, config.pad_token_id)
        self.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, hidden, std)
        narrow = self.width != hidden
        self.project_out = linear(hidden, self.width, False, std) if narrow else None
        self.project_in = linear(self.width, hidden, False, std) if narrow else None
        has_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        self.final_layer_norm = _norm(config) if has_norm else None
        self.layers = nn.CellList([OPTDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.update_parameters_name()

    def positions(self, slots, length, attention_mask):
        """Count the real tokens alone; -1 at padding."""
        if attention_mask is None:
            if slots.shape[0] > 1:  # one token may have a slot in a cache that is longer than the text
                check_length(length, self.config.max_position_embeddings)
            return slots.reshape((1, -1))
        return ops.gather(counted(attention_mask), slots, 1)

    def enter(self, x, slots, length, position_ids, attention_mask):
        """Project `x` if it is narrow, and add the positions' embeddings; all blocks share the mask."""
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(position_ids.astype(ms.int32))
        return x, (causal_mask(slots, length, attention_mask),)

    def leave(self, x):
        """Norm, if the blocks begin with norms, and project to the embeddings' width."""
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def get_input_embeddings(self) -> nn.Cell:
        """Return `embed_tokens`."""
        return self.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `embed_tokens`."""
        self._cells["embed_tokens"] = embeddings


class OPTModel(PreTrainedModel):
    """Holds the decoder under HF's name."""

    config_class: ClassVar[type[OPTConfig]] = OPTConfig
    base_model_prefix = "model"
    heads = Decoder.heads
    window = None

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.decoder = OPTDecoder(config)
        self.width = self.decoder.width
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        cache_position=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Run the decoder; see `Decoder.construct`. Embeddings and output are `word_embed_proj_dim` wide."""
        return self.decoder(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            cache_position,
            use_cache,
            output_hidden_states,
        )

    def get_input_embeddings(self) -> nn.Cell:
        """Return `decoder.embed_tokens`."""
        return self.decoder.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `decoder.embed_tokens`."""
        self.decoder.set_input_embeddings(embeddings)


class OPTForCausalLM(CausalLM):
    """OPT with scores over the vocabulary."""

    config_class = OPTConfig
    body_class = OPTModel
    base_model_prefix = "model"


class OPTForSequenceClassification(SequenceClassifier):
    """OPT with class scores."""

    config_class = OPTConfig
    body_class = OPTModel
    base_model_prefix = "model"


class OPTForQuestionAnswering(QuestionAnswerer):
    """OPT with scores of where an answer starts and ends."""

    config_class = OPTConfig
    body_class = OPTModel
    base_model_prefix = "model"
