"""WaveFT: wavelets of several lengths, shares by size, and no transform."""

from tests import nets
from tests.cases import Case

BOTH = {"target_modules": ["lin0", "lin1"]}

CASES = (
    Case(
        "dense",
        nets.Dense,
        BOTH | {"n_frequency": 12, "scaling": 2.0, "n_frequency_pattern": {"lin1": 7}},
        ("lin0", "lin1"),
        life=True,
    ),
    Case(
        "shares",
        nets.Dense,
        BOTH | {"n_frequency": 9, "scaling": 2.0, "wavelet_family": "sym4", "proportional_parameters": True},
        ("lin0", "lin1"),
    ),
    Case(
        "transposed",
        nets.Gpt2,
        {"target_modules": ["c_attn"], "n_frequency": 9, "scaling": 2.0, "use_idwt": False, "fan_in_fan_out": True},
        ("c_attn",),
    ),
)
