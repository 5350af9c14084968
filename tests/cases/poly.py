"""Poly with one task: routing by tasks has tests of its own."""

from functools import partial

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case(
        "dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 2, "n_skills": 3}, ("lin0", "lin1"), life=True
    ),
    Case("splits", nets.Blocks, {"target_modules": ["q", "v"], "r": 2, "n_skills": 2, "n_splits": 2}, QV),
    Case("hf-conv1d", nets.Gpt2, {"target_modules": ["c_attn"], "r": 2, "n_skills": 2}, ("c_attn",)),
    Case(
        "random",
        partial(nets.Blocks, 1),
        {"target_modules": ["head"], "r": 3, "init_weights": False},
        ("head",),
        identity=False,
    ),
)
