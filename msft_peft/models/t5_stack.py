"""The encoder and decoder stacks of T5 and mT5; `t5.py` says what they compute, and has the models."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.models.attention import attend, causal_mask, heads_first, padding_mask, remember
from msft_peft.models.config import T5Config
from msft_peft.models.layers import Embedding, RMSNorm, activation, linear


def distance_buckets(buckets: int, farthest: int, both_ways: bool) -> np.ndarray:
    """Tell which bucket each distance from -`farthest` to `farthest` belongs to; beyond, it is that of the ends.

    A distance is the key's position minus the query's. Half of the buckets hold one distance each, the others grow
    with its logarithm. An encoder has them for both directions, a decoder only for keys that precede the query.

    Returns:
        (2·farthest + 1,), int32.
    """
    distance = np.arange(-farthest, farthest + 1)
    first = np.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = np.where(distance > 0, buckets, 0)
    far = np.abs(distance) if both_ways else np.maximum(-distance, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(farthest / exact))
    grown = np.minimum(exact + (ratio * np.float32(buckets - exact)).astype(np.int32), buckets - 1)
    return (first + np.where(far < exact, far, grown)).astype(np.int32)


class T5Attention(nn.Cell):
    """Attention without biases and without a division by √D; the first one of a stack holds the distances' bias."""

    def __init__(self, config: T5Config, both_ways: bool, has_relative_attention_bias: bool = False):
        super().__init__()
        width, inner, factor = config.d_model, config.num_heads * config.d_kv, config.initializer_factor
        self.head_dim = config.d_kv
        self.q = linear(width, inner, False, factor * (width * config.d_kv) ** -0.5)
        self.k = linear(width, inner, False, factor * width**-0.5)
        self.v = linear(width, inner, False, factor * width**-0.5)
        self.o = linear(inner, width, False, factor * inner**-0.5)
        self.dropout = config.dropout_rate
        if has_relative_attention_bias:
            buckets, self.farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
            self.relative_attention_bias = Embedding(buckets, config.num_heads, factor * width**-0.5)
            self.buckets = Tensor(distance_buckets(buckets, self.farthest, both_ways))

    def position_bias(self, queries: Tensor, length: int) -> Tensor:
        """Return the bias (1, N, T, S) of queries at the slots `queries` (T,) for keys at the slots 0 to S - 1."""
        distance = Tensor(np.arange(length, dtype=np.int32)) - queries.astype(ms.int32).reshape((-1, 1))  # (T, S)
        distance = ops.clamp(distance, -self.farthest, self.farthest) + self.farthest
        bias = self.relative_attention_bias(ops.gather(self.buckets, distance, 0))  # (T, S, N)
        return bias.astype(ms.float32).transpose((2, 0, 1)).expand_dims(0)

    def keys_values(self, x):
        """Return keys and values (B, N, S, D) of `x` (B, S, H)."""
        return heads_first(self.k(x), self.head_dim), heads_first(self.v(x), self.head_dim)

    def construct(self, x, k, v, mask):
        """Attend from `x` (B, T, H) to keys and values (B, N, S, D)."""
        return self.o(
            attend(heads_first(self.q(x), self.head_dim), k, v, mask, self.dropout if self.training else 0.0, 1.0)
        )


class T5LayerSelfAttention(nn.Cell):
    """Self-attention on the normed input, added to it."""

    def __init__(self, config: T5Config, is_decoder: bool, has_relative_attention_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, not is_decoder, has_relative_attention_bias)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(p=config.dropout_rate)

    def construct(self, x, mask, past, slot):
        """Map (B, T, H) to (B, T, H); also return all keys and values."""
        y = self.layer_norm(x)
        k, v = self.SelfAttention.keys_values(y)
        if past is not None:
            k, v = remember(past[0], k, slot), remember(past[1], v, slot)
        return x + self.dropout(self.SelfAttention(y, k, v, mask)), k, v


class T5LayerCrossAttention(nn.Cell):
    """Attention from the decoder to the encoder, on the normed input, added to it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.EncDecAttention = T5Attention(config, True)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(p=config.dropout_rate)

    def construct(self, x, states, mask, past):
        """Map (B, T, H) to (B, T, H); also return the keys and values of `states`, or those in `past`."""
        k, v = self.EncDecAttention.keys_values(states) if past is None else past
        return x + self.dropout(self.EncDecAttention(self.layer_norm(x), k, v, mask)), k, v


class T5DenseActDense(nn.Cell):
    """W_o·act(W_i·x): version 1.0."""

    def __init__(self, config: T5Config):
        super().__init__()
        width, inner, factor = config.d_model, config.d_ff, config.initializer_factor
        self.wi = linear(width, inner, False, factor * width**-0.5)
        self.wo = linear(inner, width, False, factor * inner**-0.5)
        self.dropout = nn.Dropout(p=config.dropout_rate)
        self.act = activation(config.dense_act_fn)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return self.wo(self.dropout(self.act(self.wi(x))))


class T5DenseGatedActDense(nn.Cell):
    """W_o·(act(W₀·x) ∘ W₁·x) (Shazeer 2020, arXiv:2002.05202): version 1.1 and mT5."""

    def __init__(self, config: T5Config):
        super().__init__()
        width, inner, factor = config.d_model, config.d_ff, config.initializer_factor
        self.wi_0 = linear(width, inner, False, factor * width**-0.5)
        self.wi_1 = linear(width, inner, False, factor * width**-0.5)
        self.wo = linear(inner, width, False, factor * inner**-0.5)
        self.dropout = nn.Dropout(p=config.dropout_rate)
        self.act = activation(config.dense_act_fn)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return self.wo(self.dropout(self.act(self.wi_0(x)) * self.wi_1(x)))


class T5LayerFF(nn.Cell):
    """The MLP on the normed input, added to it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(config) if config.is_gated_act else T5DenseActDense(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(p=config.dropout_rate)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))


class T5Block(nn.Cell):
    """One block: self-attention, in a decoder cross-attention, MLP."""

    def __init__(self, config: T5Config, is_decoder: bool, has_relative_attention_bias: bool):
        super().__init__()
        cross = [T5LayerCrossAttention(config)] if is_decoder else []
        attention = T5LayerSelfAttention(config, is_decoder, has_relative_attention_bias)
        self.layer = nn.CellList([attention, *cross, T5LayerFF(config)])
        self.is_decoder = is_decoder

    def construct(self, x, mask, states=None, states_mask=None, past=None, slot=None):
        """Map (B, T, H) to (B, T, H); a decoder's block also returns all keys and values, own and cross."""
        x, k, v = self.layer[0](x, mask, past, slot)
        if not self.is_decoder:
            return self.layer[1](x), ()
        crossed = None if past is None or len(past) == 2 else (past[2], past[3])
        x, cross_k, cross_v = self.layer[1](x, states, states_mask, crossed)
        return self.layer[2](x), (k, v, cross_k, cross_v)


class T5Stack(nn.Cell):
    """The blocks of the encoder or of the decoder, with the embedding that both share."""

    def __init__(self, config: T5Config, embed_tokens: Embedding, is_decoder: bool):
        super().__init__()
        self.embed_tokens = embed_tokens
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nn.CellList([T5Block(config, is_decoder, i == 0) for i in range(layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.first_dropout = nn.Dropout(p=config.dropout_rate)  # one for each place: compiled, the same drops the same
        self.dropout = nn.Dropout(p=config.dropout_rate)
        self.is_decoder = is_decoder

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        cache_position=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Run the blocks; the arguments are those of `T5Model.construct`, for this stack.

        Returns:
            A dict: "last_hidden_state" (B, T, H), and, if asked for, "past_key_values" and "hidden_states".
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "T5 needs either input_ids or inputs_embeds for its encoder, and either decoder_input_ids or "
                "decoder_inputs_embeds for its decoder: got both, or neither."
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        t = x.shape[1]
        cached = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        length = cached + t if cache_position is None else cached
        if attention_mask is not None and attention_mask.shape[1] != length:
            raise ValueError(
                f"the attention mask has {attention_mask.shape[1]} columns, but {cached} cached slots and {t} new "
                f"tokens need {length}. Put ones in front of it for a cache or a prefix."
            )
        slots = Tensor(np.arange(cached, cached + t, dtype=np.int32)) if cache_position is None else cache_position
        mask = self.block[0].layer[0].SelfAttention.position_bias(slots, length)
        if self.is_decoder:
            mask = mask + causal_mask(slots, length, attention_mask)
        elif attention_mask is not None:
            mask = mask + padding_mask(attention_mask)
        states_mask = None if encoder_attention_mask is None else padding_mask(encoder_attention_mask)

        x = self.first_dropout(x)
        states: tuple[Any, ...] = ()
        cache: tuple[Any, ...] = ()
        for i, block in enumerate(self.block):
            if output_hidden_states:
                states = (*states, x)
            past = None if past_key_values is None else past_key_values[i]
            x, kept = block(x, mask, encoder_hidden_states, states_mask, past, cache_position)
            cache = (*cache, kept)
        x = self.dropout(self.final_layer_norm(x))
        outputs = {"last_hidden_state": x}
        if use_cache:
            outputs["past_key_values"] = cache
        if output_hidden_states:
            outputs["hidden_states"] = (*states, x)
        return outputs
