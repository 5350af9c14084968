"""HRA: inputs of dense layers and weights of convolutions reflected."""

from functools import partial

from tests import nets
from tests.cases import Case

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 2}, ("lin0", "lin1"), life=True),
    Case(
        "gram-schmidt",
        nets.Dense,
        {"target_modules": ["lin0"], "r": 3, "apply_GS": True, "init_weights": False},
        ("lin0",),
        identity=False,
    ),
    Case("conv2d", partial(nets.Conv, 2, has_bias=True), {"target_modules": ["conv"], "r": 2}, ("conv",)),
)
