"""HiRA: every kind of layer."""

from functools import partial

from tests import nets
from tests.cases import Case

CASES = (
    Case("dense", nets.Dense, {"target_modules": ["lin0", "lin1"], "r": 2}, ("lin0", "lin1"), life=True),
    Case("embedding", nets.Embedding, {"target_modules": ["emb", "lin"], "r": 2}, ("emb", "lin")),
    Case("conv2d", partial(nets.Conv, 2, stride=2), {"target_modules": ["conv"], "r": 2}, ("conv",)),
)
