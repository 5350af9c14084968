"""Layers under HF's parameter names, with formulas that are fast on CPU and need only stock operators."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import Normal, initializer

from msft_peft.backend.activations import ACTIVATIONS

_matmul = ops.MatMul()
_add_row = ops.BiasAdd()
_FEW = 16  # rows: so many are normed faster by few plain operators than by matrix products


def linear(inputs: int, outputs: int, bias: bool, std: float) -> nn.Dense:
    """Build a Dense (weight (outputs, inputs), bias (outputs,)) initialised as HF does: N(0, std²) and zeros."""
    return nn.Dense(inputs, outputs, weight_init=Normal(std), bias_init="zeros", has_bias=bias)


class Conv1D(nn.Cell):
    """y = x·W + b with W stored (inputs, outputs): GPT-2's dense layer, under HF's names and their order.

    Attributes:
        weight: (nx, nf), drawn from N(0, std²).
        bias: (nf,), zeros.
    """

    def __init__(self, nf: int, nx: int, std: float = 0.02):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = Parameter(initializer(Normal(std), (nx, nf), ms.float32), name="weight")
        self.bias = Parameter(initializer("zeros", (nf,), ms.float32), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        """Map `x` (..., nx) to (..., nf)."""
        rows = _add_row(_matmul(x.reshape((-1, self.nx)), self.weight), self.bias)
        return rows.reshape((*x.shape[:-1], self.nf))


class Embedding(mint.nn.Embedding):
    """Rows of `weight` (vocab, H) by index; the row `padding_idx` starts at zero and gets no gradient.

    It is mint's Embedding (same attributes) over a gather that every backend has in graph mode too.
    """

    def __init__(self, vocab: int, width: int, std: float, padding_idx: int | None = None):
        weight = initializer(Normal(std), (vocab, width), ms.float32)
        super().__init__(vocab, width, _weight=weight)
        self.padding_idx = padding_idx
        if padding_idx is not None and not self.weight.has_init:
            self.weight[padding_idx] = 0.0

    def construct(self, input: Tensor) -> Tensor:
        """Look up `input` (...), integers, as (..., H)."""
        rows = ops.gather(self.weight, input, 0)
        if self.padding_idx is not None and self.training:
            padding = ops.expand_dims(ops.equal(input, self.padding_idx), -1)
            rows = ops.where(padding, ops.stop_gradient(rows), rows)
        return rows


def check_length(length: int, most: int) -> None:
    """See that a text has no more tokens than there are embeddings of positions; a device may not notice.

    Raises:
        ValueError: it has.
    """
    if length > most:
        raise ValueError(
            f"A text of {length} tokens, prefix and padding included, is longer than the {most} positions that the "
            f"model has embeddings for. Cut it, or give position_ids."
        )


class LayerNorm(mint.nn.LayerNorm):
    """y = (x - mean) / √(var + ε) · weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450).

    Without `affine` there are no weight and bias: they are 1 and 0.
    """

    def __init__(self, width: int, eps: float, affine: bool = True):
        super().__init__((width,), eps, affine)
        self.average = _average(width)

    def construct(self, input: Tensor) -> Tensor:
        """Normalise `input` (..., H)."""
        rows = input.reshape((-1, input.shape[-1])).astype(ms.float32)  # (N, H)
        average = _for_rows(rows, self.average)
        mean = _row_means(rows, average)  # (N, 1)
        rows = rows - (mean if average is None else _outer(mean, ops.ones((1, rows.shape[-1]), ms.float32), average))
        scale = ops.rsqrt(_row_means(ops.square(rows), average) + self.eps)  # (N, 1)
        if self.weight is None:
            scale = scale if average is None else _outer(scale, ops.ones((1, rows.shape[-1]), ms.float32), average)
            return (rows * scale).astype(input.dtype).reshape(input.shape)
        rows = rows * _outer(scale, self.weight.astype(ms.float32).reshape((1, -1)), average)
        return _add_row(rows.astype(input.dtype), self.bias).reshape(input.shape)


class RMSNorm(nn.Cell):
    """y = x / √(mean(x²) + ε) · weight over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = Parameter(initializer("ones", (width,), ms.float32), name="weight")
        self.variance_epsilon = eps
        self.average = _average(width)

    def construct(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., H)."""
        rows = x.reshape((-1, x.shape[-1])).astype(ms.float32)  # (N, H)
        average = _for_rows(rows, self.average)
        scale = ops.rsqrt(_row_means(ops.square(rows), average) + self.variance_epsilon)  # (N, 1)
        rows = rows * _outer(scale, self.weight.astype(ms.float32).reshape((1, -1)), average)
        return rows.astype(x.dtype).reshape(x.shape)


def _average(width: int) -> Tensor | None:
    """On CPU the column (H, 1) whose product with rows (N, H) is their mean; elsewhere None.

    There a matrix product reduces and broadcasts 3 to 10 times faster than ReduceMean and Mul do; on Ascend it
    may round to fewer bits than a norm bears.
    """
    on_cpu = ms.get_context("device_target") == "CPU"
    return Tensor(np.full((width, 1), 1.0 / width, np.float32)) if on_cpu else None


def _for_rows(rows: Tensor, average: Tensor | None) -> Tensor | None:
    """The column `average`, unless `rows` (N, H) are few, as when one token at a time is generated."""
    return None if 0 < rows.shape[0] <= _FEW else average


def _row_means(rows: Tensor, average: Tensor | None) -> Tensor:
    """The mean of each row of (N, H), as (N, 1)."""
    return ops.mean(rows, -1, keep_dims=True) if average is None else _matmul(rows, average)


def _outer(column: Tensor, row: Tensor, average: Tensor | None) -> Tensor:
    """(N, 1) times (1, H), as (N, H)."""
    return column * row if average is None else _matmul(column, row)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that HF's `hidden_act` names.

    Raises:
        ValueError: it is not built here.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act '{name}' is not built; supported: {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]
