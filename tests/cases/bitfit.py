"""BitFit: every kind of layer that has a bias."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "all",
        partial(nets.Blocks, 1),
        {},
        ("layers.0.norm", "layers.0.attn.q", "layers.0.attn.v", "layers.0.mlp", "head"),
        life=True,
    ),
    Case("dense", nets.Dense, {}, ("lin0",)),
    Case(
        "named",
        nets.Blocks,
        {"target_modules": ["q", "norm"]},
        tuple(f"layers.{n}.{end}" for n in range(2) for end in ("norm", "attn.q")),
    ),
    Case("fused-activation", nets.FusedDense, {}, ("lin0",)),
    Case("norm", nets.Norms, {"target_modules": ["norm", "lin"]}, ("norm", "lin"), life=True),
    Case("conv1d", partial(nets.Conv, 1, has_bias=True), {}, ("conv",)),
    Case("head", nets.Classifier, {"modules_to_save": ["classifier"]}, ("backbone",), ("classifier",)),
    Case("half", partial(nets.Classifier, ms.float16), {}, ("backbone", "classifier.0", "classifier.2")),
)
