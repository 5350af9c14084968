"""Scaled dot-product attention and its masks, for every model in this package."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

_BLOCKED = -1e9  # finite, so that a row with nothing to look at stays a number; representable once scores are float32
_dot = ops.BatchMatMul(transpose_b=True)
_mix = ops.BatchMatMul()
_mix_transposed = ops.BatchMatMul(transpose_a=True)
_matmul = ops.MatMul()
_scatter = ops.TensorScatterUpdate()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale·q·kᵀ + mask)·v, with each key/value head shared by N/K query heads.

    Source: Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        q: (B, N, T, D).
        k: (B, K, S, D), where K divides N; k and v are not copied for the groups.
        v: (B, K, S, D).
        mask: additive (1 or B, 1 or N, 1 or T, S), or None.
        dropout: probability of dropping an attention weight.
        scale: default 1/√D.

    Returns:
        (B, T, N·D), ready for the output projection.
    """
    b, n, t, d = q.shape
    groups, s = k.shape[1], k.shape[2]
    q = q * (d**-0.5 if scale is None else scale)
    q = q.reshape((b, groups, n // groups * t, d))  # heads of a group stand one after another
    scores = _dot(q, k).astype(ms.float32)
    if mask is not None:
        scores = (scores.reshape((b, n, t, s)) + mask).reshape((b, groups, n // groups * t, s))
    if dropout > 0.0:
        mixed = _mix(ops.dropout(ops.softmax(scores, -1).astype(v.dtype), dropout), v)
    elif t == 1:  # one token: a plain product costs less than a Cell with a gradient of its own
        mixed = _mix(ops.softmax(scores, -1).astype(v.dtype), v)
    else:
        mixed, _ = _softmax_mix(scores, v)
    if t == 1:
        return mixed.reshape((b, 1, n * d))
    return mixed.reshape((b, n, t, d)).swapaxes(1, 2).reshape((b, t, n * d))


def attend_beside(q: Tensor, beside: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> Tensor:
    """Σ gate·softmax(q·kᵀ/√D)·v: keys and values that all queries look at apart from those of the text.

    An attention takes such `beside` as the last argument of its `construct`, and has `keys_and_values(x)`, which makes
    keys and values, (B, K, P, D) each, of hidden states (B, P, H) that stand nowhere in the text.

    Source: Zhang et al. 2023, arXiv:2303.16199, §3.2.

    Args:
        q: (B, N, T, D).
        beside: (k, v, gate) of each part: (1, K, P, D), the same, and (1,).

    Returns:
        (B, T, N·D), as `attend`.
    """
    total: Tensor | float = 0.0
    for k, v, gate in beside:
        shape = (q.shape[0], *k.shape[1:])
        mixed = attend(q, ops.broadcast_to(k, shape), ops.broadcast_to(v, shape), None)
        total = total + mixed * gate.astype(mixed.dtype)
    return total


class SoftmaxMix(nn.Cell):
    """softmax(scores)·v, with a gradient that sums over D in place of S (Dao et al. 2022, arXiv:2205.14135, §B.2).

    With P = softmax(scores) and O = P·v:  dscores = P ∘ (dO·vᵀ - rowsum(dO ∘ O)),  dv = Pᵀ·dO.
    """

    def construct(self, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return O (B, K, T, D) and P (B, K, T, S) for `scores` (B, K, T, S) and `v` (B, K, S, D)."""
        weights = ops.softmax(scores, -1).astype(v.dtype)
        return _mix(weights, v), weights

    def bprop(self, scores, v, out, dout):
        """Return the gradients of `scores` and `v`; P is kept for this only, nothing flows back through it."""
        mixed, weights = out
        d = mixed.shape[-1]
        sums = _matmul((dout[0] * mixed).reshape((-1, d)), ops.ones((d, 1), mixed.dtype))  # (B·K·T, 1)
        sums = _matmul(sums, ops.ones((1, scores.shape[-1]), mixed.dtype)).reshape(scores.shape)
        dscores = weights * (_dot(dout[0], v) - sums)
        return dscores.astype(scores.dtype), _mix_transposed(weights, dout[0])


_softmax_mix = SoftmaxMix()


def heads_first(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, N·D) as (B, N, T, D). A single token is not moved, which saves a kernel."""
    b, t, _ = x.shape
    return x.reshape((b, -1, 1, head_dim)) if t == 1 else x.reshape((b, t, -1, head_dim)).swapaxes(1, 2)


def split_heads(fused: Tensor, heads: int, by_head: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Take queries, keys and values, (B, N, T, D) each, out of one projection (B, T, 3·N·D).

    Args:
        fused: all queries, all keys, all values; or, `by_head`, one head's after the other.
        heads: N.
        by_head: see `fused`.
    """
    b, t, width = fused.shape
    d = width // (3 * heads)
    if by_head:
        q, k, v = ops.split(fused.reshape((b, t, heads, 3 * d)).swapaxes(1, 2), d, 3)
    else:
        q, k, v = ops.split(fused.reshape((b, t, 3 * heads, d)).swapaxes(1, 2), heads, 1)
    return q, k, v


def remember(past: Tensor, new: Tensor, slot: Tensor | None) -> Tensor:
    """Append `new` (B, K, T, D) to `past` (B, K, S, D); or, given a slot (1,), write the one new token there."""
    if slot is None:
        return ops.cat((past.astype(new.dtype), new), 2)
    # A scatter writes one slot; a choice by mask would pass over all of them, ten times slower on CPU.
    b, k = new.shape[:2]
    heads = Tensor(np.argwhere(np.ones((b, k))).reshape((b, k, 1, 2)).astype(np.int32))  # (B, K, 1, 2)
    places = ops.cat((heads, ops.broadcast_to(slot.astype(ms.int32).reshape((1, 1, 1, 1)), (b, k, 1, 1))), -1)
    return _scatter(past, places, new.astype(past.dtype))


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


def counted(real: Tensor) -> Tensor:
    """Number the nonzero places of each row of `real` (B, S) from 0 on, (B, S) int32; the others get -1."""
    real = ops.not_equal(real, 0).astype(ms.int32)
    return ops.cumsum(real, 1) * real - 1
