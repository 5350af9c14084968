"""AdaLoRA: dense layers and convolutions; the schedule is tested in tests/unit/test_adalora.py."""

from functools import partial

from tests import nets
from tests.cases import Case

RANKS = {"init_r": 3, "target_r": 2, "total_step": 10}

CASES = (
    Case("dense", nets.Dense, RANKS | {"target_modules": ["lin0", "lin1"]}, ("lin0", "lin1"), life=True),
    Case(
        "pruned",
        nets.Dense,
        RANKS
        | {
            "target_modules": ["lin0", "lin1"],
            "rank_pattern": {"lin0.lora_E": [True, False, True], "lin1.lora_E": [True, True, True]},
        },
        ("lin0", "lin1"),
    ),
    Case(
        "conv2d-grouped",
        partial(nets.Conv, 2, channels=(4, 4), group=2),
        RANKS | {"target_modules": ["conv"], "lora_alpha": 4},
        ("conv",),
    ),
)
