"""LoRA: every kind of layer and container, and every option that is built."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")
BLOCK = partial(nets.Blocks, 1)
BIASES = ("attn.q.base_layer", "attn.v", "mlp")


def lora(target_modules: object, **settings: object) -> dict[str, object]:
    return {"r": 2, "lora_alpha": 4, "target_modules": target_modules, **settings}


def conv(dims: int, **settings: object) -> partial:
    return partial(nets.Conv, dims, **settings)


PAD_2D = {"pad_mode": "pad", "padding": (1, 0, 2, 1)}
PAD_3D = {"pad_mode": "pad", "padding": (1, 0, 2, 1, 0, 1)}

CASES = (
    Case("dense", nets.Dense, lora(["lin0", "lin1"]), ("lin0", "lin1"), life=True),
    Case("fused-activation", nets.FusedDense, lora(["lin0", "lin1"]), ("lin0", "lin1")),
    Case("mint-linear", nets.MintLinear, lora(["lin0", "lin1"]), ("lin0", "lin1")),
    Case("embedding", nets.Embedding, lora(["emb", "lin"]), ("emb", "lin"), life=True),
    Case("conv1d", conv(1, pad_mode="pad", padding=2, stride=2, has_bias=True), lora(["conv"]), ("conv",)),
    Case("conv1d-dilated", conv(1, pad_mode="valid", dilation=2), lora(["conv"]), ("conv",)),
    Case("conv2d-asymmetric", conv(2, stride=(1, 2), has_bias=True, **PAD_2D), lora(["conv"]), ("conv",), life=True),
    Case("conv2d-dilated", conv(2, kernel=(3, 2), pad_mode="valid", dilation=2), lora(["conv"]), ("conv",)),
    Case("conv2d-same", conv(2, stride=2), lora(["conv"]), ("conv",)),
    Case("conv2d-grouped", conv(2, channels=(4, 4), group=2), lora(["conv"]), ("conv",), merges=False),
    Case("conv3d-asymmetric", conv(3, stride=(1, 2, 1), **PAD_3D), lora(["conv"]), ("conv",)),
    Case("hf-conv1d", nets.Gpt2, lora(["c_attn", "c_proj"], fan_in_fan_out=True), ("c_attn", "c_proj"), life=True),
    Case("blocks", nets.Blocks, lora(["q", "v"]), QV),
    Case("one-block", nets.Blocks, lora(["q"], layers_to_transform=1, layers_pattern="layers"), QV[2:3]),
    Case("all-linear", BLOCK, lora("all-linear"), (*QV[:2], "layers.0.mlp", "head")),
    Case("regex", nets.Containers, lora(r"(stack|named)\.[0-9l].*"), ("stack.0", "stack.1", "named.left")),
    Case("sequential", nets.Sequential, lora(["0", "2.up", "down"]), ("0", "2.up", "2.down")),
    Case(
        "containers", nets.Containers, lora(["stack.0", "1", "left"]), ("stack.0", "stack.1", "named.left"), life=True
    ),
    Case(
        "head",
        nets.Classifier,
        lora(["backbone"], modules_to_save=["classifier"]),
        ("backbone",),
        ("classifier",),
        life=True,
    ),
    Case("task", nets.Classifier, lora(["backbone"], task_type="SEQ_CLS"), ("backbone",), ("classifier",)),
    Case(
        "bias-all",
        BLOCK,
        lora(["q"], bias="all"),
        QV[:1],
        trains=(*(f"layers.0.{owner}.bias" for owner in BIASES), "layers.0.norm.beta", "head.bias"),
    ),
    Case("bias-lora-only", BLOCK, lora(["q"], bias="lora_only"), QV[:1], trains=(f"layers.0.{BIASES[0]}.bias",)),
    Case(
        "bias-and-head",
        nets.Classifier,
        lora(["backbone"], bias="all", modules_to_save=["classifier"]),
        ("backbone",),
        ("classifier",),
        trains=("backbone.base_layer.bias",),
        life=True,
    ),
    Case(
        "patterns",
        BLOCK,
        lora(["q", "v"], use_rslora=True, rank_pattern={"layers.0.attn.q": 3}, alpha_pattern={"v": 7, "^.*q$": 1}),
        QV[:2],
        life=True,
    ),
    Case("dropout", nets.Dense, lora(["lin0"], lora_dropout=0.5), ("lin0",)),
    Case("random", nets.Dense, lora(["lin0", "lin1"], init_lora_weights=False), ("lin0", "lin1"), identity=False),
    Case("dora", nets.Dense, lora(["lin0", "lin1"], use_dora=True), ("lin0", "lin1"), life=True),
    Case("dora-embedding", nets.Embedding, lora(["emb"], use_dora=True), ("emb",)),
    Case("dora-conv2d", conv(2, stride=2, has_bias=True), lora(["conv"], use_dora=True), ("conv",)),
    Case("bias-of-b", nets.Dense, lora(["lin0"], lora_bias=True), ("lin0",), life=True),
    Case("tokens", nets.Embedding, lora(["lin"], trainable_token_indices={"emb": [3, 1]}), ("emb", "lin"), life=True),
    Case("pissa", nets.Dense, lora(["lin0"], init_lora_weights="pissa"), ("lin0",), residual=True),
    Case("orthogonal", nets.Dense, lora(["lin0", "lin1"], init_lora_weights="orthogonal"), ("lin0", "lin1")),
    Case(
        "bdlora",
        nets.Blocks,
        lora(["q", "v"], use_bdlora={"target_modules_bd_a": ["q"], "target_modules_bd_b": ["v"], "nblocks": 2}),
        QV,
        life=True,
    ),
    Case(
        "kasa",
        nets.Dense,
        lora(["lin0", "lin1"], kasa_config={}),
        ("lin0", "lin1"),
        identity=False,
        residual=True,
    ),
    Case("velora", nets.Dense, lora(["lin0", "lin1"], velora_config={"num_groups": 4}), ("lin0", "lin1"), life=True),
    Case(
        "monteclora",
        nets.Dense,
        lora(["lin0"], monteclora_config={"num_samples": 2}),
        ("lin0",),
        life=True,
        idle=("std_prior", "expert_weights_prior"),
    ),
    Case("mica", nets.Dense, lora(["lin0", "lin1"], init_lora_weights="mica"), ("lin0", "lin1"), life=True),
    Case("mica-embedding", nets.Embedding, lora(["emb"], init_lora_weights="mica"), ("emb",)),
    Case("tied", nets.Tied, lora(["lin"]), ("lin",)),
    Case("float16", partial(nets.Dense, ms.float16), lora(["lin0", "lin1"]), ("lin0", "lin1")),
    Case("float16-embedding", partial(nets.Embedding, ms.float16), lora(["emb"]), ("emb",)),
    Case(
        "float16-head",
        partial(nets.Classifier, ms.float16),
        lora(["backbone"], modules_to_save=["classifier"]),
        ("backbone",),
        ("classifier",),
        life=True,
    ),
)
