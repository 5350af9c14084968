"""SHiRA: dense layers of either way to store a weight."""

from tests import nets
from tests.cases import Case

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 1}, ("lin0", "lin1"), life=True),
    Case(
        "fused-activation",
        nets.FusedDense,
        {"target_modules": ["lin0", "lin1"], "r": 2, "random_seed": 5},
        ("lin0", "lin1"),
    ),
    Case("transposed", nets.Gpt2, {"target_modules": ["c_attn"], "r": 1, "fan_in_fan_out": True}, ("c_attn",)),
)
