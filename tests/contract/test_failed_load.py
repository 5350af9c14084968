"""A load that fails names the file, lists all that is wrong, and leaves the model as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from msft_peft import LoadError, NoMatchingPeftModuleError, PeftModel
from tests import nets
from tests.cases import Case, first_cases, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same

CONFIG, WEIGHTS, CKPT = "adapter_config.json", "adapter_model.safetensors", "adapter_model.ckpt"

first = pytest.mark.parametrize("first", first_cases(), ids=lambda case: case.note)


def edit_config(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v != "gone"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def only_ckpt(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / CKPT).write_bytes(content)


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / CKPT).unlink()


def first_key(tensors: dict[str, np.ndarray]) -> str:
    return sorted(tensors)[0]


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors[first_key(tensors)] = np.zeros((7, 7), np.float32)


# What is done to a good adapter's folder; the error; a part of its text. Every text must name the folder.
BREAKAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "config gone": (lambda d: (d / CONFIG).unlink(), ValueError, "Can't find 'adapter_config.json' at '"),
    "config empty": (lambda d: (d / CONFIG).write_text(""), ValueError, "adapter_config.json is no valid JSON"),
    "config cut": (lambda d: (d / CONFIG).write_text('{"peft_type": '), ValueError, "adapter_config.json is no valid"),
    "config not text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, "adapter_config.json is no"),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), ValueError, "must hold a JSON object, got list"),
    "no peft_type": (lambda d: edit_config(d, peft_type="gone"), ValueError, "peft_type"),
    "peft_type null": (lambda d: edit_config(d, peft_type=None), ValueError, "peft_type"),
    "unknown peft_type": (lambda d: edit_config(d, peft_type="FOO"), ValueError, "peft_type='FOO'"),
    "lower-case peft_type": (lambda d: edit_config(d, peft_type="lora"), ValueError, "peft_type='lora'"),
    "unhashable peft_type": (lambda d: edit_config(d, peft_type=["LORA"]), ValueError, "peft_type="),
    "unknown task_type": (lambda d: edit_config(d, task_type="FOO"), ValueError, "Invalid task type: 'FOO'. Must be"),
    "weights gone": (no_weights, FileNotFoundError, "has no adapter weights: none of adapter_model.safetensors"),
    "weights empty": (lambda d: (d / WEIGHTS).write_bytes(b""), LoadError, "is no valid safetensors file"),
    "weights garbage": (lambda d: (d / WEIGHTS).write_bytes(b"x" * 999), LoadError, "is no valid safetensors file"),
    "weights cut": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]),
        LoadError,
        "is no valid saf",
    ),
    "no tensors": (lambda d: edit_tensors(d, dict.clear), LoadError, "Found missing adapter keys"),
    "ckpt garbage": (lambda d: only_ckpt(d, b"x" * 999), LoadError, "is no valid MindSpore checkpoint"),
    "ckpt empty": (lambda d: only_ckpt(d, b""), LoadError, "is no valid MindSpore checkpoint"),
    "ckpt cut": (lambda d: only_ckpt(d, (d / CKPT).read_bytes()[:-9]), LoadError, "is no valid MindSpore checkpoint"),
    "tensor missing": (lambda d: edit_tensors(d, lambda t: t.pop(first_key(t))), LoadError, "Found missing adapter k"),
    "tensor too many": (
        lambda d: edit_tensors(d, lambda t: t.update(x=np.ones(1))),
        LoadError,
        r"unexpected .*\['x'\]",
    ),
    "tensor of other shape": (
        lambda d: edit_tensors(d, reshape),
        LoadError,
        r"size mismatch for .*\(7, 7\), the model",
    ),
}


@pytest.fixture
def folder(first: Case, tmp_path: Path) -> Path:
    """A good adapter's folder."""
    model = first.adapted()
    shake(model.trainable_params(), seed=9)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@first
@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
def test_a_failed_load_changes_nothing(first: Case, folder: Path, breakage: tuple):
    damage, kind, text = breakage
    damage(folder)
    base = first.base()
    before = state_of(base)
    with pytest.raises(kind, match=text) as error:
        PeftModel.from_pretrained(base, folder)
    assert str(folder) in str(error.value)
    assert state_of(base) == before
    assert not hasattr(base, "peft_config")

    model = first.adapted()
    before, expected = state_of(model), output(model)
    for name in ("other", "default"):
        with pytest.raises(kind, match=text) as error:
            model.load_adapter(folder, name)
        assert str(folder) in str(error.value)
        assert state_of(model) == before
    assert_same(output(model), expected, "exact")


@first
def test_all_faults_are_listed_at_once(first: Case, folder: Path):
    removed = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        # Half of them go, the others change their shapes.
        keys = sorted(tensors)
        for i, key in enumerate(keys[:4]):
            del tensors[key]
            if i % 2:
                tensors[key] = np.zeros((1, 9 + i), np.float32)
        tensors.update({"stray.one": np.zeros(1), "stray.two": np.zeros(1)})
        removed.extend(keys[:4])

    edit_tensors(folder, change)
    with pytest.raises(LoadError) as error:
        PeftModel.from_pretrained(first.base(), folder)
    misshapen = ["(1, 10)"] if len(removed) > 1 else []
    for part in (*removed, *misshapen, "stray.one", "stray.two", "Nothing was changed", str(folder / WEIGHTS)):
        assert part in str(error.value)


@first
def test_not_strict_loads_what_fits_and_warns(first: Case, folder: Path):
    missing = []
    edit_tensors(folder, lambda t: (missing.append(first_key(t)), t.pop(first_key(t)), t.update(x=np.zeros(1))))
    with pytest.warns(UserWarning, match="Found missing adapter keys .* Found unexpected keys") as caught:
        model = PeftModel.from_pretrained(first.base(), folder, strict=False)
    text = next(str(w.message) for w in caught if "missing" in str(w.message))
    assert missing[0] in text
    assert "'x'" in text
    loaded = safetensors.numpy.load_file(folder / WEIGHTS).values()
    values = [array(p).tobytes() for p in weights_of(model, "default")]
    assert sum(a.tobytes() in values for a in loaded) >= len(values) - 1


@first
def test_mismatched_sizes_may_be_ignored(first: Case, folder: Path):
    edit_tensors(folder, reshape)
    with pytest.raises(LoadError):
        PeftModel.from_pretrained(first.base(), folder, strict=False)
    with pytest.warns(UserWarning, match=r"size mismatch for .*\(7, 7\)"):
        model = PeftModel.from_pretrained(first.base(), folder, ignore_mismatched_sizes=True)
    assert np.isfinite(output(model)).all()


@first
def test_a_base_without_the_targets(first: Case, folder: Path):
    base = nets.Norms()
    before = state_of(base)
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        PeftModel.from_pretrained(base, folder)
    assert state_of(base) == before


@first
def test_a_bad_name_is_refused(first: Case, folder: Path):
    base = first.base()
    before = state_of(base)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        PeftModel.from_pretrained(base, folder, adapter_name="a.b")
    assert state_of(base) == before
    model = first.adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        model.load_adapter(folder, "a b")
    assert state_of(model) == before


@first
def test_an_unknown_source_is_named(first: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = first.base()
    before = state_of(base)
    for source in (tmp_path / "no" / "such" / "folder", "nobody/nothing", "a bad id"):
        with pytest.raises((ValueError, FileNotFoundError), match=str(source).replace("\\", ".")):
            PeftModel.from_pretrained(base, source, local_files_only=True)
    assert state_of(base) == before


@first
def test_a_pickle_that_is_not_torchs_is_named(first: Case, folder: Path):
    no_weights(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(
        LoadError, match=r"adapter_model.bin is not read: it is neither a zip file nor a pickle of torch"
    ):
        PeftModel.from_pretrained(first.base(), folder)


SCALINGS = ("lora_alpha", "alpha", "randlora_alpha", "scaling", "delora_lambda")
SCALED = {
    case.note: (case, name)
    for case in first_cases()
    for name in [next((name for name in SCALINGS if hasattr(case.method.config, name)), None)]
    if name is not None
}


@pytest.mark.parametrize(("first", "alpha"), SCALED.values(), ids=SCALED)
def test_the_settings_are_loaded_over_an_adapter_too(first: Case, alpha: str, folder: Path):
    """HF keeps the old adapter's scaling under the new weights: other numbers than the file's, and no word of it."""
    expected = output(PeftModel.from_pretrained(first.base(), folder))
    fields = json.loads((folder / CONFIG).read_text())
    other = first.adapted(**{alpha: 64})
    other.load_adapter(folder, "default")
    assert getattr(other.peft_config["default"], alpha) == fields[alpha]
    assert_same(output(other), expected)
