"""What all decoders share: the way of a batch through the blocks, and the heads for the tasks.

The key/value cache is a plain argument and result, never state of a Cell: a tuple with a pair (key, value) for each
layer, (B, K, S, D) each. What is passed in may as well be a trained prefix. Without `cache_position` new keys and
values are appended; with it they are written into that slot of a cache of fixed size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.models.config import ModelConfig
from msft_peft.models.generation import GenerativeModel
from msft_peft.models.layers import linear
from msft_peft.models.losses import answer_loss, classification_loss, cross_entropy, next_token_loss
from msft_peft.models.outputs import results
from msft_peft.models.pretrained import PreTrainedModel

HEADS = ("lm_head", "score", "classifier", "qa_outputs")


class Decoder(PreTrainedModel):
    """A decoder without a head: what a family's body adds to are `enter`, `leave` and its blocks.

    Attributes:
        blocks: the attribute that holds the blocks. A block maps (x, *shared, past, slot) to (x, keys, values).
        width: the size of the last hidden state, which heads read.
        window: how many tokens back some layer may look at most, or None.
    """

    blocks: ClassVar[str] = "layers"
    heads = HEADS
    width: int
    window: int | None = None

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.width = config.hidden_size

    def positions(self, slots: Tensor, length: int, attention_mask: Tensor | None) -> Tensor:
        """The positions (1 or B, T) of the new tokens in `slots` (T,) of `length`, where the caller gives none."""
        return slots.reshape((1, -1))

    def enter(
        self, x: Tensor, slots: Tensor, length: int, position_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the input (B, T, H) of the first block, and what every block is given: masks and the like.

        Args:
            x: (B, T, H), the embedded tokens.
            slots: (T,), where they stand among the cached and new ones.
            length: S, the number of all these.
            position_ids: (1 or B, T).
            attention_mask: (B, S), or None.
        """
        raise NotImplementedError

    def leave(self, x: Tensor) -> Tensor:
        """Map the last block's output (B, T, H) to the last hidden state."""
        raise NotImplementedError

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        cache_position=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Run the decoder.

        Args:
            input_ids: (B, T), integers; or give `inputs_embeds`.
            attention_mask: (B, S), nonzero at real tokens, for the S cached and new slots; None: all are real.
            position_ids: (1 or B, T); default: counted on from the cache's end.
            past_key_values: a cache, or a prefix: a tuple of (key, value) for each layer, (B, K, S - T, D) each.
            inputs_embeds: (B, T, H), in place of `input_ids`.
            cache_position: (1,), integer: write the one new token (T = 1) into this slot of `past_key_values`, which
                then is a cache of fixed size (B, K, S, D); slots after it are not looked at.
            use_cache: also return the keys and values.
            output_hidden_states: also return the input of every layer, and the normed output, as a tuple.

        Returns:
            A dict: "last_hidden_state" (B, T, H), and, if asked for, "past_key_values" and "hidden_states".

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; `attention_mask` has not S columns; or the
                family has learned positions, and not so many.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("A decoder needs either input_ids or inputs_embeds: got both, or neither.")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        t = x.shape[1]
        cached = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        length = cached + t if cache_position is None else cached
        if attention_mask is not None and attention_mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but {cached} cached slots and "
                f"{t} new tokens need {length}. Put ones in front of it for a cache or a prefix."
            )
        if cache_position is None:
            slots = Tensor(np.arange(cached, cached + t, dtype=np.int32))
        else:
            slots = cache_position.astype(ms.int32)
        if position_ids is None:
            position_ids = self.positions(slots, length, attention_mask)
        x, shared = self.enter(x, slots, length, position_ids, attention_mask)

        states: tuple[Any, ...] = ()
        cache: tuple[Any, ...] = ()
        for i, block in enumerate(getattr(self, self.blocks)):
            if output_hidden_states:
                states = (*states, x)
            past = None if past_key_values is None else past_key_values[i]
            x, k, v = block(x, *shared, past, cache_position)
            cache = (*cache, (k, v))
        x = self.leave(x)
        outputs = {"last_hidden_state": x}
        if use_cache:
            outputs["past_key_values"] = cache
        if output_hidden_states:
            outputs["hidden_states"] = (*states, x)
        return outputs


class CausalLM(GenerativeModel):
    """A decoder with scores over the vocabulary; with `tie_word_embeddings` they share the embedding's Parameter.

    Attributes:
        body_class: the class of the decoder, which stands under `base_model_prefix`.
    """

    body_class: ClassVar[type[PreTrainedModel]]
    heads = HEADS

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        body = self.add_body(self.body_class(config))
        self.lm_head = linear(body.width, config.vocab_size, False, config.initializer_range)
        self.tie_weights()
        self.update_parameters_name()

    def tie_weights(self) -> None:
        """Let `lm_head` use the embedding's Parameter, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        cache_position=None,
        logits_to_keep=0,
        output_hidden_states=False,
    ):
        """Score the next token at every position; see `Decoder.construct` for the other arguments.

        Args:
            labels: (B, T), the token ids, -100 where no loss is wanted; the shift by one happens here.
            logits_to_keep: score only the last so many positions; 0 for all.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, V), and what the decoder returns when asked.
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            cache_position,
            use_cache,
            output_hidden_states,
        )
        x = body["last_hidden_state"]
        if logits_to_keep > 0:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)
        return results(body, {"logits": logits}, None if labels is None else next_token_loss(logits, labels))

    def get_output_embeddings(self) -> nn.Cell:
        """Return `lm_head`."""
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `lm_head`."""
        self._cells["lm_head"] = embeddings


class SequenceClassifier(PreTrainedModel):
    """A decoder with class scores, read at the last token that is not padding."""

    body_class: ClassVar[type[PreTrainedModel]]
    heads = HEADS
    fresh_heads = ("score",)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        body = self.add_body(self.body_class(config))
        self.num_labels = config.num_labels
        self.score = linear(body.width, config.num_labels, False, config.initializer_range)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Classify; see `Decoder.construct` for the arguments and `classification_loss` for `labels`.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, C), and what the decoder returns when asked.

        Raises:
            ValueError: several sequences, and no `pad_token_id` in the config to find their ends.
        """
        pad = self.config.pad_token_id
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            None,
            use_cache,
            output_hidden_states,
        )
        x = body["last_hidden_state"]
        b, t, _ = x.shape
        if pad is None and b > 1:
            raise ValueError(
                f"{b} sequences in a batch, but config.pad_token_id is None: their ends are unknown. "
                f"Set model.config.pad_token_id."
            )
        if input_ids is None or pad is None:
            last = x[:, -1]
        else:
            places = Tensor(np.arange(t, dtype=np.int32)) * ops.not_equal(input_ids, pad).astype(ms.int32)  # (B, T)
            row = ops.equal(places, places.max(-1, keepdims=True)).astype(x.dtype)
            row = row * ops.not_equal(input_ids, pad).astype(x.dtype)
            last = (row.expand_dims(1) @ x).squeeze(1)  # (B, 1, T) @ (B, T, H)
        logits = self.score(last)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return results(body, {"logits": logits}, loss)


class TokenClassifier(PreTrainedModel):
    """A decoder with class scores of every token.

    Attributes:
        head: the attribute that holds the scores' layer.
    """

    body_class: ClassVar[type[PreTrainedModel]]
    heads = HEADS
    head: ClassVar[str] = "classifier"
    fresh_heads = ("classifier",)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        body = self.add_body(self.body_class(config))
        self.num_labels = config.num_labels
        rates = [config.get(name) for name in ("classifier_dropout", "hidden_dropout")]
        self.dropout = nn.Dropout(p=next((rate for rate in rates if rate is not None), 0.1))
        setattr(self, self.head, linear(body.width, config.num_labels, True, config.initializer_range))
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Classify every token; see `Decoder.construct`. `labels` are (B, T), -100 where no loss is wanted.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, C), and what the decoder returns when asked.
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            None,
            use_cache,
            output_hidden_states,
        )
        logits = getattr(self, self.head)(self.dropout(body["last_hidden_state"]))
        return results(body, {"logits": logits}, None if labels is None else cross_entropy(logits, labels))


class QuestionAnswerer(PreTrainedModel):
    """A decoder with scores of every token to be the start or the end of the answer."""

    body_class: ClassVar[type[PreTrainedModel]]
    heads = HEADS
    fresh_heads = ("qa_outputs",)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        body = self.add_body(self.body_class(config))
        self.num_labels = 2
        self.qa_outputs = linear(body.width, 2, True, config.initializer_range)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        """Score starts and ends; see `Decoder.construct` for the arguments and `answer_loss` for the positions.

        Returns:
            A dict: "loss" if both positions are given, "start_logits" and "end_logits" (B, T), and what the decoder
            returns when asked.
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            None,
            use_cache,
            output_hidden_states,
        )
        logits = self.qa_outputs(body["last_hidden_state"])  # (B, T, 2)
        start, end = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = answer_loss(start, end, start_positions, end_positions)
        return results(body, {"start_logits": start, "end_logits": end}, loss)
