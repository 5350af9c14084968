"""MiSS: the block of shards, its small variant, and the one that multiplies."""

from tests import nets
from tests.cases import Case

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 4}, ("lin0", "lin1"), life=True),
    Case("mini", nets.Dense, {"target_modules": ["lin0"], "r": 2, "mini_r": 4, "init_weights": "mini"}, ("lin0",)),
    Case("bat", nets.Dense, {"target_modules": ["lin0"], "r": 2, "init_weights": "bat"}, ("lin0",)),
)
