"""Torch's generator on the CPU against ours, bit for bit."""

import numpy as np
import pytest
import torch

from msft_peft.backend.torch_random import TorchGenerator, rounded_to_bfloat16

SEEDS = [0, 777, 2**32 + 5, 2**40 + 7, -1, 2**64 - 1]
BOUNDS = [(0, 1), (-0.3, 0.3), (-0.0512, 0.0512), (-1.7, 2.9), (1e6, 1e6 + 1)]


def torch_generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    return generator if seed is None else generator.manual_seed(seed)


@pytest.mark.parametrize("seed", [*SEEDS, None])
def test_one_call_after_the_other(seed):
    """Every kind of draw, in turn, from one generator: each leaves it where torch leaves its own."""
    theirs, ours = torch_generator(seed), TorchGenerator(seed)
    for _ in range(2):
        np.testing.assert_array_equal(ours.uniform((7, 3)), torch.rand((7, 3), generator=theirs).numpy())
        np.testing.assert_array_equal(ours.permutation(50), torch.randperm(50, generator=theirs).numpy())
        wanted = torch.empty(5, dtype=torch.bfloat16).uniform_(-1, 2, generator=theirs).float().numpy()
        np.testing.assert_array_equal(ours.uniform((5,), -1, 2, bfloat16=True), wanted)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_uniform(low, high):
    theirs = torch.empty(300, 700).uniform_(low, high, generator=torch_generator(3))
    found = TorchGenerator(3).uniform((300, 700), low, high)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, theirs.numpy())


@pytest.mark.parametrize(("low", "high"), BOUNDS[:-1])
def test_uniform_in_bfloat16(low, high):
    theirs = torch.empty(300, 700, dtype=torch.bfloat16).uniform_(low, high, generator=torch_generator(3))
    found = TorchGenerator(3).uniform((300, 700), low, high, bfloat16=True)
    np.testing.assert_array_equal(found, theirs.float().numpy())


@pytest.mark.parametrize("shape", [(1,), (3, 5), (16,), (4, 5, 2), (1000, 3, 7)])
def test_normal(shape):
    """Fewer than 16 exactly; more to what torch's own logarithm and cosine leave."""
    theirs, ours = torch_generator(3), TorchGenerator(3)
    for std in (1.0, 0.6):
        wanted = torch.normal(mean=0.0, std=std, size=shape, generator=theirs).numpy()
        found = ours.normal(shape, std)
        assert (found.dtype, found.shape) == (np.float32, shape)
        np.testing.assert_allclose(found, wanted, atol=0 if found.size < 16 else 1.5e-6)
    np.testing.assert_array_equal(ours.uniform((3,)), torch.rand(3, generator=theirs).numpy())


@pytest.mark.parametrize(
    ("length", "count"), [(0, None), (1, None), (2, 1), (2, 2), (1000, 17), (1000, 1000), (99, 200)]
)
def test_permutation(length, count):
    theirs = torch.randperm(length, generator=torch_generator(777))[:count]
    found = TorchGenerator(777).permutation(length, count)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, theirs.numpy())


def test_the_beginning_of_a_long_permutation():
    theirs = torch.randperm(4096 * 1024, generator=torch_generator(777))[:1000]
    np.testing.assert_array_equal(TorchGenerator(777).permutation(4096 * 1024, 1000), theirs.numpy())


def test_rounding_to_bfloat16():
    values = np.random.default_rng(1).normal(size=50000).astype(np.float32)
    ties = ((np.arange(512, dtype=np.uint32) << 15) + np.uint32(0x3F000000)).view(np.float32)
    for some in (values, -ties, ties):
        np.testing.assert_array_equal(rounded_to_bfloat16(some), torch.tensor(some).to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("seed", [1.0, "1", True, 2**64, -(2**63) - 1])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="a seed must be an integer"):
        TorchGenerator(seed)


def test_what_torch_permutes_otherwise_is_refused():
    with pytest.raises(NotImplementedError, match="214748363"):
        TorchGenerator(1).permutation(2**28, 3)
