"""OFT: the layer's input is rotated, block by block."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.ops import at_least_float32
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class OFTConfig(TargetedConfig):
    """Settings of OFT.

    Args:
        r: number of blocks; 0 if `oft_block_size` says it.
        oft_block_size: inputs in a block; 0 if `r` says it. A number that does not divide a layer's inputs is replaced
            by the nearest one that does, with a warning.
        module_dropout: probability that a block is left unrotated in a training step.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "oft_only": which biases of the base model are trained.
        init_weights: begin as the identity; False draws N(0, 0.01).
        coft: keep the rotations near the identity: a block's Q that is longer than eps / √blocks (a Frobenius norm,
            over all blocks that are held) is shortened to that.
        eps: how far they may go, with `coft`.
        block_share: one rotation for all blocks.
        use_cayley_neumann: approximate the Cayley transform by a series, without an inverse.
        num_cayley_neumann_terms: length of the series.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: both or none of `r` and `oft_block_size`, or a value out of range.

    Source: Qiu et al. 2023, arXiv:2306.07280; the series and the rotation of inputs: OFTv2, arXiv:2506.19847.
    Differs: in HF `module_dropout` has no effect, and a convolution with a kernel larger than one is not the identity
        at first, nor what it is merged to; both work here. Two active adapters act as they are merged. With `coft` a
        forward pass in training writes the shortened angles into the weights; in HF one in evaluation does so, too.
    """

    peft_type: str | None = "OFT"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r == 0 and self.oft_block_size == 0:
            raise ConfigError(
                f"Either `r` or `oft_block_size` must be non-zero. Currently, r = {self.r} and oft_block_size = "
                f"{self.oft_block_size}."
            )
        if self.r != 0 and self.oft_block_size != 0:
            raise ConfigError(
                f"You can only specify either r ({self.r}) or oft_block_size ({self.oft_block_size}), but not both "
                "simultaneously, because r x oft_block_size == in_features."
            )
        check_positive("r" if self.r else "oft_block_size", self.r or self.oft_block_size)
        check_positive("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        check_probability("module_dropout", self.module_dropout)
        check_bias(self.bias, "oft")
        check_finite("eps", self.eps)
        if self.coft and self.eps <= 0:
            raise ConfigError(f"coft=True keeps rotations within `eps`, which must be above 0, got {self.eps}")


class OFTPatch(Patch):
    """y = W·(x·R) + b, with R made of rotations of blocks of x, each the Cayley transform of a skew-symmetric Q.

    R = (I - Q)·(I + Q)⁻¹; or by its series I + 2Q + 2Q² + ... + Qⁿ, in HF's sign, n the number of terms less one.

    Weights:
        oft_R.weight (blocks, b·(b - 1)/2): what stands above the diagonal of Q, row by row; zeros. One row only with
            `block_share`. A convolution's blocks divide in·K, K the kernel's size; it applies the rotated weight.
    """

    key = "oft_R.weight"

    def setup(self, site: Site, config: OFTConfig) -> None:
        self.reweighs = site.kind == "conv2d"
        if site.groups > 1:
            raise NotImplementedError(f"OFT does not support groups > 1: {site.path} is a convolution of that kind.")
        self.features = self.size(site)
        self.block, self.blocks = _division(site.path, self.features, config)
        if self.block == 1:
            raise ConfigError(f"OFT has nothing to rotate in blocks of one, into which {site.path} would be divided.")
        held, entries = 1 if config.block_share else self.blocks, self.block * (self.block - 1) // 2
        init = "zeros" if config.init_weights else Normal(0.1)
        self.angles = self.weight(self.key, (held, entries), init, attribute="angles")
        places = np.full((self.block, self.block), entries, np.int32)
        places[np.triu_indices(self.block, 1)] = np.arange(entries)
        self.places = Tensor(places.reshape(-1))
        self.identity, self.nothing = (
            Tensor(np.eye(self.block, dtype=np.float32)),
            Tensor(np.zeros((held, 1), np.float32)),
        )
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        self.drop = nn.Dropout(p=config.module_dropout) if config.module_dropout else None
        self.bound = config.eps / math.sqrt(held) if config.coft else 0.0

    @staticmethod
    def size(site: Site) -> int:
        """How many numbers are rotated."""
        return math.prod(site.shape) // site.out_features

    def rotations(self) -> Tensor:
        """(blocks, b, b), or (1, b, b) with `block_share`; at least in float32."""
        angles = at_least_float32(self.bounded() if self.bound else self.angles)
        entries = ops.concat((angles, ops.cast(self.nothing, angles.dtype)), 1)
        above = ops.reshape(ops.gather(entries, self.places, 1), (-1, self.block, self.block))
        q, identity = ops.sub(above, ops.transpose(above, (0, 2, 1))), ops.cast(self.identity, entries.dtype)
        r = self.series(q, identity) if self.terms else ops.matmul(identity - q, ops.inverse(identity + q))
        if self.training and self.drop is not None:
            turned = ops.cast(self.drop(ops.ones((r.shape[0], 1, 1), r.dtype)) != 0, r.dtype)
            r = ops.add(identity, ops.mul(turned, ops.sub(r, identity)))
        return r

    def bounded(self) -> Tensor:
        """The angles, shortened to the bound, in training for good: the next step begins from there, as in HF.

        The gradient passes by the shortening.
        """
        # Each stands in Q twice.
        lengths = ops.sqrt(ops.mul(ops.square(self.angles).sum(1, keepdims=True), 2.0))
        share = ops.div(self.bound, ops.maximum(lengths, self.bound))
        if self.training:
            return ops.assign(self.angles, ops.stop_gradient(ops.mul(self.angles, share)))
        return ops.add(self.angles, ops.stop_gradient(ops.mul(self.angles, ops.sub(share, 1.0))))

    def series(self, q: Tensor, identity: Tensor) -> Tensor:
        """I + 2Q + 2Q² + ... + Qⁿ, n = terms - 1 but at least 3 if there are more than two terms."""
        if self.terms == 1:
            return ops.add(identity, ops.mul(q, 0.0))
        total, power = ops.add(identity, ops.mul(q, 2.0)), q
        if self.terms == 2:
            return total
        last = max(self.terms - 1, 3)
        for exponent in range(2, last + 1):
            power = ops.matmul(power, q)
            total = ops.add(total, power if exponent == last else ops.mul(power, 2.0))
        return total

    def rotated(self, x: Tensor) -> Tensor:
        """x·R for x (..., features)."""
        r = ops.cast(self.rotations(), x.dtype)
        if r.shape[0] == 1:
            turned = ops.matmul(ops.reshape(x, (-1, self.block)), r[0])
        else:
            parts = ops.transpose(ops.reshape(x, (-1, self.blocks, self.block)), (1, 0, 2))
            turned = ops.transpose(ops.matmul(parts, r), (1, 0, 2))
        return ops.reshape(turned, x.shape)

    def before(self, x: Tensor) -> Tensor:
        return ops.cast(self.rotated(self.cast(x)), x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # W·(x·R) = (W·Rᵀ)·x, as rows.
        blocks = ops.transpose(self.rotations(), (0, 2, 1))
        rows = ops.transpose(ops.reshape(w, (-1, self.blocks, self.block)), (1, 0, 2))
        return ops.reshape(ops.transpose(ops.matmul(rows, ops.cast(blocks, w.dtype)), (1, 0, 2)), w.shape), b


class OFTEmbeddingPatch(OFTPatch):
    """E'[i] = E[i]·R.

    Weights:
        oft_embedding_R.weight: as `oft_R.weight`; the blocks divide the dimension.
    """

    key = "oft_embedding_R.weight"

    @staticmethod
    def size(site: Site) -> int:
        return site.out_features

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.cast(self.rotated(ops.cast(y, self.dtype)), y.dtype)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.rotated(w), b


def _division(path: str, features: int, config: OFTConfig) -> tuple[int, int]:
    """(size, number) of blocks."""
    name, wanted = ("r", config.r) if config.r else ("oft_block_size", config.oft_block_size)
    fitting = wanted
    if features % wanted:
        # Of two divisors as near, the smaller.
        fitting = min((n for n in range(1, features + 1) if features % n == 0), key=lambda n: (abs(n - wanted), n))
        warnings.warn(
            f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({fitting}) at {path}, which has {features} inputs.",
            PeftWarning,
            stacklevel=2,
        )
    return (features // fitting, fitting) if config.r else (fitting, features // fitting)


class OFTModel(Tuner):
    """The base model with OFT adapters in it, and the switches over them."""


METHOD = Method(
    config=OFTConfig,
    tuner=OFTModel,
    patches={"dense": OFTPatch, "conv2d": OFTPatch, "embedding": OFTEmbeddingPatch},
    default_targets=USUAL,
)
