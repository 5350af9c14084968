"""BOFT: inputs are rotated by a product of sparse rotations, as in a butterfly network, and outputs scaled."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.ops import at_least_float32
from msft_peft.config import TargetedConfig, check_bias, check_positive, check_probability
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class BOFTConfig(TargetedConfig):
    """Settings of BOFT.

    Args:
        boft_block_size: inputs in a block; 0 if `boft_block_num` says it.
        boft_block_num: number of blocks; 0 if `boft_block_size` says it.
        boft_n_butterfly_factor: how many block-diagonal rotations are multiplied, each of blocks that lie twice as far
            apart; 1 is OFT.
        boft_dropout: probability that a block is left unrotated in a training step.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "boft_only": which biases of the base model are trained.
        init_weights: begin as the identity; False draws the rotations from N(0, 0.1) and the scales from N(1, 0.1).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: both or none of `boft_block_size` and `boft_block_num`, or a value out of range.

    Source: Liu et al. 2023, arXiv:2311.06243, §3.
    Differs: in HF several factors need CUDA, and there is one factor without it, whatever the config says. HF ignores
        a convolution's dilation, and all but the first of its strides and paddings. Each block is dropped by itself;
        HF drops a fixed number of blocks of one factor. HF refuses GPT-2's `Conv1D`.
    """

    peft_type: str | None = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if size == 0 and number == 0:
            raise ConfigError(
                f"Either `boft_block_size` or `boft_block_num` must be non-zero. Currently, boft_block_size = {size} "
                f"and boft_block_num = {number}."
            )
        if size != 0 and number != 0:
            raise ConfigError(
                f"You can only specify either boft_block_size ({size}) or boft_block_num ({number}), but not both "
                "simultaneously, because boft_block_size x boft_block_num == in_features."
            )
        check_positive("boft_block_size" if size else "boft_block_num", size or number)
        check_positive("boft_n_butterfly_factor", self.boft_n_butterfly_factor)
        check_probability("boft_dropout", self.boft_dropout)
        check_bias(self.bias, "boft")


class BOFTPatch(Patch):
    """y = s ∘ W·(x·R_m···R_1) + b, with R_i = P_i·diag(Q_i1, Q_i2, ...)·P_iᵀ and Q = (I - S)·(I + S)⁻¹, S skew.

    Weights, for blocks of size h:
        boft_R (m, blocks, h, h): S is half of this less its transpose; zeros. A convolution's blocks divide in·K, K
            the kernel's size; it applies the rotated weight.
        boft_s (out, 1), of a convolution (1, out): ones.
    """

    def setup(self, site: Site, config: BOFTConfig) -> None:
        self.reweighs = site.kind == "conv2d"
        if site.groups > 1:
            raise NotImplementedError(f"BOFT does not support groups > 1: {site.path} is a convolution of that kind.")
        self.features, self.factors = math.prod(site.shape) // site.out_features, config.boft_n_butterfly_factor
        self.block, self.blocks = _division(site.path, self.features, config)
        init_r, init_s = ("zeros", "ones") if config.init_weights else (Normal(0.1), Normal(0.1, 1.0))
        shape = (self.factors, self.blocks, self.block, self.block)
        self.boft_R = self.weight("boft_R", shape, init_r)
        out = site.out_features
        self.boft_s = self.weight("boft_s", (1, out) if self.reweighs else (out, 1), init_s)
        there = [_butterfly(self.features, self.block, i) for i in range(self.factors)]
        self.there = tuple(Tensor(order.astype(np.int32)) for order in there)
        self.back = tuple(Tensor(np.argsort(order).astype(np.int32)) for order in there)
        self.identity = Tensor(np.eye(self.block, dtype=np.float32))
        self.biased = site.bias is not None
        self.dropout = nn.Dropout(p=config.boft_dropout) if config.boft_dropout else None

    def rotations(self) -> Tensor:
        """(m, blocks, h, h): the Q of each block, at least in float32."""
        flat = at_least_float32(ops.reshape(self.boft_R, (-1, self.block, self.block)))
        identity = ops.cast(self.identity, flat.dtype)
        skew = ops.mul(ops.sub(flat, ops.transpose(flat, (0, 2, 1))), 0.5)
        q = ops.matmul(ops.sub(identity, skew), ops.inverse(ops.add(identity, skew)))
        if self.training and self.dropout is not None:
            turned = ops.cast(self.dropout(ops.ones((q.shape[0], 1, 1), q.dtype)) != 0, q.dtype)
            q = ops.add(identity, ops.mul(turned, ops.sub(q, identity)))
        return ops.reshape(q, self.boft_R.shape)

    def rotated(self, rows: Tensor, q: Tensor, i: int) -> Tensor:
        """rows·P·diag(q)·Pᵀ for rows (n, features), q (blocks, h, h) and P that of the i-th factor."""
        if i:
            rows = ops.gather(rows, self.back[i], 1)
        parts = ops.transpose(ops.reshape(rows, (-1, self.blocks, self.block)), (1, 0, 2))
        rows = ops.reshape(ops.transpose(ops.matmul(parts, q), (1, 0, 2)), (-1, self.features))
        return ops.gather(rows, self.there[i], 1) if i else rows

    def before(self, x: Tensor) -> Tensor:
        rows = ops.reshape(self.cast(x), (-1, self.features))
        q = ops.cast(self.rotations(), rows.dtype)
        for i in range(self.factors - 1, -1, -1):
            rows = self.rotated(rows, q[i], i)
        return ops.cast(ops.reshape(rows, x.shape), x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        more = ops.sub(ops.reshape(self.boft_s, (-1,)), 1.0)
        scaled = ops.sub(y, self.site.layer.bias) if self.biased else y
        return ops.add(y, ops.mul(self.cast(scaled), more))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # W·(x·R) = (W·Rᵀ)·x, as rows.
        q = ops.cast(ops.transpose(self.rotations(), (0, 1, 3, 2)), w.dtype)
        rows = ops.reshape(w, (-1, self.features))
        for i in range(self.factors):
            rows = self.rotated(rows, q[i], i)
        return ops.reshape(ops.mul(rows, ops.reshape(self.boft_s, (-1, 1))), w.shape), b


def _division(path: str, features: int, config: BOFTConfig) -> tuple[int, int]:
    """(size, number) of blocks."""
    name, wanted = ("boft_block_size", config.boft_block_size)
    if not wanted:
        name, wanted = ("boft_block_num", config.boft_block_num)
    if features % wanted:
        raise ConfigError(f"in_features ({features}) must be divisible by {name} ({wanted})! At {path}.")
    size, number = (wanted, features // wanted) if config.boft_block_size else (features // wanted, wanted)
    apart = 2 ** (config.boft_n_butterfly_factor - 1)
    if apart > 1 and (number % apart or number % 2 or size % 2):
        raise ConfigError(
            f"Invalid combination of in_features ({features}), boft_n_butterfly_factor "
            f"({config.boft_n_butterfly_factor}) and {name} ({wanted}) at {path}: {number} blocks of size {size}. "
            f"With several factors the size must be even, and the number a multiple of {apart}."
        )
    return size, number


def _butterfly(features: int, block: int, i: int) -> np.ndarray:
    """(features,): the order in which the i-th factor takes the features.

    In parts of 2^i blocks, first the even half-blocks and then the odd ones.
    """
    halves = np.arange(features).reshape(-1, 2 ** (i + 1), block // 2) if i else np.arange(features).reshape(1, 1, -1)
    return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


class BOFTModel(Tuner):
    """The base model with BOFT adapters in it, and the switches over them."""


def unpack(config: BOFTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rotations that a file lacks are the identity: HF without CUDA writes one, whatever number the config says."""
    wanted, found = config.boft_n_butterfly_factor, dict(arrays)
    short = [key for key, array in arrays.items() if "boft_R" in key and array.ndim == 4 and len(array) < wanted]
    for key in short:
        found[key] = np.pad(arrays[key], [(0, wanted - len(arrays[key])), *[(0, 0)] * 3])
    if short:
        warnings.warn(
            f"boft_n_butterfly_factor={wanted}, and the file has {len(arrays[short[0]])}, as HF peft writes it "
            "without its CUDA kernel: the others begin as the identity.",
            PeftWarning,
            stacklevel=4,
        )
    return found


METHOD = Method(
    config=BOFTConfig,
    tuner=BOFTModel,
    patches=dict.fromkeys(("dense", "conv2d"), BOFTPatch),
    default_targets=USUAL,
    unpack=unpack,
)
