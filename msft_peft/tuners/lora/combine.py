"""The arithmetic of combining low-rank updates, in numpy alone: it knows no models and no adapter names.

The eleven functions from `reshape_weight_task_tensors` to `dare_ties` bear the names, arguments and numbers of HF's
`peft.utils.merge_utils`, on numpy arrays. A *task tensor* is what one adapter says about one weight.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from msft_peft.errors import ConfigError, PeftWarning

Array = np.ndarray
SIGN_METHODS = ("total", "frequency")


def reshape_weight_task_tensors(task_tensors: Array, weights: Array) -> Array:
    """The weights (n,) in a shape that broadcasts over task tensors (n, ...): (n, 1, ...)."""
    return np.reshape(weights, (*np.shape(weights), *(1,) * (np.ndim(task_tensors) - np.ndim(weights))))


def magnitude_based_pruning(tensor: Array, density: float) -> Array:
    """Zeros in place of all but the ⌊density·size⌋ entries of largest magnitude."""
    kept = int(density * tensor.size)
    order = np.argsort(-np.abs(tensor), axis=None, kind="stable")[:kept]
    mask = np.zeros(tensor.size, tensor.dtype)
    mask[order] = 1
    return tensor * mask.reshape(tensor.shape)


def random_pruning(tensor: Array, density: float, rescale: bool) -> Array:
    """Zeros in place of each entry with probability 1 - density; with `rescale`, the rest is divided by density.

    The draws are numpy's global ones, which `mindspore.set_seed` seeds. Differs: density 0 gives zeros, not NaNs.
    """
    kept = tensor * (np.random.random(tensor.shape) < density).astype(tensor.dtype)
    return kept / tensor.dtype.type(density) if rescale and density > 0 else kept


def prune(tensor: Array, density: float, method: str, rescale: bool = False) -> Array:
    """The tensor thinned out to a share `density` of its entries, by "magnitude" or at "random".

    A density of 1 or more leaves it whole, with a warning.

    Raises:
        ConfigError: a negative density, or an unknown method.
    """
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.",
            PeftWarning,
            stacklevel=2,
        )
        return tensor
    if density < 0:
        raise ConfigError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ConfigError(f"Unknown method {method}; there are 'magnitude' and 'random'")


def calculate_majority_sign_mask(tensor: Array, method: str = "total") -> Array:
    """Where each task tensor (n, ...) has the sign that the n have in sum: by mass ("total") or head ("frequency").

    A sum of zero counts as positive, and an entry of zero has neither sign.

    Raises:
        ConfigError: an unknown method.
    """
    if method not in SIGN_METHODS:
        raise ConfigError(f'Unimplemented mask method "{method}"; there are {SIGN_METHODS}')
    signs = np.sign(tensor)
    total = tensor.sum(axis=0) if method == "total" else signs.sum(axis=0)
    return signs == np.where(total >= 0, 1, -1)


def disjoint_merge(task_tensors: Array, majority_sign_mask: Array) -> Array:
    """The mean over those task tensors (n, ...) that the mask keeps; zero where it keeps none."""
    total = (task_tensors * majority_sign_mask).sum(axis=0)
    return total / np.maximum(majority_sign_mask.sum(axis=0), 1).astype(task_tensors.dtype)


def task_arithmetic(task_tensors: Sequence[Array], weights: Array) -> Array:
    """Σ wᵢ·tᵢ. Source: Ilharco et al. 2022, arXiv:2212.04089."""
    return _weighted(np.stack(task_tensors), weights).sum(axis=0)


def magnitude_prune(task_tensors: Sequence[Array], weights: Array, density: float) -> Array:
    """Σ wᵢ·prune(tᵢ), by magnitude."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(task_tensors: Sequence[Array], weights: Array, density: float, majority_sign_method: str = "total") -> Array:
    """Trim by magnitude, elect a sign for each entry, average what agrees.

    The weights come in after the election: a negative one turns a vote into its opposite only in the sum.

    Source: Yadav et al. 2023, arXiv:2306.01708.
    """
    return _elect([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: Sequence[Array], weights: Array, density: float) -> Array:
    """Σ wᵢ·drop(tᵢ)/density, dropped at random. Source: Yu et al. 2023, arXiv:2311.03099."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def dare_ties(
    task_tensors: Sequence[Array], weights: Array, density: float, majority_sign_method: str = "total"
) -> Array:
    """`ties` with the random dropping and rescaling of `dare_linear` in place of the trimming."""
    return _elect([prune(t, density, "random", rescale=True) for t in task_tensors], weights, majority_sign_method)


def _weighted(task_tensors: Array, weights: Array) -> Array:
    return task_tensors * reshape_weight_task_tensors(task_tensors, np.asarray(weights, task_tensors.dtype))


def _elect(task_tensors: Sequence[Array], weights: Array, method: str) -> Array:
    stacked = np.stack(task_tensors)
    return disjoint_merge(_weighted(stacked, weights), calculate_majority_sign_mask(stacked, method))


# --- low-rank updates ----------------------------------------------------------------------------------------------

# combination_type without "_svd" -> how its task tensors become one; "cat" is the only one that is not listed.
_SUMS: dict[str, Callable[..., Array]] = {
    "linear": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
ON_FACTORS = tuple(_SUMS)
ON_DELTAS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATION_TYPES = ("cat", *ON_FACTORS, *ON_DELTAS)


@dataclass(frozen=True)
class LowRank:
    """One adapter's update of one weight, Δ = s·B·A.

    Attributes:
        a: (r, in...), A as it is stored, in float32.
        b: (out, r...), B likewise.
        scaling: s.
    """

    a: Array
    b: Array
    scaling: float

    @property
    def delta(self) -> Array:
        """(out, in): kernels and the like laid flat."""
        return self.scaling * (self.b.reshape(len(self.b), -1) @ self.a.reshape(len(self.a), -1))


def needs_density(combination_type: str) -> bool:
    """Whether this type thins the tensors out."""
    return combination_type not in ("cat", "linear", "svd")


def combine(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    combination_type: str,
    rank: int,
    *,
    groups: int = 1,
    clamp: float | None = None,
    **settings: Any,
) -> tuple[Array, Array]:
    """The factors A (r, in...) and B (out, r...) of a new update with scaling 1.

    - "cat": A = [w₁s₁A₁; w₂s₂A₂; ...], B = [B₁ B₂ ...], so that B·A is exactly Σ wᵢΔᵢ.
    - the types on factors: A = f(A₁, A₂, ...; sign(wᵢsᵢ)√|wᵢsᵢ|) and B = f(B₁, B₂, ...; √|wᵢsᵢ|), each by itself. The
      product has cross terms BᵢAⱼ: these are no weighted sums of updates, not even "linear".
    - the types on deltas: the best approximation of rank r of f(Δ₁, Δ₂, ...; wᵢ).

    Args:
        updates: of one weight; their ranks must be equal for the types on factors.
        weights: wᵢ.
        combination_type: one of `COMBINATION_TYPES`.
        rank: r; factors of a lower rank are filled up with zeros, those of an SVD cut to it.
        groups: of a convolution, whose B reads A group by group.
        clamp: after an SVD, the quantile at which both factors are cut off.
        settings: `density` and `majority_sign_method`, for the types that take them.
    """
    first = updates[0]
    if combination_type in ON_DELTAS:
        function = _SUMS.get(combination_type.removesuffix("_svd"), task_arithmetic)
        delta = function([u.delta for u in updates], np.asarray(weights, np.float32), **settings)
        a, b = truncated_svd(delta, rank, clamp)
        return a.reshape(rank, *first.a.shape[1:]), b.reshape(len(b), rank, *first.b.shape[2:])
    scaled = np.array([w * u.scaling for w, u in zip(weights, updates, strict=True)], np.float32)
    if combination_type == "cat":
        # A's rows lie group after group, so it is within the groups that those of one adapter follow another's.
        rows = [_by_group(s * u.a, groups) for s, u in zip(scaled, updates, strict=True)]
        a, b = np.concatenate(rows, axis=1), np.concatenate([u.b for u in updates], axis=1)
    else:
        root = np.sqrt(np.abs(scaled))
        function = _SUMS[combination_type]
        a = _by_group(function([u.a for u in updates], np.sign(scaled) * root, **settings), groups)
        b = function([u.b for u in updates], root, **settings)
    a = _fill(a, rank // groups)
    return a.reshape(rank, *first.a.shape[1:]), _fill(b, rank // groups)


def truncated_svd(delta: Array, rank: int, clamp: float | None = None) -> tuple[Array, Array]:
    """A (rank, in) with orthonormal rows, and B (out, rank): of all such products B·A is the nearest to delta.

    Where the rank exceeds the smaller side of delta, both are filled up with zeros.

    Args:
        delta: the matrix (out, in).
        rank: of the product, at most.
        clamp: cut all entries of A and B off at ± their quantile `clamp`, taken over both.
    """
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    a, b = vt[:rank], (u * s)[:, :rank]
    if clamp is not None:
        limit = np.quantile(np.concatenate([b.ravel(), a.ravel()]), clamp).astype(delta.dtype)
        # As torch's clamp does, so that a negative quantile, of a tiny `clamp`, gives HF's numbers too.
        a, b = (np.minimum(np.maximum(x, -limit), limit) for x in (a, b))
    return _fill(a[None], rank)[0], _fill(b, rank)


def _by_group(a: Array, groups: int) -> Array:
    return a.reshape(groups, -1, *a.shape[1:])


def _fill(x: Array, length: int) -> Array:
    """Zeros after the last entry of the second axis, up to this length."""
    return np.pad(x, [(0, length - n if axis == 1 else 0) for axis, n in enumerate(x.shape)])
