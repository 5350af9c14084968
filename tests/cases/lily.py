"""Lily: factors that neighbours share, and layers that share with none."""

from functools import partial

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], "r": 3, "stride_A": 2}, QV, life=True),
    Case(
        "random",
        partial(nets.Blocks, 1),
        {"target_modules": ["head"], "r": 2, "num_B": 3, "scaling": 2.5, "init_weights": False},
        ("head",),
        identity=False,
    ),
)
