"""LN tuning: norms of several classes, and other layers that are trained so."""

from tests import nets
from tests.cases import Case

NORMS = ("layers.0.norm", "layers.1.norm")

CASES = (
    Case("blocks", nets.Blocks, {"target_modules": list(NORMS)}, NORMS, life=True),
    Case("offset-norm", nets.Rms, {"target_modules": ["norm"]}, ("norm",)),
    Case("fused-activation", nets.FusedDense, {"target_modules": ["lin0"]}, ("lin0",)),
    Case("embedding", nets.Embedding, {"target_modules": ["emb"]}, ("emb",)),
)
