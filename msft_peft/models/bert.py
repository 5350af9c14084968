"""BERT and its task heads, under HuggingFace's module and parameter names (Devlin et al. 2018, arXiv:1810.04805).

A block is  h = LN(x + Attention(x)),  y = LN(h + W₂·act(W₁·h)).
"""

from __future__ import annotations

from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from msft_peft.backend.activations import tanh
from msft_peft.models.attention import attend, heads_first, padding_mask, remember
from msft_peft.models.config import BertConfig
from msft_peft.models.layers import Embedding, LayerNorm, activation, check_length, linear
from msft_peft.models.losses import answer_loss, classification_loss, cross_entropy
from msft_peft.models.outputs import results
from msft_peft.models.pretrained import PreTrainedModel


class BertEmbeddings(nn.Cell):
    """LN(word + position + type), then dropout; the row of `padding_position`, if any, stays zero."""

    def __init__(self, config: BertConfig, padding_position: int | None = None):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.word_embeddings = Embedding(config.vocab_size, width, std, config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, width, std, padding_position)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width, std)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)

    def construct(self, input_ids, token_type_ids, position_ids, inputs_embeds):
        """Embed `input_ids` (B, T), or take `inputs_embeds` (B, T, H), at `position_ids` (1 or B, T)."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = ops.zeros_like(position_ids)
        x = x + (self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids))
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Cell):
    """Multi-head attention without its output projection."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.head_dim = width // config.num_attention_heads
        self.query = linear(width, width, True, std)
        self.key = linear(width, width, True, std)
        self.value = linear(width, width, True, std)
        self.dropout = config.attention_probs_dropout_prob

    def construct(self, x, mask, past):
        """Attend from `x` (B, T, H) to itself, and to a prefix `past` of keys and values (B, N, P, D)."""
        q = heads_first(self.query(x), self.head_dim)  # (B, N, T, D)
        k, v = heads_first(self.key(x), self.head_dim), heads_first(self.value(x), self.head_dim)
        if past is not None:
            k, v = remember(past[0], k, None), remember(past[1], v, None)
        return attend(q, k, v, mask, self.dropout if self.training else 0.0)


class BertResidualOutput(nn.Cell):
    """LN(residual + dropout(W·x + b)): how attention and MLP both end."""

    def __init__(self, config: BertConfig, inputs: int):
        super().__init__()
        self.dense = linear(inputs, config.hidden_size, True, config.initializer_range)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)

    def construct(self, x, residual):
        """Map `x` (B, T, inputs) and `residual` (B, T, H) to (B, T, H)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Cell):
    """Attention, output projection, residual."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidualOutput(config, config.hidden_size)

    def construct(self, x, mask, past):
        """Map (B, T, H) to (B, T, H)."""
        return self.output(self.self(x, mask, past), x)


class BertIntermediate(nn.Cell):
    """The first half of the MLP."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = linear(config.hidden_size, config.intermediate_size, True, config.initializer_range)
        self.intermediate_act_fn = activation(config.hidden_act)

    def construct(self, x):
        """Map (B, T, H) to (B, T, I)."""
        return self.intermediate_act_fn(self.dense(x))


class BertLayer(nn.Cell):
    """One block."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidualOutput(config, config.intermediate_size)

    def construct(self, x, mask, past=None):
        """Map (B, T, H) to (B, T, H)."""
        x = self.attention(x, mask, past)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Cell):
    """The blocks."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.CellList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def construct(self, x, mask, past_key_values):
        """Return the input of every block and the last output, each (B, T, H)."""
        states: tuple[Any, ...] = (x,)
        for i, layer in enumerate(self.layer):
            x = layer(x, mask, None if past_key_values is None else past_key_values[i])
            states = (*states, x)
        return states


class BertPooler(nn.Cell):
    """tanh(W·x + b) of the first token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = linear(config.hidden_size, config.hidden_size, True, config.initializer_range)

    def construct(self, x):
        """Map (B, T, H) to (B, H)."""
        return tanh(self.dense(x[:, 0]))


class BertPreTrainedModel(PreTrainedModel):
    """The base of all BERT models; those with a head keep a `body_class` under `base_model_prefix`."""

    config_class: ClassVar[type[BertConfig]] = BertConfig
    base_model_prefix = "bert"
    heads = ("cls", "classifier", "qa_outputs", "pooler")
    fresh_heads = heads


class BertModel(BertPreTrainedModel):
    """The encoder.

    Args:
        config: the settings.
        add_pooling_layer: whether to also pool the first token, as classifiers of sequences do.

    Raises:
        ValueError: the config asks for a decoder, for other than absolute positions, or an unknown activation.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        if config.position_embedding_type != "absolute" or config.is_decoder:
            raise ValueError(
                f"{type(self).__name__} is an encoder with absolute positions, but the config has "
                f"position_embedding_type='{config.position_embedding_type}' and is_decoder={config.is_decoder}. "
                f"Other kinds are not built."
            )
        self.embeddings = self.embedder(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        output_hidden_states=False,
    ):
        """Run the encoder.

        Args:
            input_ids: (B, T), integers; or give `inputs_embeds`.
            attention_mask: (B, P + T), nonzero at real tokens; None: all are real.
            token_type_ids: (B, T), the sentence that a token belongs to; default 0.
            position_ids: (1 or B, T); default: counted on from the prefix.
            inputs_embeds: (B, T, H), in place of the word embeddings.
            past_key_values: a prefix of P keys and values for each layer, a tuple of pairs (B, N, P, D).
            output_hidden_states: also return the embeddings and every block's output, as a tuple.

        Returns:
            A dict: "last_hidden_state" (B, T, H), "pooler_output" (B, H) if there is a pooler, "hidden_states".

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; `attention_mask` has not P + T columns; or
                there are no positions for so many tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("An encoder needs either input_ids or inputs_embeds: got both, or neither.")
        t = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        prefix = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        length = prefix + t
        if attention_mask is not None and attention_mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but prefix and tokens need "
                f"{length}. Put ones in front of it for a prefix."
            )
        if position_ids is None:
            position_ids = self.positions(input_ids, prefix, length)
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = None if attention_mask is None else padding_mask(attention_mask)
        states = self.encoder(x, mask, past_key_values)
        x = states[-1]
        outputs = {"last_hidden_state": x}
        if self.pooler is not None:
            outputs["pooler_output"] = self.pooler(x)
        if output_hidden_states:
            outputs["hidden_states"] = states
        return outputs

    def embedder(self, config: BertConfig) -> BertEmbeddings:
        """Make the embeddings."""
        return BertEmbeddings(config)

    def positions(self, input_ids: Tensor | None, prefix: int, length: int) -> Tensor:
        """The positions (1 or B, T) of the tokens behind a prefix, where the caller gives none."""
        check_length(length, self.config.max_position_embeddings)
        return Tensor(np.arange(prefix, length, dtype=np.int32)).reshape((1, -1))

    def get_input_embeddings(self) -> nn.Cell:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of the word embeddings."""
        self.embeddings._cells["word_embeddings"] = embeddings


def head_dropout(config: BertConfig) -> nn.Dropout:
    """The dropout before a classifier."""
    given = config.classifier_dropout
    return nn.Dropout(p=config.hidden_dropout_prob if given is None else given)


class BertForSequenceClassification(BertPreTrainedModel):
    """Scores of the whole sequence, from the pooled first token."""

    body_class: ClassVar[type[BertModel]] = BertModel

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.build(config)
        self.update_parameters_name()

    def build(self, config: BertConfig) -> None:
        """Make the body and the head."""
        self.add_body(self.body_class(config))
        self.dropout = head_dropout(config)
        self.classifier = linear(config.hidden_size, config.num_labels, True, config.initializer_range)

    def classify(self, body):
        """The scores (B, C) from what the body returned."""
        return self.classifier(self.dropout(body["pooler_output"]))

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        past_key_values=None,
        output_hidden_states=False,
    ):
        """Classify; see `BertModel.construct` for the arguments and `classification_loss` for `labels`.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, C), and "hidden_states" when asked.
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            past_key_values,
            output_hidden_states,
        )
        logits = self.classify(body)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return results(body, {"logits": logits}, loss)


class BertForTokenClassification(BertPreTrainedModel):
    """Scores of every token."""

    body_class: ClassVar[type[BertModel]] = BertModel

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.add_body(self.body_class(config, add_pooling_layer=False))
        self.dropout = head_dropout(config)
        self.classifier = linear(config.hidden_size, config.num_labels, True, config.initializer_range)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        past_key_values=None,
        output_hidden_states=False,
    ):
        """Classify every token; `labels` are (B, T), -100 where no loss is wanted.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, C), and "hidden_states" when asked.
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            past_key_values,
            output_hidden_states,
        )
        logits = self.classifier(self.dropout(body["last_hidden_state"]))
        return results(body, {"logits": logits}, None if labels is None else cross_entropy(logits, labels))


class BertForQuestionAnswering(BertPreTrainedModel):
    """Scores of every token to be the start or the end of the answer."""

    body_class: ClassVar[type[BertModel]] = BertModel

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = 2
        self.add_body(self.body_class(config, add_pooling_layer=False))
        self.qa_outputs = linear(config.hidden_size, 2, True, config.initializer_range)
        self.update_parameters_name()

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        past_key_values=None,
        output_hidden_states=False,
    ):
        """Score starts and ends; positions (B,) outside the sequence are ignored in the loss.

        Returns:
            A dict: "loss" if both positions are given, "start_logits" and "end_logits" (B, T), "hidden_states".
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            past_key_values,
            output_hidden_states,
        )
        logits = self.qa_outputs(body["last_hidden_state"])  # (B, T, 2)
        start, end = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = answer_loss(start, end, start_positions, end_positions)
        return results(body, {"start_logits": start, "end_logits": end}, loss)


class BertTransform(nn.Cell):
    """LN(act(W·x + b))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = linear(config.hidden_size, config.hidden_size, True, config.initializer_range)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def construct(self, x):
        """Map (B, T, H) to (B, T, H)."""
        return self.LayerNorm(self.transform_act_fn(self.dense(x)))


class BertPredictions(nn.Cell):
    """Scores over the vocabulary; the bias stands here and in the decoder, as in HF's files."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertTransform(config)
        self.decoder = linear(config.hidden_size, config.vocab_size, True, config.initializer_range)
        self.bias = Parameter(initializer("zeros", (config.vocab_size,), ms.float32), name="bias")
        self.decoder.bias = self.bias

    def construct(self, x):
        """Map (B, T, H) to (B, T, V)."""
        return self.decoder(self.transform(x))


class BertMLMHead(nn.Cell):
    """Holds the predictions under HF's name."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertPredictions(config)

    def construct(self, x):
        """Map (B, T, H) to (B, T, V)."""
        return self.predictions(x)


class BertForMaskedLM(BertPreTrainedModel):
    """Scores over the vocabulary at every token.

    Attributes:
        head: the attribute that holds the scores' layers.
        head_class: their class.
    """

    body_class: ClassVar[type[BertModel]] = BertModel
    head: ClassVar[str] = "cls"
    head_class: ClassVar[type[nn.Cell]] = BertMLMHead

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.add_body(self.body_class(config, add_pooling_layer=False))
        setattr(self, self.head, self.head_class(config))
        self.tie_weights()
        self.update_parameters_name()

    def tie_weights(self) -> None:
        """Let the decoder use the word embedding's Parameter, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.get_output_embeddings().weight = self.get_input_embeddings().weight

    def construct(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        past_key_values=None,
        output_hidden_states=False,
    ):
        """Score the vocabulary; `labels` are (B, T), -100 where no loss is wanted.

        Returns:
            A dict: "loss" if `labels` are given, "logits" (B, T, V), and "hidden_states" when asked.
        """
        body = getattr(self, self.base_model_prefix)(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            past_key_values,
            output_hidden_states,
        )
        logits = getattr(self, self.head)(body["last_hidden_state"])
        return results(body, {"logits": logits}, None if labels is None else cross_entropy(logits, labels))

    def get_output_embeddings(self) -> nn.Cell:
        """Return the decoder of the head."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of the head's decoder."""
        self.cls.predictions._cells["decoder"] = embeddings
