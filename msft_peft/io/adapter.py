"""An adapter's tensors on disk: `adapter_model.safetensors` under HF's keys, `adapter_model.ckpt` under `p.name`."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import safetensors.numpy
from mindspore import nn
from safetensors import SafetensorError

from msft_peft.backend.arrays import to_numpy, write
from msft_peft.backend.files import fetch, replacing
from msft_peft.backend.tree import Named, named_parameters
from msft_peft.config import PeftConfig
from msft_peft.core.inject import Adapter, lies_inside
from msft_peft.core.layer import Wrapper, outer_cells
from msft_peft.core.targets import matches_name
from msft_peft.errors import LoadError, PeftWarning
from msft_peft.hosts import input_table, output_head

SAFETENSORS_NAME = "adapter_model.safetensors"
CKPT_NAME = "adapter_model.ckpt"
# Where HF's wrappers put the base model; part of every key.
PREFIX = "base_model.model."

_ADAPTER_ENTRY = "msft_peft_adapter"


def save_tensors(directory: Path, name: str, entries: Mapping[str, Named]) -> None:
    """Write an adapter's tensors into `directory`, in both formats, each file whole or not at all.

    Args:
        directory: made if it is not there.
        name: the adapter's name; a part of the parameter names in the checkpoint, but of no key in the other file.
        entries: the tensors by their keys below the base model, see `Adapter.entries`.
    """
    ordered = sorted(entries.items())
    arrays = {PREFIX + key: to_numpy(named.parameter).reshape(named.shape) for key, named in ordered}
    with replacing(directory / SAFETENSORS_NAME) as path:
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    parameters = [{"name": PREFIX + named.local, "data": named.parameter} for _, named in ordered]
    with replacing(directory / CKPT_NAME) as path:
        ms.save_checkpoint(parameters, str(path), append_dict={_ADAPTER_ENTRY: name})


@dataclass(frozen=True)
class Tensors:
    """What was read from a file.

    Attributes:
        origin: the file.
        arrays: its tensors under the names that they have there: HF's keys, or parameter names in a checkpoint.
        adapter: the name that the adapter had when a MindSpore checkpoint was written; None for safetensors.
    """

    origin: Path
    arrays: dict[str, np.ndarray]
    adapter: str | None = None


def read_tensors(source: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> Tensors:
    """Read the adapter in a directory or Hub repository: the safetensors file, or else the checkpoint.

    Raises:
        FileNotFoundError: neither is there.
        LoadError: the file is broken; it is named.
    """
    for filename, read in ((SAFETENSORS_NAME, _read_safetensors), (CKPT_NAME, _read_ckpt)):
        path = fetch(source, filename, subfolder=subfolder, **hub)
        if path is not None:
            return read(path)
    where = f"{source}/{subfolder}" if subfolder else f"{source}"
    hint = ""
    if fetch(source, "adapter_model.bin", subfolder=subfolder, **hub) is not None:
        hint = (
            " Its adapter_model.bin is a pickle, which is not read: convert it with HF peft (safe_serialization=True)."
        )
    raise FileNotFoundError(f"'{where}' has neither {SAFETENSORS_NAME} nor {CKPT_NAME}, so no adapter weights.{hint}")


def _read_safetensors(path: Path) -> Tensors:
    return Tensors(path, read_arrays(path))


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays in a safetensors file, by name.

    Raises:
        LoadError: the file is broken; it is named.
    """
    try:
        return safetensors.numpy.load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise LoadError(f"{path} is no valid safetensors file: {error}") from error


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, whole or not at all."""
    with replacing(Path(path)) as temporary:
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        safetensors.numpy.save_file(whole, temporary, metadata={"format": "pt"})


def _read_ckpt(path: Path) -> Tensors:
    try:
        parameters = ms.load_checkpoint(str(path))
    except (ValueError, RuntimeError, TypeError) as error:
        raise LoadError(f"{path} is no valid MindSpore checkpoint: {error}") from error
    adapter = parameters.pop(_ADAPTER_ENTRY, "default")
    return Tensors(path, {key: to_numpy(value) for key, value in parameters.items()}, str(adapter))


@dataclass(frozen=True)
class Match:
    """How the tensors of a file fit an adapter; `apply` copies those that do.

    Attributes:
        fitting: (parameter, its new value) pairs.
        missing: keys that the adapter needs and the file lacks.
        unexpected: keys that the file has and the adapter does not.
        misshapen: "key: shape in the file, shape in the model" lines.
        origin: the file.
    """

    fitting: list[tuple[Named, np.ndarray]]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    origin: Path

    def check(self, strict: bool, ignore_mismatched_sizes: bool) -> None:
        """Raise or warn of everything that does not fit, all of it at once.

        Raises:
            LoadError: a shape differs and `ignore_mismatched_sizes` is not set; with `strict`, also if a tensor is
                missing or unexpected.
        """
        faults = []
        if self.missing:
            faults.append(f"Found missing adapter keys while loading the checkpoint: {self.missing}.")
        if self.unexpected:
            faults.append(f"Found unexpected keys that the adapter does not have: {self.unexpected}.")
        if self.misshapen:
            faults.append("size mismatch for " + "; ".join(self.misshapen) + ".")
        if not faults:
            return
        text = f"{self.origin} does not fit the adapter. " + " ".join(faults)
        if (strict and (self.missing or self.unexpected)) or (self.misshapen and not ignore_mismatched_sizes):
            raise LoadError(
                text + " Nothing was changed. Is it the adapter of another base model? strict=False loads what is "
                "there and warns; ignore_mismatched_sizes=True leaves tensors of other shapes at their initial values."
            )
        warnings.warn(text + " These weights keep their initial values.", PeftWarning, stacklevel=4)

    def apply(self) -> None:
        """Copy the fitting tensors into the model."""
        for named, array in self.fitting:
            write(named.parameter, array.reshape(named.parameter.shape))


def match_tensors(tensors: Tensors, adapter: Adapter, model: nn.Cell) -> Match:
    """Compare a file's tensors with what `adapter` needs, in the model or still outside it; nothing is written."""
    entries = {PREFIX + key: named for key, named in adapter.entries(model).items()}
    arrays = _by_key(tensors, adapter, model)
    # A file may also carry the base model's embeddings, see `embeddings_of`.
    carried = {PREFIX + key: named for key, named in embeddings_of(model, adapter).items()}
    entries |= {key: named for key, named in carried.items() if key in arrays}
    fitting, misshapen = [], []
    for key in sorted(entries.keys() & arrays.keys()):
        found, wanted = tuple(arrays[key].shape), entries[key].shape
        if found == wanted:
            fitting.append((entries[key], arrays[key]))
        else:
            misshapen.append(f"{key}: the file has shape {found}, the model {wanted}")
    missing, unexpected = sorted(entries.keys() - arrays.keys()), sorted(arrays.keys() - entries.keys())
    return Match(fitting, missing, unexpected, misshapen, tensors.origin)


def with_copies_in(tensors: Tensors, config: PeftConfig, model: nn.Cell) -> PeftConfig:
    """The config, with every layer named in `modules_to_save` that the file holds a copy of.

    HF takes a name there for the end of a path, "norm" for `input_norm` too; its files then hold more copies than the
    name says here.
    """
    names = getattr(config, "modules_to_save", None)
    if not names or tensors.adapter is not None:
        return config
    held = {
        path
        for path in outer_cells(model)
        if path.endswith(tuple(names)) and any(key.startswith(f"{PREFIX}{path}.") for key in tensors.arrays)
    }
    extra = {path for path in held if not matches_name(path, names)}
    return replace(config, modules_to_save=[*names, *sorted(extra)])  # type: ignore[call-arg]


def embeddings_of(model: nn.Cell, adapter: Adapter) -> dict[str, Named]:
    """The weights of the base model's input and output embeddings, by their keys in a file of `adapter`.

    HF's files hold them where the adapter targets those layers, or the vocabulary was resized.
    """
    found = {}
    cells = {id(cell): path for path, cell in outer_cells(model).items()}
    for layer in (input_table(model), output_head(model)):
        if layer is None or id(layer) not in cells:
            continue
        path, base = cells[id(layer)], layer.base() if isinstance(layer, Wrapper) else layer
        if lies_inside(path, adapter.modules):
            continue  # the adapter has a copy of its own
        inner = f"{path}.base_layer" if path in adapter.patches else path
        for named in named_parameters(base, inner):
            if named.key.endswith(".weight"):
                found[named.key] = named
    return found


def _by_key(tensors: Tensors, adapter: Adapter, model: nn.Cell) -> dict[str, np.ndarray]:
    """The file's tensors by HF's keys and in HF's shapes; what is unknown keeps the key that it has."""
    if tensors.adapter is None:
        known = {PREFIX + key for key in adapter.entries(model)}
        # Files from old scripts may still hold the adapter's name.
        return {
            key if key in known else re.sub(r"\.default(?=(\.[^.]+)?$)", "", key): array
            for key, array in tensors.arrays.items()
        }
    # A checkpoint speaks of the adapter by the name that it had then.
    entries = replace(adapter, name=tensors.adapter).entries(model)
    by_name = {
        prefix + named.local: (PREFIX + key, named) for key, named in entries.items() for prefix in (PREFIX, "")
    }
    arrays = {}
    for name, array in tensors.arrays.items():
        key, named = by_name.get(name, (name, None))
        stored_alike = named is not None and array.shape == tuple(named.parameter.shape)
        arrays[key] = array.reshape(named.shape) if named is not None and stored_alike else array
    return arrays
