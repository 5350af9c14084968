"""Host: what differs in one library of models. Each has a file here, whose `HOST` says it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from msft_peft.hosts.name_maps import NameMap
from msft_peft.hosts.site import Site


def _names_table(model: nn.Cell) -> nn.Cell | None:
    get = getattr(model, "get_input_embeddings", None)
    return get() if callable(get) else None


def _names_head(model: nn.Cell) -> nn.Cell | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _nothing(model: nn.Cell) -> None:
    return None


def _itself(model: Any) -> Any:
    return model


def _unchanged(kind: type, model: nn.Cell) -> type:
    return kind


def _of_construct(model: nn.Cell) -> inspect.Signature:
    return inspect.signature(model.construct)


@dataclass(frozen=True)
class Host:
    """A library of models.

    No file of a host imports its library before it is given a model of it: classes are known by their names.

    Attributes:
        name: the library.
        owns: whether an object is of a class of the library. Plain Cells are everyone's, and asked for last.
        describe: the Site that a layer at a path is; None if it is none, or not of this library.
        names_of: how HF's names of a model's layers differ from its own; None where they do not, or it is not known.
        input_table: the layer that turns tokens into vectors; None if the model does not tell.
        output_head: the layer that turns hidden states into logits; None if the model does not tell.
        as_cell: the Cell that stands for a model which is none.
        original: the model itself, given that Cell.
        settle: what must follow every edit of a tree of Cells.
        signature: what the model takes.
        class_of: the model's own class.
        facade: the subclass of a `PeftModel` class to be used for the model, given both.
    """

    name: str
    owns: Callable[[Any], bool]
    describe: Callable[[nn.Cell, str], Site | None]
    names_of: Callable[[nn.Cell], NameMap | None] = _nothing
    input_table: Callable[[nn.Cell], nn.Cell | None] = _names_table
    output_head: Callable[[nn.Cell], nn.Cell | None] = _names_head
    as_cell: Callable[[Any], nn.Cell] = _itself
    original: Callable[[nn.Cell], Any] = _itself
    settle: Callable[[nn.Cell], None] = _nothing
    signature: Callable[[nn.Cell], inspect.Signature] = _of_construct
    class_of: Callable[[nn.Cell], type] = type
    facade: Callable[[type, nn.Cell], type] = _unchanged
