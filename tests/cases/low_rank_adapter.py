"""Low-rank adapters."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case


def adapter(target_modules: object = None, **settings: object) -> dict[str, object]:
    return {"reduction_factor": 2, "low_rank_size": 2, "target_modules": target_modules, **settings}


CASES = (
    Case("dense", nets.Dense, adapter(["lin0", "lin1"]), ("lin0", "lin1"), life=True),
    Case("rank-one", nets.Gpt2, adapter(["c_proj"], low_rank_size=1, non_linearity="tanh"), ("c_proj",)),
    Case("blocks", nets.Blocks, adapter(["mlp"]), ("layers.0.mlp", "layers.1.mlp")),
    Case("half", partial(nets.Dense, ms.float16), adapter(["lin0"], init_weights=False), ("lin0",), identity=False),
)
