"""RoAd: its three variants."""

from tests import nets
from tests.cases import Case

CASES = (
    Case("one", nets.Dense, {"target_modules": ["lin0"], "group_size": 4}, ("lin0",), life=True),
    Case(
        "two",
        nets.FusedDense,
        {"target_modules": ["lin0"], "group_size": 8, "variant": "road_2"},
        ("lin0",),
    ),
    Case(
        "four",
        nets.Gpt2,
        {"target_modules": ["c_attn"], "group_size": 2, "variant": "road_4"},
        ("c_attn",),
    ),
)
