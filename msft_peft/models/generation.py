"""Text generation with a key/value cache of fixed size: greedy, by sampling, by beam search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from msft_peft.models.generation_config import GenerationConfig
from msft_peft.models.pretrained import PreTrainedModel
from msft_peft.models.search import Beams, Sampling, rearranged

_BUCKET = 64  # in graph mode prompts and caches are lengthened to multiples of this: few shapes, few compilations


@dataclass
class _Start:
    """What the loop begins with: the model has read the prompts.

    Attributes:
        tokens: (B, t), the result so far; t may be 0.
        scores: (B, V), of the first new token.
        cache: keys and values of the S slots that are filled.
        real: (B, S), 1 at slots that hold a real token.
        new: how many tokens may be added.
        names: what the model calls the ids and the mask of its new tokens.
        fixed: arguments of every step, with the batch as their first axis.
        position: (B, 1), of the first new token; None if the model counts by itself.
    """

    tokens: np.ndarray
    scores: np.ndarray
    cache: tuple
    real: np.ndarray
    new: int
    names: tuple[str, str] = ("input_ids", "attention_mask")
    fixed: dict[str, np.ndarray] = field(default_factory=dict)
    position: np.ndarray | None = None


class GenerativeModel(PreTrainedModel):
    """A model with scores over the vocabulary that can `generate`.

    The prompt runs through the model once; then each token runs alone against a cache of fixed size, so that in graph
    mode this step is compiled once. The cache lives in a call of `generate` only: nothing is left in the model.

    Attributes:
        on_repeat: called with R when each row of the batch is about to stand in it R times, for several texts of one
            prompt.
    """

    on_repeat: Callable[[int], None] | None = None

    def generate(
        self,
        input_ids: Tensor | np.ndarray | None = None,
        attention_mask: Tensor | np.ndarray | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: tuple[tuple[Tensor, Tensor], ...] | None = None,
        position_ids: Tensor | np.ndarray | None = None,
        generation_config: Any = None,
        show_progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """Continue each prompt until an eos token ends it or it is long enough.

        Args:
            input_ids: (B, T), padded on the left; may be left out if `inputs_embeds` are given.
            attention_mask: (B, T) or (B, P + T), nonzero at real tokens; without the part for the P slots of
                `past_key_values` these count as real. Default: all are real.
            inputs_embeds: (B, T, H), in place of the embeddings of `input_ids`, such as soft prompts.
            past_key_values: a prefix of P keys and values for each layer, which stands before the prompt.
            position_ids: (B, T), of the prompt, from whose last one on new tokens are counted; default: real tokens
                are counted, those of a prefix too.
            generation_config: options, as a dict or an object with `to_dict()`, such as HF's GenerationConfig.
            show_progress: show a bar that counts the tokens.
            options: see `GenerationConfig`; they win over `generation_config`.

        Returns:
            (B·R, T + new), int64: R continuations of each prompt, one after another, with the prompt before them,
            R = `num_return_sequences`; (B·R, new) if only `inputs_embeds` were given.

        Raises:
            TypeError: options that do not exist.
            ValueError: no prompt, a prompt padded on the right, a mask of another length, or an option out of range.
            NotImplementedError: an option of HF's that is not built.
        """
        config = GenerationConfig.of(self.config, generation_config, options)
        prefix = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        tokens, prompt, real = _read_prompt(input_ids, inputs_embeds, attention_mask, prefix)
        new = config.count_new(prompt.shape[1])
        if position_ids is None:
            positions = np.maximum(real.cumsum(-1, dtype=np.int32) - 1, 0)[:, prefix:]
        else:
            positions = _as_array(position_ids).astype(np.int32)
        if ms.get_context("mode") == ms.GRAPH_MODE and not (prefix and self.base_model.window):
            extra = -prompt.shape[1] % _BUCKET  # stands before the prompt: a window reaches over it, but to no prefix
            prompt = np.pad(prompt, [(0, 0), (extra, 0)] + [(0, 0)] * (prompt.ndim - 2))
            real = np.insert(real, [prefix] * extra, 0, axis=1)
            positions = np.pad(positions, [(0, 0), (extra, 0)])
        with _evaluating(self):
            outputs = self(
                **{"input_ids" if inputs_embeds is None else "inputs_embeds": Tensor(prompt)},
                attention_mask=Tensor(real),
                position_ids=Tensor(positions),
                past_key_values=None if past_key_values is None else ms.mutable(past_key_values),
                use_cache=True,
                logits_to_keep=1,
            )
            scores, cache = outputs["logits"].asnumpy()[:, -1], outputs["past_key_values"]
            start = _Start(tokens, scores, cache, real, new, position=positions[:, -1:] + 1)
            return self._continue(start, config, show_progress)

    def _continue(self, start: _Start, config: GenerationConfig, show_progress: bool) -> Tensor:
        """Add tokens to the prompts of `start`, one a step, and return the texts."""
        search = (Sampling if config.num_beams == 1 else Beams)(config, start.tokens, start.new)
        scores, cache, real, fixed, position = start.scores, start.cache, start.real, start.fixed, start.position
        if config.rows > 1:
            rows = np.repeat(np.arange(len(real)), config.rows)
            cache = rearranged(cache, rows, all_parts=True)
            scores, real, fixed = scores[rows], real[rows], {name: value[rows] for name, value in fixed.items()}
            position = None if position is None else position[rows]
            if self.on_repeat is not None:
                self.on_repeat(config.rows)
        filled = real.shape[1]
        fixed_size = ms.get_context("mode") == ms.GRAPH_MODE  # else a cache that grows is both shorter and cheaper
        size = filled + start.new
        size += -size % _BUCKET
        real = np.pad(real, [(0, 0), (0, size - filled)])
        cache = _lengthened(cache, size) if fixed_size else cache
        given: dict[str, Any] = {name: Tensor(value) for name, value in fixed.items()}
        for slot in tqdm(range(filled, filled + start.new), desc="Generating", disable=not show_progress):
            if search.advance(scores):
                break
            if search.parents is not None:
                cache = rearranged(cache, search.parents)
            real[:, slot] = 1
            if position is not None:
                given["position_ids"] = Tensor(position)
                position = position + 1
            if fixed_size:
                given["cache_position"] = Tensor(np.array([slot], dtype=np.int32))
            given[start.names[0]] = Tensor(search.tokens.astype(np.int32))
            given[start.names[1]] = Tensor(real if fixed_size else real[:, : slot + 1])
            cache = ms.mutable(cache)  # else a graph takes the tensors for constants, anew each time
            outputs = self(past_key_values=cache, use_cache=True, **given)
            scores, cache = outputs["logits"].asnumpy()[:, -1], outputs["past_key_values"]
        return Tensor(search.result())


class Seq2SeqModel(GenerativeModel):
    """An encoder-decoder with scores over the vocabulary that can `generate`.

    The encoder runs once, and so do the projections of its states to the keys and values of cross-attention.
    """

    def get_encoder(self) -> nn.Cell:
        """Return the encoder."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor | np.ndarray | None = None,
        attention_mask: Tensor | np.ndarray | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_input_ids: Tensor | np.ndarray | None = None,
        decoder_attention_mask: Tensor | np.ndarray | None = None,
        past_key_values: tuple[tuple[Tensor, Tensor], ...] | None = None,
        generation_config: Any = None,
        show_progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """Write a text for each input until an eos token ends it or it is long enough.

        Args:
            input_ids: (B, S), what the encoder reads, padded on either side.
            attention_mask: (B, S), nonzero at the encoder's real tokens. Default: all are real.
            inputs_embeds: (B, S, H), in place of `input_ids`.
            encoder_outputs: what the encoder returned earlier, in place of both.
            decoder_input_ids: (B, T), what the texts begin with, padded on the left; default: the start token. Where
                it is not there, it is put first.
            decoder_attention_mask: (B, T) or (B, P + T), nonzero at real tokens. Default: all are real.
            past_key_values: a prefix of P keys and values for each layer of the decoder, before its tokens.
            generation_config: options, as a dict or an object with `to_dict()`, such as HF's GenerationConfig.
            show_progress: show a bar that counts the tokens.
            options: see `GenerationConfig`; they win over `generation_config`.

        Returns:
            (B·R, T + new), int64: R = `num_return_sequences` texts for each input, with the decoder's first tokens.

        Raises:
            TypeError: options that do not exist.
            ValueError: no input, no start token, a mask of another length, or an option out of range.
            NotImplementedError: an option of HF's that is not built.
        """
        config = GenerationConfig.of(self.config, generation_config, options)
        if input_ids is None and inputs_embeds is None and encoder_outputs is None:
            raise ValueError("generate needs input_ids (B, S), inputs_embeds (B, S, H) or encoder_outputs.")
        name, source = "input_ids", input_ids
        if encoder_outputs is not None:
            name, source = "encoder_outputs", _last_state(encoder_outputs)
        elif inputs_embeds is not None:
            name, source = "inputs_embeds", inputs_embeds
        source = _as_array(source)
        source = source.astype(np.int32) if source.ndim == 2 else source
        seen = _read_mask(attention_mask, source.shape[:2], "attention_mask")
        if ms.get_context("mode") == ms.GRAPH_MODE:
            extra = -source.shape[1] % _BUCKET
            source = np.pad(source, [(0, 0), (0, extra)] + [(0, 0)] * (source.ndim - 2))
            seen = np.pad(seen, [(0, 0), (0, extra)])

        first, first_mask = self._first_tokens(decoder_input_ids, decoder_attention_mask, config, len(source))
        prefix = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        tokens, prompt, real = _read_prompt(first, None, first_mask, prefix)
        new = config.count_new(prompt.shape[1])
        with _evaluating(self):
            outputs = self(
                **{name: Tensor(source)},
                attention_mask=Tensor(seen),
                decoder_input_ids=Tensor(prompt),
                decoder_attention_mask=Tensor(real),
                past_key_values=None if past_key_values is None else ms.mutable(past_key_values),
                use_cache=True,
                logits_to_keep=1,
            )
            scores, cache = outputs["logits"].asnumpy()[:, -1], outputs["past_key_values"]
            names = ("decoder_input_ids", "decoder_attention_mask")
            start = _Start(tokens, scores, cache, real, new, names, {"attention_mask": seen})
            return self._continue(start, config, show_progress)

    def _first_tokens(
        self, given: Tensor | np.ndarray | None, mask: Tensor | np.ndarray | None, config: GenerationConfig, batch: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the decoder's first tokens (B, T), the start token before all others, and their mask."""
        start = config.decoder_start_token_id
        start = self.config.bos_token_id if start is None else start
        if given is not None:
            first = _as_array(given)
            if start is None or (first[:, 0] == start).any():
                return first, None if mask is None else _as_array(mask)
            mask = None if mask is None else np.pad(_as_array(mask), [(0, 0), (1, 0)], constant_values=1)
            return np.pad(first, [(0, 0), (1, 0)], constant_values=start), mask
        if start is None:
            raise ValueError(
                "generate does not know what to begin with: set model.config.decoder_start_token_id, or pass "
                "decoder_start_token_id or decoder_input_ids."
            )
        return np.full((batch, 1), start), None if mask is None else _as_array(mask)


@contextlib.contextmanager
def _evaluating(model: nn.Cell) -> Iterator[None]:
    """Inside the block the model is not in training mode."""
    was_training = model.training
    if was_training:  # not otherwise: it would forget a phase that a caller has set
        model.set_train(False)
    try:
        yield
    finally:
        if was_training:
            model.set_train(True)


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.asnumpy() if isinstance(values, Tensor) else np.asarray(values)


def _last_state(encoder_outputs: Any) -> Tensor:
    """The encoder's last state, from its dict, from a tuple, or itself."""
    if isinstance(encoder_outputs, dict):
        return encoder_outputs["last_hidden_state"]
    return encoder_outputs[0] if isinstance(encoder_outputs, (tuple, list)) else encoder_outputs


def _read_mask(given: Tensor | np.ndarray | None, shape: tuple[int, ...], name: str, prefix: int = 0) -> np.ndarray:
    """Return the mask (B, P + T) for tokens of the `shape` (B, T), 1 at real ones; P slots of a prefix are real."""
    real = np.ones(shape, np.int32) if given is None else (_as_array(given) != 0).astype(np.int32)
    if real.shape == shape:
        real = np.pad(real, [(0, 0), (prefix, 0)], constant_values=1)
    wanted = (shape[0], prefix + shape[1])
    if real.shape != wanted:
        raise ValueError(f"generate: {name} has the shape {real.shape}, but prompt and prefix need {wanted}.")
    return real


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
    real = _read_mask(attention_mask, (batch, t), "attention_mask", prefix)
    if not real[:, -1].all():
        raise ValueError("generate: the prompt is padded on the right; pad it on the left (padding_side='left').")
    return tokens, prompt, real


def _lengthened(cache: tuple, size: int) -> tuple:
    """Append empty slots to the decoder's own keys and values (B, K, S, D) until there are `size`."""
    b, heads, filled, d = cache[0][0].shape
    empty = ops.zeros((b, heads, size - filled, d), cache[0][0].dtype)
    return tuple((ops.cat((k, empty), 2), ops.cat((v, empty), 2), *cross) for k, v, *cross in cache)
