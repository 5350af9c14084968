"""LoRA."""

from msft_peft.registry import Method
from msft_peft.tuners.lora.config import LoraConfig, LoraRuntimeConfig
from msft_peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from msft_peft.tuners.lora.corda import preprocess_corda
from msft_peft.tuners.lora.dora import DoraEmbeddingPatch, DoraPatch
from msft_peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from msft_peft.tuners.lora.extras import extra_patches
from msft_peft.tuners.lora.init_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from msft_peft.tuners.lora.lora_ga import preprocess_loraga
from msft_peft.tuners.lora.model import LoraModel
from msft_peft.tuners.lora.patch import LoraEmbeddingPatch, LoraPatch

__all__ = [
    "METHOD",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraEmbeddingPatch",
    "LoraGAConfig",
    "LoraModel",
    "LoraPatch",
    "LoraRuntimeConfig",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "save_as_lora",
]

# The layers that HF peft 0.21.2 adapts by default, architectures with equal names together.
_DEFAULT_TARGETS: dict[tuple[str, ...], list[str] | str] = {
    ("q_proj", "v_proj"): (
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm".split()
    ),
    ("query_key_value",): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel".split(),
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta".split(),
    ("q", "v"): "mt5 t5".split(),
    ("c_attn",): "gpt2 gpt_bigcode".split(),
    ("q", "v", "q_proj", "v_proj"): ["blip-2"],
    ("query_proj", "value_proj"): ["deberta-v2"],
    ("in_proj",): ["deberta"],
    ("Wqkv",): ["mpt"],
    ("c_proj", "c_attn"): ["btlm"],
    ("qkv_proj",): ["codegen"],
    ("q_proj", "v_proj", "fc1", "fc2"): ["phi"],
    ("q_proj", "k_proj", "v_proj", "o_proj"): ["nemotron_h"],
    ("key", "value", "receptance", "output"): ["rwkv"],
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): ["rwkv7"],
}

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")

METHOD = Method(
    config=LoraConfig,
    patches={"dense": LoraPatch, "embedding": LoraEmbeddingPatch} | dict.fromkeys(_CONVOLUTIONS, LoraPatch),
    variants={
        "dora": {"dense": DoraPatch, "embedding": DoraEmbeddingPatch} | dict.fromkeys(_CONVOLUTIONS, DoraPatch),
        "alora": {"dense": LoraPatch},
    },
    default_targets={kind: list(targets) for targets, kinds in _DEFAULT_TARGETS.items() for kind in kinds}
    | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"},
    mixed=True,
    extras=extra_patches,
    tuner=LoraModel,
)
