"""BOFT: inputs and convolutions rotated, by one factor and by several."""

from functools import partial

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "dense",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "boft_block_size": 2},
        ("lin0", "lin1"),
        life=True,
    ),
    Case(
        "butterfly",
        nets.FusedDense,
        {"target_modules": ["lin1"], "boft_block_size": 2, "boft_n_butterfly_factor": 3},
        ("lin1",),
    ),
    Case(
        "conv2d",
        partial(nets.Conv, 2, stride=2, has_bias=True),
        {"target_modules": ["conv"], "boft_block_size": 0, "boft_block_num": 3},
        ("conv",),
    ),
)
