"""How far two results may be apart: one table of (absolute, relative). No other test holds such a number."""

from typing import Any

import numpy as np

TOLERANCES = {
    # The same kernels on the same numbers.
    ("float32", "exact"): (0.0, 0.0),
    ("float16", "exact"): (0.0, 0.0),
    # The same mathematics by other kernels, or compiled.
    ("float32", "close"): (2e-6, 2e-5),
    ("float16", "close"): (4e-3, 4e-3),
    # x·W + x·Δ against x·(W + Δ): one more rounding of every weight.
    ("float32", "merge"): (1e-5, 1e-4),
    ("float16", "merge"): (2e-2, 2e-2),
    # W + Δ − Δ against W.
    ("float32", "unmerge"): (1e-6, 1e-6),
    ("float16", "unmerge"): (0.0, 0.0),
    # Gradients, of the same loss, in PyNative and compiled.
    ("float32", "gradient"): (5e-6, 1e-4),
    ("float16", "gradient"): (5e-3, 5e-3),
    # Weights after a few steps of Adam, on the mean of two workers' gradients or on that of the joined batch.
    ("float32", "workers"): (2e-4, 0.0),
    # Computed in float16, on weights of float32.
    ("float32", "half"): (1e-2, 1e-2),
    # Places, as SHiRA and Uni-LoRA have them.
    ("int32", "exact"): (0.0, 0.0),
    ("int64", "exact"): (0.0, 0.0),
    # What counts as a difference, where two results must differ.
    ("float32", "differ"): (1e-3, 0.0),
    ("float16", "differ"): (2e-2, 0.0),
}


def array(value: Any) -> np.ndarray:
    """A copy: `asnumpy` is a live view."""
    return np.array(value.asnumpy() if hasattr(value, "asnumpy") else value)


def assert_same(actual: Any, expected: Any, what: str = "close") -> None:
    """Whole tensors agree, in shape, dtype and numbers, within the tolerance of `what` for that dtype."""
    actual, expected = array(actual), array(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert np.isfinite(expected.astype(np.float32)).all()
    atol, rtol = TOLERANCES[str(expected.dtype), what]
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=rtol)


def differ(actual: Any, expected: Any) -> bool:
    """Whether two tensors of one shape are further apart than any rounding brings them."""
    actual, expected = array(actual), array(expected)
    atol, _ = TOLERANCES[str(expected.dtype), "differ"]
    return bool(np.abs(actual.astype(np.float32) - expected.astype(np.float32)).max() > atol)
