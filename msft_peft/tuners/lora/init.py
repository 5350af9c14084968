"""LoRA's initialisations that start from the base weight: pure functions of numpy arrays, and the choice among them.

W is the base weight (out, in) in float32, A is (r, in), B is (out, r), s the scaling: the adapter adds s·B·A.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init_config import DIRECTIONS, SCALES, LoftQConfig, LoraGAConfig

# What `preprocess_corda` and `preprocess_loraga` leave on a layer for its initialisation: HF's names.
EIGENS, GRADIENT = "eigens", "_peft_loraga_grad"
TITLES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
# Randomised algorithms draw the same numbers each time: a saved adapter must find the same remainder again.
_SEED = 0
_BLOCK = 64
# The 16 levels of NormalFloat: quantiles of the normal distribution, scaled to [-1, 1], zero among them.
_NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@dataclass(frozen=True)
class Start:
    """What an initialisation gives.

    Attributes:
        a, b: the factors.
        residual: the base gives up s·B·A.
        kept: what the base weight becomes instead, if that is something else.
    """

    a: np.ndarray
    b: np.ndarray
    residual: bool = True
    kept: np.ndarray | None = None


@dataclass
class CordaEigens:
    """Of a layer's W·C, with C the covariance of its inputs, the r components to be adapted.

    Attributes:
        S_WC: singular values (r).
        U_WC: left singular vectors (out, r).
        V_WC: right singular vectors times C⁻¹ (in, r).
    """

    S_WC: np.ndarray
    U_WC: np.ndarray
    V_WC: np.ndarray


def svd_lowrank(w: np.ndarray, q: int, niter: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The q largest singular triples of w (m, n), approximately: U (m, q), S (q), Vᵀ (q, n).

    Formula: an orthonormal Q whose span nears that of the q first left singular vectors, from a random start and
    `niter` power iterations; then the SVD of Qᵀ·W.

    Source: Halko, Martinsson, Tropp 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    rng = np.random.default_rng(_SEED)
    basis = np.linalg.qr(w @ rng.standard_normal((w.shape[1], q), dtype=np.float32))[0]
    for _ in range(niter):
        basis = np.linalg.qr(w.T @ basis)[0]
        basis = np.linalg.qr(w @ basis)[0]
    u, s, vt = np.linalg.svd(basis.T @ w, full_matrices=False)
    return basis @ u, s, vt


def orthogonal(shape: tuple[int, int], r: int, rng: np.random.Generator) -> Start:
    """Both factors random, and their product zero: they live in the two halves of an orthonormal basis.

    Formula: with Q (r, r) orthonormal, Q₁ its odd and Q₂ its even rows, and G₁ (in, r/2), G₂ (out, r/2) normal:
    A = (G₁·Q₁)ᵀ / 10, B = G₂·Q₂ / 10, thus B·A = G₂·Q₂·Q₁ᵀ·G₁ᵀ / 100 = 0.

    Args:
        shape: of the base weight (out, in).
        r: the rank, an even number.
        rng: random numbers.

    Raises:
        ConfigError: the rank is odd.
    """
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    q = np.linalg.qr(rng.standard_normal((r, r)))[0]
    out, into = shape
    a = (rng.standard_normal((into, r // 2)) @ q[0::2]).T / 10
    b = rng.standard_normal((out, r // 2)) @ q[1::2] / 10
    return Start(a.astype(np.float32), b.astype(np.float32), residual=False)


def olora(w: np.ndarray, r: int) -> Start:
    """B begins orthonormal: with W = Q·R, B = Q[:, :r] and A = R[:r]; the base keeps W - s·B·A.

    Source: Büyükakyüz 2024, arXiv:2406.01775.
    """
    q, upper = np.linalg.qr(w)
    return Start(upper[:r], q[:, :r])


def pissa(w: np.ndarray, r: int, scaling: float, niter: int | None = None) -> Start:
    """The adapter takes over W's r principal components: with W = U·S·Vᵀ, s·B·A = U[:, :r]·S[:r]·V[:, :r]ᵀ.

    A and B have √(S/s) each; the base keeps W - s·B·A.

    Args:
        w, r: see above.
        scaling: s.
        niter: power iterations of the randomised SVD; None for the exact one, which takes far longer.

    Source: Meng et al. 2024, arXiv:2404.02948, §3.
    Differs: HF's randomised SVD draws anew each time, so that an adapter saved without conversion meets another
    remainder when it is loaded; here the same weight always has the same remainder.
    """
    u, s, vt = np.linalg.svd(w, full_matrices=False) if niter is None else svd_lowrank(w, r, niter)
    return Start(*_split(u[:, :r], s[:r] / scaling, vt[:r]))


def loftq(w: np.ndarray, r: int, scaling: float, config: LoftQConfig) -> Start:
    """The base becomes its quantised self Q, and the adapter what that lost: Q + s·B·A ≈ W.

    Formula: `loftq_iter` times in turn Q = q(W - s·B·A), and s·B·A = the best rank-r approximation of W - Q.

    Raises:
        ConfigError: neither 4 nor 8 bits, or no iteration.

    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    Differs: HF needs a CUDA device and bitsandbytes for this. It leaves s out of the formula, so that with
    lora_alpha ≠ r its adapter adds s times what is missing.
    """
    quantisers = {4: nf4, 8: int8}
    if config.loftq_bits not in quantisers:
        raise ConfigError(f"Only nf4 and int8 quantization is supported: loftq_bits 4 or 8, got {config.loftq_bits}.")
    if config.loftq_iter < 1:
        raise ConfigError(f"Number of iterations must be greater than 0, got loftq_iter={config.loftq_iter}.")
    rest = w
    for _ in range(config.loftq_iter):
        kept = quantisers[config.loftq_bits](rest)
        u, s, vt = np.linalg.svd(w - kept, full_matrices=False)
        a, b = _split(u[:, :r], s[:r] / scaling, vt[:r])
        rest = w - scaling * (b @ a)
    return Start(a, b, kept=kept)


def nf4(w: np.ndarray) -> np.ndarray:
    """w rounded to 4-bit NormalFloat: in blocks of 64 numbers, the nearest of 16 levels times the block's largest.

    Source: Dettmers et al. 2023, arXiv:2305.14314, §3.
    """
    flat = np.pad(w.reshape(-1), (0, -w.size % _BLOCK)).reshape(-1, _BLOCK)
    largest = np.abs(flat).max(1, keepdims=True)
    unit = flat / np.where(largest == 0, 1, largest)
    nearest = np.searchsorted((_NF4[1:] + _NF4[:-1]) / 2, unit)
    return (_NF4[nearest] * largest).reshape(-1)[: w.size].reshape(w.shape)


def int8(w: np.ndarray) -> np.ndarray:
    """w rounded to 8-bit integers: row by row, 255 equal steps between ± the row's largest number.

    Source: Dettmers et al. 2022, arXiv:2208.07339, §2 (vector-wise quantisation of the half-precision weight).
    """
    half = w.astype(np.float16).astype(np.float32)
    largest = np.abs(half).max(1, keepdims=True)
    step = np.where(largest == 0, 1, largest)
    return (np.round(half * (127 / step)) * step / 127).astype(np.float32)


def corda_eigens(w: np.ndarray, covariance: np.ndarray, r: int, method: str) -> CordaEigens:
    """The components of W that matter most ("ipm") or least ("kpm") to inputs of this covariance.

    Formula: W·C = U·S·Vᵀ; then W = U·S·(Vᵀ·C⁻¹), of which r components are chosen. C gets 1 % of its mean diagonal
    added to its own, twice as much again while its inverse is not exact to 0.05 in norm.

    Raises:
        ConfigError: another method, or a covariance that has no inverse.
    """
    if method not in ("ipm", "kpm"):
        raise ConfigError(f"Invalid corda_method found: {method}, it should be 'ipm' or 'kpm'.")
    eye, damp = np.eye(len(covariance), dtype=np.float32), 0.01 * float(np.diag(covariance).mean())
    for _ in range(20):
        fixed = covariance.astype(np.float32) + damp * eye
        try:
            inverse = np.linalg.inv(fixed)
        except np.linalg.LinAlgError:
            inverse = np.full_like(fixed, np.inf)
        if np.isfinite(inverse).all() and np.linalg.norm(fixed @ inverse - eye) <= 0.05:
            break
        damp *= 2
    else:
        raise ConfigError(
            "The inputs' covariance has no inverse (all inputs were zero?): sample more or other inputs."
        )
    u, s, vt = np.linalg.svd(w @ fixed, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    return CordaEigens(s[chosen], u[:, chosen], (vt[chosen] @ inverse).T)


def corda(eigens: CordaEigens, scaling: float) -> Start:
    """The adapter takes over the components that `corda_eigens` chose: s·B·A = U·S·V; the base keeps the others.

    Source: Yang et al. 2024, arXiv:2406.05223, §3.
    """
    return Start(*_split(eigens.U_WC, eigens.S_WC / scaling, eigens.V_WC.T))


def lora_ga(w: np.ndarray, gradient: np.ndarray, r: int, scaling: float, config: LoraGAConfig) -> Start:
    """The first steps follow the full gradient: A and B are singular vectors of the weight's gradient G = U·S·Vᵀ.

    Formula: A = V[:, i]ᵀ and B = U[:, j]·S[j], where among the first 2r components
    "ArB2r" is i = 0..r-1, j = r..2r-1, "A2rBr" the other way round, "ArBr" i the odd and j the even ones, "random" a
    random choice, the same for both. Then scale="stable" multiplies B by out^¼ / √γ, "weight_svd" by the largest
    singular value of W over that of S[j₀], "gd_scale" divides both by s, "unit" does nothing. The base keeps
    W - s·B·A.

    Raises:
        ConfigError: fewer than 2r components, or an unknown direction or scale.

    Source: Wang et al. 2024, arXiv:2407.05000, §3; the paper has no S in B, which follows HF.
    """
    if config.direction not in DIRECTIONS:
        raise ConfigError(f"Unknown LoRA-GA direction {config.direction!r}: choose one of {DIRECTIONS}")
    if config.scale not in SCALES:
        raise ConfigError(f"Unknown LoRA-GA scale {config.scale!r}: choose one of {SCALES}")
    if 2 * r > min(w.shape):
        raise ConfigError(f"LoRA-GA takes 2r components of a gradient {w.shape}, which has fewer: r={r} is too large.")
    u, s, vt = svd_lowrank(gradient, min(4 * r, *w.shape), 4)
    of_a, of_b = {
        "ArBr": (np.arange(1, 2 * r, 2), np.arange(0, 2 * r, 2)),
        "A2rBr": (np.arange(r, 2 * r), np.arange(r)),
        "ArB2r": (np.arange(r), np.arange(r, 2 * r)),
        "random": (np.random.default_rng(_SEED).permutation(2 * r)[:r],) * 2,
    }[config.direction]
    a, b = vt[of_a], u[:, of_b] * s[of_b]
    if config.scale == "stable":
        b = b * (w.shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd":
        b = b * (np.linalg.svd(w, compute_uv=False)[0] / (s[of_b[0]] or 1))
    elif config.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return Start(a.astype(np.float32), b.astype(np.float32))


def mica(w: np.ndarray, r: int) -> Start:
    """A alone is trained, within the outputs that the weight uses least.

    Formula: with W = U·S·Vᵀ, B is the last r columns of U, those of the smallest singular values, and A is zero.

    Source: MiCA, arXiv:2604.01694.
    """
    u = np.linalg.svd(w, full_matrices=False)[0]
    return Start(np.zeros((r, w.shape[1]), np.float32), u[:, -r:], residual=False)


def start_of(site: Site, config: LoraConfig, r: int, scaling: float) -> Start | None:
    """What the config's initialisation gives for a layer; None if it draws the factors, or the data come later (EVA).

    Raises:
        ConfigError: the layer is a convolution, its weight is not finite, the rank exceeds its smaller side or is odd
            where it may not be, or the data that the initialisation needs were not collected.
    """
    init = str(config.init)
    if config.init in (True, False, "gaussian") or not _is_dense(site, init) or init == "eva":
        return None
    if init == "orthogonal":
        seed = np.random.randint(2**31 - 1)  # ms.set_seed sets numpy's seed too
        return orthogonal((site.out_features, site.in_features), r, np.random.default_rng(seed))
    w = base_weight(site).T if site.kind == "embedding" else base_weight(site)
    check_weight(w, r, site, f"init_lora_weights={init!r}")
    if init == "mica":
        return mica(w, r)
    if init == "olora":
        return olora(w, r)
    if init == "loftq":
        return loftq(w, r, scaling, LoftQConfig(**config.loftq_config))
    if init == "corda":
        return corda(_eigens_of(site, r), scaling)
    if init == "lora_ga":
        return lora_ga(w, _gradient_of(site), r, scaling, config.lora_ga_config or LoraGAConfig())
    return pissa(w, r, scaling, int(init.removeprefix("pissa_niter_")) if init != "pissa" else None)


def base_weight(site: Site) -> np.ndarray:
    """The base weight (out, in) of a linear layer, in float32."""
    w = as_float32(to_numpy(site.weight))
    return np.ascontiguousarray(w.T) if site.transposed else w


def _is_dense(site: Site, init: str) -> bool:
    """Whether the layer is linear; warns of an embedding or a bare parameter, and refuses convolutions."""
    if init == "mica" and site.kind == "embedding":
        return True
    if site.kind in ("embedding", "parameter"):
        article = "an" if site.kind == "embedding" else "a"
        warnings.warn(
            f"{site.path} is {article} {site.kind}, for which there is no init_lora_weights={init!r}: it starts as "
            "with True.",
            PeftWarning,
            stacklevel=5,
        )
        return False
    if site.kind != "dense":
        raise ConfigError(
            f"init_lora_weights={init!r} is for linear layers, and {site.path} is a {site.kind}. Choose True, "
            "'gaussian' or False, or leave that layer out of target_modules."
        )
    return True


def check_weight(w: np.ndarray, r: int, site: Site, what: str) -> None:
    """Raise ConfigError if a weight that is to be decomposed has no SVD, or not so many components."""
    if not np.isfinite(w).all():
        raise ConfigError(f"The weight of {site.path} holds NaN or infinity: {what} decomposes it.")
    if r > min(w.shape):
        raise ConfigError(
            f"{what} has at most min(in_features, out_features) components, but r={r} for "
            f"{site.path} with weight {w.shape}. Choose a smaller r, or give the layer its own in rank_pattern."
        )


def _gradient_of(site: Site) -> np.ndarray:
    gradient = getattr(site.layer, GRADIENT, None)
    if gradient is None:
        raise ConfigError(
            f"init_lora_weights='lora_ga': no gradient was collected for {site.path}. Please run `preprocess_loraga` "
            "on the model first. (An adapter is saved so that it needs none with "
            "`path_initial_model_for_weight_conversion`.)"
        )
    return gradient


def _eigens_of(site: Site, r: int) -> CordaEigens:
    eigens = getattr(site.layer, EIGENS, None)
    if eigens is None:
        raise ConfigError(
            f"`eigens` attribute not found for layer {site.path}, please run `preprocess_corda` first. (An adapter is "
            "saved so that it needs none with `path_initial_model_for_weight_conversion`.)"
        )
    wanted = ((r,), (site.out_features, r), (site.in_features, r))
    found = (eigens.S_WC.shape, eigens.U_WC.shape, eigens.V_WC.shape)
    if found != wanted:
        raise ConfigError(
            f"The CorDA decomposition of {site.path} has shapes {found}, not {wanted}. Please make sure the "
            "`lora_config` and `model` argument of `preprocess_corda` is consistent with `get_peft_model`. If you're "
            "using cache in `preprocess_corda`, please make sure the cache is built with the same model and LoRA rank."
        )
    return eigens


def _split(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) with B·A = U·S·Vᵀ and the root of S in each."""
    root = np.sqrt(s)
    return root[:, None] * vt, u * root
