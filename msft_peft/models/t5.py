"""T5 and mT5: encoder-decoders under HuggingFace's module and parameter names (Raffel et al. 2019, arXiv:1910.10683).

A block is  h = x + Attention(RMSNorm(x)),  a decoder's then  h = h + CrossAttention(RMSNorm(h), encoder),  and last
y = h + FF(RMSNorm(h)). Attention does not divide by √D; a learned bias for each head and distance takes the place of
positions, held by the first block and shared by all.

T5 1.0 has FF(x) = W_o·relu(W_i·x) and scores from the embedding's own matrix, on states times 1/√d_model; version 1.1
and mT5 have FF(x) = W_o·(gelu(W₀·x) ∘ W₁·x) and a matrix of their own for the scores.

The cache is a plain argument and result: for each decoder layer (key, value, cross key, cross value), the first two
(B, N, S, D) from the decoder's own tokens, the others (B, N, T, D) from the encoder's T states. In a cache that is
passed in, a pair (key, value) stands for a prefix of trained keys and values: they precede the decoder's tokens in its
self-attention, at slots 0 to P - 1 (so the first token is at distance 1 from the last of them), and cross-attention is
computed from the encoder as always. That is all that prefix tuning of HF peft reaches in an encoder-decoder: it makes
twice as many values, for self- and cross-attention, and then drops the latter.

Differs: in HF's `generate` such a prefix is not counted in the first token's slot, so that the causal mask hides all
of it but slot 0, and the first tokens themselves; training, and any forward pass, do see it. Here generation computes
what training did.
"""

from __future__ import annotations

from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.backend.activations import tanh
from msft_peft.models.config import MT5Config, T5Config
from msft_peft.models.generation import Seq2SeqModel
from msft_peft.models.layers import Embedding, linear
from msft_peft.models.losses import IGNORE, answer_loss, classification_loss, cross_entropy
from msft_peft.models.outputs import results
from msft_peft.models.pretrained import PreTrainedModel
from msft_peft.models.t5_stack import T5Stack


def shift_right(labels: Tensor, start: int | None, pad: int | None) -> Tensor:
    """Move `labels` (B, T) one place to the right, behind the token `start`; -100 becomes `pad`.

    Raises:
        ValueError: the config names neither.
    """
    if start is None or pad is None:
        raise ValueError(
            f"decoder inputs cannot be made from labels: config.decoder_start_token_id is {start} and "
            f"config.pad_token_id is {pad}. Set both (T5's are 0), or pass decoder_input_ids."
        )
    shifted = ops.cat((ops.full_like(labels[:, :1], start), labels[:, :-1]), 1)
    return ops.where(ops.equal(shifted, IGNORE), ops.full_like(shifted, pad), shifted)


def _last_state(encoder_outputs):
    """The encoder's last state, from a dict, a tuple or the Tensor itself."""
    if isinstance(encoder_outputs, dict):
        return encoder_outputs["last_hidden_state"]
    if isinstance(encoder_outputs, (tuple, list)):
        return encoder_outputs[0]
    return encoder_outputs


class T5PreTrainedModel(PreTrainedModel):
    """The base of all T5 models."""

    config_class: ClassVar[type[T5Config]] = T5Config
    base_model_prefix = "transformer"
    # The cross-attention of old files has a bias for distances that was never used.
    heads: ClassVar[tuple[str, ...]] = (
        "lm_head",
        "classification_head",
        "classifier",
        "qa_outputs",
        "EncDecAttention.relative_attention_bias",
    )

    def _add_stacks(self, config: T5Config, decoder: bool = True) -> None:
        """Build the embedding and the stacks that share it."""
        self.shared = Embedding(config.vocab_size, config.d_model, config.initializer_factor)
        self.encoder = T5Stack(config, self.shared, False)
        if decoder:
            self.decoder = T5Stack(config, self.shared, True)

    def get_encoder(self) -> nn.Cell:
        """Return the encoder."""
        return self.base_model.encoder

    def get_decoder(self) -> nn.Cell:
        """Return the decoder."""
        return self.base_model.decoder

    def get_input_embeddings(self) -> nn.Cell:
        """Return the embedding that encoder and decoder share."""
        return self.base_model.shared

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of the embedding that encoder and decoder share."""
        body = self.base_model
        body._cells["shared"] = embeddings
        for name in ("encoder", "decoder"):
            if name in body._cells:
                body._cells[name]._cells["embed_tokens"] = embeddings

    def _run(
        self,
        input_ids,
        attention_mask,
        decoder_input_ids,
        decoder_attention_mask,
        encoder_outputs,
        past_key_values,
        inputs_embeds,
        decoder_inputs_embeds,
        use_cache,
        cache_position,
        output_hidden_states,
    ):
        """Run encoder and decoder; see `T5Model.construct`."""
        outputs = {}
        states = None
        if encoder_outputs is not None:
            states = _last_state(encoder_outputs)
        elif past_key_values is None or len(past_key_values[0]) == 2:
            encoded = self.encoder(
                input_ids, attention_mask, None, None, inputs_embeds, None, None, False, output_hidden_states
            )
            states = encoded["last_hidden_state"]
            if output_hidden_states:
                outputs["encoder_hidden_states"] = encoded["hidden_states"]
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            states,
            attention_mask,
            decoder_inputs_embeds,
            past_key_values,
            cache_position,
            use_cache,
            output_hidden_states,
        )
        if states is not None:
            outputs["encoder_last_hidden_state"] = states
        outputs["last_hidden_state"] = decoded["last_hidden_state"]
        if use_cache:
            outputs["past_key_values"] = decoded["past_key_values"]
        if output_hidden_states:
            outputs["decoder_hidden_states"] = decoded["hidden_states"]
        return outputs


class T5Model(T5PreTrainedModel):
    """Encoder and decoder without a head.

    Raises:
        ValueError: the config asks for an activation that is not built.
    """

    def __init__(self, config: T5Config):
        super().__init__(config)
        self._add_stacks(config)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        use_cache=False,
        cache_position=None,
        output_hidden_states=False,
    ):
        """Run encoder and decoder.

        Args:
            input_ids: (B, S), the encoder's tokens; or give `inputs_embeds`, or `encoder_outputs`, or a cache.
            attention_mask: (B, S), nonzero at the encoder's real tokens; None: all are real.
            decoder_input_ids: (B, T), the decoder's tokens; or give `decoder_inputs_embeds`.
            decoder_attention_mask: (B, P + T), nonzero at real tokens, for P cached and T new slots.
            encoder_outputs: what the encoder returned: its dict, a tuple with the last state, or that (B, S, H).
            past_key_values: a cache, (key, value, cross key, cross value) for each layer, which makes the encoder's
                outputs superfluous; or a prefix, (key, value) for each layer, each (B, N, P, D).
            inputs_embeds: (B, S, H), in place of `input_ids`.
            decoder_inputs_embeds: (B, T, H), in place of `decoder_input_ids`.
            use_cache: also return the keys and values.
            cache_position: (1,), integer: write the one new token (T = 1) into this slot of `past_key_values`, whose
                own keys and values then have a fixed size (B, N, P, D); slots after it are not looked at.
            output_hidden_states: also return the input of every layer, and the normed output, of both stacks.

        Returns:
            A dict: "last_hidden_state" (B, T, H), "encoder_last_hidden_state" (B, S, H) unless a cache stands for it,
            and, if asked for, "past_key_values", "decoder_hidden_states" and "encoder_hidden_states".

        Raises:
            ValueError: not exactly one of ids and embeddings; or `decoder_attention_mask` has not P + T columns.
        """
        return self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            cache_position,
            output_hidden_states,
        )


class T5EncoderModel(T5PreTrainedModel):
    """The encoder alone."""

    heads = (*T5PreTrainedModel.heads, "decoder")

    def __init__(self, config: T5Config):
        super().__init__(config)
        self._add_stacks(config, decoder=False)
        self.update_parameters_name()

    def construct(self, input_ids=None, attention_mask=None, inputs_embeds=None, output_hidden_states=False):
        """Run the encoder; see `T5Model.construct` for the arguments.

        Returns:
            A dict: "last_hidden_state" (B, S, H), and "hidden_states" if asked for.
        """
        return self.encoder(
            input_ids, attention_mask, None, None, inputs_embeds, None, None, False, output_hidden_states
        )


class T5ForConditionalGeneration(T5PreTrainedModel, Seq2SeqModel):
    """Encoder and decoder with scores over the vocabulary."""

    def __init__(self, config: T5Config):
        super().__init__(config)
        self._add_stacks(config)
        self.lm_head = linear(config.d_model, config.vocab_size, False, config.initializer_factor)
        self.tied = config.tie_word_embeddings
        self.tie_weights()
        self.update_parameters_name()

    def tie_weights(self) -> None:
        """Let `lm_head` use the embedding's Parameter, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the decoder's inputs (B, T) for `labels` (B, T); see `shift_right`."""
        return shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=False,
        cache_position=None,
        logits_to_keep=0,
        output_hidden_states=False,
    ):
        """Score the decoder's next token at every position; see `T5Model.construct` for the other arguments.

        Args:
            labels: (B, T), the wanted tokens, -100 where no loss is wanted. Without decoder inputs, these are the
                labels moved to the right behind `config.decoder_start_token_id`.
            logits_to_keep: score only the last so many positions; 0 for all.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, V), and what `T5Model` returns beside its last state.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        body = self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            cache_position,
            output_hidden_states,
        )
        x = body["last_hidden_state"]
        if logits_to_keep > 0:
            x = x[:, -logits_to_keep:]
        if self.tied:
            x = x * self.config.d_model**-0.5
        logits = self.lm_head(x)
        return results(body, {"logits": logits}, None if labels is None else cross_entropy(logits, labels))

    def get_output_embeddings(self) -> nn.Cell:
        """Return `lm_head`."""
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of `lm_head`."""
        self._cells["lm_head"] = embeddings


class T5ClassificationHead(nn.Cell):
    """W₂·tanh(W₁·x + b₁) + b₂, with dropout before both."""

    def __init__(self, config: T5Config):
        super().__init__()
        std = config.initializer_factor * config.d_model**-0.5
        self.dense = linear(config.d_model, config.d_model, True, std)
        self.first_dropout = nn.Dropout(p=config.classifier_dropout)
        self.dropout = nn.Dropout(p=config.classifier_dropout)
        self.out_proj = linear(config.d_model, config.num_labels, True, std)

    def construct(self, x):
        """Map (B, H) to (B, C)."""
        return self.out_proj(self.dropout(tanh(self.dense(self.first_dropout(x)))))


class T5ForSequenceClassification(T5PreTrainedModel):
    """Class scores from the decoder's state at the last eos token; the decoder reads the input, moved to the right."""

    fresh_heads = ("classification_head",)
    body_class: ClassVar[type[T5Model]] = T5Model

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self.body_class(config)
        self.classification_head = T5ClassificationHead(config)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        decoder_inputs_embeds=None,
        labels=None,
        output_hidden_states=False,
    ):
        """Classify; see `T5Model.construct` for the arguments and `classification_loss` for `labels`.

        `input_ids` must be given, to find the last eos token of each text: a text without one gets the score NaN.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, C), and what `T5Model` returns beside its last state.

        Raises:
            ValueError: no `input_ids`.
        """
        if input_ids is None:
            raise ValueError("T5ForSequenceClassification needs input_ids: it reads its scores at their eos tokens.")
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
            decoder_input_ids = shift_right(input_ids, start, pad)
        body = self.transformer(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            None,
            decoder_inputs_embeds,
            False,
            None,
            output_hidden_states,
        )
        x = body["last_hidden_state"]
        ends = ops.equal(input_ids, self.config.eos_token_id)
        places = Tensor(np.arange(1, x.shape[1] + 1, dtype=np.int32)) * ends.astype(ms.int32)  # (B, T)
        last = ops.logical_and(ends, ops.equal(places, places.max(-1, keepdims=True))).astype(x.dtype)
        x = (last.expand_dims(1) @ x).squeeze(1) / last.sum(-1, keepdims=True)  # (B, 1, T) @ (B, T, H)
        logits = self.classification_head(x)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return results(body, {"logits": logits}, loss)


class T5ForTokenClassification(T5PreTrainedModel):
    """Class scores of every token, from the encoder."""

    fresh_heads = ("classifier",)
    heads = T5EncoderModel.heads
    body_class: ClassVar[type[T5EncoderModel]] = T5EncoderModel

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self.body_class(config)
        self.dropout = nn.Dropout(p=config.classifier_dropout)
        self.classifier = linear(config.d_model, config.num_labels, True, config.initializer_factor)
        self.update_parameters_name()

    def construct(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_hidden_states=False
    ):
        """Classify every token; `labels` are (B, T), -100 where no loss is wanted.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, C), and "hidden_states" when asked.
        """
        body = self.transformer(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        logits = self.classifier(self.dropout(body["last_hidden_state"]))
        return results(body, {"logits": logits}, None if labels is None else cross_entropy(logits, labels))


class T5ForQuestionAnswering(T5PreTrainedModel):
    """Scores of every decoder token to be the start or the end; the decoder reads the input, moved to the right."""

    fresh_heads = ("qa_outputs",)

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.num_labels = 2
        self._add_stacks(config)
        self.qa_outputs = linear(config.d_model, 2, True, config.initializer_factor * config.d_model**-0.5)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        output_hidden_states=False,
    ):
        """Score starts and ends; see `T5Model.construct` for the other arguments, `answer_loss` for the positions.

        Returns:
            A dict: "loss" if both positions are given, "start_logits" and "end_logits" (B, T), and what `T5Model`
            returns beside its last state.

        Raises:
            ValueError: neither decoder inputs nor `input_ids` to make them from.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError("T5ForQuestionAnswering needs decoder_input_ids, or input_ids to make them from.")
            start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
            decoder_input_ids = shift_right(input_ids, start, pad)
        body = self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            False,
            None,
            output_hidden_states,
        )
        logits = self.qa_outputs(body["last_hidden_state"])  # (B, T, 2)
        start_logits, end_logits = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = answer_loss(start_logits, end_logits, start_positions, end_positions)
        return results(body, {"start_logits": start_logits, "end_logits": end_logits}, loss)


class MT5Model(T5Model):
    """mT5 without a head."""

    config_class = MT5Config


class MT5EncoderModel(T5EncoderModel):
    """mT5's encoder."""

    config_class = MT5Config


class MT5ForConditionalGeneration(T5ForConditionalGeneration):
    """mT5 with scores over the vocabulary."""

    config_class = MT5Config


class MT5ForSequenceClassification(T5ForSequenceClassification):
    """mT5 with class scores."""

    config_class = MT5Config
    body_class = MT5Model


class MT5ForTokenClassification(T5ForTokenClassification):
    """mT5 with class scores of every token."""

    config_class = MT5Config
    body_class = MT5EncoderModel


class MT5ForQuestionAnswering(T5ForQuestionAnswering):
    """mT5 with scores of where an answer starts and ends."""

    config_class = MT5Config
