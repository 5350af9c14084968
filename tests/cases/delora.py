"""DeLoRA."""

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "dense",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "r": 2, "delora_lambda": 3},
        ("lin0", "lin1"),
        life=True,
    ),
)
