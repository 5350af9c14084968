"""Input and output embeddings that share one weight."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from mindspore import nn

from msft_peft.core.layer import site_of
from msft_peft.core.wrapper import copy_of
from msft_peft.errors import PeftWarning
from msft_peft.hosts import Site, input_table, output_head


class Tied(NamedTuple):
    """An input table and an output head that hold the same Parameter."""

    table: Site
    head: Site

    @property
    def paths(self) -> set[str]:
        return {self.table.path, self.head.path}


def tied_embeddings(model: nn.Cell, cells: Mapping[str, nn.Cell]) -> Tied | None:
    """The model's tied embeddings; None if it has none.

    Args:
        model: the base model.
        cells: every cell of it that can be named, by path.
    """
    paths = {id(cell): path for path, cell in cells.items()}
    ends = [cell for cell in (input_table(model), output_head(model)) if id(cell) in paths]
    found = [(site_of(cell, paths[id(cell)]), paths[id(cell)]) for cell in ends]
    # A Site's own path is HF's.
    sites = [replace(site, path=path) for site, path in found if site is not None]
    return Tied(*sites) if len(sites) == 2 and sites[0].weight is sites[1].weight else None


def copies_of(modules: Mapping[str, nn.Cell], tied: Tied | None) -> dict[str, nn.Cell]:
    """Trainable copies of layers, by path; those of tied layers share their weight again."""
    copies = {path: copy_of(cell) for path, cell in modules.items()}
    if tied is not None and tied.paths <= set(copies):
        table, head = copies[tied.table.path], copies[tied.head.path]
        head._params[tied.head.weight_name] = table._params[tied.table.weight_name]
    return copies


def say_ties(tied: Tied | None, adapted: Iterable[str], ensure: bool) -> None:
    """Warn where HF does: of a tied layer that is adapted by itself, and of ties that are asked for in vain."""
    if tied is None and ensure:
        text = "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
    elif tied is not None and not ensure and tied.paths & set(adapted):
        text = (
            "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` "
            f"is not set to True: {tied.table.path} and {tied.head.path} share a weight, and only one is adapted."
        )
    else:
        return
    warnings.warn(text, PeftWarning, stacklevel=4)
