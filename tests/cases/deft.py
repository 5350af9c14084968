"""DEFT: both projections, and PaRa."""

from tests import nets
from tests.cases import Case

BOTH = {"target_modules": ["lin0", "lin1"], "r": 3}
QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("dense", nets.Dense, BOTH | {"alpha": 5}, ("lin0", "lin1"), life=True),
    Case("qr", nets.Dense, BOTH | {"decomposition_method": "qr", "r": 9}, ("lin0", "lin1")),
    Case("para", nets.Dense, BOTH | {"para": True, "decomposition_method": "qr"}, ("lin0", "lin1"), identity=False),
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], "r": 2, "deft_dropout": 0.5}, QV),
)
