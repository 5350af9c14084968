"""Files: HuggingFace folders and Hub repositories, read and written without torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

# Not from the package itself, where mindnlp puts a reader of its own: it gives Tensors, and float16 for bfloat16.
from safetensors._safetensors_rust import safe_open  # type: ignore[import-not-found]
from safetensors.numpy import save_file
from tqdm import tqdm

from msft_peft.backend.files import inside, replacing, write_text
from msft_peft.backend.hub import fetch_folder
from msft_peft.backend.torch_pickle import read_torch

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def resolve_folder(
    name_or_path: str | os.PathLike, patterns: list[str], kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return a local folder that holds the wanted files, and the `kwargs` that are not for the Hub.

    Args:
        name_or_path: a local folder, or a Hub id, whose files matching `patterns` are then downloaded.
        patterns: file names relative to the (sub)folder.
        kwargs: may hold `HUB_OPTIONS`, as in `huggingface_hub.snapshot_download`, and `subfolder`.

    Raises:
        FileNotFoundError: the name looks like a local path, and there is no such folder; or the Hub has no such model.
        HubError: it could not be had from the Hub.
    """
    rest = dict(kwargs)
    options = {key: rest.pop(key) for key in HUB_OPTIONS if key in rest}
    subfolder = options.pop("subfolder", None) or ""
    name = os.fspath(name_or_path)
    if not os.path.isdir(name):
        if os.path.isabs(name) or name.startswith(".") or name.count("/") > 1 or os.path.exists(name):
            raise FileNotFoundError(f"'{name}' is no folder. Give a folder that holds {CONFIG_FILE}, or a Hub id.")
        prefix = f"{subfolder}/" if subfolder else ""
        name = fetch_folder(name, [prefix + pattern for pattern in patterns], **options)
    folder = inside(name, subfolder, "subfolder=") if subfolder else name
    return folder, rest


def fetch_checkpoint(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Return the folder of a whole checkpoint, the paths of its weights files, and the other `kwargs`.

    safetensors where they are; torch's pickles, of which nothing is run, only where nothing else is.

    Raises:
        FileNotFoundError: no weights file nor index is there, or a shard is missing.
        ValueError: the index is broken, or names a file outside the folder.
    """
    for weights, index in ((WEIGHTS_FILE, INDEX_FILE), (BIN_FILE, BIN_INDEX_FILE)):
        folder, rest = resolve_folder(name_or_path, [CONFIG_FILE, weights, index], kwargs)
        single, index = os.path.join(folder, weights), os.path.join(folder, index)
        if os.path.isfile(single):
            return folder, [single], rest
        if os.path.isfile(index):
            break
    else:
        present = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise FileNotFoundError(
            f"'{folder}' has no weights: none of {WEIGHTS_FILE}, {BIN_FILE} and their indices (found: {present})."
        )
    names = shard_names(index)
    if not os.path.isdir(os.fspath(name_or_path)):
        resolve_folder(name_or_path, names, kwargs)
    paths = [inside(folder, name, f"'{index}'") for name in names]
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        raise FileNotFoundError(f"'{index}' names shards that are not there: {', '.join(absent)}. Download them too.")
    return folder, paths, rest


def shard_names(index: str) -> list[str]:
    """Read the sorted file names of an index such as `model.safetensors.index.json`.

    Raises:
        ValueError: it is not such an index, or a name in it leads out of the folder.
    """
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{index}' is no index of weights: no readable 'weight_map' ({error!r}).") from error
    for name in names:
        inside(os.path.dirname(index), name, f"'{index}'")
    return names


class _Pickled:
    """A pickle of torch's, with what is used here of safetensors' interface."""

    def __init__(self, path: str):
        self.found = read_torch(path)

    def keys(self) -> list[str]:
        return list(self.found)

    def get_shape(self, key: str) -> tuple[int, ...]:
        return self.found[key].shape

    def get_tensor(self, key: str) -> np.ndarray:
        return self.found[key].numpy()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    if path.endswith(".bin"):
        yield _Pickled(path)
        return
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is no readable safetensors file ({error}). Download or save it again.") from error


def tensor_shapes(paths: list[str]) -> dict[str, tuple[int, ...]]:
    """Read the key and shape of every tensor in `paths` from the headers alone."""
    shapes = {}
    for path in paths:
        with _opened(path) as file:
            shapes.update({key: _shape(file, key) for key in file.keys()})
    return shapes


def _shape(file: Any, key: str) -> tuple[int, ...]:
    return file.get_shape(key) if isinstance(file, _Pickled) else tuple(file.get_slice(key).get_shape())


def tensors(paths: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor as an array of its own, one at a time; a bar shows the progress through several files."""
    for path in tqdm(paths, desc="Loading checkpoint shards", disable=len(paths) < 2):
        with _opened(path) as file:
            for key in file.keys():
                yield key, file.get_tensor(key)


def write_tensors(arrays: dict[str, np.ndarray], folder: str | os.PathLike, max_shard_size: int) -> None:
    """Write `model.safetensors` into `folder`, or numbered shards and their index where it would be too large.

    In the form that transformers reads, each file whole or not at all, the index last. Files of an earlier checkpoint
    of another number of shards are removed: a reader would take them for this one's.

    Args:
        arrays: the tensors by HF's keys.
        folder: made if it is not there.
        max_shard_size: bytes in a file; a larger tensor has a file of its own.
    """
    shards = _in_shards(arrays, max_shard_size)
    names = [WEIGHTS_FILE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards):
        with replacing(Path(folder) / name) as path:
            save_file({key: np.ascontiguousarray(arrays[key]) for key in shard}, path, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
            "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
        }
        write_text(Path(folder) / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    old = [path for path in Path(folder).iterdir() if _SHARD.fullmatch(path.name) and path.name not in names]
    if len(shards) == 1:
        old.append(Path(folder) / INDEX_FILE)
    elif (Path(folder) / WEIGHTS_FILE).is_file():
        old.append(Path(folder) / WEIGHTS_FILE)
    for path in old:
        path.unlink(missing_ok=True)


_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05}-of-{count:05}.safetensors"


def _in_shards(arrays: dict[str, np.ndarray], limit: int) -> list[list[str]]:
    """The keys, in order, for each file."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, array in arrays.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += array.nbytes
    return shards


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def as_bytes(size: int | str) -> int:
    """A number of bytes, or HF's way to write one: "5GB" (10⁹), "300MiB" (2²⁰).

    Raises:
        ValueError: it is none, or not above zero.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", str(size).strip(), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    try:
        count = int(float(match[1]) * unit) if match and unit else 0
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"a size must be a number of bytes, with a unit or without, such as '5GB'; got {size!r}")
    return count
