"""OSF: weights that are tall, wide and square, and stored the other way."""

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "dense",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "rank_pattern": {"in1": 2}},
        ("lin0", "lin1"),
        life=True,
    ),
    Case("transposed", nets.Gpt2, {"target_modules": ["c_attn"], "effective_rank": 0.4}, ("c_attn",)),
)
