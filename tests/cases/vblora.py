"""VB-LoRA: layers of several sizes at one bank."""

from tests import nets
from tests.cases import Case

BANK = {"r": 2, "num_vectors": 6, "vector_length": 2, "init_vector_bank_bound": 1.0}
QV = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v")

CASES = (
    Case("blocks", nets.Blocks, {"target_modules": ["q", "v"], **BANK}, QV, life=True),
    Case(
        "transposed", nets.Gpt2, {"target_modules": ["c_attn"], **BANK, "fan_in_fan_out": True, "topk": 3}, ("c_attn",)
    ),
)
