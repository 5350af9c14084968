"""AdaLoRA's mathematics: an update in the form of an SVD, whose singular values can be switched off."""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.core.patch import Patch
from msft_peft.core.scale import Scale
from msft_peft.hosts import Site
from msft_peft.tuners.adalora.config import AdaLoraConfig


class AdaLoraPatch(Patch):
    """W' = W + s/(init_r + 1e-5)·B·(E ∘ A), with A and B near orthogonal, and E the singular values.

    Weights, of a convolution with its kernel as a part of the input:
        lora_A (r, in): N(0, 0.02).
        lora_B (out, r): N(0, 0.02).
        lora_E (r, 1): zeros.

    Attributes:
        places: of its ranks among the `init_r` that an adapter begins with; fewer once pruned ones have been left out
            of a file.
        kept: which of its ranks are in use, and in files; None while all are.
        ranknum: the rank that the update is divided by; HF has a parameter for it, in no file.
        scaling: s = lora_alpha.
    """

    kept: list[bool] | None = None
    constants = 1

    def setup(self, site: Site, config: AdaLoraConfig) -> None:
        left = (config.rank_pattern or {}).get(self.key_of(site), [True] * config.init_r)
        self.places = np.flatnonzero(left)
        self.r = len(self.places)
        out = site.out_features
        width = math.prod(site.shape) // out
        if self.r:
            init = Normal(0.02 if config.init_lora_weights else 1.0)
            self.lora_A = self.weight("lora_A", (self.r, width), init)
            self.lora_B = self.weight("lora_B", (out, self.r), init)
            self.lora_E = self.weight("lora_E", (self.r, 1), "zeros" if config.init_lora_weights else Normal(1.0))
        else:
            # MindSpore has no tensors without numbers: a layer that has lost all ranks holds zeros that are not kept.
            self.kept = [False]
            for key, shape in (("lora_A", (1, width)), ("lora_B", (out, 1)), ("lora_E", (1, 1))):
                setattr(self, key, self.weight(key, shape, np.zeros(shape, np.float32), fixed=True))
        self.ranknum = float(config.init_r if self.r else 0)
        self.scale = Scale(config.lora_alpha if config.lora_alpha > 0 else float(self.r))
        self.orth_reg_weight = config.orth_reg_weight
        self.dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    @staticmethod
    def key_of(site: Site) -> str:
        """What a `rank_pattern` calls the layer."""
        return f"{site.path}.lora_E"

    @property
    def scaling(self) -> float:
        """The factor in effect."""
        return self.scale.value

    def kept_of(self, attribute: str) -> tuple[int, tuple[int, ...]] | None:
        if self.kept is None:
            return None
        return int(attribute == "lora_B"), tuple(i for i, one in enumerate(self.kept) if one)

    def shape_of(self, attribute: str) -> tuple[int, ...]:
        shape, part = list(super().shape_of(attribute)), self.kept_of(attribute)
        if part is not None:
            shape[part[0]] = len(part[1])
        return tuple(shape)

    def factor(self) -> Tensor:
        """(out, r): s/(ranknum + 1e-5)·B."""
        return ops.mul(self.lora_B, self.scale.value / (self.ranknum + 1e-5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.dropout(self.cast(x))
        if self.site.kind == "dense":
            h = self.op(x, ops.mul(self.lora_A, self.lora_E))
            return ops.add(y, self.op.mix(h, self.factor()))
        return ops.add(y, self.op(x, self.delta_weight()))

    def delta_weight(self) -> Tensor:
        return ops.reshape(ops.matmul(self.factor(), ops.mul(self.lora_A, self.lora_E)), self.site.shape)

    def penalty(self) -> Tensor:
        """‖A·Aᵀ - I‖ + ‖Bᵀ·B - I‖; zero of a layer without ranks."""
        if self.r == 0:
            return ops.zeros((), self.lora_A.dtype)
        return ops.add(_distance(self.lora_A), _distance(ops.transpose(self.lora_B, (1, 0))))


def _distance(rows: Tensor) -> Tensor:
    """‖rows·rowsᵀ - I‖."""
    gram = ops.matmul(rows, ops.transpose(rows, (1, 0)))
    off = ops.sub(gram, ops.eye(rows.shape[0], rows.shape[0], rows.dtype))
    # Not the root of zero, whose gradient is infinite.
    return ops.sqrt(ops.maximum(ops.square(off).sum(), 1e-24))
