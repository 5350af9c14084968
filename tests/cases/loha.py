"""LoHa: with the kernel as a part of the input side, and by itself."""

from functools import partial

from tests import nets
from tests.cases import Case

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 2, "alpha": 4}, ("lin0", "lin1"), life=True),
    Case(
        "conv2d-effective",
        partial(nets.Conv, 2, stride=2, has_bias=True),
        {"target_modules": ["conv"], "r": 2, "use_effective_conv2d": True},
        ("conv",),
    ),
    Case("conv1d", partial(nets.Conv, 1), {"target_modules": ["conv"], "r": 2}, ("conv",)),
)
