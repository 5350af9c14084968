"""More tokens, or fewer: embeddings and heads of another size, tied ones too."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.graphs import drop_compiled


def resize_rows(model: nn.Cell, table: nn.Cell, head: nn.Cell | None, size: int, std: float | None) -> None:
    """Give the embedding, the head over the same vocabulary, and all that is tied to either `size` rows.

    Args:
        model: what they belong to; its parameters are named anew.
        table: the input embedding, `weight` (V, H).
        head: the output layer, `weight` (V, H) and maybe `bias` (V,).
        size: the new V.
        std: draw new rows from N(0, std²); None: each is the mean of the old ones, as is HF's default.

    Raises:
        ValueError: the layers hold no weights of that shape themselves (adapters are on them).
    """
    old = _own(table).shape[0]
    replaced = {id(_own(table)): _resized(_own(table), size, std)}
    layers = [table]
    if head is not None and _own(head).shape[0] == old:
        layers.append(head)
        for p in (_own(head), head._params.get("bias")):
            if p is not None and id(p) not in replaced:
                replaced[id(p)] = _resized(p, size, std if p.ndim == 2 else 0.0)
    for _, cell in model.cells_and_names():
        cell._params.update({name: replaced[id(p)] for name, p in cell._params.items() if id(p) in replaced})
    for layer in layers:
        for name in ("num_embeddings", "vocab_size", "out_channels", "out_features"):
            if getattr(layer, name, None) == old:
                setattr(layer, name, size)
    model.update_parameters_name()
    drop_compiled()


def _own(layer: nn.Cell) -> Parameter:
    weight = layer._params.get("weight")
    if weight is None or weight.ndim != 2:
        raise ValueError(
            f"resize_token_embeddings: {type(layer).__name__} has no weight (tokens, width) of its own. Resize the "
            "model before adapters are put into it."
        )
    return weight


def _resized(p: Parameter, size: int, std: float | None) -> Parameter:
    array = to_numpy(p)
    rows = array[:size]
    if size > len(array):
        new = np.zeros((size - len(array), *array.shape[1:]), np.float32)
        if std is None:
            new += as_float32(array).mean(0)
        elif std:
            new += np.random.normal(0.0, std, new.shape).astype(np.float32)
        rows = np.concatenate([array, new.astype(array.dtype)])
    return Parameter(Tensor(rows.copy()), name=p.name, requires_grad=p.requires_grad)
