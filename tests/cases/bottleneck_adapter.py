"""Bottleneck adapters: the kinds of dense layers, and both placements."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case


def adapter(target_modules: object = None, **settings: object) -> dict[str, object]:
    return {"bottleneck_size": 3, "target_modules": target_modules, **settings}


CASES = (
    Case("dense", nets.Dense, adapter(["lin0", "lin1"]), ("lin0", "lin1"), life=True),
    Case("mint-linear", nets.MintLinear, adapter(["lin1"], non_linearity="silu"), ("lin1",)),
    Case("hf-conv1d", nets.Gpt2, adapter(["c_attn", "c_proj"], non_linearity="silu"), ("c_attn", "c_proj")),
    Case("blocks", nets.Blocks, adapter(["mlp"]), ("layers.0.mlp", "layers.1.mlp"), life=True),
    Case("dropout", nets.Dense, adapter(["lin0"], adapter_dropout=0.5), ("lin0",)),
    Case(
        "bias-and-head",
        nets.Classifier,
        adapter(["backbone"], bias="all", modules_to_save=["classifier"]),
        ("backbone",),
        ("classifier",),
        trains=("backbone.base_layer.bias",),
        life=True,
    ),
    Case("half", partial(nets.Dense, ms.float16), adapter(["lin0", "lin1"]), ("lin0", "lin1")),
)
