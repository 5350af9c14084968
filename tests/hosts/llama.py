"""One small Llama that every host builds alike, and what HF peft on torch made of it (`make_golden.py` wrote that)."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "dora": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "adalora": {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["v_proj"]},
    "vera": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "o_proj"]},
    "ln": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
    "ends": {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens", "lm_head"]},
    "extras": {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 4, 17, 30, 42]},
        "target_parameters": ["mlp.up_proj.weight", "q_proj.weight"],
    },
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the name alone: large enough to matter, small enough not to saturate anything."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    one = "norm" in name or "ia3" in name
    return (1 + 0.2 * values if one else 0.2 * values).astype(np.float32)


def batch() -> np.ndarray:
    """(2, 12), tokens above the special ones."""
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12)).astype(np.int32)


def golden(name: str) -> dict[str, np.ndarray]:
    """What HF peft on torch made of the batch with this adapter: "logits", "loss", and "gradient/<key>"; "base"."""
    with np.load(GOLDEN / name / "io.npz") as found:
        return dict(found)


def config_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "adapter_config.json").read_text())
