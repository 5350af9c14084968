"""The choice of the next tokens from their scores, in numpy: greedy, drawn, or by beam search.

It stands outside of compiled code, which would draw the same tokens each time; only the scores of the last position
are brought here, (rows, V) numbers a step.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.models.generation_config import GenerationConfig

_NEVER = np.float32(-1e9)


class Search:
    """Continues the texts of a batch, R of each, R = `config.rows`.

    Args:
        config: what was asked for.
        prompt: (B, t), the tokens before the first new one; t may be 0.
        new: how many tokens may be added.

    Attributes:
        parents: for each row of the last `tokens` the row before that it continues; None if that is itself.
    """

    def __init__(self, config: GenerationConfig, prompt: np.ndarray, new: int):
        self.config, self.new, self.count = config, new, 0
        self.texts = np.repeat(prompt, config.rows, 0)  # (B·R, t)
        self.least = max(config.min_new_tokens or 0, config.min_length - prompt.shape[1])
        self.parents: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """The newest token of each text, (B·R, 1)."""
        return self.texts[:, -1:]

    def advance(self, scores: np.ndarray) -> bool:
        """Add a token to each text, given its `scores` (B·R, V); return whether all is done."""
        self.count += 1
        return self._add(scores.astype(np.float32))

    def result(self) -> np.ndarray:
        """Return the texts, (B · number asked for, t + new), int64."""
        return self.texts

    def _add(self, scores: np.ndarray) -> bool:
        raise NotImplementedError

    def _changed(self, scores: np.ndarray) -> np.ndarray:
        """Apply what the options forbid or make less probable to `scores` (B·R, V), or log probabilities."""
        config = self.config
        if config.repetition_penalty != 1.0 and self.texts.size:
            seen = np.take_along_axis(scores, self.texts, axis=1)
            seen = np.where(seen < 0, seen * config.repetition_penalty, seen / config.repetition_penalty)
            np.put_along_axis(scores, self.texts, seen, axis=1)
        if config.no_repeat_ngram_size:
            for row, text in enumerate(self.texts):
                scores[row, followers(text, config.no_repeat_ngram_size)] = -np.inf
        if self.count <= self.least:
            scores[:, config.ends] = -np.inf
        return scores


def followers(text: np.ndarray, size: int) -> np.ndarray:
    """Return the tokens that would end a sequence of `size` tokens that `text` (t,) holds already."""
    if len(text) < size:
        return text[:0]
    windows = np.lib.stride_tricks.sliding_window_view(text, size)
    last = text[len(text) - size + 1 :]
    return windows[(windows[:, :-1] == last).all(-1), -1]


class Sampling(Search):
    """The most probable token each time, or one that is drawn."""

    def __init__(self, config: GenerationConfig, prompt: np.ndarray, new: int):
        super().__init__(config, prompt, new)
        self.done = np.zeros(len(self.texts), dtype=bool)
        self.random = np.random if config.seed is None else np.random.RandomState(config.seed)

    def _add(self, scores: np.ndarray) -> bool:
        scores = self._changed(scores)
        picked = self.draw(scores) if self.config.do_sample else scores.argmax(-1)
        picked = np.where(self.done, self.config.pad, picked)
        self.texts = np.concatenate([self.texts, picked[:, None]], 1)
        self.done |= np.isin(picked, self.config.ends)
        return bool(self.done.all()) or self.count == self.new

    def draw(self, scores: np.ndarray) -> np.ndarray:
        """Draw a token (B,) for each row of `scores` (B, V)."""
        k = min(self.config.top_k or scores.shape[1], scores.shape[1])
        order, scores = top(scores, k)
        scores = scores.astype(np.float64) / self.config.temperature
        weights = np.exp(scores - scores[:, :1])
        weights /= weights.sum(-1, keepdims=True)
        before = np.cumsum(weights, axis=-1) - weights  # the probability of all more probable tokens
        weights = np.where(before < self.config.top_p, weights, 0.0)
        edges = np.cumsum(weights, axis=-1)
        drawn = self.random.random_sample((len(scores), 1)) * edges[:, -1:]
        rank = np.minimum((edges <= drawn).sum(-1), np.count_nonzero(weights, axis=-1) - 1)
        return order[np.arange(len(order)), rank]


def top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices and the values (B, k) of the k largest of each row of `scores` (B, V), largest first."""
    if k < scores.shape[1]:
        part = np.argpartition(scores, scores.shape[1] - k, axis=-1)[:, -k:]
        part.sort(axis=-1)  # so that of equal scores the first comes first
    else:
        part = np.broadcast_to(np.arange(k), scores.shape)
    found = np.take_along_axis(scores, part, axis=1)
    order = np.argsort(-found, axis=-1, kind="stable")
    return np.take_along_axis(part, order, axis=1), np.take_along_axis(found, order, axis=1)


class Beams(Search):
    """Beam search: of all continuations of the K best texts so far, keep the K best.

    A text's score is the sum of the log probabilities of its new tokens. One that ends while it is among the K best
    leaves the beam for the K best finished texts, ranked by score / length**length_penalty; others follow in its
    place. `GenerationConfig.early_stopping` says when a batch's search is over.
    """

    def __init__(self, config: GenerationConfig, prompt: np.ndarray, new: int):
        super().__init__(config, prompt, new)
        b, k = len(prompt), config.num_beams
        self.scores = np.full((b, k), _NEVER)
        self.scores[:, 0] = 0.0  # all beams are equal at first: only one may continue
        self.ended = np.zeros((b, k), dtype=bool)
        self.ended_scores = np.full((b, k), _NEVER)
        self.ended_texts = np.full((b, k, prompt.shape[1] + new), config.pad, self.texts.dtype)
        self.lengths = np.zeros((b, k), np.int64)
        self.open = np.ones((b, 1), dtype=bool)

    def _add(self, scores: np.ndarray) -> bool:
        config, (b, k) = self.config, self.scores.shape
        shifted = scores - scores.max(-1, keepdims=True)
        scores = self._changed(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
        vocabulary = scores.shape[1]
        totals = scores.reshape((b, k, vocabulary)) + self.scores[:, :, None]
        found, totals = top(totals.reshape((b, -1)), max(2, 1 + len(config.ends)) * k)  # some may end: K go on
        parents, tokens = found // vocabulary, found % vocabulary
        texts = np.take_along_axis(self.texts.reshape((b, k, -1)), parents[:, :, None], axis=1)
        texts = np.concatenate([texts, tokens[:, :, None]], 2)  # (B, more than K, t + 1)
        ends = np.isin(tokens, config.ends) | (self.count == self.new)
        self._finish(texts, totals, ends & (np.arange(ends.shape[1]) < k))

        order, self.scores = top(totals + ends * _NEVER, k)
        self.texts = np.take_along_axis(texts, order[:, :, None], axis=1).reshape((b * k, -1))
        parents = np.take_along_axis(parents, order, axis=1)
        self.parents = (parents + np.arange(b)[:, None] * k).reshape(-1)
        self._close()
        full = config.early_stopping is True and self.ended.all()
        return bool(full or ends.all() or not self.open.any())

    def _finish(self, texts: np.ndarray, totals: np.ndarray, ended: np.ndarray) -> None:
        """Merge the `ended` among `texts` (B, C, t), with the scores `totals` (B, C), into the finished ones."""
        full = self.ended.all(-1, keepdims=True) & (self.config.early_stopping is True)
        ranks = totals / np.float32(self.count**self.config.length_penalty)
        ranks = ranks + (full | ~self.open | ~ended) * _NEVER
        rest = self.ended_texts.shape[2] - texts.shape[2]
        texts = np.pad(texts, [(0, 0), (0, 0), (0, rest)], constant_values=self.config.pad)
        order, self.ended_scores = top(np.concatenate([self.ended_scores, ranks], 1), self.ended.shape[1])
        self.ended = np.take_along_axis(np.concatenate([self.ended, ended], 1), order, axis=1)
        lengths = np.concatenate([self.lengths, np.full_like(totals, self.count, np.int64)], 1)
        self.lengths = np.take_along_axis(lengths, order, axis=1)
        texts = np.concatenate([self.ended_texts, texts], 1)
        self.ended_texts = np.take_along_axis(texts, order[:, :, None], axis=1)

    def _close(self) -> None:
        """Note for which texts of the batch no running beam can come among the finished ones any more."""
        config = self.config
        length = self.new if config.early_stopping == "never" and config.length_penalty > 0 else self.count
        best = self.scores[:, :1] / np.float32(length**config.length_penalty)
        worst = np.where(self.ended, self.ended_scores.min(-1, keepdims=True), _NEVER)
        self.open = self.open & (best > worst).any(-1, keepdims=True)

    def result(self) -> np.ndarray:
        kept = self.config.num_return_sequences
        length = self.ended_texts.shape[2] - self.new + self.lengths[:, :kept].max()
        return self.ended_texts[:, :kept, :length].reshape((-1, length))


class Rearrange(nn.Cell):
    """Picks rows of a cache: a Cell, so that graph mode compiles one function for all of it."""

    def construct(self, cache, rows, all_parts):
        """Pick `rows` (R,) of the first two tensors of each layer of `cache`, or of `all_parts`."""
        picked: tuple[Any, ...] = ()
        for layer in cache:
            parts: tuple[Any, ...] = ()
            for i in range(len(layer)):
                parts = (*parts, ops.gather(layer[i], rows, 0) if all_parts or i < 2 else layer[i])
            picked = (*picked, parts)
        return picked


_rearrange = Rearrange()


def rearranged(cache: tuple, rows: np.ndarray, all_parts: bool = False) -> tuple:
    """Let row i of `cache` be what row `rows[i]` was; without `all_parts` keys and values of cross-attention stay."""
    return _rearrange(ms.mutable(cache), Tensor(rows.astype(np.int32)), all_parts)
