"""FourierFT: a few places of the spectrum, other numbers of them in other layers."""

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "dense",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "n_frequency": 12, "scaling": 20.0, "n_frequency_pattern": {"lin1": 7}},
        ("lin0", "lin1"),
        life=True,
    ),
    Case(
        "transposed",
        nets.Gpt2,
        {"target_modules": ["c_attn"], "n_frequency": 9, "scaling": 9.0, "fan_in_fan_out": True},
        ("c_attn",),
    ),
)
