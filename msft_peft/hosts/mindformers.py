"""MindFormers: its linear layers and embeddings, and what HF calls its layers. Never imported: known by names."""

from typing import Any

from mindspore import Tensor, nn, ops

from msft_peft.backend.ops import DenseOp, EmbeddingOp
from msft_peft.backend.tree import get_child
from msft_peft.hosts import cells
from msft_peft.hosts.host import Host
from msft_peft.hosts.name_maps import NameMap, name_map
from msft_peft.hosts.site import LINEAR, Site

_LIBRARY = "mindformers"
# Their construct returns (output, bias).
_PAIRED = ("ColumnParallelLinear", "RowParallelLinear")
# Table class -> the parameter that holds the vectors.
_TABLES = {
    "LlamaEmbedding": "embedding_weight",
    "VocabParallelEmbedding": "weight",
    "VocabEmbedding": "embedding_table",
}
_ARCHITECTURES = {"llama": "llama", "glm2": "glm"}
_INPUT_TABLES = ("model.tok_embeddings", "transformer.embedding")
_OUTPUT_HEADS = ("lm_head", "transformer.output_layer")


class LinearOp(DenseOp):
    """y = x·Wᵀ as `Linear` computes it: in its own dtype, and divided among devices as its product is.

    Args:
        dtype: to compute in.
        strategy: of the base layer's product, ((rows, in), (out, in)) in numbers of slices; None where it has none.

    A's product keeps the division of the input, B's that of the output, as in MindFormers' own LoRA; ranks are whole.
    """

    def __init__(self, dtype: Any, strategy: tuple[tuple[int, int], tuple[int, int]] | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.whole, self.mixing, self.sum = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True), ops.Add()
        if strategy is not None:
            (rows, inputs), (out, _) = strategy
            self.whole.shard(strategy)
            self.matmul.shard(((rows, inputs), (1, inputs)))
            self.mixing.shard(((rows, 1), (out, 1)))
            self.sum.shard(((rows, out), (rows, out)))

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        return self._as_input(self.matmul(self.rows(x), ops.cast(w, self.dtype)), x)

    def base(self, x: Tensor, w: Tensor) -> Tensor:
        return self._as_input(self.whole(self.rows(x), ops.cast(w, self.dtype)), x)

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return self._as_input(self.mixing(self.rows(h), ops.cast(w, self.dtype)), h)

    def add(self, y: Tensor, delta: Tensor) -> Tensor:
        # The layer's output has just come from rows: compiled code leaves both reshapes out.
        width = y.shape[-1]
        total = self.sum(ops.reshape(y, (-1, width)), ops.cast(ops.reshape(delta, (-1, width)), y.dtype))
        return ops.reshape(total, y.shape)

    def rows(self, x: Tensor) -> Tensor:
        return ops.cast(ops.reshape(x, (-1, x.shape[-1])), self.dtype)

    def _as_input(self, y: Tensor, x: Tensor) -> Tensor:
        """y (N, out) in the dtype of x (*, in), and in its shape but for the last axis."""
        return ops.cast(ops.reshape(y, (*x.shape[:-1], y.shape[-1])), x.dtype)


def owns(cell: object) -> bool:
    """Whether a class of MindFormers made it."""
    return bool(_names(cell))


def describe(cell: nn.Cell, path: str) -> Site | None:
    """The Site that a layer of MindFormers is; None for experts' layers, and those whose weight is given to them."""
    names = _names(cell)
    table = next((_TABLES[name] for name in names if name in _TABLES), None)
    if table is not None:
        vocabulary, dim = cell._params[table].shape
        return Site(path, "embedding", vocabulary, dim, (vocabulary, dim), EmbeddingOp(), cell, weight_name=table)
    paired = any(name in names for name in _PAIRED)
    weight = cell._params.get("weight")
    does_more = any(name.endswith("WithLoRA") for name in names)
    if not (paired or "Linear" in names) or does_more or weight is None or weight.ndim != 2:
        return cells.describe(cell, path)
    out, inputs = weight.shape if cell.transpose_b else weight.shape[::-1]
    return Site(
        path,
        LINEAR,
        inputs,
        out,
        (out, inputs),
        LinearOp(cell.compute_dtype if paired else cell.dtype, None if paired else _strategy(cell)),
        cell,
        transposed=not cell.transpose_b,
        fan_in_fan_out=False,
        activation=cell.activation if getattr(cell, "activation_flag", False) else None,
        paired=paired,
    )


def names_of(model: nn.Cell) -> NameMap | None:
    """What HF calls the model's layers; None where that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return name_map(_ARCHITECTURES[kind]) if kind in _ARCHITECTURES else None


def input_table(model: nn.Cell) -> nn.Cell | None:
    """The layer that turns tokens into vectors."""
    return _first(model, _INPUT_TABLES)


def output_head(model: nn.Cell) -> nn.Cell | None:
    """The layer that turns hidden states into logits."""
    return _first(model, _OUTPUT_HEADS)


def _names(cell: object) -> list[str]:
    """The names of its classes that are MindFormers'."""
    return [kind.__name__ for kind in type(cell).__mro__ if kind.__module__.partition(".")[0] == _LIBRARY]


def _strategy(cell: nn.Cell) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """How the product is divided among devices, its weight as (out, in)."""
    found = getattr(cell.matmul, "in_strategy", None)
    if not found:
        return None
    rows, weight = found
    return rows, weight if cell.transpose_b else weight[::-1]


def _first(model: nn.Cell, paths: tuple[str, ...]) -> nn.Cell | None:
    for path in paths:
        try:
            return get_child(model, path)
        except KeyError:
            continue
    return None


HOST = Host("mindformers", owns, describe, names_of, input_table, output_head)
