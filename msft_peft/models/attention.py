"""Scaled dot-product attention and its masks, for every model in this package."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

_BLOCKED = -1e9  # finite, so that a row with nothing to look at stays a number; representable once scores are float32
_dot = ops.BatchMatMul(transpose_b=True)
_mix = ops.BatchMatMul()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q·kᵀ/√D + mask)·v, with each key/value head shared by N/K query heads (Vaswani et al. 2017,
    arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245).

    Args:
        q: (B, N, T, D).
        k: (B, K, S, D), where K divides N; k and v are not copied for the groups.
        v: (B, K, S, D).
        mask: additive (1 or B, 1, 1 or T, S), or None.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, N·D), ready for the output projection.
    """
    b, n, t, d = q.shape
    groups, s = k.shape[1], k.shape[2]
    q = (q * (d**-0.5)).reshape((b, groups, n // groups * t, d))  # heads of a group stand one after another
    scores = _dot(q, k).astype(ms.float32)
    if mask is not None:
        scores = (scores.reshape((b, n, t, s)) + mask).reshape((b, groups, n // groups * t, s))
    weights = ops.softmax(scores, -1).astype(v.dtype)
    if dropout > 0.0:
        weights = ops.dropout(weights, dropout)
    mixed = _mix(weights, v).reshape((b, n, t, d))
    return mixed.swapaxes(1, 2).reshape((b, t, n * d))


def causal_mask(
    queries: Tensor, length: int, attention_mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Build the additive mask of a decoder: a token sees itself and the tokens before it.

    Args:
        queries: (T,) the slots, counted from the first cached token, at which the queries stand.
        length: S, the number of slots.
        attention_mask: (B, S), nonzero where a slot holds a real token.
        window: how many slots back a token may look, itself included; None for all.

    Returns:
        (1 or B, 1, T, S), float32: 0 where a query may look, else a large negative number.
    """
    keys = Tensor(np.arange(length, dtype=np.int32))
    distance = queries.astype(ms.int32).reshape((-1, 1)) - keys  # (T, S)
    seen = ops.greater_equal(distance, 0)
    if window is not None:
        seen = ops.logical_and(seen, ops.less(distance, window))
    seen = seen.reshape((1, 1, -1, length))
    if attention_mask is not None:
        seen = ops.logical_and(seen, ops.not_equal(attention_mask, 0).reshape((-1, 1, 1, length)))
    return (1.0 - seen.astype(ms.float32)) * _BLOCKED


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Build the additive mask (B, 1, 1, S) of an encoder from `attention_mask` (B, S), nonzero at real tokens."""
    real = ops.not_equal(attention_mask, 0).astype(ms.float32)
    return ((1.0 - real) * _BLOCKED).reshape((real.shape[0], 1, 1, real.shape[1]))
