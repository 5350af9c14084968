"""Errors and warnings against HF peft, live: each situation, what HF makes of it, and what we do.

The tables below are the list of differences: a row with two outcomes is one that is meant.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

import msft_peft

from . import ours, theirs
from .cases import CASES

CASE = CASES["linear"]
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"]}


@dataclass(frozen=True)
class Side:
    """One of the two libraries."""

    lib: Any
    build: Callable[[], Any]

    def config(self, **fields: Any) -> Any:
        return self.lib.LoraConfig(**CONFIG | fields)

    def adapt(self, **fields: Any) -> Any:
        return self.lib.get_peft_model(self.build(), self.config(**fields))

    def load(self, folder: Path, **options: Any) -> Any:
        return self.lib.PeftModel.from_pretrained(self.build(), folder, **options)


WEIGHTS, _, _ = theirs.data(CASE)
SIDES = {
    "HF": Side(peft, lambda: theirs.build("mlp", WEIGHTS)),
    "ours": Side(msft_peft, lambda: ours.build("mlp", WEIGHTS)),
}


def outcome(act: Callable[[], Any]) -> tuple[str, str]:
    """("ok", ""), ("warning", its text) or (the built-in kind of the exception, its text)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except Exception as error:  # whatever it is, it is compared
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            return kind.__name__, str(error)
    texts = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    return ("warning", " ".join(texts)) if texts else ("ok", "")


def check(act: Callable[[Side], Any], row: "Row") -> None:
    for name, wanted in (("HF", row.hf), ("ours", row.ours or row.hf)):
        kind, text = outcome(lambda name=name: act(SIDES[name]))
        assert kind == wanted, f"{name}: {kind}: {text}"
        for word in row.says if name == "HF" or row.ours is None else row.we_say:
            assert word in text, f"{name} says {text!r}"


@dataclass(frozen=True)
class Row:
    """A situation.

    Attributes:
        act: what is done; gets a Side, and in FILES a folder with an adapter as well.
        hf: HF's outcome.
        ours: ours, where it is meant to be another.
        says: what both texts hold; only HF's where `ours` is given.
        we_say: what our text holds where `ours` is given.
    """

    act: Callable[..., Any]
    hf: str
    ours: str | None = None
    says: tuple[str, ...] = ()
    we_say: tuple[str, ...] = ()


# --- files ---------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, drop: str | None = None, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text()) | fields
    found.pop(drop, None)
    path.write_text(json.dumps(found))
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict], Any]) -> Path:
    path = folder / "adapter_model.safetensors"
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path, metadata={"format": "pt"})
    return folder


def overwrite(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


KEY = "base_model.model.lin1.lora_B.weight"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def misshape(arrays: dict) -> None:
    arrays[KEY] = np.zeros((8, 3), np.float32)


def unprefix(arrays: dict) -> None:
    for key in list(arrays):
        arrays[key.removeprefix("base_model.model.")] = arrays.pop(key)


def with_default(arrays: dict) -> None:
    for key in list(arrays):
        arrays[key.replace(".weight", ".default.weight")] = arrays.pop(key)


FILES = {
    "as it was": Row(lambda side, f: side.load(f), "ok"),
    "missing tensor": Row(
        lambda side, f: side.load(edit_tensors(f, lambda arrays: arrays.pop(KEY))),
        "warning",
        "RuntimeError",
        ("Found missing adapter keys while loading the checkpoint: ['base_model.model.lin1.lora_B.default.weight']",),
        ("Found missing adapter keys while loading the checkpoint: ['base_model.model.lin1.lora_B.weight']",),
    ),
    "no tensors at all": Row(
        lambda side, f: side.load(edit_tensors(f, dict.clear)),
        "warning",
        "RuntimeError",
        ("Found missing adapter keys", "lin0.lora_A", "lin1.lora_B"),
        ("Found missing adapter keys", "lin0.lora_A", "lin1.lora_B"),
    ),
    "unexpected tensor": Row(
        lambda side, f: side.load(edit_tensors(f, lambda arrays: arrays.update(zeta=np.ones(2, np.float32)))),
        "ok",
        "RuntimeError",
        we_say=("unexpected", "zeta"),
    ),
    "wrong shape": Row(
        lambda side, f: side.load(edit_tensors(f, misshape)), "RuntimeError", says=("size mismatch for", "lin1.lora_B")
    ),
    "wrong shape, ignored": Row(
        lambda side, f: side.load(edit_tensors(f, misshape), ignore_mismatched_sizes=True),
        "warning",
        says=("lin1.lora_B",),
    ),
    "keys without the prefix": Row(
        lambda side, f: side.load(edit_tensors(f, unprefix)), "warning", "ok", ("missing",)
    ),
    "keys with the adapter's name": Row(lambda side, f: side.load(edit_tensors(f, with_default)), "ok"),
    "base without the layers": Row(
        lambda side, f: side.load(edit_config(f, target_modules=["nope"])),
        "ValueError",
        says=("Target modules", "not found in the base model", "Please check the target modules and try again"),
    ),
    "unknown fields": Row(
        lambda side, f: side.load(edit_config(f, zeta=1)),
        "warning",
        says=("Unexpected keyword arguments ['zeta'] for class LoraConfig, these are ignored.",),
    ),
    "unknown peft_type": Row(
        lambda side, f: side.load(edit_config(f, peft_type="FOO")), "KeyError", "ValueError", ("FOO",), ("FOO", "LORA")
    ),
    "lower-case peft_type": Row(
        lambda side, f: side.load(edit_config(f, peft_type="lora")), "KeyError", "ValueError", ("lora",), ("lora",)
    ),
    "no peft_type": Row(
        lambda side, f: side.load(edit_config(f, drop="peft_type")),
        "KeyError",
        "ValueError",
        ("peft_type",),
        ("peft_type", CONFIG_FILE),
    ),
    "unknown task_type": Row(
        lambda side, f: side.load(edit_config(f, task_type="FOO_TASK")),
        "ValueError",
        says=(
            "Invalid task type: 'FOO_TASK'. Must be one of the following task types: SEQ_CLS, SEQ_2_SEQ_LM, "
            "CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION.",
        ),
    ),
    "causal LM, but a plain net": Row(
        lambda side, f: side.load(edit_config(f, task_type="CAUSAL_LM")), "AttributeError", "ok"
    ),
    "invalid JSON": Row(lambda side, f: side.load(overwrite(f, CONFIG_FILE, b"{")), "ValueError"),
    "no config": Row(
        lambda side, f: side.load(without(f, CONFIG_FILE)),
        "ValueError",
        says=("Can't find 'adapter_config.json' at '",),
    ),
    "no such folder": Row(
        lambda side, f: side.load(f / "a" / "b"), "ValueError", says=("Can't find 'adapter_config.json' at '",)
    ),
    "no weights": Row(
        lambda side, f: side.load(without(f, WEIGHTS_FILE)), "ValueError", "FileNotFoundError", we_say=(WEIGHTS_FILE,)
    ),
    "truncated weights": Row(
        lambda side, f: side.load(overwrite(f, WEIGHTS_FILE, (f / WEIGHTS_FILE).read_bytes()[:-40])),
        "Exception",
        "RuntimeError",
        we_say=(WEIGHTS_FILE,),
    ),
    "empty weights": Row(
        lambda side, f: side.load(overwrite(f, WEIGHTS_FILE, b"")), "Exception", "RuntimeError", we_say=(WEIGHTS_FILE,)
    ),
    "runtime_config": Row(
        lambda side, f: side.load(edit_config(f, runtime_config={"ephemeral_gpu_offload": True})),
        "warning",
        says=("contains a `runtime_config` key. This is ignored. Runtime configurations are only valid at runtime.",),
    ),
    "a dot in the adapter's name": Row(
        lambda side, f: side.load(f, adapter_name="my.ad"), "KeyError", "ValueError", (), ("'my.ad'",)
    ),
    "an empty name": Row(lambda side, f: side.load(f, adapter_name=""), "KeyError", "ValueError", we_say=("''",)),
    "a dict for a config": Row(
        lambda side, f: side.load(f, config={"r": 4}),
        "ValueError",
        says=("The input config must be a PeftConfig, got <class 'dict'>",),
    ),
    "saving over a file": Row(
        lambda side, f: side.adapt().save_pretrained(f / WEIGHTS_FILE),
        "ValueError",
        "NotADirectoryError",
        ("Provided path (", ") should be a directory, not a file"),
        ("Provided path (", ") should be a directory, not a file"),
    ),
    "selecting an adapter that is not there": Row(
        lambda side, f: side.adapt().save_pretrained(f, selected_adapters=["q"]),
        "ValueError",
        says=(
            "You passed an invalid `selected_adapters` arguments, current supported adapter names are ['default'] "
            "- got ['q'].",
        ),
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_files(name, tmp_path):
    SIDES["HF"].adapt().save_pretrained(tmp_path / "adapter")
    turn = iter("ab")

    def act(side: Side) -> None:
        folder = tmp_path / next(turn)
        shutil.copytree(tmp_path / "adapter", folder)
        FILES[name].act(side, folder)

    check(act, FILES[name])


def test_hf_s_warnings_are_to_be_had(tmp_path):
    """What is an error here is the warning that it is in HF with strict=False."""
    SIDES["ours"].adapt().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.ckpt").unlink()
    edit_tensors(tmp_path, lambda arrays: arrays.pop(KEY))
    kind, text = outcome(lambda: SIDES["ours"].load(tmp_path, strict=False))
    assert kind == "warning"
    assert "Found missing adapter keys while loading the checkpoint" in text


# --- calls ---------------------------------------------------------------------------------------------------------


def two(side: Side, **fields: Any) -> Any:
    model = side.adapt(**fields)
    model.add_adapter("other", side.config(r=2))
    return model


def merged(side: Side) -> Any:
    model = side.adapt()
    model.merge_adapter()
    return model


def broken(side: Side) -> Any:
    model = side.adapt(init_lora_weights=False)
    for p in model.parameters() if side is SIDES["HF"] else model.trainable_params():
        if p.requires_grad:
            (ours.fill if side is SIDES["ours"] else theirs.fill)(p, float("nan"))
    return model


def loha(side: Side) -> Any:
    """A config of another method, made up where the library has none but LoRA."""
    if side is SIDES["HF"]:
        return side.lib.LoHaConfig(target_modules=["lin0"])
    config = side.config()
    config.peft_type = "LOHA"
    return config


CALLS = {
    "r = 0": Row(
        lambda side: side.adapt(r=0),
        "ValueError",
        says=("`r` should be a positive integer value but the value passed is 0",),
    ),
    "unknown init": Row(
        lambda side: side.adapt(init_lora_weights="foo"),
        "ValueError",
        says=("Unknown initialization init_lora_weights='foo'",),
    ),
    "unknown bias": Row(
        lambda side: side.adapt(bias="foo"), "NotImplementedError", says=("Requested bias: foo, is not implemented.",)
    ),
    "no targets": Row(
        lambda side: side.adapt(target_modules=None), "ValueError", says=("Please specify `target_modules`",)
    ),
    "no match": Row(lambda side: side.adapt(target_modules=["zz"]), "ValueError", says=("Target modules",)),
    "an empty list": Row(lambda side: side.adapt(target_modules=[]), "ValueError"),
    "all excluded": Row(
        lambda side: side.adapt(exclude_modules=["lin0", "lin1"]),
        "ValueError",  # HF's text depends on whether layers that nobody asked for are left
    ),
    "a norm": Row(
        lambda side: side.adapt(target_modules=["norm"]),
        "ValueError",
        says=("Target module", "is not supported. Currently, only"),
    ),
    "layers and a regex": Row(
        lambda side: side.adapt(target_modules="lin.", layers_to_transform=[0]),
        "ValueError",
        says=("`layers_to_transform` cannot be used when `target_modules` is a str.",),
    ),
    "a pattern and a regex": Row(
        lambda side: side.adapt(target_modules="lin.", layers_pattern="layers"),
        "ValueError",
        says=("`layers_pattern` cannot be used when `target_modules` is a str.",),
    ),
    "a pattern without layers": Row(
        lambda side: side.adapt(layers_pattern="layers"),
        "ValueError",
        says=("When `layers_pattern` is specified, `layers_to_transform` must also be specified.",),
    ),
    "target_parameters as a string": Row(
        lambda side: side.adapt(target_parameters="a"),
        "TypeError",
        says=("`target_parameters` must be a list of strings or None.",),
    ),
    "lora_bias and pissa": Row(lambda side: side.adapt(lora_bias=True, init_lora_weights="pissa"), "ValueError"),
    "lora_bias and DoRA": Row(
        lambda side: side.adapt(lora_bias=True, use_dora=True),
        "ValueError",
        says=("lora_bias=True is not supported for DoRA, please pass use_dora=False",),
    ),
    "loftq without its config": Row(
        lambda side: side.adapt(init_lora_weights="loftq"),
        "ValueError",
        says=("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.",),
    ),
    "unknown task": Row(lambda side: side.config(task_type="FOO"), "ValueError", says=("Invalid task type: 'FOO'.",)),
    "modules_to_save that match nothing": Row(
        lambda side: side.adapt(modules_to_save=["zz"]), "ok", "ValueError", we_say=("'zz'",)
    ),
    "a second model on one net": Row(
        lambda side: side.lib.get_peft_model(side.adapt().base_model.model, side.config()),
        "warning",
        says=("You are trying to modify a model with PEFT for a second time.",),
    ),
    "a taken name": Row(
        lambda side: side.adapt().add_adapter("default", side.config()),
        "ValueError",
        says=("Adapter with name 'default' already exists.",),
    ),
    "another method": Row(
        lambda side: side.adapt().add_adapter("other", loha(side)),
        "ValueError",
        says=("Cannot combine adapters with different peft types. Found ", "LORA and ", "LOHA."),
    ),
    "two adapters with biases": Row(
        lambda side: side.adapt(bias="all").add_adapter("other", side.config(bias="all")),
        "ValueError",
        says=("adapter with bias", "When using multiple adapters, set bias to 'none' for all adapters."),
    ),
    "setting an unknown adapter": Row(
        lambda side: side.adapt().set_adapter("x"), "ValueError", says=("Adapter x not found.",)
    ),
    "setting a list": Row(lambda side: two(side).set_adapter(["default", "other"]), "TypeError"),
    "deleting an unknown adapter": Row(
        lambda side: side.adapt().delete_adapter("x"), "ValueError", says=("Adapter x does not exist",)
    ),
    "deleting a merged adapter": Row(
        lambda side: merged(side).delete_adapter("default"),
        "ValueError",
        says=("Cannot delete adapter(s) ['default'] while they are merged. Please unmerge them first.",),
    ),
    "deleting the active adapter": Row(
        lambda side: two(side).delete_adapter("default"),
        "warning",
        says=("Adapter default was active which is now deleted. Setting active adapter to other.",),
    ),
    "setting while merged": Row(
        lambda side: merged(side).set_adapter("default"),
        "warning",
        says=("Adapter cannot be set when the model is merged. Unmerging the model first.",),
    ),
    "merging twice": Row(
        lambda side: merged(side).merge_adapter(), "warning", says=("All adapters are already merged, nothing to do.",)
    ),
    "merging one more": Row(
        lambda side: (model := two(side), model.merge_adapter(), model.merge_adapter(["default", "other"])),
        "warning",
        says=("Already following adapters were merged default. You are now additionally merging other.",),
    ),
    "unmerging twice": Row(
        lambda side: side.adapt().unmerge_adapter(), "warning", says=("Already unmerged. Nothing to do.",)
    ),
    "merging an unknown adapter": Row(
        lambda side: side.adapt().merge_adapter(["x"]), "ok", "ValueError", we_say=("Adapter x not found.",)
    ),
    "merging NaNs safely": Row(
        lambda side: broken(side).merge_adapter(safe_merge=True),
        "ValueError",
        says=("NaNs detected in the merged weights. The adapter default seems to be broken",),
    ),
    "merging NaNs for good, safely": Row(
        lambda side: broken(side).merge_and_unload(safe_merge=True),
        "ValueError",
        says=("NaNs detected in the merged weights. The adapter default seems to be broken",),
    ),
    "one layer trained whole by two": Row(
        lambda side: (
            model := side.adapt(modules_to_save=["norm"]),
            model.add_adapter("other", side.config(modules_to_save=["norm"])),
            model.base_model.set_adapter(["default", "other"]),
        ),
        "ValueError",
    ),
    "disabling with biases": Row(
        lambda side: side.adapt(bias="all").disable_adapter().__enter__(),
        "warning",
        says=(
            "Careful, disabling adapter layers with bias configured to be 'all' does not produce the same output "
            "as the base model would without adaption.",
        ),
    ),
    "a fan_in_fan_out that is corrected": Row(
        lambda side: side.adapt(fan_in_fan_out=True),
        "warning",
        says=(
            "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`.",
            "Setting fan_in_fan_out to False.",
        ),
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_calls(name):
    check(CALLS[name].act, CALLS[name])


def test_every_error_of_ours_is_a_peft_error():
    """So that `except PeftError` catches what we raise; HF has no such root for most of its own."""
    rows = [row for row in CALLS.values() if (row.ours or row.hf) not in ("ok", "warning")]
    plain = []
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Exception) as caught:  # noqa: PT011 the kinds are the previous test's affair
                row.act(SIDES["ours"])
        if not isinstance(caught.value, msft_peft.PeftError):
            plain.append(type(caught.value).__name__)
    assert sorted(plain) == ["NotImplementedError", "TypeError", "TypeError"]
