"""KaSA: the base weight loses its least singular components, and the update gets singular values of its own."""

from collections.abc import Mapping

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init import base_weight, check_weight
from msft_peft.tuners.lora.patch import LoraPatch

# Those that leave the base weight alone.
_INITS = (True, False, "gaussian", "orthogonal")


class KasaPatch(LoraPatch):
    """Knowledge-aware singular values: W' = U·S₋·Vᵀ + s·B·diag(d)·A, where W = U·S·Vᵀ and S₋ lacks the r smallest.

    A fresh adapter takes these components out of the base weight, which gets them back when the adapter is taken out.

    Weights: those of LoRA, and
        lora_diag (r,): d; N(0, 1).

    Source: Wang et al. 2024, arXiv:2412.06071, §3.
    Differs: HF's base weight stays cut after `unload` and `delete_adapter`. HF refuses layers that store their weight
    transposed (Conv1D); they work here.
    """

    residual, alone, title = True, False, "KaSA"
    factored = False

    def setup(self, site: Site, config: LoraConfig) -> None:
        if config.init not in _INITS:
            raise ConfigError(
                f"kasa_config does not go with init_lora_weights={config.init_lora_weights!r}: both start from the "
                f"base weight. Choose one of {_INITS}."
            )
        super().setup(site, config)
        self.beta, self.gamma = config.kasa_config.beta, config.kasa_config.gamma
        w = base_weight(site)
        check_weight(w, self.r, site, "kasa_config")
        if self.r == min(w.shape):
            raise ConfigError(
                f"KaSA requires `r` to be smaller than min(in_features, out_features), so that something of the base "
                f"weight is left: at {site.path} r={self.r} and the weight is {w.shape}."
            )
        self.taken = smallest(w, self.r)
        self.lora_diag = self.weight("lora_diag", (self.r,), Normal(1.0))

    def hidden(self, x: Tensor) -> Tensor:
        return ops.mul(super().hidden(x), self.lora_diag)

    def down(self) -> Tensor:
        return ops.mul(super().down(), ops.reshape(self.lora_diag, (-1, 1)))

    def delta_weight(self) -> Tensor:
        return self.scaled(ops.matmul(ops.mul(self.lora_B, self.lora_diag), self.lora_A))

    def remainder(self, w: Tensor) -> Tensor:
        return ops.sub(w, self.part(w))

    def regained(self, w: Tensor, given: Mapping[str, np.ndarray]) -> Tensor:
        return ops.add(w, self.part(w))

    def retaken(self, w: Tensor) -> Tensor:
        # What another one gave back may be among what this one is to take.
        whole = ops.add(w, self.part(w))
        self.taken = smallest(as_float32(to_numpy(whole)), self.r)
        return self.remainder(whole)

    def part(self, w: Tensor) -> Tensor:
        """What was taken out of the base weight, in the dtype of w."""
        left, right = self.taken
        return Tensor(left @ right, w.dtype)

    def penalty(self) -> Tensor:
        """β·Σdᵢ² + γ·(‖Bᵀ·B - I‖ + ‖A·Aᵀ - I‖)."""
        a, b, d = (ops.cast(p, self.dtype) for p in (self.lora_A, self.lora_B, self.lora_diag))
        off_b = _off_identity(ops.matmul(ops.transpose(b, (1, 0)), b))
        off_a = _off_identity(ops.matmul(a, ops.transpose(a, (1, 0))))
        return ops.add(self.beta * ops.reduce_sum(ops.square(d)), self.gamma * ops.add(off_a, off_b))


def smallest(w: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """(out, r) and (r, in): the factors of w's part in its r smallest singular components."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u[:, -r:] * s[-r:], vt[-r:]


def _off_identity(gram: Tensor) -> Tensor:
    return ops.sqrt(ops.reduce_sum(ops.square(ops.sub(gram, ops.eye(gram.shape[0], gram.shape[1], gram.dtype)))))
