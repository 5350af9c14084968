"""The layers that HF peft 0.21.2 adapts by default, by the base model's `model_type`."""

# Architectures whose layers have equal names stand together.
_LAYERS: dict[tuple[str, ...], list[str]] = {
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


def _by_architecture(layers: dict[tuple[str, ...], list[str]]) -> dict[str, list[str] | str]:
    return {kind: list(names) for names, kinds in layers.items() for kind in kinds}


# Most methods' targets.
USUAL: dict[str, list[str] | str] = _by_architecture(_LAYERS) | {
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

# VB-LoRA's: fewer architectures, and more layers in some of them.
VBLORA = {
    kind: USUAL[kind]
    for kind in (
        "bert bloom deberta gemma gemma2 gemma3_text gemma4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj llama llama4 "
        "nemotron_h qwen2 qwen3 roberta"
    ).split()
} | _by_architecture(
    {
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): ["bart", "opt"],
        ("q", "k", "v", "o", "wi", "wo"): ["t5"],
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"): ["mt5"],
        ("query_proj", "key_proj", "value_proj", "dense"): ["deberta-v2"],
    }
)

# (IA)³'s targets, and those among them that are scaled at their inputs.
IA3 = _by_architecture(
    {
        ("q_proj", "v_proj", "down_proj"): "gemma gemma2 gemma3_text llama4 qwen2 qwen3".split(),
        ("k_proj", "v_proj", "down_proj"): "llama mistral".split(),
        ("q_proj", "v_proj", "fc2"): "bart phi".split(),
        ("query_key_value", "dense_4h_to_h"): "falcon gpt_neox RefinedWeb RefinedWebModel".split(),
        ("c_attn", "mlp.c_proj"): "gpt2 gpt_bigcode".split(),
        ("key", "value", "output.dense"): "bert roberta".split(),
        ("k", "v", "wo"): ["t5"],
        ("k", "v", "wi_1"): ["mt5"],
        ("query_key_value", "mlp.dense_4h_to_h"): ["bloom"],
        ("q_proj", "k_proj", "fc2"): ["opt"],
        ("q_proj", "v_proj", "fc_out"): ["gptj"],
        ("q_proj", "v_proj", "c_proj"): ["gpt_neo"],
        ("k_proj", "v_proj", "w2"): ["mixtral"],
        ("key_proj", "value_proj", "output.dense"): ["deberta-v2"],
        ("in_proj", "output.dense"): ["deberta"],
    }
)
# The last of them; mT5 has none.
IA3_FEEDFORWARD = {kind: names[-1:] for kind, names in IA3.items() if kind != "mt5"} | {"mt5": []}

# The norms that LN tuning trains.
NORMS = _by_architecture(
    {
        ("input_layernorm", "post_attention_layernorm", "norm"): "gemma llama mistral".split(),
        ("input_layernorm", "post_attention_layernorm", "ln_f"): "bloom falcon".split(),
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ): "gemma2 gemma3_text".split(),
        ("post_attention_layernorm",): "qwen2 qwen3".split(),
        ("layer_norm", "final_layer_norm"): "mt5 t5".split(),
        ("ln_1", "ln_2", "ln_f"): ["gpt2"],
        ("ln_1", "ln_f"): ["gptj"],
        ("input_layernorm", "final_layernorm"): ["phi"],
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"): ["bart"],
        ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"): ["blip-2"],
        (
            "multi_modal_projector",
            "input_layernorm",
            "post_attention_layernorm",
            "norm",
            "embed_tokens",
            "lm_head",
        ): ["llava"],
    }
)

# OSF's targets.
OSF = _by_architecture(
    {
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"): (
            "gemma gemma2 gemma3_text llama llama4 mistral mixtral phi qwen2 qwen3".split()
        ),
        ("query_key_value", "dense_4h_to_h"): "bloom falcon gpt_neox".split(),
        ("c_attn", "c_proj"): "gpt2 gpt_bigcode".split(),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): ["opt"],
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"): ["gptj"],
    }
)

# AdaLoRA's targets.
ADALORA: dict[str, list[str] | str] = _by_architecture(
    {
        ("q_proj", "v_proj"): "gemma gemma2 gemma3_text gpt_neo gptj llama llama4 qwen2 qwen3".split(),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): "bart opt".split(),
        ("query_key_value",): "bloom gpt_neox".split(),
        ("c_attn",): "gpt2 gpt_bigcode".split(),
        ("q", "k", "v", "o", "wi", "wo"): ["t5"],
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"): ["mt5"],
        ("query", "value"): ["bert"],
        ("query", "key", "value", "dense"): ["roberta"],
        ("query_proj", "key_proj", "value_proj", "dense"): ["deberta-v2"],
        ("in_proj",): ["deberta"],
        ("q_proj", "k_proj", "v_proj", "o_proj"): ["nemotron_h"],
    }
) | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}
