"""Files that torch wrote, read without torch: what is in them is never run, and what they say is checked.

The files here are made by hand, opcode by opcode, so that they may say what torch would not; that torch's own files
are read rightly is shown in tests/parity.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msft_peft import LoraConfig, PeftModel, get_peft_model
from msft_peft.backend.torch_pickle import read_torch
from msft_peft.errors import LoadError
from tests import nets
from tests.cases import state_of

FLOATS = np.arange(12, dtype="<f4")


class Named:
    """Pickled as a bare name: the function or class that a file asks for."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """Pickled as a call, and, if there is a state, the setting of it on the result."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.function, self.args, self.state = function, args, state


class Stored:
    """Pickled as a reference to a storage."""

    def __init__(self, key: str = "0", kind: str = "FloatStorage", numel: Any = 12) -> None:
        self.pid = ("storage", Named("torch", kind), key, "cpu", numel)


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2, as torch writes, with names that need not exist here."""
    out = io.BytesIO()
    _write(out, value)
    return b"\x80\x02" + out.getvalue() + b"."


def _write(out: io.BytesIO, value: Any) -> None:
    if isinstance(value, Named):
        out.write(f"c{value.module}\n{value.name}\n".encode())
    elif isinstance(value, Call):
        _write(out, value.function)
        _write(out, value.args)
        out.write(b"R")
        if value.state is not None:
            _write(out, value.state)
            out.write(b"b")
    elif isinstance(value, Stored):
        _write(out, value.pid)
        out.write(b"Q")
    elif isinstance(value, tuple):
        out.write(b"(")
        for item in value:
            _write(out, item)
        out.write(b"t")
    elif isinstance(value, dict):
        out.write(b"}(")
        for pair in value.items():
            for item in pair:
                _write(out, item)
        out.write(b"u")
    else:
        out.write(pickle.dumps(value, 2)[2:-1])


def tensor(
    storage: Any = None, offset: Any = 0, shape: Any = (3, 4), stride: Any = (4, 1), name: str = "_rebuild_tensor_v2"
) -> Call:
    hooks = Call(Named("collections", "OrderedDict"))
    return Call(
        Named("torch._utils", name), Stored() if storage is None else storage, offset, shape, stride, False, hooks
    )


def zip_file(path: Path, value: Any, numbers: bytes = FLOATS.tobytes(), compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", numbers)
        archive.writestr("archive/version", "3\n")
    return path


def legacy_file(path: Path, value: Any, numbers: bytes = FLOATS.tobytes(), count: int = 12) -> Path:
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    body = b"".join(map(pickled, heads)) + pickled(value) + pickled(["0"])
    path.write_bytes(body + struct.pack("<q", count) + numbers)
    return path


writers = pytest.mark.parametrize("write", [zip_file, legacy_file])
Writer = Callable[..., Path]


@writers
def test_tensors_are_read(write: Writer, tmp_path: Path):
    state = {
        "whole": tensor(),
        "turned": tensor(shape=(4, 3), stride=(1, 4)),
        "part": tensor(offset=5, shape=(2, 2), stride=(4, 2)),
        "number": tensor(offset=7, shape=(), stride=()),
        "none": tensor(shape=(0, 3), stride=(3, 1)),
        "repeated": tensor(shape=(20,), stride=(0,)),
        "old": tensor(name="_rebuild_tensor"),
        "parameter": Call(Named("torch._utils", "_rebuild_parameter"), tensor(), True, ()),
    }
    found = {key: value.numpy() for key, value in read_torch(write(tmp_path / "x.bin", state)).items()}
    whole = FLOATS.reshape(3, 4)
    wanted = {
        "whole": whole,
        "turned": whole.T,
        "part": whole[1:3, 1::2],
        "number": whole[1, 3],
        "none": np.zeros((0, 3), np.float32),
        "repeated": np.zeros(20, np.float32),
        "old": whole,
        "parameter": whole,
    }
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)
        assert found[key].dtype == np.float32
        assert found[key].flags.c_contiguous
        assert found[key].flags.writeable
        assert found[key].flags.owndata


def test_an_ordered_dict_with_metadata_is_a_state_dict(tmp_path: Path):
    ordered = Call(Named("collections", "OrderedDict"), (("w", tensor()),), state={"_metadata": {"": 1}})
    assert list(read_torch(zip_file(tmp_path / "x.bin", ordered))) == ["w"]


# Each would do something if it were run; the file that it would leave is looked for.
ATTACKS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda mark: Call(Named("os", "system"), f"touch {mark}"),
    "posix.system": lambda mark: Call(Named("posix", "system"), f"touch {mark}"),
    "builtins.eval": lambda mark: Call(Named("builtins", "eval"), f"open({mark!r}, 'w')"),
    "builtins.exec": lambda mark: Call(Named("builtins", "exec"), f"open({mark!r}, 'w')"),
    "builtins.open": lambda mark: Call(Named("builtins", "open"), mark, "w"),
    "builtins.getattr": lambda mark: Call(
        Named("builtins", "getattr"), Named("collections", "OrderedDict"), "fromkeys"
    ),
    "subprocess.Popen": lambda mark: Call(Named("subprocess", "Popen"), ("touch", mark)),
    "torch.load": lambda mark: Call(Named("torch", "load"), mark),
    "torch.storage._load_from_bytes": lambda mark: Call(Named("torch.storage", "_load_from_bytes"), b"x"),
    "numpy.core.multiarray._reconstruct": lambda mark: Call(Named("numpy.core.multiarray", "_reconstruct"), ()),
    "msft_peft.backend.torch_pickle.read_torch": lambda mark: Call(
        Named("msft_peft.backend.torch_pickle", "read_torch"), mark
    ),
}


@writers
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_a_file_is_run(name: str, write: Writer, tmp_path: Path):
    mark = tmp_path / "mark"
    path = write(tmp_path / "x.bin", {"w": tensor(), "evil": ATTACKS[name](str(mark))})
    with pytest.raises(
        ValueError, match=f"it names {name}, which no file of plain tensors needs; nothing of it was run"
    ):
        read_torch(path)
    assert not mark.exists()


REBUILD = Named("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        (REBUILD, "_Function"),
        (Named("torch", "FloatStorage"), "_Type"),
        (Stored(), "_Storage"),
        (tensor(), "TorchTensor"),
    ],
    ids=["function", "type", "storage", "tensor"],
)
def test_nothing_of_ours_is_altered(thing: Any, kind: str, tmp_path: Path):
    """Opcode BUILD writes attributes of what lies on the stack, in C, past the class's own rules."""
    out = io.BytesIO()
    _write(out, thing)
    for state in ({"offset": 99, "_function": 1, "dtype": "O"}, (None, {"__class__": 1, "numel": 10**9})):
        text = io.BytesIO()
        _write(text, state)
        path = tmp_path / "x.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + out.getvalue() + text.getvalue() + b"b.")
            archive.writestr("archive/data/0", FLOATS.tobytes())
        with pytest.raises(ValueError, match=f"it sets the state of a {kind}"):
            read_torch(path)


LIES: dict[str, tuple[Any, str]] = {
    "past the end": (tensor(offset=1), "reaches to number 12 of a storage that holds 12"),
    "a long stride": (tensor(stride=(100, 1)), "reaches to number 203"),
    "a negative stride": (tensor(stride=(-4, 1)), "makes no sense"),
    "a negative offset": (tensor(offset=-1), "makes no sense"),
    "a float": (tensor(offset=1.0), "makes no sense"),
    "a word for a shape": (tensor(shape="ab"), "makes no sense"),
    "shape and strides": (tensor(shape=(3,)), "makes no sense"),
    "endless": (tensor(shape=(10**12,), stride=(0,)), "repeats the 12 numbers"),
    "a large storage": (tensor(Stored(numel=10**9), shape=(10**9,), stride=(1,)), "storage '0'"),
    "no storage": (tensor({}), "which is no storage"),
    "a storage that is not there": (tensor(Stored("7")), "storages? .*7.* in it"),
    "another kind of storage": (tensor(Stored(kind="ComplexFloatStorage")), "names torch.ComplexFloatStorage"),
    "one storage, two sizes": (
        Call(Named("collections", "OrderedDict"), (tensor(), tensor(Stored(numel=3)))),
        "two kinds",
    ),
    "a negative size": (tensor(Stored(numel=-1)), "of -1 numbers"),
}


@writers
@pytest.mark.parametrize("name", LIES)
def test_what_a_file_says_is_checked(name: str, write: Writer, tmp_path: Path):
    value, text = LIES[name]
    with pytest.raises(ValueError, match=f"x.bin is not read: .*{text}"):
        read_torch(write(tmp_path / "x.bin", {"w": value}))


@writers
def test_files_that_are_cut_off(write: Writer, tmp_path: Path):
    path = write(tmp_path / "x.bin", {"w": tensor()})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not read"):
            read_torch(path)


def test_compressed_and_foreign_archives(tmp_path: Path):
    for path in (
        zip_file(tmp_path / "a.bin", {"w": tensor()}, compress=zipfile.ZIP_DEFLATED),
        tmp_path / "b.bin",
    ):
        if not path.exists():
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("hello.txt", "hello")
        with pytest.raises(ValueError, match="not one of torch's"):
            read_torch(path)


@pytest.mark.parametrize("value", [[1, 2], "text", {"w": 3}, {1: "w"}, {"w": {"deep": 1}}])
def test_other_things_than_state_dicts(value: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"not a state dict|other things than tensors"):
        read_torch(zip_file(tmp_path / "x.bin", value))


def test_an_adapter_of_an_attacker_changes_nothing(tmp_path: Path):
    get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_model.ckpt"):
        os.unlink(tmp_path / name)
    mark = tmp_path / "mark"
    zip_file(tmp_path / "adapter_model.bin", ATTACKS["os.system"](str(mark)))
    base = nets.Dense()
    before = state_of(base)
    with pytest.raises(LoadError, match=r"adapter_model.bin is not read: it names os.system"):
        PeftModel.from_pretrained(base, tmp_path)
    assert state_of(base) == before
    assert not mark.exists()


def test_the_order_of_a_state_dict_is_kept(tmp_path: Path):
    state = OrderedDict((name, tensor()) for name in "qwertz")
    assert list(read_torch(zip_file(tmp_path / "x.bin", dict(state)))) == list("qwertz")
