"""OSF: the smallest singular directions of the weight are trained, at a right angle to the largest."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import HALF_DTYPES, as_float32, to_numpy
from msft_peft.config import TargetedConfig, check_patterns
from msft_peft.core.patch import Patch
from msft_peft.core.targets import ALL_LINEAR
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site, model_config
from msft_peft.registry import Method
from msft_peft.tuners.architectures import OSF


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


def projected(w: Tensor, basis: Tensor, rows: bool, within: bool) -> Tensor:
    """w as it is, where its gradient loses what lies in a subspace, or outside of it.

    Args:
        w: (k, n) if `rows`, else (n, k).
        basis: orthonormal, (r, n) or (n, r).
        rows: which of the two.
        within: the gradient's part in the subspace is kept; otherwise the rest of it.
    """
    turned = ops.transpose(basis, (1, 0))
    part = ops.matmul(ops.matmul(w, turned), basis) if rows else ops.matmul(basis, ops.matmul(turned, w))
    kept = part if within else ops.sub(w, part)
    # The two differ by nothing, so that w keeps its bits.
    return ops.add(ops.stop_gradient(w), ops.sub(kept, ops.stop_gradient(kept)))


class OSFPatch(Patch):
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

    def factors(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(U, diag(s)·V) and (U₀, diag(s₀)·V₀)."""
        u = projected(self.U_low, self.osf_high if self.tall else self.osf_U, False, not self.tall)
        v = projected(self.V_low, self.osf_high if self.wide else self.osf_V, True, not self.wide)
        own, at_first = ops.expand_dims(self.S_low, 1), ops.expand_dims(self.osf_S, 1)
        # Not joined to one product: to compile a model of several such layers would take minutes (MindSpore 2.10.0).
        return (u, ops.mul(v, own)), (self.osf_U, ops.mul(self.osf_V, at_first))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        (u, v), (u_0, v_0) = self.factors()
        x = self.op.rows(self.cast(x))
        return self.op.add(y, ops.sub(self.op.mix(self.op(x, v), u), self.op.mix(self.op(x, v_0), u_0)))

    def delta_weight(self) -> Tensor:
        (u, v), (u_0, v_0) = self.factors()
        return ops.sub(ops.matmul(u, v), ops.matmul(u_0, v_0))


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
