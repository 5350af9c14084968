"""LoKr: whole and factored matrices, dense and convolution layers."""

from functools import partial

from tests import nets
from tests.cases import Case

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 2, "alpha": 4}, ("lin0", "lin1"), life=True),
    Case(
        "both",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "r": 1, "decompose_both": True, "decompose_factor": 4},
        ("lin0", "lin1"),
    ),
    Case(
        "conv2d-effective",
        partial(nets.Conv, 2, has_bias=True),
        {"target_modules": ["conv"], "r": 1, "use_effective_conv2d": True, "init_weights": "lycoris"},
        ("conv",),
    ),
)
