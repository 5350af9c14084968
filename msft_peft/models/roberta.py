"""RoBERTa and its task heads, under HuggingFace's names (Liu et al. 2019, arXiv:1907.11692).

Its blocks are BERT's. Positions count the tokens that are not padding, from `pad_token_id` + 1 on; padding stands at
`pad_token_id`. Classifiers of sequences read the first token through a layer of their own, not through a pooler.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer

from msft_peft.backend.activations import GELU, tanh
from msft_peft.models.attention import counted
from msft_peft.models.bert import (
    BertEmbeddings,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    head_dropout,
)
from msft_peft.models.config import BertConfig, RobertaConfig
from msft_peft.models.layers import LayerNorm, check_length, linear


class RobertaPreTrainedModel(BertPreTrainedModel):
    """The base of all RoBERTa models."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    heads = ("lm_head", "classifier", "qa_outputs", "pooler")
    fresh_heads = heads


class RobertaModel(RobertaPreTrainedModel, BertModel):
    """The encoder; see `BertModel`. Without `position_ids`, padding is known by `input_ids` alone, not by the mask.

    Differs: behind a prefix, positions of `inputs_embeds` are counted on from it, as those of `input_ids` are;
    transformers starts them anew.

    Raises:
        ValueError: the config has no `pad_token_id`; or as in `BertModel`.
    """

    def embedder(self, config: BertConfig) -> BertEmbeddings:
        """Make the embeddings."""
        if config.pad_token_id is None:
            raise ValueError("RoBERTa's positions count from config.pad_token_id, which is None. Set it; HF's is 1.")
        return BertEmbeddings(config, config.pad_token_id)

    def positions(self, input_ids: Tensor | None, prefix: int, length: int) -> Tensor:
        """The positions (1 or B, T) of the tokens behind a prefix, where the caller gives none."""
        pad = self.config.pad_token_id
        check_length(length, self.config.max_position_embeddings - pad - 1)
        if input_ids is None:
            return Tensor(np.arange(prefix, length, dtype=np.int32)).reshape((1, -1)) + (pad + 1)
        real = (input_ids != pad).astype(ms.int32)
        return counted(real) + (1 + pad + prefix * real)


class RobertaClassificationHead(nn.Cell):
    """W₂·tanh(W₁·x + b₁) + b₂ of the first token, with dropout before each of the two layers."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = linear(config.hidden_size, config.hidden_size, True, config.initializer_range)
        self.dropout, self.inner_dropout = head_dropout(config), head_dropout(config)
        self.out_proj = linear(config.hidden_size, config.num_labels, True, config.initializer_range)

    def construct(self, x):
        """Map (B, T, H) to (B, C)."""
        return self.out_proj(self.inner_dropout(tanh(self.dense(self.dropout(x[:, 0])))))


class RobertaForSequenceClassification(RobertaPreTrainedModel, BertForSequenceClassification):
    """Scores of the whole sequence, from the first token."""

    body_class = RobertaModel

    def build(self, config: BertConfig) -> None:
        """Make the body and the head."""
        self.add_body(self.body_class(config, add_pooling_layer=False))
        self.classifier = RobertaClassificationHead(config)

    def classify(self, body):
        """The scores (B, C) from what the body returned."""
        return self.classifier(body["last_hidden_state"])


class RobertaForTokenClassification(RobertaPreTrainedModel, BertForTokenClassification):
    """Scores of every token."""

    body_class = RobertaModel


class RobertaForQuestionAnswering(RobertaPreTrainedModel, BertForQuestionAnswering):
    """Scores of every token to be the start or the end of the answer."""

    body_class = RobertaModel


class RobertaLMHead(nn.Cell):
    """W₂·LN(GELU(W₁·x + b₁)) + b₂, with b₂ standing here and in the decoder, as in HF's files."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = linear(config.hidden_size, config.hidden_size, True, config.initializer_range)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = linear(config.hidden_size, config.vocab_size, True, config.initializer_range)
        self.bias = Parameter(initializer("zeros", (config.vocab_size,), ms.float32), name="bias")
        self.decoder.bias = self.bias
        self.gelu = GELU()

    def construct(self, x):
        """Map (B, T, H) to (B, T, V)."""
        return self.decoder(self.layer_norm(self.gelu(self.dense(x))))


class RobertaForMaskedLM(RobertaPreTrainedModel, BertForMaskedLM):
    """Scores over the vocabulary at every token."""

    body_class = RobertaModel
    head = "lm_head"
    head_class = RobertaLMHead

    def get_output_embeddings(self) -> nn.Cell:
        """Return the decoder of the head."""
        return self.lm_head.decoder

    def set_output_embeddings(self, embeddings: nn.Cell) -> None:
        """Put another Cell in the place of the head's decoder."""
        self.lm_head._cells["decoder"] = embeddings
