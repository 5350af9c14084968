"""Where a model keeps its blocks: the layers, all of one kind, that it runs one after the other."""

from mindspore import nn

from msft_peft.backend.tree import get_child

PLACES = (
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "transformer.layers",
    "bert.encoder.layer",
    "roberta.encoder.layer",
    "encoder.layer",
    "decoder.layers",
    "layers",
    "h",
)


def blocks_path(model: nn.Cell) -> str | None:
    """The path of the CellList of `model`'s blocks; None if it is at none of the known places."""
    return next((place for place in PLACES if isinstance(_at(model, place), nn.CellList)), None)


# In an encoder-decoder: below its body, the ends of the paths of both.
_BODIES = ("", "transformer.", "model.")
_STACKS = (("encoder.block", "decoder.block"), ("encoder.layers", "decoder.layers"))


def all_blocks(model: nn.Cell) -> list[str]:
    """The paths of the CellLists of `model`'s blocks: two, the encoder's and the decoder's, where it has both."""
    for body in _BODIES:
        for stack in _STACKS:
            found = [body + end for end in stack if isinstance(_at(model, body + end), nn.CellList)]
            if found:
                return found
    one = blocks_path(model)
    return [] if one is None else [one]


def cell_lists(model: nn.Cell) -> list[str]:
    """The paths of all CellLists in `model`."""
    return [path for path, cell in model.cells_and_names() if isinstance(cell, nn.CellList)]


def _at(model: nn.Cell, path: str) -> nn.Cell | None:
    try:
        return get_child(model, path)
    except KeyError:
        return None
