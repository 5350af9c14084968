"""HiRA: the base weight, elementwise times a low-rank matrix, is added to itself."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal

from msft_peft.config import TargetedConfig, check_patterns, check_positive, check_probability
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.targets import match_pattern
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class HiraConfig(TargetedConfig):
    """Settings of HiRA.

    Args:
        r: rank.
        hira_dropout: dropout of the update's input, but not for embeddings, as in HF.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        init_weights: True begins with an update of zero, "gaussian" too with A drawn from N(0, 1/r²); False draws all.
        rank_pattern: regex for the end of a layer's path -> its own r.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or an unknown `init_weights`.

    Source: Huang et al. 2025, ICLR, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation", §3.
    """

    peft_type: str | None = "HIRA"
    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        check_positive("r", self.r)
        check_patterns("rank_pattern", self.rank_pattern, check_positive)
        check_probability("hira_dropout", self.hira_dropout)
        if self.init_weights not in (True, False, "gaussian"):
            raise ConfigError(f"Unknown initialization init_weights={self.init_weights!r}: True, False or 'gaussian'")


class HiraPatch(Patch):
    """W' = W + W ∘ (B·A). Several adapters each multiply the base weight, not what others made of it.

    Weights:
        hira_A (r, in, kernel...): He-uniform with a = √5.
        hira_B (out, r, 1...): zeros.
    """

    reads_base = True

    def setup(self, site: Site, config: HiraConfig) -> None:
        r = match_pattern(config.rank_pattern, site.path, config.r)
        if site.groups > 1:
            raise NotImplementedError(f"HiRA does not support groups > 1: {site.path} is a convolution of that kind.")
        out, inputs, *kernel = site.shape
        self.hira_A = self.weight("hira_A", (r, inputs, *kernel), _init_of_a(config, r))
        init_b = "zeros" if config.init_weights else Normal(1.0)
        self.hira_B = self.weight("hira_B", (out, r, *(1 for _ in kernel)), init_b)
        self.dropout = nn.Dropout(p=config.hira_dropout) if config.hira_dropout else nn.Identity()
        self.builds_delta = not config.hira_dropout

    def factor(self) -> Tensor:
        """B·A in the shape of the weight."""
        b, a = ops.reshape(self.hira_B, (self.site.shape[0], -1)), ops.reshape(self.hira_A, (self.hira_A.shape[0], -1))
        return ops.reshape(ops.matmul(b, a), self.site.shape)

    def delta_weight(self) -> Tensor:
        return ops.mul(self.base_weight(), self.factor())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.add(y, self.op(self.dropout(self.cast(x)), self.delta_weight()))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Not additive: what is added changes with the base weight, so unmerging must not compute it anew.
        return ops.add(w, self.delta_weight()), b


class HiraEmbeddingPatch(HiraPatch):
    """E[i] = E₀[i] ∘ (1 + B·A[:, i]).

    Weights:
        hira_embedding_A (r, vocabulary): zeros.
        hira_embedding_B (dim, r): N(0, 1).
    """

    def setup(self, site: Site, config: HiraConfig) -> None:
        r = match_pattern(config.rank_pattern, site.path, config.r)
        vocabulary, dim = site.shape
        init_a = "zeros" if config.init_weights else Normal(1.0)
        self.hira_embedding_A = self.weight("hira_embedding_A", (r, vocabulary), init_a)
        self.hira_embedding_B = self.weight("hira_embedding_B", (dim, r), Normal(1.0))

    def factor(self) -> Tensor:
        return ops.transpose(ops.matmul(self.hira_embedding_B, self.hira_embedding_A), (1, 0))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        # Only the rows that were looked up. The table's own row, not y, which other adapters may have changed.
        h = self.op.mix(ops.gather(ops.transpose(self.hira_embedding_A, (1, 0)), x, 0), self.hira_embedding_B)
        return ops.add(y, ops.mul(self.op(x, self.base_weight()), h))


def _init_of_a(config: HiraConfig, r: int) -> Initializer:
    if config.init_weights is False:
        return Normal(1.0)
    return Normal(1 / r) if config.init_weights == "gaussian" else he_uniform()


_RANK = re.compile(r"\.hira_(embedding_)?A(\.|$)")


def unpack(config: HiraConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as they are; a pattern of ranks that none of them has goes from the config, with a warning.

    HF ignores `rank_pattern` in the first adapter of a model, and writes it all the same.
    """
    ranks = {array.shape[0] for key, array in arrays.items() if _RANK.search(key)}
    if config.rank_pattern and ranks == {config.r}:
        warnings.warn(
            f"rank_pattern={config.rank_pattern} is left out: all of the file's ranks are r={config.r}, as HF peft "
            "makes them, which ignores the pattern in the first adapter of a model.",
            PeftWarning,
            stacklevel=2,
        )
        config.rank_pattern = {}
    return dict(arrays)


class HiraModel(Tuner):
    """The base model with Hira adapters in it, and the switches over them."""


METHOD = Method(
    config=HiraConfig,
    tuner=HiraModel,
    patches={"embedding": HiraEmbeddingPatch} | dict.fromkeys(("dense", "conv1d", "conv2d", "conv3d"), HiraPatch),
    default_targets=USUAL,
    mixed=True,
    unpack=unpack,
)
