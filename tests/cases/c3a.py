"""C³A: blocks that divide each layer."""

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "blocks",
        nets.Blocks,
        {"target_modules": ["q", "v"], "block_size": 2},
        tuple(f"layers.{n}.attn.{end}" for n in range(2) for end in "qv"),
        life=True,
        identity=False,
    ),
    Case(
        "fused-activation",
        nets.FusedDense,
        {"target_modules": ["lin0"], "block_size_pattern": {"lin0": 2}, "init_weights": "kaiming_uniform"},
        ("lin0",),
        identity=False,
    ),
)
