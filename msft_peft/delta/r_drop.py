"""R-Drop: two passes of each example through dropout, which are to agree."""

from typing import Any

from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from msft_peft.delta.checks import DeltaTypeError, DeltaValueError


class RDropLoss(nn.Cell):
    """CE(z, labels) + alpha/4·Σᵢ (KL(pᵢ ‖ qᵢ) + KL(qᵢ ‖ pᵢ)), with p and q the softmax of rows 2i and 2i + 1 of z.

    The cross entropy is the mean over the batch, the divergence a sum over the pairs, as in MindPet. The batch is one
    that `rdrop_repeat` doubled.

    Inputs:
        logits: z (2·B, classes), float16 or float32.
        label_ids: classes (2·B), int; or their probabilities (2·B, classes), float.
        alpha: what the divergence counts; an int, float or Tensor.

    Outputs: a scalar.

    Raises:
        DeltaTypeError (TypeError): alpha is none of these.
        DeltaValueError (ValueError): an odd number of rows.

    Source: Wu et al. 2021, arXiv:2106.14448.
    """

    def construct(self, logits: Tensor, label_ids: Tensor, alpha: Any = 4) -> Tensor:
        if not isinstance(alpha, Tensor):
            _check_alpha(alpha)
        _check_rows(logits.shape[0])
        labels = label_ids if label_ids.ndim == logits.ndim else ops.reshape(label_ids, (-1,))
        divergence = ops.reduce_sum(pair_divergence(ops.log_softmax(logits, -1)))
        return ops.cross_entropy(logits, labels) + divergence / 4 * alpha


# Compiled code cannot raise these errors itself; what is marked so runs while it is being compiled.
@constexpr(check=False)
def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise DeltaTypeError(f"RDropLoss: alpha must be an int or a float, got {alpha!r} ({type(alpha).__name__})")


@constexpr(check=False)
def _check_rows(rows: int) -> None:
    if rows % 2:
        raise DeltaValueError(f"RDropLoss: logits must hold each example twice (see rdrop_repeat), got {rows} rows")


def pair_divergence(log_p: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p) of each pair of neighbouring rows: log-probabilities (2·B, ..., classes) -> (B, ...)."""
    pairs = ops.reshape(log_p, (-1, 2, *log_p.shape[1:]))
    first, second = pairs[:, 0], pairs[:, 1]
    # Both sums in one: Σ (p − q)·(log p − log q)
    return ops.reduce_sum((ops.exp(first) - ops.exp(second)) * (first - second), -1)


def rdrop_repeat(*items: Tensor) -> tuple[Tensor, ...]:
    """Each item with every row twice, one after the other: what goes through a model whose loss is `RDropLoss`."""
    # Not repeat_interleave, which refuses a mask of bool.
    return tuple([ops.reshape(ops.stack((item, item), 1), (-1, *item.shape[1:])) for item in items])
