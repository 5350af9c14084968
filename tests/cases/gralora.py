"""GraLoRA, alone and with a plain low-rank update beside it."""

from functools import partial

from tests import nets
from tests.cases import Case

Q = ("layers.0.attn.q",)

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0"], "r": 2, "alpha": 4}, ("lin0",), life=True),
    Case("hybrid", partial(nets.Blocks, 1), {"target_modules": ["q"], "r": 2, "hybrid_r": 1}, Q),
)
