"""(IA)³: factors on outputs and inputs of every kind of layer that it works on."""

from functools import partial

from tests import nets
from tests.cases import Case

QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")
LINEAR = {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}

CASES = (
    Case("dense", nets.Dense, LINEAR, ("lin0", "lin1"), life=True),
    Case("fused-activation", nets.FusedDense, LINEAR, ("lin0", "lin1")),
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], "feedforward_modules": []}, QV),
    Case(
        "conv2d-grouped",
        partial(nets.Conv, 2, channels=(4, 4), group=2),
        {"target_modules": ["conv"], "feedforward_modules": ["conv"]},
        ("conv",),
    ),
)
