"""OSF: the smallest singular directions of the weight are trained, at a right angle to the largest."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import HALF_DTYPES, as_float32, to_numpy
from msft_peft.config import TargetedConfig, check_patterns
from msft_peft.core.targets import ALL_LINEAR
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site, model_config
from msft_peft.registry import Method
from msft_peft.tuners.architectures import OSF
from msft_peft.tuners.low_rank import LowRankPatch


@dataclass
class OSFConfig(TargetedConfig):
    """Settings of OSF.

    Args:
        effective_rank: how many singular directions of a weight are kept as they are, the largest ones; all others are
            trained. A float in (0, 1] is a share of the weight's smaller side; None is half of it.
        rank_pattern: regex for a part of a layer's path -> its own effective_rank; the first that is found counts.
        init_weights: begin with the weight's own directions; False draws N(0, 1).
        target_svd_config: has no effect, as in HF.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`;
            without targets, and where none are usual, "all-linear".

    Raises:
        ConfigError: a rank that is not positive; when a model is wrapped: one that leaves nothing to train.

    Source: Nayak et al. 2025, arXiv:2504.07097, §3.
    Differs: several active adapters add up, where HF runs the first alone; `exclude_modules`, `layers_to_transform`
        and unmerging work here. HF does nothing, silently, to layers that are no `Linear`: here GPT-2's `Conv1D`
        works, and others are refused, as is a layer with nothing left to train.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern")
    # These patterns are for any part of a path.
    patterned: ClassVar[tuple[str, ...]] = ()

    peft_type: str | None = "OSF"
    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.effective_rank is not None:
            _check_rank("effective_rank", self.effective_rank)
        check_patterns("rank_pattern", self.rank_pattern or {}, _check_rank)


def _check_rank(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"`{where}` should be a positive integer value but the value passed is {value}")


class Joined(nn.Cell):
    """w and a constant beside it, where the gradient of w loses what lies in a subspace, or outside of it.

    Not w alone: graph mode mixes up Parameters that a Cell with a gradient of its own gives back as they are.

    Args:
        rows: w (k, n), the constant (k, n) and the subspace's orthonormal basis (r, n) are rows; otherwise columns,
            (n, k) and (n, r).
        within: the gradient's part in the subspace is kept; otherwise the rest of it.
    """

    def __init__(self, rows: bool, within: bool) -> None:
        super().__init__()
        self.rows, self.within = rows, within

    def construct(self, w: Tensor, constant: Tensor, basis: Tensor) -> Tensor:
        return ops.concat((w, constant), 0 if self.rows else 1)

    def bprop(self, w: Tensor, constant: Tensor, basis: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        turned = ops.transpose(basis, (1, 0))
        if self.rows:
            d = dout[: w.shape[0]]
            part = ops.matmul(ops.matmul(d, turned), basis)
        else:
            d = dout[:, : w.shape[1]]
            part = ops.matmul(basis, ops.matmul(turned, d))
        return part if self.within else ops.sub(d, part), ops.zeros_like(constant), ops.zeros_like(basis)


# Of the whole process: a compiled graph holds on to Cells with a gradient of their own, past their model's end.
_columns_in, _columns_beside = Joined(False, True), Joined(False, False)
_rows_in, _rows_beside = Joined(True, True), Joined(True, False)


class OSFPatch(LowRankPatch):
    """W' = W + U·diag(s)·V - U₀·diag(s₀)·V₀, with U₀, s₀, V₀ the k smallest singular directions of W.

    Gradients of U and V are projected on what is orthogonal to the directions that are kept, U₁ and V₁. Where a side
    of the weight is its rank, that is the span of U₀, or V₀; the basis U₁, or V₁, is needed on the other side alone.

    Weights, k = min(out, in) - effective_rank:
        osf_svd_params.U_low (out, k): U₀.
        osf_svd_params.S_low (k,): s₀.
        osf_svd_params.V_low (k, in): V₀.
        osf_U, osf_S, osf_V: U₀, s₀, V₀; osf_high: U₁ or V₁. They are found again in W, and not in files.
    """

    def setup(self, site: Site, config: OSFConfig) -> None:
        kept = _rank(site, config)
        self.r, self.dropout = 2 * (min(site.shape) - kept), nn.Identity()
        w = as_float32(to_numpy(site.from_storage(site.weight)))
        u, s, v = (self.rounded(part) for part in np.linalg.svd(w, full_matrices=False))
        self.osf_U, self.osf_S, self.osf_V = (
            self.constant(f"osf_{key}", part) for key, part in (("U", u[:, kept:]), ("S", s[kept:]), ("V", v[kept:]))
        )
        self.U_low, self.S_low, self.V_low = (
            self.weight(
                f"osf_svd_params.{key}",
                tuple(start.shape),
                Normal(1.0) if config.init_weights is False else to_numpy(start).astype(np.float32),
                attribute=key,
            )
            for key, start in (("U_low", self.osf_U), ("S_low", self.osf_S), ("V_low", self.osf_V))
        )
        self.tall, self.wide = site.shape[0] > site.shape[1], site.shape[0] < site.shape[1]
        if self.tall or self.wide:
            self.osf_high = self.constant("osf_high", u[:, :kept] if self.tall else v[:kept])

    def rounded(self, part: np.ndarray) -> np.ndarray:
        """As HF keeps it, in the layer's own precision."""
        return as_float32(to_numpy(Tensor(part, self.site.dtype))) if self.site.dtype in HALF_DTYPES else part

    def constant(self, key: str, values: np.ndarray) -> Parameter:
        return self.weight(key, values.shape, np.ascontiguousarray(values), fixed=True, saved=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.tall:
            u = _columns_beside(self.U_low, self.osf_U, self.osf_high)
        else:
            u = _columns_in(self.U_low, self.osf_U, self.osf_U)
        if self.wide:
            v = _rows_beside(self.V_low, self.osf_V, self.osf_high)
        else:
            v = _rows_in(self.V_low, self.osf_V, self.osf_V)
        s = ops.concat((self.S_low, ops.neg(self.osf_S)), 0)
        return u, ops.mul(v, ops.expand_dims(s, 1))


def _rank(site: Site, config: OSFConfig) -> int:
    """How many singular directions of this layer's weight are kept."""
    smaller, patterns = min(site.shape), config.rank_pattern or {}
    said = next((patterns[p] for p in patterns if re.search(p, site.path)), config.effective_rank)
    if said is None:
        said = smaller // 2
    rank = int(smaller * said) if isinstance(said, float) and said <= 1 else int(said)
    if rank < 1:
        raise ConfigError(
            f"`effective_rank` should be a positive integer value but the value passed is {rank}: at {site.path}, "
            f"whose weight has the rank {smaller}"
        )
    if rank >= smaller:
        raise ConfigError(
            f"effective_rank={said} leaves nothing to train of {site.path}, whose weight {site.shape} has the rank "
            f"{smaller}: set less, for this layer in `rank_pattern`, or leave the layer out."
        )
    return rank


def find_targets(config: OSFConfig, model: nn.Cell, sites: dict[str, Site]) -> list[str] | str:
    """The usual targets, or all dense layers where none are known."""
    return OSF.get(str(model_config(model).get("model_type")), ALL_LINEAR)


class OSFModel(Tuner):
    """The base model with OSF adapters in it, and the switches over them."""


METHOD = Method(
    config=OSFConfig,
    tuner=OSFModel,
    patches={"dense": OSFPatch},
    default_targets=OSF,
    find_targets=find_targets,
)
