"""Super-Tuning: the largest and the smallest numbers, alone and beside LoRA, with and without dropout."""

from tests import nets
from tests.cases import Case

BOTH = {"target_modules": ["lin0", "lin1"], "sparsity": 0.7}
QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("supra", nets.Dense, BOTH | {"r": 2}, ("lin0", "lin1"), life=True),
    Case("dense", nets.Dense, BOTH, ("lin0", "lin1")),
    Case("smallest", nets.Dense, BOTH | {"select_top": False, "save_precomputed_indices": False}, ("lin0", "lin1")),
    Case(
        "supra-dropout",
        nets.Blocks,
        {"target_modules": ["q", "v"], "sparsity": 0.5, "r": 2, "lora_alpha": 3, "lora_dropout": 0.5},
        QV,
    ),
)
