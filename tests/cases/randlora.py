"""RandLoRA: layers that are wider and narrower than they are long, at one set of bases."""

from tests import nets
from tests.cases import Case

BOTH = {"target_modules": ["lin0", "lin1"], "r": 4, "randlora_alpha": 8}

CASES = (
    Case("dense", nets.Dense, BOTH, ("lin0", "lin1"), life=True),
    Case("sparse", nets.Dense, BOTH | {"sparse": True, "save_projection": False}, ("lin0", "lin1")),
)
