"""Text generation with a key/value cache of fixed size, greedy or by sampling."""

from __future__ import annotations

from collections.abc import Iterable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from msft_peft.models.pretrained import PreTrainedModel

_BUCKET = 64  # in graph mode prompts and caches are lengthened to multiples of this: few shapes, few compilations


class GenerativeModel(PreTrainedModel):
    """A model with scores over the vocabulary that can `generate`.

    The prompt runs through the model once; then each token runs alone against a cache of fixed size, so that in graph
    mode this step is compiled once. The cache lives in a call of `generate` only: nothing is left in the model.
    """

    def generate(
        self,
        input_ids: Tensor | np.ndarray | None = None,
        attention_mask: Tensor | np.ndarray | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: tuple[tuple[Tensor, Tensor], ...] | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue each prompt until an eos token ends it or it is long enough.

        Args:
            input_ids: (B, T), padded on the left; may be left out if `inputs_embeds` are given.
            attention_mask: (B, T) or (B, P + T), nonzero at real tokens; without the part for the P slots of
                `past_key_values` these count as real. Default: all are real.
            inputs_embeds: (B, T, H), in place of the embeddings of `input_ids`, such as soft prompts.
            past_key_values: a prefix of P keys and values for each layer, which stands before the prompt.
            max_new_tokens: how many tokens to add at most; default 20 if there is no `max_length` either.
            max_length: how long prompt and continuation may be; `max_new_tokens` goes first.
            do_sample: draw the tokens; otherwise take the most probable ones, whatever the next three arguments say.
            temperature: the scores are divided by it.
            top_k: draw from so many of the most probable tokens; 0 for all.
            top_p: draw from the fewest tokens that together have this probability (Holtzman et al. 2020,
                arXiv:1904.09751).
            repetition_penalty: above 1 makes tokens that already occur less probable (Keskar et al. 2019,
                arXiv:1909.05858, §4.1).
            eos_token_id: the token, or any of the tokens, that ends a text; default: the config's.
            pad_token_id: what follows the end in the result; default: the config's, or the first eos token.
            seed: makes the draws repeat; default: they follow `mindspore.set_seed`.

        Returns:
            (B, T + new), int64: prompts and continuations; (B, new) if only `inputs_embeds` were given.

        Raises:
            ValueError: no prompt, a prompt padded on the right, a mask of another length, or an option out of range.
        """
        choose = _Chooser(do_sample, temperature, top_k, top_p, repetition_penalty, seed)
        ends = _as_list(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        pad = pad if pad is not None else (ends[0] if ends else 0)
        prefix = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        tokens, prompt, real = _read_prompt(input_ids, inputs_embeds, attention_mask, prefix)
        new = _count_new(max_new_tokens, max_length, prompt.shape[1])

        filled = prefix + prompt.shape[1]
        size = filled + new
        if ms.get_context("mode") == ms.GRAPH_MODE and not (prefix and self.base_model.window):
            extra = -prompt.shape[1] % _BUCKET  # stands before the prompt: a window reaches over it, but to no prefix
            prompt = np.pad(prompt, [(0, 0), (extra, 0)] + [(0, 0)] * (prompt.ndim - 2))
            real = np.insert(real, [prefix] * extra, 0, axis=1)
            filled += extra
            size = filled + new + -(filled + new) % _BUCKET

        was_training = self.training
        if was_training:  # not otherwise: it would forget a phase that a caller has set
            self.set_train(False)
        try:
            step = {
                "input_ids" if inputs_embeds is None else "inputs_embeds": Tensor(prompt),
                "attention_mask": Tensor(real),
                "position_ids": Tensor(np.maximum(real.cumsum(-1, dtype=np.int32) - 1, 0)[:, prefix:]),
                "past_key_values": None if past_key_values is None else ms.mutable(past_key_values),
                "logits_to_keep": 1,
            }
            outputs = self(use_cache=True, **step)
            cache = _lengthened(outputs["past_key_values"], size)
            real = np.pad(real, [(0, 0), (0, size - filled)])
            done = np.zeros(len(real), dtype=bool)
            for slot in range(filled, filled + new):
                picked = np.where(done, pad, choose(outputs["logits"].asnumpy()[:, -1], tokens))[:, None]
                tokens = np.concatenate([tokens, picked], axis=1)
                done |= np.isin(picked[:, 0], ends)
                if done.all() or slot == filled + new - 1:
                    break
                position = real.sum(-1, keepdims=True, dtype=np.int32)
                real[:, slot] = 1
                outputs = self(
                    input_ids=Tensor(picked.astype(np.int32)),
                    attention_mask=Tensor(real),
                    position_ids=Tensor(position),
                    past_key_values=ms.mutable(cache),  # else a graph takes the tensors as constants, anew each time
                    use_cache=True,
                    cache_position=Tensor(np.array([slot], dtype=np.int32)),
                )
                cache = outputs["past_key_values"]
        finally:
            if was_training:
                self.set_train(True)
        return Tensor(tokens)


class _Chooser:
    """Picks the next token of each text from its scores, in numpy: a compiled graph would draw the same each time."""

    def __init__(
        self, do_sample: bool, temperature: float, top_k: int, top_p: float, penalty: float, seed: int | None
    ):
        for name, value, good, want in (
            ("temperature", temperature, temperature > 0, "> 0 (for the most probable token: do_sample=False)"),
            ("top_k", top_k, top_k is None or top_k >= 0, ">= 0"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", penalty, penalty > 0, "> 0"),
        ):
            if not good:
                raise ValueError(f"generate: {name}={value} should be {want}.")
        self.do_sample, self.temperature, self.penalty = do_sample, temperature, penalty
        self.top_k, self.top_p = top_k or 0, 1.0 if top_p is None else top_p
        self.random = np.random if seed is None else np.random.RandomState(seed)

    def __call__(self, scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Pick (B,) from `scores` (B, V), given all `tokens` (B, t) so far."""
        scores = scores.astype(np.float32)
        if self.penalty != 1.0:
            seen = np.take_along_axis(scores, tokens, axis=1)
            seen = np.where(seen < 0, seen * self.penalty, seen / self.penalty)
            np.put_along_axis(scores, tokens, seen, axis=1)
        if not self.do_sample:
            return scores.argmax(-1)
        order = np.argsort(-scores, axis=-1, kind="stable")
        scores = np.take_along_axis(scores, order, axis=1).astype(np.float64) / self.temperature
        if self.top_k:
            scores = scores[:, : self.top_k]
        weights = np.exp(scores - scores[:, :1])
        weights /= weights.sum(-1, keepdims=True)
        before = np.cumsum(weights, axis=-1) - weights  # the probability of all more probable tokens
        weights = np.where(before < self.top_p, weights, 0.0)
        edges = np.cumsum(weights, axis=-1)
        drawn = self.random.random_sample((len(scores), 1)) * edges[:, -1:]
        rank = np.minimum((edges <= drawn).sum(-1), np.count_nonzero(weights, axis=-1) - 1)
        return order[np.arange(len(order)), rank]


def _as_list(token: int | Iterable[int] | None) -> list[int]:
    if token is None:
        return []
    return [token] if isinstance(token, int) else [int(one) for one in token]


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.asnumpy() if isinstance(values, Tensor) else np.asarray(values)


def _read_prompt(
    input_ids: Tensor | np.ndarray | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | np.ndarray | None,
    prefix: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the result so far (B, T or 0), the model's input (B, T) or (B, T, H), and its mask (B, P + T)."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("generate needs a prompt: input_ids (B, T) or inputs_embeds (B, T, H).")
    prompt = _as_array(input_ids).astype(np.int32) if inputs_embeds is None else _as_array(inputs_embeds)
    batch, t = prompt.shape[:2]
    tokens = np.zeros((batch, 0), np.int64) if input_ids is None else _as_array(input_ids).astype(np.int64)
    if attention_mask is None:
        real = np.ones((batch, t), np.int32)
    else:
        real = (_as_array(attention_mask) != 0).astype(np.int32)
    if real.shape == (batch, t):
        real = np.pad(real, [(0, 0), (prefix, 0)], constant_values=1)
    if real.shape != (batch, prefix + t):
        raise ValueError(
            f"generate: attention_mask has the shape {real.shape}, but prompt and prefix need {(batch, prefix + t)}."
        )
    if not real[:, -1].all():
        raise ValueError("generate: the prompt is padded on the right; pad it on the left (padding_side='left').")
    return tokens, prompt, real


def _count_new(max_new_tokens: int | None, max_length: int | None, prompt: int) -> int:
    if max_new_tokens is None:
        max_new_tokens = 20 if max_length is None else max_length - prompt
    if max_new_tokens < 1:
        raise ValueError(
            f"generate would add {max_new_tokens} tokens to a prompt of {prompt}: raise max_length or max_new_tokens."
        )
    return max_new_tokens


def _lengthened(cache: tuple[tuple[Tensor, Tensor], ...], size: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Append empty slots to keys and values (B, K, S, D) until there are `size`."""
    b, heads, filled, d = cache[0][0].shape
    empty = ops.zeros((b, heads, size - filled, d), cache[0][0].dtype)
    return tuple((ops.cat((k, empty), 2), ops.cat((v, empty), 2)) for k, v in cache)
