"""The arithmetic of combining adapters: properties, and values worked out by hand. HF's numbers: tests/parity."""

import mindspore as ms
import numpy as np
import pytest

from msft_peft import ConfigError
from msft_peft.tuners.lora.combine import (
    COMBINATION_TYPES,
    LowRank,
    calculate_majority_sign_mask,
    combine,
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_based_pruning,
    magnitude_prune,
    needs_density,
    prune,
    random_pruning,
    reshape_weight_task_tensors,
    task_arithmetic,
    ties,
    truncated_svd,
)
from tests.tolerances import assert_same

VOTES = np.array([[3, -1, 0, 2], [-1, -2, 0, -1], [-1, 4, 0, -1.5]], np.float32)
WEIGHTS = np.array([1, 2, -3], np.float32)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_weights_broadcast_over_task_tensors():
    assert reshape_weight_task_tensors(np.ones((2, 3, 4)), np.ones(2)).shape == (2, 1, 1)


def test_pruning_by_magnitude_keeps_the_largest():
    t = np.array([[1, -5, 0.5], [-3, 2, 4]], np.float32)
    assert_same(magnitude_based_pruning(t, 0.5), np.array([[0, -5, 0], [-3, 0, 4]], np.float32), "exact")
    assert_same(magnitude_based_pruning(t, 0.49), np.array([[0, -5, 0], [0, 0, 4]], np.float32), "exact")
    assert not magnitude_based_pruning(t, 0.0).any()
    equal = magnitude_based_pruning(np.ones(5, np.float32), 0.4)
    assert equal.sum() == 2


def test_random_pruning_keeps_the_share_and_the_sum():
    t = np.full((200, 50), 3, np.float32)
    for density in (0.2, 0.7):
        plain, scaled = (random_pruning(t, density, rescale=rescale) for rescale in (False, True))
        assert set(np.unique(plain)) == {0, 3}
        assert abs((plain != 0).mean() - density) < 0.02  # 4 standard deviations
        np.testing.assert_allclose(np.unique(scaled), [0, 3 / density], rtol=1e-6)
        assert abs(scaled.mean() - 3) < 0.3
    assert not random_pruning(t, 0.0, rescale=True).any()


def test_set_seed_repeats_random_pruning():
    t = random(30)
    draws = []
    for seed in (1, 1, 2):
        ms.set_seed(seed)
        draws.append(random_pruning(t, 0.5, rescale=True).tobytes())
    assert draws[0] == draws[1] != draws[2]


def test_prune():
    t = random(40)
    with pytest.warns(UserWarning, match="The density 1.5 is greater than or equal to 1, no pruning"):
        assert prune(t, 1.5, "magnitude") is t
    with pytest.raises(ValueError, match="Density should be >= 0, got -1"):
        prune(t, -1, "random")
    with pytest.raises(ConfigError, match="Unknown method foo"):
        prune(t, 0.5, "foo")
    assert (prune(t, 0.5, "magnitude") != 0).sum() == 20
    assert 0 < (prune(t, 0.5, "random") != 0).sum() < 40


def test_the_sign_of_the_majority():
    # Summed: 1, 1, 0, -0.5. Counted: -1, -1, 0, -1. A sum of zero is positive; an entry of zero has no sign.
    by_mass = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 1]], bool)
    by_head = np.array([[0, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 1]], bool)
    assert (calculate_majority_sign_mask(VOTES) == by_mass).all()
    assert (calculate_majority_sign_mask(VOTES, "frequency") == by_head).all()
    with pytest.raises(ConfigError, match='Unimplemented mask method "foo"'):
        calculate_majority_sign_mask(VOTES, "foo")


def test_disjoint_merge_is_the_mean_of_what_agrees():
    mask = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1]], bool)
    assert_same(disjoint_merge(VOTES, mask), np.array([1, 4, 0, 0.25], np.float32), "exact")


def test_ties_elects_before_it_weighs():
    merged = ties(list(VOTES), WEIGHTS, 0.75)
    # Trimmed to three entries each, which only drops the zeros; then by mass: 3, 4, nothing, -1 and -1.5 agree.
    assert_same(merged, np.array([3 * 1, 4 * -3, 0, (-1 * 2 + -1.5 * -3) / 2], np.float32), "exact")
    by_head = ties(list(VOTES), WEIGHTS, 0.75, majority_sign_method="frequency")
    assert_same(by_head, np.array([(-2 + 3) / 2, (-1 - 4) / 2, 0, (-2 + 4.5) / 2], np.float32), "exact")


@pytest.mark.filterwarnings("ignore:The density")
def test_nothing_pruned_is_the_plain_sum():
    plain = task_arithmetic(list(VOTES), WEIGHTS)
    assert_same(plain, np.array([3 - 2 + 3, -1 - 4 - 12, 0, 2 - 2 + 4.5], np.float32), "exact")
    assert_same(magnitude_prune(list(VOTES), WEIGHTS, 1.0), plain, "exact")
    assert_same(dare_linear(list(VOTES), WEIGHTS, 1.0), plain, "exact")
    assert_same(dare_ties(list(VOTES), WEIGHTS, 1.0), ties(list(VOTES), WEIGHTS, 1.0), "exact")


def test_dare_is_right_on_average():
    tensors = [random(5, seed=seed) for seed in range(3)]
    mean = np.mean([dare_linear(tensors, WEIGHTS, 0.5) for _ in range(4000)], axis=0)
    assert np.abs(mean - task_arithmetic(tensors, WEIGHTS)).max() < 0.4
    drawn = {dare_ties(tensors, WEIGHTS, 0.5).tobytes() for _ in range(20)}
    assert len(drawn) > 5


def test_truncated_svd_is_the_nearest():
    delta = random(7, 5)
    a, b = truncated_svd(delta, 2)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((2, 5), (7, 2), np.float32, np.float32)
    np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
    singular = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(delta - b @ a), np.linalg.norm(singular[2:]), rtol=1e-5)
    for rank in (5, 9):  # beyond the matrix's own rank there is nothing to add
        a, b = truncated_svd(delta, rank)
        assert (a.shape, b.shape) == ((rank, 5), (7, rank))
        assert_same(b @ a, delta)


def test_clamp_cuts_the_factors_off():
    delta = random(7, 5)
    whole, clamped = truncated_svd(delta, 3), truncated_svd(delta, 3, clamp=0.8)
    limit = np.quantile(np.concatenate([whole[0].ravel(), whole[1].ravel()]), 0.8)
    for before, after in zip(whole, clamped):
        assert_same(after, np.clip(before, -limit, limit).astype(np.float32))
        assert (np.abs(before) > limit).any()


def updates(ranks: tuple[int, ...] = (2, 2), kernel: tuple[int, ...] = (), groups: int = 1) -> list[LowRank]:
    ones = (1,) * len(kernel)
    return [
        LowRank(random(r, 5, *kernel, seed=r + i), random(6, r // groups, *ones, seed=9 + i), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


def delta(a: np.ndarray, b: np.ndarray, groups: int = 1) -> np.ndarray:
    """B·A, group by group, as a grouped convolution has it."""
    a = a.reshape(groups, len(a) // groups, -1)
    b = b.reshape(groups, len(b) // groups, -1)
    return np.concatenate([b[g] @ a[g] for g in range(groups)])


@pytest.mark.parametrize(("kernel", "groups"), [((), 1), ((3,), 1), ((2, 3), 2), ((2, 1, 2), 1)])
@pytest.mark.parametrize("spare", [0, 2])
def test_cat_is_the_exact_sum(kernel: tuple[int, ...], groups: int, spare: int):
    parts = updates((2, 4), kernel, groups)
    a, b = combine(parts, [0.7, -1.2], "cat", 6 + spare, groups=groups)
    assert a.shape == (6 + spare, 5, *kernel)
    assert b.shape == (6, (6 + spare) // groups, *(1 for _ in kernel))
    expected = sum(w * u.scaling * delta(u.a, u.b, groups) for w, u in zip((0.7, -1.2), parts))
    assert_same(delta(a, b, groups), expected.astype(np.float32))


def test_svd_of_the_full_rank_is_the_exact_sum():
    parts = updates((2, 1), (3,))
    a, b = combine(parts, [0.7, -1.2], "svd", 3)
    assert (a.shape, b.shape) == ((3, 5, 3), (6, 3, 1))
    assert_same(delta(a, b), (0.7 * parts[0].delta - 1.2 * parts[1].delta).astype(np.float32))


@pytest.mark.parametrize("groups", [1, 2])
def test_linear_combines_the_factors(groups: int):
    parts = updates((4, 4), (3,), groups)
    a, b = combine(parts, [2.0, -0.5], "linear", 6, groups=groups)
    one, other = np.sqrt(2.0 * 0.5), np.sqrt(0.5 * 1.5)
    want_a = (one * parts[0].a - other * parts[1].a).astype(np.float32)
    want_b = (one * parts[0].b + other * parts[1].b).astype(np.float32)
    assert_same(delta(a, b, groups), delta(want_a, want_b, groups))  # the spare rows and columns are zeros


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
@pytest.mark.parametrize("weight", [1.5, -1.5, 0.0])
def test_one_update_alone_is_scaled(combination_type: str, weight: float):
    settings = {"density": 1.0} if needs_density(combination_type) else {}
    part = updates((2,))[0]
    a, b = combine([part], [weight], combination_type, 2, **settings)
    assert_same(delta(a, b), (weight * part.delta).astype(np.float32))
