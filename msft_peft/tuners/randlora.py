"""RandLoRA: a full-rank update, as a weighted sum of low-rank products of random matrices that all layers share."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Constant, Normal

from msft_peft.backend.torch_random import TorchGenerator, rounded_to_bfloat16
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability, check_seed
from msft_peft.core.keys import BASE, PREFIX
from msft_peft.core.patch import Shared
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, LoadError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch


@dataclass
class RandLoraConfig(TargetedConfig):
    """Settings of RandLoRA.

    Args:
        r: rank of each product; the fewer, the more products there are, and the more numbers are trained.
        projection_prng_key: seed that the random matrices are drawn from, the same numbers as in HF peft on torch.
        save_projection: keep the random matrices in files; otherwise they are drawn again from the seed.
        sparse: their entries are -1, 0 and 1, with probabilities 1/6, 2/3 and 1/6, before they are normalised.
        very_sparse: the same with s the root of the layers' smaller side in the place of 3; wins over `sparse`.
        randlora_dropout: dropout of the update's input.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        randlora_alpha: numerator of the scaling randlora_alpha / r.
        bias: "none", "all" or "randlora_only": which biases of the base model are trained.
        init_weights: begin with an update of zero; False draws the weights of the products.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or matrices so sparse that nothing is in them.

    Source: Albert et al. 2025, arXiv:2502.00987, §4.
    Differs: `exclude_modules` works here. Each adapter has random matrices of its own, with its own seed. Without
        `save_projection` HF warns that they may be drawn otherwise elsewhere. Files hold the random matrices once,
        those of HF at each layer again (2.1 GB for a model of 3e9 parameters, here 75 MB). HF reads ours too, to the
        same outputs, and warns of the copies that it misses.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "RANDLORA"
    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_seed("projection_prng_key", self.projection_prng_key)
        check_finite("randlora_alpha", self.randlora_alpha)
        check_probability("randlora_dropout", self.randlora_dropout)
        check_bias(self.bias, "randlora")


class RandLoraBases(Shared):
    """What the layers of one adapter share; each takes the corner that its sizes ask for.

    Weights, never trained, for the largest smaller and larger sides of the layers, of deviation one:
        randlora_A (r, 1, smaller).
        randlora_B (larger, products, r), with products = smaller / r, rounded up.
    """

    def setup(self, sites: list[Site], config: RandLoraConfig) -> None:
        generator = TorchGenerator(config.projection_prng_key)
        sides = max(site.in_features for site in sites), max(site.out_features for site in sites)
        small, large, r = min(sides), max(sides), config.r
        products = math.ceil(small / r)
        if config.sparse or config.very_sparse:
            s = math.sqrt(small) if config.very_sparse else 3
            drawn = [_signs(generator.uniform(shape), s) for shape in ((r, 1, small), (large, products, r))]
        else:
            a = _he_uniform(generator, (r, 1, small))
            b = np.concatenate([_he_uniform(generator, (large, 1, r)) for _ in range(products)], 1)
            # HF computes in bfloat16 here.
            drawn = [rounded_to_bfloat16(matrix / rounded_to_bfloat16(_deviation(matrix))) for matrix in (a, b)]
        self.randlora_A, self.randlora_B = (
            self.weight(key, values.shape, values, fixed=True, saved=config.save_projection)
            for key, values in zip(("randlora_A", "randlora_B"), drawn)
        )


class RandLoraPatch(LowRankPatch):
    """ΔW = s·Σ_j B_j·diag(λ_j)·A·diag(γ_j), with random A and B_j that all layers share; transposed if in > out.

    Weights, with p = min(in, out) / r products, rounded up:
        randlora_lambda (r, p): zeros.
        randlora_gamma (p, min(in, out)): one over the larger of these sizes.

    B's columns stand product by product, and the rows of A, λ and γ rank by rank: the t-th column, of product t // r,
    meets the t-th row, of rank t // p. So it is in HF; the paper has the same product and rank on both sides.
    """

    def setup(self, site: Site, config: RandLoraConfig) -> None:
        self.r, self.scaling = config.r, config.randlora_alpha / config.r
        self.dropout = self.dropped(config.randlora_dropout)
        self.small, self.large = sorted((site.in_features, site.out_features))
        self.products = math.ceil(self.small / self.r)
        shape = (self.products, self.small)
        init_lambda, gamma = ("zeros", 1 / max(shape)) if config.init_weights else (Normal(1.0), 1 / self.large)
        self.randlora_lambda = self.weight("randlora_lambda", (self.r, self.products), init_lambda)
        self.randlora_gamma = self.weight("randlora_gamma", shape, Constant(gamma))

    def factors(self) -> tuple[Tensor, Tensor]:
        a = ops.cast(self.shared.randlora_A[:, :, : self.small], self.dtype)
        b = ops.cast(self.shared.randlora_B[: self.large, : self.products], self.dtype)
        factor = ops.mul(ops.expand_dims(self.randlora_lambda, 2), self.scaling)
        a = ops.reshape(ops.mul(ops.mul(a, factor), ops.expand_dims(self.randlora_gamma, 0)), (-1, self.small))
        b = ops.reshape(b, (self.large, -1))
        return (b, a) if self.small == self.site.in_features else (ops.transpose(a, (1, 0)), ops.transpose(b, (1, 0)))

    @property
    def batched_rank(self) -> int:
        return 0  # no lower than that of the layer


def _he_uniform(generator: TorchGenerator, shape: tuple[int, int, int]) -> np.ndarray:
    """He-uniform with a = √5, in bfloat16."""
    # In this order of operations, for the same bits.
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(shape[2]))
    return generator.uniform(shape, -bound, bound, bfloat16=True)


def _deviation(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.std(ddof=1, dtype=np.float64), np.float32)


def _signs(units: np.ndarray, s: float) -> np.ndarray:
    """-1, 0 or 1, with probabilities 1/2s, 1 - 1/s and 1/2s, from numbers in [0, 1), normalised."""
    low, high = np.float32(1 / (2 * s)), np.float32(1 - 1 / (2 * s))
    signs = (units > high).astype(np.float32) - (units < low).astype(np.float32)
    deviation = _deviation(signs)
    if deviation == 0:
        raise ConfigError("RandLoRA: with this seed the sparse matrices are empty; take another projection_prng_key.")
    return signs / deviation


_COPY = re.compile(r"(?P<layer>.+)\.(?P<base>randlora_[AB])(\.default)?")


def unpack(config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The random matrices once: HF's files hold them at each layer again.

    Raises:
        LoadError: they are not the same everywhere.
    """
    found: dict[str, np.ndarray] = {}
    # What stands beside the base model first, then the copies.
    for key in sorted(arrays, key=lambda key: key.startswith(PREFIX)):
        copy = _COPY.fullmatch(key)
        name = key if copy is None else BASE + copy["base"]
        if copy is not None and not np.array_equal(found.setdefault(name, arrays[key]), arrays[key]):
            raise LoadError(f"{key} is another matrix than {name}: RandLoRA's layers share one. The file is damaged.")
        found.setdefault(name, arrays[key])
    return found


class RandLoraModel(Tuner):
    """The base model with RandLora adapters in it, and the switches over them."""


METHOD = Method(
    config=RandLoraConfig,
    tuner=RandLoraModel,
    patches={"dense": RandLoraPatch},
    shared=RandLoraBases,
    default_targets=USUAL,
    unpack=unpack,
)
