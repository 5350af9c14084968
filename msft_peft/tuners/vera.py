"""VeRA: one pair of random projections for all layers, of which each layer trains two vectors of factors."""

import math
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Constant, Normal

from msft_peft.backend.torch_random import TorchGenerator
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability, check_seed
from msft_peft.core.patch import Shared
from msft_peft.core.tuner import Tuner
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch


@dataclass
class VeraConfig(TargetedConfig):
    """Settings of VeRA.

    Args:
        r: rank of the projections; large, since a layer trains r + out numbers only.
        projection_prng_key: seed that the projections are drawn from, the same numbers as in HF peft on torch.
        save_projection: keep the projections in files; otherwise they are drawn again from the seed.
        vera_dropout: dropout of the update's input.
        d_initial: what the factors of the ranks begin with.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "vera_only": which biases of the base model are trained.
        init_weights: begin with an update of zero; False begins with factors of one for the outputs and random ones
            for the ranks.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Kopiczko et al. 2023, arXiv:2310.11454, §3.
    Differs: `exclude_modules` works here. Each adapter has projections of its own, with its own seed. Without
        `save_projection` HF warns that they may be drawn otherwise elsewhere; here they are torch's to the bit.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "VERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_seed("projection_prng_key", self.projection_prng_key)
        check_probability("vera_dropout", self.vera_dropout)
        check_finite("d_initial", self.d_initial)
        check_bias(self.bias, "vera")


class VeraProjections(Shared):
    """What the layers of one adapter share; each takes as many columns of A and rows of B as it has inputs, outputs.

    Weights, never trained, for the most inputs and outputs that any of the layers has:
        vera_A (r, in): uniform with variance 2 / in.
        vera_B (out, r): uniform with variance 2 / r.
    """

    def setup(self, sites: list[Site], config: VeraConfig) -> None:
        generator = TorchGenerator(config.projection_prng_key)
        inputs, outputs = max(site.in_features for site in sites), max(site.out_features for site in sites)
        shapes = {"vera_A": (config.r, inputs), "vera_B": (outputs, config.r)}
        drawn = {key: kaiming_uniform(generator, shape) for key, shape in shapes.items()}
        self.vera_A, self.vera_B = (
            self.weight(key, shapes[key], values, fixed=True, saved=config.save_projection)
            for key, values in drawn.items()
        )


class VeraPatch(LowRankPatch):
    """ΔW = diag(b)·B·diag(d)·A, with random A and B that all layers share.

    Weights:
        vera_lambda_b (out,): zeros.
        vera_lambda_d (r,): `d_initial`.
    """

    def setup(self, site: Site, config: VeraConfig) -> None:
        self.r, self.dropout = config.r, self.dropped(config.vera_dropout)
        init_b, init_d = ("zeros", Constant(config.d_initial)) if config.init_weights else ("ones", Normal(1.0))
        self.vera_lambda_b = self.weight("vera_lambda_b", (site.out_features,), init_b)
        self.vera_lambda_d = self.weight("vera_lambda_d", (config.r,), init_d)

    def factors(self) -> tuple[Tensor, Tensor]:
        b = ops.cast(self.shared.vera_B[: self.site.out_features], self.dtype)
        a = ops.cast(self.shared.vera_A[:, : self.site.in_features], self.dtype)
        return ops.mul(b, ops.expand_dims(self.vera_lambda_b, 1)), ops.mul(a, ops.expand_dims(self.vera_lambda_d, 1))


def kaiming_uniform(generator: TorchGenerator, shape: tuple[int, int]) -> np.ndarray:
    """He-uniform with variance 2 / columns."""
    # In this order of operations, for the same bits.
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return generator.uniform(shape, -bound, bound)


class VeraModel(Tuner):
    """The base model with Vera adapters in it, and the switches over them."""


METHOD = Method(
    config=VeraConfig,
    tuner=VeraModel,
    patches={"dense": VeraPatch},
    shared=VeraProjections,
    default_targets=USUAL | {"phi": ["q_proj", "v_proj"]},
)
