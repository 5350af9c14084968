"""R-Drop around any model: each example goes through dropout twice, and both results are to agree."""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from msft_peft.delta.r_drop import pair_divergence, rdrop_repeat
from msft_peft.errors import ConfigError


class WithRDropLoss(nn.Cell):
    """CE(z, labels) + alpha/4·Σ (KL(p ‖ q) + KL(q ‖ p)), with p and q the results of two passes of one example.

    A Cell to train in the place of `nn.WithLossCell`: for `mindspore.value_and_grad`, or `mindspore.train.Model`
    without a loss function. It has the model's parameters under their own names, and none of its own.

    The cross entropy is a mean over all labels that count; the divergence a sum over the pairs, as MindPet's, or with
    `divergence="mean"` their mean, whose weight does not grow with the batch and the number of tokens.

    Args:
        model: a `PeftModel`, or any Cell, that gives logits: as they are, first in a tuple, or "logits" in a dict. It
            must have dropout in it: without, both passes are alike.
        alpha: what the divergence counts.
        columns: what the model calls its inputs, one name each; without, they are given in order.
        ignore_index: a label that does not count.
        shift: the logits at a position are for the next one's label (causal language models).
        divergence: "sum" or "mean".

    Inputs: those of the model, each (B, ...), then labels (B, ...) of int. Outputs: a scalar, in float32.

    Raises:
        ConfigError: `divergence` is neither, or alpha no number.

    Source: Wu et al. 2021, arXiv:2106.14448.
    """

    def __init__(
        self,
        model: nn.Cell,
        alpha: float = 4.0,
        columns: Sequence[str] | None = None,
        ignore_index: int = -100,
        shift: bool = False,
        divergence: str = "sum",
    ) -> None:
        super().__init__(auto_prefix=False)
        if divergence not in ("sum", "mean"):
            raise ConfigError(f"divergence must be 'sum' or 'mean', got {divergence!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ConfigError(f"alpha must be a number, got {alpha!r}")
        self.model, self.alpha, self.columns = model, alpha, tuple(columns or ())
        self.ignore_index, self.shift, self.mean = ignore_index, shift, divergence == "mean"

    def construct(self, *inputs: Tensor) -> Tensor:
        doubled = rdrop_repeat(*inputs)
        logits = ops.cast(self._logits(doubled[:-1]), ms.float32)
        labels = doubled[-1]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        log_p = ops.log_softmax(logits, -1)
        counts = ops.cast(labels != self.ignore_index, log_p.dtype)
        wanted = ops.expand_dims(ops.where(labels != self.ignore_index, labels, ops.zeros_like(labels)), -1)
        picked = ops.squeeze(ops.gather_elements(log_p, -1, wanted), -1)
        cross_entropy = -ops.reduce_sum(picked * counts) / ops.reduce_sum(counts)
        # (B, ...): labels stand twice too
        once = ops.reshape(counts, (-1, 2, *counts.shape[1:]))[:, 0]
        divergence = ops.reduce_sum(pair_divergence(log_p) * once)
        if self.mean:
            divergence = 2 * divergence / ops.reduce_sum(counts)
        return cross_entropy + divergence * (self.alpha / 4)

    def _logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        named = {}
        for i in range(len(self.columns)):
            named[self.columns[i]] = inputs[i]
        result: Any = self.model(**named) if self.columns else self.model(*inputs)
        if isinstance(result, dict):
            return result["logits"]
        return result if isinstance(result, Tensor) else result[0]
