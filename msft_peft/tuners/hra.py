"""HRA: the layer's input is reflected r times, by learned Householder reflections."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import initializer

from msft_peft.backend.ops import at_least_float32
from msft_peft.config import TargetedConfig, check_bias, check_positive
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class HRAConfig(TargetedConfig):
    """Settings of HRA.

    Args:
        r: number of reflections; an even one lets them begin as pairs that undo each other.
        apply_GS: make the vectors orthogonal to each other first (Gram-Schmidt); not with `init_weights=True`, whose
            pairs of equal vectors cannot be.
        init_weights: begin as the identity (r even); False draws all vectors.
        bias: "none", "all" or "hra_only": which biases of the base model are trained.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or `apply_GS` with `init_weights`.

    Source: Yuan et al. 2024, arXiv:2405.17484, §3.
    Differs: HF divides rounding errors by rounding errors where `apply_GS` meets equal vectors.
    """

    peft_type: str | None = "HRA"
    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_bias(self.bias, "hra")


class HRAPatch(Patch):
    """W' = W·H₁···H_r with H_i = I - 2·u_i·u_iᵀ/|u_i|², or with Gram-Schmidt W' = W·(I - 2·Q·Qᵀ), Q a basis of all u.

    Weights:
        hra_u (in·K, r), K the kernel's size: He-uniform with a = √5, each column twice, so that pairs cancel.

    Computed in the compact WY form, I - U·T·Uᵀ with a triangular T of size r (Schreiber & Van Loan 1989): the input is
    touched by two thin products instead of r reflections, and nothing of the size in×in is built.
    """

    def setup(self, site: Site, config: HRAConfig) -> None:
        if site.groups > 1:
            raise NotImplementedError(f"HRA does not support groups > 1: {site.path} is a convolution of that kind.")
        if config.apply_GS and config.init_weights:
            raise ConfigError("apply_GS=True needs init_weights=False: equal vectors cannot be made orthogonal.")
        self.orthogonal, self.reweighs = config.apply_GS, site.kind != "dense"
        size, r = math.prod(site.shape) // site.out_features, config.r
        init = he_uniform() if not config.init_weights or self.undrawn else _pairs(size, r)
        self.hra_u = self.weight("hra_u", (size, r), init)
        above = np.triu(np.ones((r, r), np.float32), 1)
        self.above, self.half = Tensor(above), Tensor(0.5 * np.eye(r, dtype=np.float32))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """U (in·K, r) of length one, and T (r, r), at least in float32."""
        u = at_least_float32(self.hra_u)
        # A small number keeps the gradient of a zero vector finite.
        u = ops.mul(u, ops.rsqrt(ops.reduce_sum(ops.square(u), 0) + 1e-24))
        gram = ops.matmul(ops.transpose(u, (1, 0)), u)
        if self.orthogonal:
            return u, ops.mul(ops.inverse(gram), 2.0)
        return u, ops.inverse(ops.add(ops.mul(gram, ops.cast(self.above, u.dtype)), ops.cast(self.half, u.dtype)))

    def before(self, x: Tensor) -> Tensor:
        u, t = self.vectors()
        rows = ops.reshape(self.cast(x), (-1, x.shape[-1]))
        return ops.cast(ops.reshape(_reflected(rows, u, ops.transpose(t, (1, 0))), x.shape), x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = ops.reshape(w, (self.site.out_features, -1))
        return ops.reshape(_reflected(rows, *self.vectors()), w.shape), b


def _reflected(rows: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """rows·(I - U·t·Uᵀ)."""
    u, t = ops.cast(u, rows.dtype), ops.cast(t, rows.dtype)
    return ops.sub(rows, ops.matmul(ops.matmul(ops.matmul(rows, u), t), ops.transpose(u, (1, 0))))


def _pairs(size: int, r: int) -> np.ndarray:
    """(size, r): columns in pairs of equal ones."""
    if r % 2:
        warnings.warn(
            f"r={r} is odd, so that the reflections cannot begin as pairs that undo each other: the fresh adapter is "
            "not the identity.",
            PeftWarning,
            stacklevel=2,
        )
        return initializer(he_uniform(), (size, r)).init_data().asnumpy()
    half = initializer(he_uniform(), (size, r // 2)).init_data().asnumpy()
    return np.repeat(half, 2, axis=1)


class HRAModel(Tuner):
    """The base model with HRA adapters in it, and the switches over them."""


METHOD = Method(
    config=HRAConfig,
    tuner=HRAModel,
    patches=dict.fromkeys(("dense", "conv2d"), HRAPatch),
    default_targets=USUAL,
)
