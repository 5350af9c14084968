"""Context-aware prompt tuning: the tokens of examples stand before the input, moved a little by training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from msft_peft.backend.arrays import as_float32
from msft_peft.config import PromptLearningConfig, TaskType
from msft_peft.core.prompt import Table, VirtualTokens, vocabulary
from msft_peft.errors import ConfigError
from msft_peft.registry import Method

_IGNORED = -100
# A token's kind is its type modulo this: 1 and 3 are the template around input and output, 2 is input, 0 is output.
_KINDS = 4
# Radii are given for embeddings of this length.
_USUAL_WIDTH = 2048


@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222); for causal language models alone.

    Args:
        cpt_token_ids: the tokens of the examples that stand before the input; they fix `num_virtual_tokens`.
        cpt_mask: as many ones; kept for HF's files, nothing reads it.
        cpt_tokens_type_mask: the type of each: 4·i + 1 and 4·i + 3 for the template of example i around its input and
            its output, 4·i + 2 for the input, 4·i + 4 for the output. Outputs are never moved. 0 for what is none.
        opt_weighted_loss_type: "decay" lets earlier examples count less.
        opt_loss_decay_factor: by this factor for each example.
        opt_projection_epsilon: how far an input token may be moved: at most ε·√(d/2048).
        opt_projection_format_epsilon: the same for tokens of the template.
        tokenizer_name_or_path: kept for HF's files.

    Raises:
        ConfigError: another task, lists of different lengths, or an unknown loss.
    """

    peft_type: str = "CPT"
    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig only supports task_type = CAUSAL_LM, got {self.task_type!r}.")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_virtual_tokens, self.num_transformer_submodules = len(self.cpt_token_ids), 1
        ones = [1] * len(self.cpt_token_ids)
        self.cpt_mask = ones if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = ones if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if not len(self.cpt_token_ids) == len(self.cpt_mask) == len(self.cpt_tokens_type_mask) > 0:
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ConfigError(f"opt_weighted_loss_type must be 'none' or 'decay', got {self.opt_weighted_loss_type!r}")


class CPTEmbedding(VirtualTokens):
    """E + P(Δ): the examples' own embeddings E (n, d), frozen, and a trained Δ that P keeps small.

    P scales a row δ of Δ down to  min(1, ρ/‖δ‖)·δ,  where ρ = ε·√(d/2048) with the ε of the token's kind, and 0 for
    output tokens. The gradient passes through P as it is, and in training Δ itself is moved to P(Δ) at each step.

    The loss is the mean, over output tokens of the examples and of the input, of  γ^k·CE,  where k is how many later
    examples there are ("decay"; otherwise γ = 1).

    Args:
        config: a `CPTConfig`.
        word_embeddings: where E comes from.

    Raises:
        ConfigError: a token that the model does not know.
    """

    own_loss: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ("embedding.weight",)

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        self.reparametrised = not config.inference_mode
        if not self.reparametrised:
            self.embedding = self.table(config.token_dim)
            return
        if word_embeddings is None:
            raise ConfigError("CPT begins with the embeddings of cpt_token_ids: it needs the word embeddings.")
        vectors, ids = vocabulary(word_embeddings), np.array(config.cpt_token_ids)
        if ids.min() < 0 or ids.max() >= len(vectors):
            raise ConfigError(
                f"cpt_token_ids must be tokens of the model, 0 to {len(vectors) - 1}, got {ids.tolist()}"
            )
        self.embedding = Table(Tensor(as_float32(vectors[ids])), requires_grad=False)
        self.delta_embedding = self.table(config.token_dim, np.zeros((self.tokens, config.token_dim), np.float32))
        types = np.array(config.cpt_tokens_type_mask)
        kinds = types % _KINDS
        radius = np.zeros(len(ids))
        radius[kinds == 2] = config.opt_projection_epsilon
        radius[(kinds == 1) | (kinds == 3)] = config.opt_projection_format_epsilon
        radius *= np.sqrt(config.token_dim / _USUAL_WIDTH)
        self.radius = Tensor(radius.astype(np.float32).reshape(-1, 1))
        self.moved = Tensor((kinds != 0).astype(np.float32).reshape(-1, 1))

    def virtual(self) -> Tensor:
        if not self.reparametrised:
            return self.embedding.weight
        return self.embedding.weight + self._small()

    def _small(self) -> Tensor:
        delta = ops.stop_gradient(self.delta_embedding.weight)
        norm = ops.sqrt(ops.sum(delta * delta, 1, keepdim=True))
        near = delta * ops.minimum(self.radius / ops.maximum(norm, 1e-12), 1.0)
        if self.training:
            near = ops.depend(near, ops.assign(self.delta_embedding.weight, near))
        return near + self.moved * (self.delta_embedding.weight - ops.stop_gradient(self.delta_embedding.weight))

    def adjusted(self, outputs: Any, named: Mapping[str, Any]) -> Any:
        """The outputs with CPT's own loss in place of the base model's, if there are labels."""
        labels = named.get("labels")
        if labels is None:
            return outputs
        if not isinstance(outputs, dict):
            raise TypeError("CPT computes the loss from the model's logits: let the model return a dict with them")
        found = {}
        for key in outputs:
            found[key] = outputs[key]
        found["loss"] = self._loss(outputs["logits"], labels, named.get("input_type_mask"))
        return found

    def _loss(self, logits: Tensor, labels: Tensor, types: Tensor | None) -> Tensor:
        b = labels.shape[0]
        ids = ops.broadcast_to(Tensor([self.config.cpt_token_ids], ms.int32), (b, self.tokens))
        mine = ops.broadcast_to(Tensor([self.config.cpt_tokens_type_mask], ms.int32), (b, self.tokens))
        # Without types all of the input is output.
        types = ops.full_like(labels, _KINDS) if types is None else types
        types = ops.cast(types, ms.int32)
        types = ops.where(ops.greater(types, 0), types + max(self.config.cpt_tokens_type_mask), types)
        types = ops.concat((mine, types), 1)[:, 1:]
        labels = ops.concat((ids, ops.cast(labels, ms.int32)), 1)[:, 1:]
        output = ops.logical_and(ops.greater(types, 0), ops.equal(types % _KINDS, 0))
        counted = ops.logical_and(output, ops.not_equal(labels, _IGNORED))
        safe = ops.where(counted, labels, ops.zeros_like(labels))
        scores = ops.log_softmax(ops.cast(logits[:, :-1], ms.float32), -1)
        losses = -ops.squeeze(ops.gather_elements(scores, 2, ops.expand_dims(safe, 2)), 2)
        if self.config.opt_weighted_loss_type == "decay":
            losses = losses * self.config.opt_loss_decay_factor ** _later(types, output)
        counted = ops.cast(counted, ms.float32)
        return ops.sum(losses * counted) / ops.sum(counted)


def _later(types: Tensor, output: Tensor) -> Tensor:
    """For each output token of `types` (B, T) how many examples come after its own: distinct larger types."""
    one, other = ops.expand_dims(types, 2), ops.expand_dims(types, 1)  # the token, and one that it is compared with
    length = types.shape[1]
    before = Tensor(np.tril(np.ones((1, length, length), np.bool_), -1))
    is_output = ops.expand_dims(output, 1)
    seen = ops.logical_and(ops.logical_and(ops.equal(one, other), is_output), before)
    first = ops.logical_and(output, ops.equal(ops.sum(ops.cast(seen, ms.float32), 2), 0.0))
    larger = ops.logical_and(ops.greater(other, one), ops.expand_dims(first, 1))
    return ops.sum(ops.cast(larger, ms.float32), 2) * ops.cast(output, ms.float32)


METHOD = Method(config=CPTConfig, prompt=CPTEmbedding, identity_at_init=False, merges=False)
