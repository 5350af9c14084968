"""The files that torch.save writes, read without torch, and without running what is in them.

A pickle is a program that may name any function to be called. Here the names that stand in a file of tensors are
known, each mapped to something harmless of our own; every other name is refused before anything is called. What the
file says of places and sizes is checked against the file before it is believed.
"""

import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from mindspore.common.np_dtype import bfloat16

_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# A short storage may stand for a longer tensor that repeats it, but not for one that fills the memory.
_MOST_REPEATED = 1 << 20
# What a file that torch wrote before 1.6 (2020) begins with, each a pickle of its own.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Sealed:
    """What a pickle may hold but not alter: BUILD would otherwise write any attribute of it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__}")


class _Function(_Sealed):
    """A function that a pickle may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Type(_Sealed):
    """A kind of storage, such as torch.FloatStorage."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)


class _Storage(_Sealed):
    """Numbers in the file, one after the other; where they are is known once the file's index was read."""

    __slots__ = ("dtype", "numel", "offset")

    def __init__(self, dtype: np.dtype, numel: int) -> None:
        self.dtype, self.numel, self.offset = dtype, numel, -1

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TorchTensor(_Sealed):
    """A tensor in a file that torch wrote; its numbers are read when they are asked for.

    Attributes:
        path: the file.
        storage: where in it.
        offset, shape, stride: which of the storage's numbers, in numbers, not bytes.
        swapped: the file was written on a machine of the other byte order.
    """

    path: Path
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    swapped: bool = False

    def numpy(self) -> np.ndarray:
        """The numbers, contiguous, as an array of its own."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        dtype = self.storage.dtype
        raw = np.memmap(self.path, np.uint8, "r", self.storage.offset, (self.storage.nbytes,))
        flat = raw.view(dtype)[self.offset :]
        steps = [step * dtype.itemsize for step in self.stride]
        values = np.array(np.lib.stride_tricks.as_strided(flat, self.shape, steps), order="C")
        return values.byteswap() if self.swapped else values

    def check(self) -> None:
        """Raise ValueError if any number would lie outside the storage."""
        shape, stride = self.shape, self.stride
        counts = [self.offset, *shape, *stride]
        if len(shape) != len(stride) or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"a tensor of shape {shape} with strides {stride} from {self.offset} on makes no sense")
        last = self.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= self.storage.numel:
            raise ValueError(
                f"a tensor of shape {shape} reaches to number {last} of a storage that holds {self.storage.numel}"
            )
        if math.prod(shape) > max(self.storage.numel, _MOST_REPEATED):
            raise ValueError(f"a tensor of shape {shape} repeats the {self.storage.numel} numbers of its storage")


class _Unpickler(pickle.Unpickler):
    """Knows the names in `_names` and no others."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}
        self._path = path
        self._names: dict[str, Any] = {
            "collections.OrderedDict": _Function(OrderedDict),
            "torch._utils._rebuild_tensor": _Function(self._tensor),
            "torch._utils._rebuild_tensor_v2": _Function(self._tensor),
            "torch._utils._rebuild_parameter": _Function(self._parameter),
            **{f"torch.{name}": _Type(dtype) for name, dtype in _DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._names:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no file of plain tensors needs; nothing of it was run"
            )
        return self._names[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no storage")
        _, kind, key, _, numel = pid[:5]
        if not isinstance(kind, _Type) or type(key) is not str or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError(f"it refers to a storage {key!r} of {numel!r} numbers, of kind {kind!r}")
        known = self.storages.setdefault(key, _Storage(kind.dtype, numel))
        if (known.dtype, known.numel) != (kind.dtype, numel):
            raise pickle.UnpicklingError(f"it gives the storage {key!r} two kinds or sizes")
        return known

    def _tensor(self, storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> TorchTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"it builds a tensor on {storage!r}, which is no storage")
        tensor = TorchTensor(self._path, storage, offset, tuple(size), tuple(stride))
        tensor.check()
        return tensor

    @staticmethod
    def _parameter(tensor: TorchTensor, *rest: Any) -> TorchTensor:
        return tensor


def read_torch(path: str | os.PathLike) -> dict[str, TorchTensor]:
    """The tensors in a file that torch.save made of a state dict: `adapter_model.bin`, `pytorch_model.bin`.

    Args:
        path: the file, in torch's zip format (since 1.6) or the one before it.

    Raises:
        ValueError: it is no such file, is cut off, says what cannot be, holds other things than tensors by name, or
            names a function that is not on the list.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            found, swapped = _read_zip(file, path) if zipfile.is_zipfile(file) else _read_legacy(file, path)
        except Exception as error:  # a broken pickle may end in any of Python's
            raise ValueError(f"{path} is not read: {str(error) or type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a state dict")
    strange = [key for key, value in found.items() if type(key) is not str or not isinstance(value, TorchTensor)]
    if strange:
        raise ValueError(f"{path} holds other things than tensors by name: {strange}")
    if not swapped:
        return dict(found)
    return {k: TorchTensor(v.path, v.storage, v.offset, v.shape, v.stride, True) for k, v in found.items()}


def _read_zip(file: BinaryIO, path: Path) -> tuple[Any, bool]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or entries[pickles[0]].compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is a zip file, but not one of torch's: there is no plain data.pkl in its folder")
        root = pickles[0].removesuffix("data.pkl")
        with archive.open(entries[f"{root}data.pkl"]) as stream:
            unpickler = _Unpickler(stream, path)  # type: ignore[arg-type]
            found = unpickler.load()
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        for key, storage in unpickler.storages.items():
            info = entries.get(f"{root}data/{key}")
            if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < storage.nbytes:
                raise ValueError(f"the storage {key!r} of {storage.nbytes} bytes is not in it")
            storage.offset = _place(file, info)
            _check_end(file, key, storage)
    return found, (order == b"big") != (_here() == "big")


def _place(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its own header, the length of which stands in it."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"the entry {info.filename} is not where the zip file says")
    return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _read_legacy(file: BinaryIO, path: Path) -> tuple[Any, bool]:
    file.seek(0)
    if _Unpickler(file, path).load() != _MAGIC:
        raise ValueError("it is neither a zip file nor a pickle of torch's")
    version = _Unpickler(file, path).load()
    if version != _PROTOCOL:
        raise ValueError(f"its protocol is {version!r}, not {_PROTOCOL}")
    little = _Unpickler(file, path).load().get("little_endian", True)
    unpickler = _Unpickler(file, path)
    found = unpickler.load()
    keys = _Unpickler(file, path).load()
    if set(keys) != set(unpickler.storages):
        raise ValueError(f"of the storages {list(unpickler.storages)} of its tensors, only {keys} are in it")
    for key in keys:
        storage = unpickler.storages[key]
        count = file.read(8)
        if len(count) < 8 or int.from_bytes(count, "little" if little else "big") != storage.numel:
            raise ValueError(f"the storage {key!r} is not of the {storage.numel} numbers that it is to have")
        storage.offset = file.tell()
        _check_end(file, key, storage)
        file.seek(storage.offset + storage.nbytes)
    return found, bool(little) != (_here() == "little")


def _check_end(file: BinaryIO, key: str, storage: _Storage) -> None:
    size = os.fstat(file.fileno()).st_size
    if storage.offset + storage.nbytes > size:
        raise ValueError(
            f"the storage {key!r} would end at byte {storage.offset + storage.nbytes} of a file of {size} bytes: "
            "it is cut off"
        )


def _here() -> str:
    return "little" if struct.pack("=H", 1) == b"\x01\x00" else "big"
