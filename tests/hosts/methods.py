"""The methods that adapt layers, each with the least that it wants to be told."""

from typing import Any

from msft_peft import PeftConfig
from msft_peft.registry import METHODS

# What a method cannot do without.
SETTINGS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["down_proj"]},
    "ADALORA": {"total_step": 10},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 20},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "MISS": {"r": 4},
    "HRA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "SHIRA": {"r": 2},
    "LOW_RANK_ADAPTER": {"reduction_factor": 4},
    "ROAD": {"group_size": 8},
    "SUPERTUNING": {"sparsity": 0.9},
}

# Without those that train biases, of which a Llama has none, and rows of embeddings.
METHODS_OF_LAYERS = sorted(
    {name for name, method in METHODS.items() if "dense" in method.patches} - {"BITFIT", "TRAINABLE_TOKENS"}
)


def config_for(name: str) -> PeftConfig:
    """The method on two layers of each block of a Llama."""
    fields = {**SETTINGS.get(name, {}), "target_modules": ["v_proj", "down_proj"]}
    return PeftConfig.from_dict({"peft_type": name, "task_type": "CAUSAL_LM", **fields})
