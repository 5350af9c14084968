"""What is asked of a model or a layer, whichever library it is from."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mindspore import nn

from msft_peft.errors import ConfigError
from msft_peft.hosts import cells, mindformers, mindnlp, mindtorch_fixes
from msft_peft.hosts.host import Host
from msft_peft.hosts.site import Site

# The first that owns a thing is asked; plain Cells come last, since those of all libraries are that too.
HOSTS = (mindnlp.HOST, mindformers.HOST, cells.HOST)


def host_of(thing: Any) -> Host:
    """The host whose model or layer this is."""
    return next(host for host in HOSTS if host.owns(thing))


def describe(cell: nn.Cell, path: str) -> Site | None:
    """The Site that `cell` is, or None if it is no layer that can be tuned."""
    return host_of(cell).describe(cell, path)


def hf_names(model: nn.Cell) -> Callable[[str], str]:
    """A function from the path of a layer, or of a part of one, to what HF calls it; the same where that is not known.

    A layer that holds several of HF's keeps its own name.
    """
    names = host_of(model).names_of(model)

    def hf_name(path: str) -> str:
        if names is None:
            return path
        found = names.to_hf(path)
        return found[0] if len(found) == 1 else path

    return hf_name


def model_config(model: nn.Cell) -> dict[str, Any]:
    """The model's own config as a dict; `{"model_type": "custom"}` where it has none."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        config = to_dict()
    return dict(config) if isinstance(config, Mapping) else {"model_type": "custom"}


def input_table(model: nn.Cell) -> nn.Cell | None:
    """The layer that turns tokens into vectors, if the model tells."""
    return host_of(model).input_table(model)


def output_head(model: nn.Cell) -> nn.Cell | None:
    """The layer that turns hidden states into logits, if the model tells."""
    return host_of(model).output_head(model)


def as_cell(model: Any) -> Any:
    """The Cell to put adapters into: the model itself, or what stands for one that is no Cell.

    Raises:
        ConfigError: it is no model of any library that is known.
    """
    if "mindtorch" in sys.modules:  # it changes Tensors for the whole process, plain Cells' too
        mindtorch_fixes.apply()
    cell = host_of(model).as_cell(model)
    if not isinstance(cell, nn.Cell):
        raise ConfigError(f"`model` must be a mindspore.nn.Cell, got {type(model).__name__}")
    return cell


def original(model: nn.Cell) -> Any:
    """The model that the user gave, for the Cell that `as_cell` made of it."""
    return host_of(model).original(model)


def settle(root: nn.Cell) -> None:
    """What the hosts have to do after every edit of the tree below `root`."""
    for host in HOSTS:
        host.settle(root)


def signature(model: nn.Cell) -> inspect.Signature:
    """What a model takes when it is called."""
    return host_of(model).signature(model)


def class_of(model: nn.Cell) -> type:
    """The class of the model that the user gave."""
    return host_of(model).class_of(model)


def facade(kind: type, model: nn.Cell) -> type:
    """The class for a `PeftModel` of this kind around the model."""
    return host_of(model).facade(kind, model)
