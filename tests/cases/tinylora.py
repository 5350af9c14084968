"""TinyLoRA: vectors of their own and tied ones, weights of lower rank than asked for, an embedding."""

from functools import partial

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], "u": 5, "weight_tying": 0.5}, QV, life=True),
    Case("embedding", nets.Embedding, {"target_modules": ["emb", "lin"], "u": 3, "r": 9}, ("emb", "lin")),
    Case(
        "uniform",
        partial(nets.Blocks, 1),
        {"target_modules": ["head"], "init_weights": "uniform", "save_projection": False, "bias": "tinylora_only"},
        ("head",),
        trains=("head.base_layer.bias",),
        identity=False,
    ),
)
