"""BEFT: layers that have a bias, and one that gains one."""

from tests import nets
from tests.cases import Case

VALUES = ("layers.0.attn.v", "layers.1.attn.v")

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0"]}, ("lin0",), life=True),
    Case("without-bias", nets.Dense, {"target_modules": ["lin1"]}, ("lin1",), merges=False),
    Case("blocks", nets.Blocks, {"target_modules": ["v"]}, VALUES),
)
