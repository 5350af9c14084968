"""Uni-LoRA: layers of several sizes at one vector, with the choice in files and made again."""

from functools import partial

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")
VECTOR = {"r": 3, "theta_d_length": 60, "init_theta_d_bound": 1.0}

CASES = (
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], **VECTOR}, QV, life=True),
    Case("kept", nets.Dense, {"target_modules": ["lin0", "lin1"], **VECTOR, "save_indices": True}, ("lin0", "lin1")),
    Case(
        "biased",
        partial(nets.Blocks, 1),
        {"target_modules": ["head"], **VECTOR, "init_weights": False, "bias": "unilora_only"},
        ("head",),
        trains=("head.base_layer.bias",),
    ),
)
