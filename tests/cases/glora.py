"""GLoRA: every kind of what scales and shifts, with and without a bias."""

from tests import nets
from tests.cases import Case

BOTH = {"target_modules": ["lin0", "lin1"], "r": 2}
QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")
VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
NUMBERS = {"config_A_B": "constant", "config_C": "none"}
BIAS = {"config_A_B": "none", "config_D_E": "none"}

CASES = (
    Case("dense", nets.Dense, BOTH, ("lin0", "lin1"), life=True),
    Case("vectors", nets.Dense, BOTH | VECTORS, ("lin0", "lin1")),
    Case("bias-alone", nets.Dense, {"target_modules": ["lin0"], "r": 2} | BIAS, ("lin0",)),
    Case("drawn", nets.Dense, BOTH | NUMBERS | {"init_weights": False}, ("lin0", "lin1"), identity=False),
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], "r": 2}, QV),
)
