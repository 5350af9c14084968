"""Losses as HF's models compute them, and the wrapper that leaves only the loss."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops

IGNORE = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100 of  logsumexp(logits) - logits[label], in float32.

    Args:
        logits: (..., C).
        labels: (...), integers in [0, C) or -100. When all are -100 the loss is NaN, as in torch.

    Returns:
        A scalar.
    """
    logits = logits.reshape((-1, logits.shape[-1])).astype(ms.float32)
    labels = labels.reshape((-1,)).astype(ms.int32)
    counted = ops.not_equal(labels, IGNORE)
    labels = ops.where(counted, labels, ops.zeros_like(labels))
    chosen = ops.gather_elements(ops.log_softmax(logits, -1), 1, labels.reshape((-1, 1))).reshape((-1,))
    counted = counted.astype(ms.float32)
    return -ops.sum(chosen * counted) / ops.sum(counted)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token's logits (B, T, V) with the label of the token after it, labels (B, T)."""
    after = ops.cat((labels[:, 1:], ops.full_like(labels[:, :1], IGNORE)), 1)  # moving labels is cheaper than logits
    return cross_entropy(logits, after)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of a sequence classifier over logits (B, C).

    Args:
        logits: (B, C).
        labels: (B,) integers, (B,) numbers when C is 1, or (B, C) numbers.
        problem_type: "regression" (mean squared error), "single_label_classification" (cross entropy),
            "multi_label_classification" (binary cross entropy), or None: C = 1 is a regression, integer labels are
            classes, others are many labels.

    Raises:
        ValueError: the problem type is none of these.
    """
    classes = logits.shape[-1]
    if problem_type is None:
        whole = labels.dtype in (ms.int8, ms.int16, ms.int32, ms.int64, ms.uint8)
        problem_type = "single_label_classification" if whole else "multi_label_classification"
        problem_type = "regression" if classes == 1 else problem_type
    if problem_type == "regression":
        wide = logits.astype(ms.float32)
        return ops.mean(ops.square(wide - labels.reshape(logits.shape).astype(ms.float32)))
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    if problem_type == "multi_label_classification":
        wide = logits.astype(ms.float32)
        softplus = ops.relu(wide) + ops.log(1.0 + ops.exp(-ops.abs(wide)))
        return ops.mean(softplus - wide * labels.astype(ms.float32))
    raise ValueError(
        f"problem_type '{problem_type}' is none of regression, single_label_classification and "
        f"multi_label_classification."
    )


def answer_loss(start: Tensor, end: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """The mean of the cross entropies, over the T tokens, of where an answer starts and where it ends.

    Args:
        start: (B, T), the scores.
        end: (B, T), the scores.
        start_positions: (B,) integers; negative ones count as 0, those beyond the end are ignored.
        end_positions: the same.
    """
    return (_position_loss(start, start_positions) + _position_loss(end, end_positions)) / 2


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    positions = ops.relu(positions.reshape((-1,)).astype(ms.int32))
    return cross_entropy(logits, ops.where(positions < logits.shape[1], positions, IGNORE))


class LossOnly(nn.Cell):
    """A model that returns its loss alone, for `mindspore.train.Model`, `TrainOneStepCell` and `value_and_grad`.

    Those differentiate the sum of *all* outputs, and feed the columns of a dataset by position, not by name.

    Args:
        model: a Cell whose outputs have a "loss".
        columns: the model's argument for each column of the dataset, in order.

    Example:
        >>> net = LossOnly(model, ("input_ids", "attention_mask", "labels"))
        >>> Model(net, optimizer=nn.AdamWeightDecay(net.trainable_params(), 1e-4)).train(1, dataset)
    """

    def __init__(self, model: nn.Cell, columns: Sequence[str] = ("input_ids", "attention_mask", "labels")):
        super().__init__(auto_prefix=False)  # the parameters keep the model's names
        self.model = model
        self.columns = tuple(columns)

    def construct(self, *batch: Tensor) -> Tensor:
        """Run the model on one batch, a Tensor for each of `columns`."""
        if len(batch) != len(self.columns):
            raise ValueError(f"LossOnly expects {len(self.columns)} columns, {self.columns}, but got {len(batch)}.")
        named = {}
        for i in range(len(self.columns)):
            named[self.columns[i]] = batch[i]
        return self.model(**named)["loss"]
