"""DEFT: a low-rank part of the weight's outputs is taken out, and another put in its place."""

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.ops import at_least_float32
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch

_METHODS = ("qr", "relu")


@dataclass
class DeftConfig(TargetedConfig):
    """Settings of DEFT.

    Args:
        r: rank of what is taken out and of what is put in; at most a layer's outputs.
        decomposition_method: "relu", or "qr" for an orthogonal projection.
        init_scale: factor of R's deviation, with `init_weights=False`.
        alpha: what is put in counts alpha / r; None or 0 for once.
        para: only take out, and put nothing in: PaRa. A fresh adapter is not the identity then.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        deft_dropout: dropout of the input, as far as R reads it.
        init_weights: begin by putting in what is taken out; False draws R from N(0, (0.02·init_scale)²).
        bias: "none", "all" or "deft_only": which biases of the base model are trained.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or an unknown `decomposition_method`.

    Source: DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025; PaRa: Chen et al. 2024,
        arXiv:2406.05641.
    """

    peft_type: str | None = "DEFT"
    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if self.decomposition_method not in _METHODS:
            raise ConfigError(
                f"Unknown decomposition_method '{self.decomposition_method}', must be one of {list(_METHODS)}."
            )
        check_finite("init_scale", self.init_scale)
        if self.init_scale < 0:
            raise ConfigError(
                f"`init_scale` is the factor of a deviation: it must not be negative, got {self.init_scale}."
            )
        check_finite("alpha", self.alpha or 0)
        check_probability("deft_dropout", self.deft_dropout)
        check_bias(self.bias, "deft")


class DeftPatch(LowRankPatch):
    """W' = W - Q·Kᵀ·W + s·Q·R, with Q = P and K = max(P, 0), or by "qr" with Q = K, the orthonormal basis of P.

    As a product of rank r, W' = W + Q·(s·R - Kᵀ·W). Several adapters each read the base weight, not what others made
    of it.

    Weights:
        deft_P (out, r): N(0, 0.02²).
        deft_R (r, in): Kᵀ·W / s, so that what is taken out is put in again; missing with `para`.
    """

    reads_base = True

    def setup(self, site: Site, config: DeftConfig) -> None:
        self.r = min(config.r, site.out_features)
        self.orthogonal, self.para = config.decomposition_method == "qr", config.para
        self.deft_scaling = config.alpha / self.r if config.alpha else 1.0
        self.dropout, self.drops = self.dropped(config.deft_dropout), config.deft_dropout > 0
        self.deft_P = self.weight("deft_P", (site.out_features, self.r), Normal(0.02))
        self.below = Tensor(np.tril(np.ones((self.r, self.r), np.float32), -1))
        self.identity = Tensor(np.eye(self.r, dtype=np.float32))
        if config.para:
            return
        shape = (self.r, site.in_features)
        if not config.init_weights:
            self.deft_R = self.weight("deft_R", shape, Normal(0.02 * config.init_scale))
        elif self.undrawn:
            self.deft_R = self.weight("deft_R", shape, "zeros")
        else:
            p, w = (as_float32(to_numpy(value)) for value in (self.deft_P, site.from_storage(site.weight)))
            k = np.linalg.qr(p)[0] if self.orthogonal else np.maximum(p, 0)
            self.deft_R = self.weight("deft_R", shape, k.T @ w / self.deft_scaling)

    def basis(self) -> tuple[Tensor, Tensor]:
        """Q and K, (out, r) each, at least in float32."""
        p = at_least_float32(self.deft_P)
        if not self.orthogonal:
            return p, ops.relu(p)
        # MindSpore has no gradient of a QR decomposition. So Q is made of P and of the constants that the kernel
        # finds: with dP·U⁻¹ = dX and E = Qᵀ·dX, dQ = dX - Q·(E - L + Lᵀ), where L is what E has below its diagonal.
        q, upper = ops.qr(ops.stop_gradient(p))
        q, upper = ops.stop_gradient(q), ops.stop_gradient(upper)
        x = ops.matmul(p, ops.stop_gradient(ops.inverse(upper)))
        e = ops.sub(ops.matmul(ops.transpose(q, (1, 0)), x), ops.cast(self.identity, x.dtype))
        lower = ops.mul(e, ops.cast(self.below, e.dtype))
        turned = ops.add(ops.sub(e, lower), ops.transpose(lower, (1, 0)))
        q = ops.sub(x, ops.matmul(q, turned))
        return q, q

    def parts(self) -> tuple[Tensor, Tensor]:
        """Q (out, r) and Kᵀ·W (r, in)."""
        q, k = self.basis()
        taken = ops.matmul(ops.transpose(k, (1, 0)), ops.cast(self.base_weight(), k.dtype))
        return ops.cast(q, self.dtype), ops.cast(taken, self.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        q, taken = self.parts()
        return q, ops.neg(taken) if self.para else ops.sub(ops.mul(self.deft_R, self.deft_scaling), taken)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.para or not self.drops:
            return super().after(x, y)
        x, (q, taken) = self.cast(x), self.parts()
        put = self.op(self.dropout(x), ops.mul(self.deft_R, self.deft_scaling))
        return ops.add(y, self.op.mix(ops.sub(put, self.op(x, taken)), q))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Not additive: what is added changes with the base weight, so unmerging must not compute it anew.
        return ops.add(w, self.delta_weight()), b


class DeftModel(Tuner):
    """The base model with DEFT adapters in it, and the switches over them."""


METHOD = Method(config=DeftConfig, tuner=DeftModel, patches={"dense": DeftPatch}, default_targets=USUAL)
