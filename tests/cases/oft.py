"""OFT: inputs, convolutions and embeddings rotated, by the series and exactly."""

from functools import partial

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "dense",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "oft_block_size": 2},
        ("lin0", "lin1"),
        life=True,
    ),
    Case(
        "exact",
        nets.Dense,
        {"target_modules": ["lin1"], "r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True},
        ("lin1",),
    ),
    Case("conv2d", partial(nets.Conv, 2, stride=2), {"target_modules": ["conv"], "oft_block_size": 3}, ("conv",)),
    Case("embedding", nets.Embedding, {"target_modules": ["emb"], "oft_block_size": 3}, ("emb",)),
)
