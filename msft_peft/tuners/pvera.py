"""PVeRA: VeRA whose hidden values are random in training, around a mean and with a spread that are both learned."""

from dataclasses import dataclass

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Constant, Normal

from msft_peft.backend.noise import SeededNormal
from msft_peft.backend.torch_random import TorchGenerator
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability, check_seed
from msft_peft.core.patch import Shared
from msft_peft.core.tuner import Tuner
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.low_rank import LowRankPatch
from msft_peft.tuners.vera import kaiming_uniform


@dataclass
class PveraConfig(TargetedConfig):
    """Settings of PVeRA.

    Args:
        r: how many hidden values there are; large, since a layer trains 2·r + out numbers only.
        projection_prng_key: seed that the projections are drawn from, the same numbers as in HF peft on torch.
        save_projection: keep the projections in files; otherwise they are drawn again from the seed.
        pvera_dropout: dropout of the update's input.
        d_initial: what the factors of the means and of the spreads begin with.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "pvera_only": which biases of the base model are trained.
        init_weights: begin with an update of zero; False begins with factors of one for the outputs and random ones
            for the hidden values.
        sample_at_inference: draw hidden values in evaluation too; otherwise they are the means there.
        generator_seed: makes the draws repeat; default: they follow `mindspore.set_seed`.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Fillioux et al. 2025, arXiv:2512.07703.
    Differs: `exclude_modules` works here. Each adapter has projections of its own, with its own seed. Without
        `save_projection` HF warns that they may be drawn otherwise elsewhere; here they are torch's to the bit. The
        draws of hidden values are of the same distribution as HF's, but not the same numbers. Under gradient
        checkpointing they follow `mindspore.set_seed`, so that the repeated pass draws what the first one did.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "PVERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_seed("projection_prng_key", self.projection_prng_key)
        check_probability("pvera_dropout", self.pvera_dropout)
        check_finite("d_initial", self.d_initial)
        check_bias(self.bias, "pvera")
        if self.generator_seed is not None:
            check_seed("generator_seed", self.generator_seed)


class PveraProjections(Shared):
    """What the layers of one adapter share; each takes as many columns of A and rows of B as it has inputs, outputs.

    Weights, never trained, for the most inputs and outputs that any of the layers has:
        pvera_A (2·r, in): uniform with variance 2 / in.
        pvera_B (out, r): uniform with variance 2 / r.
    """

    def setup(self, sites: list[Site], config: PveraConfig) -> None:
        generator = TorchGenerator(config.projection_prng_key)
        inputs, outputs = max(site.in_features for site in sites), max(site.out_features for site in sites)
        shapes = {"pvera_A": (2 * config.r, inputs), "pvera_B": (outputs, config.r)}
        self.pvera_A, self.pvera_B = (
            self.weight(key, shape, kaiming_uniform(generator, shape), fixed=True, saved=config.save_projection)
            for key, shape in shapes.items()
        )


class PveraPatch(LowRankPatch):
    """y = W·x + b + diag(b')·B·z, z = μ + ε·e^(λ/2) while it draws, else μ, with (μ; λ) = diag(d)·A·x and normal ε.

    A and B are random, and all layers share them. ΔW = diag(b')·B·diag(d₁)·A₁, of the first halves of d and A.

    Weights:
        pvera_lambda_b (out,): b', zeros.
        pvera_lambda_d (2·r,): d, `d_initial`.
    """

    def setup(self, site: Site, config: PveraConfig) -> None:
        self.r, self.dropout = config.r, self.dropped(config.pvera_dropout)
        self.sample_at_inference, seed = config.sample_at_inference, config.generator_seed
        self.noise = nn.Identity() if seed is None else SeededNormal(seed)
        self.seeded = seed is not None
        init_b, init_d = ("zeros", Constant(config.d_initial)) if config.init_weights else ("ones", Normal(1.0))
        self.pvera_lambda_b = self.weight("pvera_lambda_b", (site.out_features,), init_b)
        self.pvera_lambda_d = self.weight("pvera_lambda_d", (2 * config.r,), init_d)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scaled_b(), self.scaled_a()[: self.r]

    def scaled_a(self) -> Tensor:
        """(2·r, in): diag(d)·A."""
        a = ops.cast(self.shared.pvera_A[:, : self.site.in_features], self.dtype)
        return ops.mul(a, ops.expand_dims(self.pvera_lambda_d, 1))

    def scaled_b(self) -> Tensor:
        """(out, r): diag(b')·B."""
        b = ops.cast(self.shared.pvera_B[: self.site.out_features], self.dtype)
        return ops.mul(b, ops.expand_dims(self.pvera_lambda_b, 1))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not (self.training or self.sample_at_inference):
            return super().after(x, y)
        both = self.op(self.dropout(self.cast(x)), self.scaled_a())
        mean, log_variance = both[..., : self.r], both[..., self.r :]
        epsilon = self.noise(mean) if self.seeded else ops.standard_normal(ops.shape(mean))
        spread = ops.exp(ops.mul(log_variance, 0.5))
        z = ops.add(mean, ops.mul(ops.cast(epsilon, self.dtype), spread))
        return ops.add(y, self.op.mix(z, self.scaled_b()))

    @property
    def batched_rank(self) -> int:
        return 0 if self.training or self.sample_at_inference else super().batched_rank


class PveraModel(Tuner):
    """The base model with PVeRA in it."""


METHOD = Method(
    config=PveraConfig,
    patches={"dense": PveraPatch},
    shared=PveraProjections,
    default_targets=USUAL | {"phi": ["q_proj", "v_proj"], "dinov2": ["query", "value"]},
    tuner=PveraModel,
)
