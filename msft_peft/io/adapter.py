"""An adapter's tensors on disk: `adapter_model.safetensors` under HF's keys, `adapter_model.ckpt` under `p.name`."""

import math
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
from mindspore import Tensor, nn
from safetensors import SafetensorError

from msft_peft.backend import arguments
from msft_peft.backend.arrays import to_numpy
from msft_peft.backend.files import replacing
from msft_peft.backend.hub import fetch
from msft_peft.backend.torch_pickle import read_torch
from msft_peft.backend.tree import Named, named_parameters
from msft_peft.config import PeftConfig
from msft_peft.core.adapter import Adapter, lies_inside
from msft_peft.core.keys import BASE, PREFIX, in_file
from msft_peft.core.targets import matches_name
from msft_peft.core.wrapper import Wrapper, outer_cells
from msft_peft.errors import ConfigError, LoadError, PeftWarning
from msft_peft.hosts import hf_names, input_table, output_head, plain_dtypes
from msft_peft.registry import method_of

SAFETENSORS_NAME = "adapter_model.safetensors"
CKPT_NAME = "adapter_model.ckpt"
BIN_NAME = "adapter_model.bin"
PROMPT_ENCODER_NAME = "prompt_encoder.safetensors"

# The entry of a checkpoint that tells the name that the adapter had.
ADAPTER_ENTRY = "msft_peft_adapter"


def packed(entries: Mapping[str, Named], prefix: str, config: PeftConfig | None) -> dict[str, np.ndarray]:
    """The numbers of an adapter's tensors as HF's files hold them, by their keys there, sorted.

    Args:
        entries: see `Adapter.entries`.
        prefix: stands before the keys.
        config: the adapter's; None if its method is one that holds them as they are.
    """
    arrays = {in_file(prefix, key): named.read() for key, named in sorted(entries.items())}
    pack = None if config is None else method_of(config).pack
    return arrays if pack is None else pack(config, arrays)


def unpacked(tensors: "Tensors", config: PeftConfig) -> "Tensors":
    """What was read, in the form that the adapter of this config has in a model.

    Raises:
        LoadError: it cannot be brought into that.
    """
    unpack = method_of(config).unpack
    if unpack is None:
        return tensors
    try:
        return replace(tensors, arrays=unpack(config, tensors.arrays))
    except LoadError as error:
        raise LoadError(f"{tensors.origin}: {error}") from error


def save_tensors(
    directory: Path, name: str, entries: Mapping[str, Named], prefix: str = PREFIX, config: PeftConfig | None = None
) -> None:
    """Write an adapter's tensors into `directory`, in both formats, each file whole or not at all.

    Args:
        directory: made if it is not there.
        name: the adapter's name; a part of the parameter names in the checkpoint, but of no key in the other file.
        entries: the tensors by their keys, see `Adapter.entries`.
        prefix: stands before the keys and the parameter names.
        config: see `packed`. The checkpoint has the parameters as they are.
    """
    ordered = sorted(entries.items())
    arrays = packed(entries, prefix, config)
    with replacing(directory / SAFETENSORS_NAME) as path:
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    # MindSpore knows a tied parameter by its first name alone.
    first: dict[int, str] = {}
    for key, named in entries.items():
        first.setdefault(id(named.parameter), key)
    parameters = [
        {"name": prefix + named.local, "data": _as_stored(named)}
        for key, named in ordered
        if first[id(named.parameter)] == key
    ]
    with replacing(directory / CKPT_NAME) as path, plain_dtypes():
        ms.save_checkpoint(parameters, str(path), append_dict={ADAPTER_ENTRY: name})


def save_prompt_encoder(directory: Path, adapter: Adapter, wanted: bool) -> None:
    """Write the network that makes an adapter's virtual tokens into a file of its own, if it has one.

    HF's file has the virtual tokens alone. Where this one is not written, an old one is to go, since it would not fit:
    an empty file says so to `replacing_all`, whose scratch folder `directory` is.
    """
    path = directory / PROMPT_ENCODER_NAME
    if wanted and adapter.prompt is not None and adapter.prompt.reparametrised:
        write_arrays(path, {key: named.read() for key, named in sorted(adapter.prompt.own().items())})
    elif (directory.parent / PROMPT_ENCODER_NAME).exists():
        path.touch()


def resumable(
    tensors: "Tensors", adapter: Adapter, source: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> tuple["Tensors", np.ndarray | None]:
    """What a file holds of an adapter that goes on training, and the virtual tokens that it had.

    The network that makes them takes their place among the tensors. For other adapters nothing is changed.

    Raises:
        ConfigError: that network was not saved (HF does not).
        LoadError: its file is broken.
    """
    if adapter.prompt is None or not adapter.prompt.reparametrised:
        return tensors, None
    path = fetch(source, PROMPT_ENCODER_NAME, subfolder=subfolder, **hub)
    if path is None:
        raise ConfigError(
            "Cannot set a prompt learning adapter to trainable when loading pretrained adapter. Its virtual tokens "
            f"were made by a network that is not in the file but in {PROMPT_ENCODER_NAME} beside it, which "
            "save_pretrained writes here and HF peft does not: there is none. Load it with is_trainable=False."
        )
    rows = {key: array for key, array in tensors.arrays.items() if key.endswith("prompt_embeddings")}
    rest = {key: array for key, array in tensors.arrays.items() if key not in rows}
    return replace(tensors, arrays=rest | read_arrays(path)), next(iter(rows.values()), None)


def _as_stored(named: Named) -> Tensor:
    """The parameter itself, for MindSpore to load by name; without its padding if it has any."""
    padded = math.prod(named.parameter.shape) != math.prod(named.shape)
    return Tensor(named.read()) if padded else named.parameter


@dataclass(frozen=True)
class Tensors:
    """What was read from a file, or given as a state dict.

    Attributes:
        origin: the file, or what else it is, for messages.
        arrays: its tensors under the names that they have there: HF's keys, or parameter names in a checkpoint.
        adapter: the name that the adapter had when a MindSpore checkpoint was written; None for safetensors.
    """

    origin: Path | str
    arrays: dict[str, np.ndarray]
    adapter: str | None = None

    def renamed(self, key_mapping: Mapping[str, str] | None) -> "Tensors":
        """The same under other names.

        Args:
            key_mapping: regex -> replacement, tried in turn on each key without HF's prefix; the first that is found
                in a key is applied, as in transformers.

        Raises:
            LoadError: two tensors would get one name, or a pattern is no regular expression.
        """
        if not key_mapping:
            return self
        arguments.strings("key_mapping", arguments.mapping("key_mapping", key_mapping).values())
        arrays: dict[str, np.ndarray] = {}
        for key, array in self.arrays.items():
            below = key.removeprefix(PREFIX)
            new = key[: len(key) - len(below)] + _rename(below, key_mapping)
            if new in arrays:
                raise LoadError(f"key_mapping={dict(key_mapping)!r} names two tensors of {self.origin} alike: {new}")
            arrays[new] = array
        return replace(self, arrays=arrays)


def _rename(key: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        try:
            new, hits = re.subn(pattern, replacement, key)
        except re.error as error:
            raise LoadError(
                f"key_mapping: {pattern!r} -> {replacement!r} is no valid regular expression with its replacement: "
                f"{error}"
            ) from error
        if hits:
            return new
    return key


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether a directory or Hub repository holds an adapter: an `adapter_config.json` that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (ConfigError, NotImplementedError):
        return False
    return True


def read_tensors(
    source: str | os.PathLike,
    subfolder: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> Tensors:
    """Read the adapter in a directory or Hub repository: the safetensors file, or the checkpoint, or torch's pickle.

    Args:
        source: a directory, or a repository id.
        subfolder: folder below it.
        key_mapping: see `Tensors.renamed`.
        hub: for `huggingface_hub`.

    Raises:
        FileNotFoundError: none of them is there.
        LoadError: the file is broken, or a pickle that asks for more than tensors; it is named.
    """
    for filename in (SAFETENSORS_NAME, CKPT_NAME, BIN_NAME):
        path = fetch(source, filename, subfolder=subfolder, **hub)
        if path is not None:
            return read_file(path).renamed(key_mapping)
    where = f"{source}/{subfolder}" if subfolder else f"{source}"
    raise FileNotFoundError(
        f"'{where}' has no adapter weights: none of {SAFETENSORS_NAME}, {CKPT_NAME} and {BIN_NAME} is there."
    )


def read_file(path: Path) -> Tensors:
    """The tensors of a safetensors file, a MindSpore checkpoint or a pickle of torch's; its name's ending tells which.

    Raises:
        LoadError: it is broken, or a pickle that asks for more than tensors; it is named.
    """
    if path.suffix == ".ckpt":
        return _read_ckpt(path)
    return _read_bin(path) if path.suffix == ".bin" else Tensors(path, read_arrays(path))


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
    adapter = parameters.pop(ADAPTER_ENTRY, "default")
    strange = [key for key, value in parameters.items() if not isinstance(value, Tensor)]
    if strange:
        raise LoadError(f"{path} is no checkpoint of an adapter: {strange} are no tensors")
    return Tensors(path, {key: to_numpy(value) for key, value in parameters.items()}, str(adapter))


def _read_bin(path: Path) -> Tensors:
    try:
        return Tensors(path, {key: tensor.numpy() for key, tensor in read_torch(path).items()})
    except ValueError as error:
        raise LoadError(str(error)) from error


def with_copies_in(tensors: Tensors, config: PeftConfig, model: nn.Cell) -> PeftConfig:
    """The config, with every layer named in `modules_to_save` that the file holds a copy of.

    HF takes a name there for the end of a path, "norm" for `input_norm` too; its files then hold more copies than the
    name says here.
    """
    names = getattr(config, "modules_to_save", None)
    if not names or tensors.adapter is not None:
        return config
    prefix = BASE if config.is_prompt_learning else PREFIX
    held = {
        path
        for path in map(hf_names(model), outer_cells(model))
        if path.endswith(tuple(names)) and any(key.startswith(f"{prefix}{path}.") for key in tensors.arrays)
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
        inner = hf_names(model)(path) + (".base_layer" if path in adapter.patches else "")
        for named in named_parameters(base, adapter.inside + inner):
            if named.key.endswith(".weight"):
                found[named.key] = named
    return found


def embeddings_to_save(model: nn.Cell, adapter: Adapter, wanted: bool | str) -> dict[str, Named]:
    """Those of the base model's embeddings that belong into a file of `adapter`, by their keys there.

    Args:
        model: the base model.
        adapter: whose file.
        wanted: True takes them all, "auto" those that the adapter targets, False none.

    Raises:
        ValueError: `wanted` is none of these.
    """
    if wanted not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers must be True, False or 'auto', got {wanted!r}")
    if wanted is False:
        return {}
    found = embeddings_of(model, adapter)
    if wanted is True:
        if not found:
            warnings.warn(
                "Could not identify embedding layer(s): the base model has neither get_input_embeddings nor "
                "get_output_embeddings. None is saved.",
                PeftWarning,
                stacklevel=4,
            )
        return found
    targets = set(map(hf_names(model), adapter.targets))
    targeted = {key: named for key, named in found.items() if key.removesuffix(".base_layer.weight") in targets}
    if targeted:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.",
            PeftWarning,
            stacklevel=4,
        )
    return targeted
