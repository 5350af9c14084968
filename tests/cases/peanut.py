"""PEANuT: without and with layers between A and B."""

from tests import nets
from tests.cases import Case

BOTH = {"target_modules": ["lin0", "lin1"], "r": 3}
QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("dense", nets.Dense, BOTH, ("lin0", "lin1")),
    Case("deep", nets.Dense, BOTH | {"depth": 2, "act_fn": "silu", "scaling": 2.0}, ("lin0", "lin1"), life=True),
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], "r": 2, "act_fn": "tanh"}, QV),
)
