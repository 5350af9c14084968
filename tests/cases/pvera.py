"""PVeRA: the means alone, since the contract compares numbers; projections in files and drawn again."""

from functools import partial

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 4}, ("lin0", "lin1"), life=True),
    Case(
        "drawn-again",
        nets.Blocks,
        {"target_modules": ["q", "v"], "r": 3, "save_projection": False, "projection_prng_key": 7},
        QV,
    ),
    Case(
        "random",
        partial(nets.Blocks, 1),
        {"target_modules": ["head"], "r": 3, "init_weights": False, "bias": "pvera_only"},
        ("head",),
        trains=("head.base_layer.bias",),
        identity=False,
    ),
)
