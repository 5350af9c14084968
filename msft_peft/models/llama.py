"""The Llama family: Llama, Mistral, Qwen2 and Qwen3, under HuggingFace's module and parameter names.

A block is  h = x + Attention(RMSNorm(x)),  y = h + MLP(RMSNorm(h)),  with rotary positions and grouped key and value
heads. The families differ only in their config: Mistral adds a sliding window, Qwen2 biases on q, k and v, Qwen3 an
RMS norm on every head of q and k.

The key/value cache is a plain argument and result, never state of a Cell: a tuple with a pair (key, value) for each
layer, (B, K, S, D) each. What is passed in may as well be a trained prefix. Without `cache_position` new keys and
values are appended; with it they are written into that slot of a cache of fixed size.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.models.attention import attend, causal_mask
from msft_peft.models.config import DecoderConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from msft_peft.models.generation import GenerativeModel
from msft_peft.models.layers import Embedding, RMSNorm, activation, linear
from msft_peft.models.losses import classification_loss, next_token_loss
from msft_peft.models.pretrained import PreTrainedModel


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Compute the D/2 angles per position of the rotary embedding, θ^(-2i/D), scaled as the config says.

    "linear" divides all of them by `factor` (Chen et al. 2023, arXiv:2306.15595). "llama3" divides only those that
    turn less than `low_freq_factor` times within the original context, leaves those that turn more than
    `high_freq_factor` times, and blends in between (Llama 3.1: Grattafiori et al. 2024, arXiv:2407.21783).

    Raises:
        ValueError: another rope_type.
    """
    scaling = getattr(config, "rope_parameters", None) or config.rope_scaling or {}
    theta = scaling.get("rope_theta", config.rope_theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    frequencies = theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling["factor"])
    elif kind != "default":
        raise ValueError(
            f"rope_type '{kind}' in the {config.model_type} config is not built; supported: default, linear, llama3. "
            f"Up to the original context length rope_scaling=None is often the same model."
        )
    return frequencies.astype(np.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its position's angle (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: (B, N, T, D).
        cos: (B, N, T, D), the cosines of the D/2 angles, twice.
        sin: the same for the sines, the first half negated.
    """
    first, second = ops.split(x, x.shape[-1] // 2, -1)
    return x * cos + ops.cat((second, first), -1) * sin


class LlamaAttention(nn.Cell):
    """Causal self-attention with rotary positions; Qwen3 norms the heads of q and k first."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        hidden, std = config.hidden_size, config.initializer_range
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.get("attention_bias", False)
        qkv_bias = bias or config.model_type == "qwen2"
        self.q_proj = linear(hidden, queries, qkv_bias, std)
        self.k_proj = linear(hidden, keys, qkv_bias, std)
        self.v_proj = linear(hidden, keys, qkv_bias, std)
        self.o_proj = linear(queries, hidden, bias, std)
        self.has_norms = config.model_type == "qwen3"
        if self.has_norms:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dropout = config.attention_dropout

    def construct(self, x, cos, sin, mask, past=None, slot=None):
        """Attend from `x` (B, T, H) to itself and to `past`; return (B, T, H) and all keys and values."""
        b, t, _ = x.shape
        q = self.q_proj(x).reshape((b, t, -1, self.head_dim))  # (B, T, N, D)
        k = self.k_proj(x).reshape((b, t, -1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x).reshape((b, t, -1, self.head_dim)).swapaxes(1, 2)  # (B, K, T, D)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.swapaxes(1, 2), cos, sin)
        k = rotate(k.swapaxes(1, 2), cos[:, : k.shape[2]], sin[:, : k.shape[2]])
        if past is not None:
            k, v = _remember(past[0], k, slot), _remember(past[1], v, slot)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y), k, v


def _remember(past: Tensor, new: Tensor, slot: Tensor | None) -> Tensor:
    """Append `new` (B, K, T, D) to `past` (B, K, S, D); or, given a slot (1,), write the one new token there."""
    if slot is None:
        return ops.cat((past, new.astype(past.dtype)), 2)
    here = ops.equal(Tensor(np.arange(past.shape[2], dtype=np.int32)), slot.astype(ms.int32)).reshape((1, 1, -1, 1))
    return ops.where(here, new.astype(past.dtype), past)


class LlamaMLP(nn.Cell):
    """down(act(gate(x)) · up(x)) (SwiGLU: Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        bias = config.get("mlp_bias", False)
        self.gate_proj = linear(hidden, inner, bias, std)
        self.up_proj = linear(hidden, inner, bias, std)
        self.down_proj = linear(inner, hidden, bias, std)
        self.act_fn = activation(config.hidden_act)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Cell):
    """One block: attention, then MLP, each on the normed input and added to it."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.window = config.window(index)
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def construct(self, x, cos, sin, mask, past=None, slot=None):
        """Map (B, T, H) to (B, T, H); also return all keys and values."""
        y, k, v = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, slot)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class LlamaModel(PreTrainedModel):
    """The decoder without a head.

    Raises:
        ValueError: the config asks for a rope_type or an activation that is not built.
    """

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    base_model_prefix = "model"
    heads = ("lm_head", "score")

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, config.initializer_range, config.pad_token_id
        )
        self.layers = nn.CellList([LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.num_heads = config.num_attention_heads
        self.inverse_frequencies = Tensor(inverse_frequencies(config))
        windows = {config.window(i) for i in range(config.num_hidden_layers)}
        self.window = next((window for window in windows if window is not None), None)
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
        """Run the decoder.

        Args:
            input_ids: (B, T), integers; or give `inputs_embeds`.
            attention_mask: (B, S), nonzero at real tokens, for the S cached and new slots; None: all are real.
            position_ids: (1 or B, T); default: counted on from the cache's end.
            past_key_values: a cache, or a prefix: a tuple of (key, value) for each layer, (B, K, S - T, D) each.
            inputs_embeds: (B, T, H), in place of `input_ids`.
            cache_position: (1,), integer: write the one new token (T = 1) into this slot of `past_key_values`, which
                then is a cache of fixed size (B, K, S, D); slots after it are not looked at.
            use_cache: also return the keys and values.
            output_hidden_states: also return the input of every layer, and the normed output, as a tuple.

        Returns:
            A dict: "last_hidden_state" (B, T, H), and, if asked for, "past_key_values" and "hidden_states".

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; or `attention_mask` has not S columns.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LlamaModel needs either input_ids or inputs_embeds: got both, or neither.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        t = x.shape[1]
        cached = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        length = cached + t if cache_position is None else cached
        if attention_mask is not None and attention_mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but {cached} cached slots and "
                f"{t} new tokens need {length}. Put ones in front of it for a cache or a prefix."
            )
        if cache_position is None:
            slots = Tensor(np.arange(cached, cached + t, dtype=np.int32))
        else:
            slots = cache_position
        if position_ids is None:
            position_ids = slots.reshape((1, -1))
        angles = position_ids.astype(ms.float32).expand_dims(-1) * self.inverse_frequencies  # (1 or B, T, D/2)
        cos, sin = ops.cos(angles).astype(x.dtype), ops.sin(angles).astype(x.dtype)
        shape = (x.shape[0], self.num_heads, t, 2 * cos.shape[-1])
        cos = ops.broadcast_to(ops.cat((cos, cos), -1).expand_dims(1), shape)
        sin = ops.broadcast_to(ops.cat((-sin, sin), -1).expand_dims(1), shape)
        mask = causal_mask(slots, length, attention_mask)
        windowed = mask if self.window is None else causal_mask(slots, length, attention_mask, self.window)

        states: tuple[Any, ...] = ()
        cache: tuple[Any, ...] = ()
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                states = (*states, x)
            past = None if past_key_values is None else past_key_values[i]
            x, k, v = layer(x, cos, sin, mask if layer.window is None else windowed, past, cache_position)
            cache = (*cache, (k, v))
        x = self.norm(x)
        outputs = {"last_hidden_state": x}
        if use_cache:
            outputs["past_key_values"] = cache
        if output_hidden_states:
            outputs["hidden_states"] = (*states, x)
        return outputs

    def get_input_embeddings(self) -> nn.Cell:
        """Return `embed_tokens`."""
        return self.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `embed_tokens`."""
        self._cells["embed_tokens"] = embeddings


class LlamaForCausalLM(GenerativeModel):
    """The decoder with scores over the vocabulary; with `tie_word_embeddings` they share the embedding's Parameter."""

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    body_class: ClassVar[type[LlamaModel]] = LlamaModel
    base_model_prefix = "model"
    heads = ("lm_head", "score")

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.model = self.body_class(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size, False, config.initializer_range)
        self.tie_weights()
        self.update_parameters_name()

    def tie_weights(self) -> None:
        """Let `lm_head` use the embedding's Parameter, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        cache_position=None,
        logits_to_keep=0,
        output_hidden_states=False,
    ):
        """Score the next token at every position; see `LlamaModel.construct` for the other arguments.

        Args:
            labels: (B, T), the token ids, -100 where no loss is wanted; the shift by one happens here.
            logits_to_keep: score only the last so many positions; 0 for all.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, V), and what the decoder returns when asked.
        """
        body = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            cache_position,
            use_cache,
            output_hidden_states,
        )
        x = body["last_hidden_state"]
        if logits_to_keep > 0:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)
        return _outputs(body, logits, None if labels is None else next_token_loss(logits, labels))

    def get_output_embeddings(self) -> nn.Cell:
        """Return `lm_head`."""
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `lm_head`."""
        self._cells["lm_head"] = embeddings


class LlamaForSequenceClassification(PreTrainedModel):
    """The decoder with class scores, read at the last token that is not padding."""

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    body_class: ClassVar[type[LlamaModel]] = LlamaModel
    base_model_prefix = "model"
    heads = ("lm_head", "score")
    fresh_heads = ("score",)

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.model = self.body_class(config)
        self.num_labels = config.num_labels
        self.score = linear(config.hidden_size, config.num_labels, False, config.initializer_range)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Classify; see `LlamaModel.construct` for the arguments and `classification_loss` for `labels`.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, C), and what the decoder returns when asked.

        Raises:
            ValueError: several sequences, and no `pad_token_id` in the config to find their ends.
        """
        pad = self.config.pad_token_id
        body = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            None,
            use_cache,
            output_hidden_states,
        )
        x = body["last_hidden_state"]
        b, t, _ = x.shape
        if pad is None and b > 1:
            raise ValueError(
                f"{b} sequences in a batch, but config.pad_token_id is None: their ends are unknown. "
                f"Set model.config.pad_token_id."
            )
        if input_ids is None or pad is None:
            last = x[:, -1]
        else:
            places = Tensor(np.arange(t, dtype=np.int32)) * ops.not_equal(input_ids, pad).astype(ms.int32)  # (B, T)
            row = ops.equal(places, places.max(-1, keepdims=True)).astype(x.dtype)
            row = row * ops.not_equal(input_ids, pad).astype(x.dtype)
            last = (row.expand_dims(1) @ x).squeeze(1)  # (B, 1, T) @ (B, T, H)
        logits = self.score(last)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return _outputs(body, logits, loss)


def _outputs(body, logits, loss):
    """Put a head's results before what the decoder returned beside its last state."""
    outputs = {} if loss is None else {"loss": loss}
    outputs["logits"] = logits
    for name in ("past_key_values", "hidden_states"):
        if name in body:
            outputs[name] = body[name]
    return outputs


class MistralModel(LlamaModel):
    """Mistral's decoder."""

    config_class = MistralConfig


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with scores over the vocabulary."""

    config_class = MistralConfig
    body_class = MistralModel


class MistralForSequenceClassification(LlamaForSequenceClassification):
    """Mistral with class scores."""

    config_class = MistralConfig
    body_class = MistralModel


class Qwen2Model(LlamaModel):
    """Qwen2's decoder."""

    config_class = Qwen2Config


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with scores over the vocabulary."""

    config_class = Qwen2Config
    body_class = Qwen2Model


class Qwen2ForSequenceClassification(LlamaForSequenceClassification):
    """Qwen2 with class scores."""

    config_class = Qwen2Config
    body_class = Qwen2Model


class Qwen3Model(LlamaModel):
    """Qwen3's decoder."""

    config_class = Qwen3Config


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with scores over the vocabulary."""

    config_class = Qwen3Config
    body_class = Qwen3Model


class Qwen3ForSequenceClassification(LlamaForSequenceClassification):
    """Qwen3 with class scores."""

    config_class = Qwen3Config
    body_class = Qwen3Model
