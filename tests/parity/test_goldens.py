"""Against the goldens: what HF peft wrote, and what it computed, without HF peft or torch."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.cases import FEW

from . import ours
from .cases import ALL_CASES, Case, Record, compare, same_dicts

GOLDENS = Path(__file__).parent.parent / "goldens"

firsts = {case.method: name for name, case in reversed(ALL_CASES.items())}
each_case = pytest.mark.parametrize("name", [*firsts.values()] if FEW else list(ALL_CASES))


def folder_of(case: Case) -> Path:
    """Where its golden lies."""
    return GOLDENS / case.method.lower() / case.name


def golden(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, Record]:
    """(weights of the base, batch, target, HF's record) of a case."""
    with np.load(folder_of(ALL_CASES[name]) / "io.npz") as file:
        arrays = dict(file)

    def below(prefix):
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    trainable, total = arrays["counts"].tolist()
    weights = below("weight/")
    found = Record(arrays["output"], arrays["loss"], below("gradient/"), trainable, total, str(arrays["text"]))
    if ALL_CASES[name].merges:
        found.merged_output, found.merged = arrays["merged_output"], weights | below("merged/")
    return weights, arrays["x"], arrays["target"], found


def test_the_goldens_are_those_of_the_manifest():
    manifest = json.loads((GOLDENS / "MANIFEST.json").read_text())
    found = {
        str(path.relative_to(GOLDENS)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in GOLDENS.rglob("*/*")
        if path.is_file()
    }
    assert found == manifest["sha256"]
    assert sorted(path.name for path in GOLDENS.glob("*/*")) == sorted(ALL_CASES)
    assert manifest["versions"]["peft"] == "0.21.2"


@each_case
def test_numbers(name, mode):
    """Outputs, loss, every gradient, merged outputs and weights, counts: HF's, in both modes."""
    case = ALL_CASES[name]
    weights, x, target, theirs = golden(name)
    compare(ours.record(ours.load(case, weights, folder_of(case)), x, target, case.merges), theirs)


@each_case
def test_unmerging_gives_the_weights_back(name):
    case = ALL_CASES[name]
    weights, _, _, _ = golden(name)
    model = ours.load(case, weights, folder_of(case))
    before = ours.weights_of(model)
    if not case.merges:
        with pytest.raises(ValueError, match=r"groups=2|adapters cannot be merged"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        merged = ours.weights_of(model)
        assert any(not np.array_equal(merged[key], value) for key, value in before.items())
        model.unmerge_adapter()
    after = ours.weights_of(model)
    same_dicts("unmerge", after, before)


@each_case
@pytest.mark.parametrize("adapter", ["default", "other"])
def test_files(name, adapter, tmp_path):
    """Loaded and saved again, whatever its name meanwhile: HF's config, and HF's weights file to the byte.

    But for those of RandLoRA and Lily, which have once what several layers share.
    """
    weights, _, _, _ = golden(name)
    original = folder_of(ALL_CASES[name])
    model = ours.load(ALL_CASES[name], weights, original, adapter_name=adapter)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    assert ours.config_in(folder) == ours.config_in(original)
    mine, theirs = folder / "adapter_model.safetensors", original / "adapter_model.safetensors"
    tensors, metadata = ours.tensors_of(mine)
    wanted, _ = ours.tensors_of(theirs)
    assert tensors == ours.without_copies(wanted)
    assert metadata == {"format": "pt"}
    if len(tensors) == len(wanted):
        assert mine.read_bytes() == theirs.read_bytes()
    else:
        assert name.startswith(("randlora", "lily"))


@each_case
def test_the_checkpoint_beside_is_as_good(name, tmp_path):
    """MindSpore's own adapter_model.ckpt holds the same adapter."""
    weights, x, target, theirs = golden(name)
    case = ALL_CASES[name]
    ours.load(case, weights, folder_of(case)).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    model = ours.load(case, weights, tmp_path)
    compare(ours.record(model, x, target, merge=False), Record(**vars(theirs) | {"merged_output": None}))
