"""What MindFormers and HF call the same layers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msft_peft.errors import ConfigError

RENAMED = "{n}"  # stands for the number of a block


@dataclass(frozen=True)
class NameMap:
    """The layers of one architecture.

    Attributes:
        same: MindFormers' name -> HF's.
        many_in_hf: a layer of MindFormers -> those of HF whose rows it holds, one after the other.
        many_here: a layer of HF -> those of MindFormers whose rows it holds.
        rotary: positions are rotations, which MindFormers does not shift by a prefix.
    """

    same: Mapping[str, str]
    many_in_hf: Mapping[str, Sequence[str]] = field(default_factory=dict)
    many_here: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rotary: bool = True

    def to_hf(self, path: str) -> list[str]:
        """HF's names for a layer of MindFormers; for a part of one, the whole. Others are kept.

        Raises:
            ConfigError: the same name would mean another layer there.
        """
        parts = {mf: [hf] for hf, mfs in self.many_here.items() for mf in mfs}
        return _renamed(path, {mf: [hf] for mf, hf in self.same.items()} | dict(self.many_in_hf) | parts)

    def from_hf(self, path: str, fused: bool) -> list[str]:
        """MindFormers' names for a layer of HF; `fused` asks for the layers that hold several of HF's."""
        rules: dict[str, Sequence[str]] = {hf: [mf] for mf, hf in self.same.items()} | dict(self.many_here)
        if fused:
            rules |= {hf: [mf] for mf, hfs in self.many_in_hf.items() for hf in hfs}
        return _renamed(path, rules)


def _renamed(path: str, rules: Mapping[str, Sequence[str]]) -> list[str]:
    for old, new in rules.items():
        found = re.fullmatch(re.escape(old).replace(re.escape(RENAMED), r"(\d+)"), path)
        if found:
            number = found.groups()[0] if found.groups() else ""
            return [name.replace(RENAMED, number) for name in new]
    return [path]


def _block(mf: str, hf: str, layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{mf}.{RENAMED}.{ours}": f"{hf}.{RENAMED}.{theirs}" for ours, theirs in layers.items()}


def _holding(mf: str, hf: str, layers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {f"{mf}.{RENAMED}.{one}": [f"{hf}.{RENAMED}.{each}" for each in many] for one, many in layers.items()}


_QKV = [f"self_attn.{x}_proj" for x in "qkv"]
_HF = "model.layers"

_LLAMA = NameMap(
    {"model.tok_embeddings": "model.embed_tokens", "model.norm_out": "model.norm"}
    | _block(
        "model.layers",
        _HF,
        {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
        | {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
        | {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    ),
    _holding(
        "model.layers",
        _HF,
        {"attention.w_qkv": _QKV, "feed_forward.w_gate_hidden": ["mlp.gate_proj", "mlp.up_proj"]},
    ),
)
_GLM = NameMap(
    {
        "transformer.embedding": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
    }
    | _block(
        "transformer.encoder.layers",
        _HF,
        {f"self_attention.w{x}": f"self_attn.{x}_proj" for x in "qkv"}
        | {
            "self_attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.gate_up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        }
        | {name: name for name in ("input_layernorm", "post_attention_layernorm")},
    ),
    _holding("transformer.encoder.layers", _HF, {"self_attention.query_key_value": _QKV}),
    {
        f"{_HF}.{RENAMED}.mlp.gate_up_proj": [
            f"transformer.encoder.layers.{RENAMED}.mlp.dense_{side}" for side in ("left", "right")
        ]
    },
)
_GPT2 = NameMap(
    {
        "backbone.embedding.word_embedding": "transformer.wte",
        "backbone.embedding.position_embedding": "transformer.wpe",
        "backbone.layernorm": "transformer.ln_f",
    }
    | _block(
        "backbone.blocks",
        "transformer.h",
        {
            "attention.projection": "attn.c_proj",
            "output.mapping": "mlp.c_fc",
            "output.projection": "mlp.c_proj",
            "layernorm1": "ln_1",
            "layernorm2": "ln_2",
        },
    ),
    many_here={
        f"transformer.h.{RENAMED}.attn.c_attn": [f"backbone.blocks.{RENAMED}.attention.dense{i}" for i in (1, 2, 3)]
    },
    rotary=False,
)
_MCORE = NameMap(
    {
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
    }
    | _block(
        "decoder.layers",
        _HF,
        {f"self_attention.linear_{x}": f"self_attn.{x}_proj" for x in "qkv"}
        | {
            "self_attention.linear_proj": "self_attn.o_proj",
            "mlp.gating": "mlp.gate_proj",
            "mlp.hidden": "mlp.up_proj",
            "mlp.linear_fc2": "mlp.down_proj",
            "self_attention.q_layernorm": "self_attn.q_norm",
            "self_attention.k_layernorm": "self_attn.k_norm",
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
        },
    )
)

# "mcore": MindFormers' newer models, before it fuses their layers for training.
NAME_MAPS: dict[str, NameMap] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "glm": _GLM,
    "gpt2": _GPT2,
    "mcore": _MCORE,
}


def name_map(architecture: str | None) -> NameMap:
    """The map of this architecture; without one, every layer keeps its name.

    Raises:
        ConfigError: an unknown architecture.
    """
    if architecture is None:
        return NameMap({}, rotary=False)
    if architecture not in NAME_MAPS:
        raise ConfigError(f"architecture={architecture!r} has no map of names; {sorted(NAME_MAPS)} have one.")
    return NAME_MAPS[architecture]
