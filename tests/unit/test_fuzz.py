"""Files that were cut, flipped and made up: only our own errors come out, and nothing else happens."""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mindspore import nn
from safetensors.numpy import load_file

from msft_peft import LoraConfig, PeftError, PeftModel, get_peft_model, models
from tests import nets
from tests.models import tiny
from tests.unit.test_torch_pickle import Stored, legacy_file, tensor, zip_file

ROUNDS = 30
CONFIG, WEIGHTS, CKPT = "adapter_config.json", "adapter_model.safetensors", "adapter_model.ckpt"
PICKLES = ("adapter_model.bin", "adapter_model.bin, legacy")  # torch has two formats of one name
# What may come out: our own errors, and the built-in ones that say a file is missing or of something not built.
EXPECTED = (PeftError, FileNotFoundError, NotImplementedError)


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def flip_head(data: bytes, rng: random.Random) -> bytes:
    """A byte changed where formats keep what they say of themselves."""
    changed = bytearray(data)
    changed[rng.randrange(min(200, len(changed)))] = rng.choice(b'\x00\xff{}[]",:0123456789-e.nt')
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + rng.randrange(1, 40)] * 2 + data[start:]


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(0, 300))


def load(base: nn.Cell, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder)


MUTATIONS = [flip, flip_head, cut, repeat, noise]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good adapter's files; the two of torch under names that say which is which."""
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(nets.Blocks(), LoraConfig(r=2, target_modules=["q"])).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    arrays = load_file(folder / WEIGHTS)
    numbers, place, state = b"".join(array.tobytes() for array in arrays.values()), 0, {}
    for key, array in arrays.items():
        storage = Stored(numel=len(numbers) // 4)
        state[key] = tensor(storage, place, array.shape, tuple(stride // 4 for stride in array.strides))
        place += array.size
    zip_file(folder / "zip", state, numbers)
    legacy_file(folder / "legacy", state, numbers, len(numbers) // 4)
    pickles = zip(PICKLES, [(folder / "zip").read_bytes(), (folder / "legacy").read_bytes()])
    return files | dict(pickles)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CKPT, *PICKLES])
def test_adapters(name: str, mutate: Callable[[bytes, random.Random], bytes], whole: dict[str, bytes], tmp_path: Path):
    rng = random.Random(f"{name}{mutate.__name__}")
    base = nets.Blocks()
    before = {p.name: p.asnumpy().copy() for p in base.get_parameters()}
    for kept in {CONFIG, name if name != CONFIG else WEIGHTS}:
        (tmp_path / kept.split(",")[0]).write_bytes(whole[kept])
    assert load(base, tmp_path).unload() is base  # as it is, it loads
    for _ in range(ROUNDS):
        data = mutate(whole[name], rng)
        (tmp_path / name.split(",")[0]).write_bytes(data)
        try:
            model = load(base, tmp_path)
        except EXPECTED:
            pass
        else:
            base = model.unload()
        after = {p.name: p.asnumpy() for p in base.get_parameters()}
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before), data


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
def test_models(name: str, mutate: Callable[[bytes, random.Random], bytes], tmp_path: Path):
    rng = random.Random(f"{name}{mutate.__name__}")
    tiny.decoder("qwen3", num_hidden_layers=1).save_pretrained(tmp_path, max_shard_size="14KB")
    good = (tmp_path / name).read_bytes()
    for _ in range(ROUNDS // 3):
        data = mutate(good, rng)
        (tmp_path / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models.AutoModelForCausalLM.from_pretrained(tmp_path)
        except (ValueError, FileNotFoundError, NotImplementedError):
            pass  # the reference models know nothing of PeftError


def test_configs_of_every_shape(whole: dict[str, bytes], tmp_path: Path):
    """Each field with a value of another type."""
    fields = json.loads(whole[CONFIG])
    (tmp_path / WEIGHTS).write_bytes(whole[WEIGHTS])
    for field in fields:
        for value in (None, True, -1, 1e400, "x", ["x"], [1], {"x": 1}, [[]]):
            (tmp_path / CONFIG).write_text(json.dumps({**fields, field: value}))
            try:
                load(nets.Blocks(), tmp_path)
            except EXPECTED:
                pass
            except Exception as error:
                raise AssertionError(f"{field}={value!r}: {type(error).__name__}: {error}") from error
