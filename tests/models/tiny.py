"""Tiny models of every family, with weights large enough that a wrong formula shows."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

import msft_peft.models as models

VOCAB, WIDTH, HEADS, STD = 61, 24, 4, 0.25

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "initializer_range": STD,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": HEADS,
    "initializer_range": STD,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    **_ENDS,
}
_OPT = {
    **{key: value for key, value in _SIZES.items() if key not in ("intermediate_size", "initializer_range")},
    "ffn_dim": 40,
    "init_std": STD,
    "dropout": 0.0,
    "word_embed_proj_dim": WIDTH,
    **_ENDS,
}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "initializer_range": STD, **_ENDS}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**_GROUPED, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {**_GROUPED, "rope_scaling": {"type": "linear", "factor": 4.0}, "hidden_act": "gelu"}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rope_theta": 1e6},
    ),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 10, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**_GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "bloom": ("bloom", {**_BLOOM, "n_head": 4}),
    "bloom-post": ("bloom", {**_BLOOM, "n_head": 6, "apply_residual_connection_post_layernorm": True}),
}
BERT = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS: dict[str, dict[str, Any]] = {"bert": BERT, "roberta": {**BERT, "pad_token_id": 1}}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {**_T5, "num_decoder_layers": 3}),
    "t5-1.1": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
}


def decoder(name: str = "llama3", **overrides: Any) -> models.LlamaForCausalLM:
    """A causal language model of one of `DECODERS`."""
    family, settings = DECODERS[name]
    config = models.AutoConfig.for_model(family, **{**settings, **overrides})
    return scatter(models.AutoModelForCausalLM.from_config(config))


def seq2seq(name: str = "t5", **overrides: Any) -> models.T5ForConditionalGeneration:
    """An encoder-decoder of one of `SEQ2SEQ`, with weights of one size: its own would be too small or too large."""
    family, settings = SEQ2SEQ[name]
    model = models.AutoModelForSeq2SeqLM.from_config(
        models.AutoConfig.for_model(family, **{**settings, **overrides})
    ).set_train(False)
    for path, p in model.parameters_and_names():
        if p.ndim == 2:
            noise = np.random.RandomState(len(path)).normal(0.0, STD, p.shape)
            p.set_data(Tensor(noise.astype(np.float32)))
    return scatter(model)


def scatter(model: Any) -> Any:
    """Move biases and norms away from zeros and ones, which would hide a missing one."""
    for name, p in model.parameters_and_names():
        if p.ndim == 1:
            noise = np.random.RandomState(len(name)).normal(0.0, 0.3, p.shape)
            p.set_data(Tensor((p.asnumpy() + noise).astype(np.float32)))
    return model


def tokens(batch: int = 3, length: int = 12) -> np.ndarray:
    return np.random.RandomState(1).randint(3, VOCAB, (batch, length)).astype(np.int32)


def left_mask(batch: int = 3, length: int = 12) -> np.ndarray:
    """Ones, but for four tokens of padding at the start of the first text and seven at that of the last."""
    mask = np.ones((batch, length), np.int32)
    mask[0, :4] = 0
    mask[-1, :7] = 0
    return mask


def loss_logits_gradients(model: Any, batch: dict[str, np.ndarray], key: str = "logits") -> tuple[Any, Any, dict]:
    """Loss, logits and the gradient of every weight, of one step; compiled as a whole in graph mode."""
    names = tuple(batch)

    def forward(*columns):
        named = {}
        for i in range(len(names)):
            named[names[i]] = columns[i]
        outputs = model(**named)
        return outputs["loss"], outputs[key]

    weights = model.trainable_params()
    step = ms.value_and_grad(forward, None, weights, has_aux=True)

    def call(*columns):
        return step(*columns)

    run = ms.jit(call) if ms.get_context("mode") == ms.GRAPH_MODE else call
    (loss, logits), gradients = run(*[Tensor(column) for column in batch.values()])
    return loss.asnumpy(), logits.asnumpy(), {p.name: g.asnumpy() for p, g in zip(weights, gradients)}


def close(actual: Any, expected: Any, atol: float = 1e-4) -> None:
    """Whole arrays agree to `atol` times the largest number that was expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= atol * max(1.0, np.abs(expected).max())
