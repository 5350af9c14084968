"""The Llama family: Llama, Mistral, Qwen2 and Qwen3, under HuggingFace's module and parameter names.

A block is  h = x + Attention(RMSNorm(x)),  y = h + MLP(RMSNorm(h)),  with rotary positions and grouped key and value
heads. The families differ only in their config: Mistral adds a sliding window, Qwen2 biases on q, k and v, Qwen3 an
RMS norm on every head of q and k.
"""

from __future__ import annotations

import math
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.models.attention import attend, attend_beside, causal_mask, heads_first, remember
from msft_peft.models.config import DecoderConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from msft_peft.models.decoder import CausalLM, Decoder, QuestionAnswerer, SequenceClassifier, TokenClassifier
from msft_peft.models.layers import Embedding, RMSNorm, activation, linear


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


def rotate(x: Tensor, turn: tuple[Tensor, ...]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its position's angle (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: (B, N, T, D).
        turn: (cos, sin), each (B, N or more, T, D): the cosines of the D/2 angles, twice, and the sines, the first
            half negated; or, for a single token, the rotation itself, (B, D, D), which is one product in place of
            five passes.
    """
    if len(turn) == 1:
        return _product(x.squeeze(2), turn[0]).expand_dims(2)
    cos, sin = turn[0][:, : x.shape[1]], turn[1][:, : x.shape[1]]
    first, second = ops.split(x, x.shape[-1] // 2, -1)
    return x * cos + ops.cat((second, first), -1) * sin


_product = ops.BatchMatMul()


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

    def construct(self, x, turn, mask, past=None, slot=None, beside=()):
        """Attend from `x` (B, T, H) to itself and to `past`; return (B, T, H) and all keys and values.

        See `attend_beside` for `beside`.
        """
        q = heads_first(self.q_proj(x), self.head_dim)  # (B, N, T, D)
        k, v = self.keys_and_values(x)
        if self.has_norms:
            q = self.q_norm(q)
        q, k = rotate(q, turn), rotate(k, turn)
        if past is not None:
            k, v = remember(past[0], k, slot), remember(past[1], v, slot)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        if len(beside):
            y = y + attend_beside(q, beside)
        return self.o_proj(y), k, v

    def keys_and_values(self, x):
        """The keys and values of `x` (B, T, H), (B, K, T, D) each, with no position."""
        k = heads_first(self.k_proj(x), self.head_dim)
        return self.k_norm(k) if self.has_norms else k, heads_first(self.v_proj(x), self.head_dim)


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

    def construct(self, x, turn, mask, windowed, past=None, slot=None):
        """Map (B, T, H) to (B, T, H); also return all keys and values."""
        mask = mask if self.window is None else windowed
        y, k, v = self.self_attn(self.input_layernorm(x), turn, mask, past, slot)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class LlamaModel(Decoder):
    """The decoder without a head.

    Raises:
        ValueError: the config asks for a rope_type or an activation that is not built.
    """

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    base_model_prefix = "model"
    old_prefixes = ("transformer",)

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

    def enter(self, x, slots, length, position_ids, attention_mask):
        """Add nothing to `x`; all blocks share the rotation, and the masks without and with the window."""
        b, t, _ = x.shape
        angles = position_ids.astype(ms.float32).expand_dims(-1) * self.inverse_frequencies  # (1 or B, T, D/2)
        cos, sin = ops.cos(angles).astype(x.dtype), ops.sin(angles).astype(x.dtype)
        cos, sin = ops.cat((cos, cos), -1), ops.cat((-sin, sin), -1)
        d = cos.shape[-1]
        if t == 1:
            eye = Tensor(np.eye(d, dtype=np.float32)).astype(x.dtype)
            halves_swapped = Tensor(np.roll(np.eye(d, dtype=np.float32), d // 2, axis=1)).astype(x.dtype)
            turn: tuple[Tensor, ...] = (ops.broadcast_to(eye * cos + halves_swapped * sin, (b, d, d)),)
        else:
            shape = (b, self.num_heads, t, d)
            turn = (ops.broadcast_to(cos.expand_dims(1), shape), ops.broadcast_to(sin.expand_dims(1), shape))
        mask = causal_mask(slots, length, attention_mask)
        windowed = mask if self.window is None else causal_mask(slots, length, attention_mask, self.window)
        return x, (turn, mask, windowed)

    def leave(self, x):
        """Norm."""
        return self.norm(x)

    def get_input_embeddings(self) -> nn.Cell:
        """Return `embed_tokens`."""
        return self.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `embed_tokens`."""
        self._cells["embed_tokens"] = embeddings


class LlamaForCausalLM(CausalLM):
    """Llama with scores over the vocabulary."""

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    body_class: ClassVar[type[LlamaModel]] = LlamaModel
    base_model_prefix = "model"
    old_prefixes = ("transformer",)


class LlamaForSequenceClassification(SequenceClassifier):
    """Llama with class scores."""

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    body_class: ClassVar[type[LlamaModel]] = LlamaModel
    base_model_prefix = "model"
    old_prefixes = ("transformer",)


class LlamaForTokenClassification(TokenClassifier):
    """Llama with class scores of every token."""

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    body_class: ClassVar[type[LlamaModel]] = LlamaModel
    base_model_prefix = "model"
    old_prefixes = ("transformer",)
    head = "score"
    fresh_heads = ("score",)


class LlamaForQuestionAnswering(QuestionAnswerer):
    """Llama with scores of where an answer starts and ends; its body is called `transformer`, as in HF's files."""

    config_class: ClassVar[type[DecoderConfig]] = LlamaConfig
    body_class: ClassVar[type[LlamaModel]] = LlamaModel
    base_model_prefix = "transformer"
    old_prefixes = ("model",)


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


class MistralForTokenClassification(LlamaForTokenClassification):
    """Mistral with class scores of every token."""

    config_class = MistralConfig
    body_class = MistralModel


class MistralForQuestionAnswering(LlamaForQuestionAnswering):
    """Mistral with scores of where an answer starts and ends."""

    config_class = MistralConfig
    body_class = MistralModel
    base_model_prefix = "model"
    old_prefixes = ("transformer",)


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


class Qwen2ForTokenClassification(LlamaForTokenClassification):
    """Qwen2 with class scores of every token."""

    config_class = Qwen2Config
    body_class = Qwen2Model


class Qwen2ForQuestionAnswering(LlamaForQuestionAnswering):
    """Qwen2 with scores of where an answer starts and ends."""

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


class Qwen3ForTokenClassification(LlamaForTokenClassification):
    """Qwen3 with class scores of every token."""

    config_class = Qwen3Config
    body_class = Qwen3Model


class Qwen3ForQuestionAnswering(LlamaForQuestionAnswering):
    """Qwen3 with scores of where an answer starts and ends."""

    config_class = Qwen3Config
    body_class = Qwen3Model
