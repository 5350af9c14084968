"""Save, load, save: the same bytes, the same numbers, whatever the adapter is called."""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from msft_peft import PeftConfig, PeftModel
from msft_peft.core.patch import place_of
from tests.cases import (
    Case,
    first_cases,
    kept_of,
    layers_of,
    life_cases,
    output,
    shake,
    shared_keys,
    weights_of,
)
from tests.tolerances import array, assert_same, differ


@pytest.fixture(params=life_cases(), ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


FILES = {"README.md", "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"}

first = pytest.mark.parametrize("first", first_cases(), ids=lambda case: case.note)
MERGEABLE = [case for case in life_cases() if case.can_merge]
mergeable = pytest.mark.parametrize("case", MERGEABLE, ids=lambda case: case.note)


def trained(case: Case) -> PeftModel:
    """An adapter after some training: all that it trains has moved, biases of the base included."""
    model = case.adapted()
    shake(model.trainable_params(), seed=9)
    return model


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    loaded = ms.load_checkpoint(str(folder / "adapter_model.ckpt"))
    return {name: array(p) for name, p in loaded.items() if isinstance(p, ms.Parameter)}


def assert_equal_files(one: Path, two: Path, names: set[str] = FILES) -> None:
    for name in names - {"adapter_model.ckpt"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def assert_equal_checkpoints(one: Path, two: Path, rename: tuple[str, str] = ("", "")) -> None:
    first, second = checkpoint(one), checkpoint(two)
    renamed = {".".join(rename[1] if part == rename[0] else part for part in key.split(".")): key for key in first}
    assert set(renamed) == set(second)
    for name, key in renamed.items():
        assert_same(second[name], first[key], "exact")


def test_save_load_save(case: Case, mode: str, tmp_path: Path):
    model = trained(case)
    expected = output(model)
    model.save_pretrained(tmp_path / "one")
    assert {p.name for p in (tmp_path / "one").iterdir()} == FILES
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "one")
    assert type(loaded) is type(model)
    assert loaded.trainable_params() == []
    assert not loaded.training
    assert_same(loaded(loaded.sample()), expected, "close" if mode == "graph" else "exact")
    loaded.save_pretrained(tmp_path / "two")
    assert_equal_files(tmp_path / "one", tmp_path / "two")
    assert_equal_checkpoints(tmp_path / "one", tmp_path / "two")


def test_saving_again_gives_the_same_bytes(case: Case, tmp_path: Path):
    model = trained(case)
    for _ in range(2):
        model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert_equal_files(tmp_path / "one", tmp_path / "two")
    assert_equal_checkpoints(tmp_path / "one", tmp_path / "two")


def test_under_another_adapter_name(case: Case, mode: str, tmp_path: Path):
    model = trained(case)
    model.save_pretrained(tmp_path / "one")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "one", adapter_name="other")
    assert loaded.active_adapters == ["other"]
    assert_same(output(loaded), output(model), "exact")
    loaded.save_pretrained(tmp_path / "two")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"README.md", "other"}
    assert_equal_files(tmp_path / "one", tmp_path / "two" / "other", FILES - {"README.md"})
    assert_equal_checkpoints(tmp_path / "one", tmp_path / "two" / "other", ("default", "other"))
    back = PeftModel.from_pretrained(case.base(), tmp_path / "two" / "other")
    assert_same(output(back), output(model), "exact")


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_checkpoint_alone_is_enough(case: Case, mode: str, name: str, tmp_path: Path):
    model = trained(case)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, adapter_name=name)
    assert_same(output(loaded), output(model), "exact")
    assert len(weights_of(loaded, name)) == len(weights_of(model, "default"))


def test_mindspore_loads_the_checkpoint_by_itself(case: Case, mode: str, tmp_path: Path):
    """Its names are those of the parameters: what a user of `ms.load_param_into_net` expects."""
    model = trained(case)
    model.save_pretrained(tmp_path)
    stored = {p.name for p in [*model.trainable_params(), *kept_of(model)]}
    assert set(checkpoint(tmp_path)) == stored
    fresh = case.adapted()
    parameters = ms.load_checkpoint(str(tmp_path / "adapter_model.ckpt"))
    ms.load_param_into_net(fresh, {name: p for name, p in parameters.items() if name in stored})
    assert_same(output(fresh), output(model), "exact")


def test_the_keys_are_hfs(case: Case, tmp_path: Path):
    """No adapter name, no wrapper's name, one prefix; what trains is there, what belongs to it, nothing else."""
    model = trained(case)
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        keys = set(file.keys())
    assert all(key.startswith("base_model.model.") for key in keys - shared_keys(model))
    parts = {part for key in keys for part in key.split(".")}
    assert not parts & {"default", "modules_to_save", "original_module", "adapters"}
    stored = [*model.trainable_params(), *kept_of(model)]
    assert len(keys) == len(stored)
    assert not parts & {"gamma", "beta", "embedding_table"}
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    sizes = [tensors[key].size for key in keys]
    assert sum(sizes) == sum(p.size for p in stored)


def test_saving_changes_nothing(case: Case, mode: str, tmp_path: Path):
    model = trained(case)
    before, expected = model.peft_config["default"].to_dict(), output(model)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == before
    assert before["inference_mode"] is False
    assert [p.requires_grad for p in model.get_parameters()].count(True) == len(model.trainable_params())
    assert_same(output(model), expected, "exact")


@pytest.mark.filterwarnings("ignore:Careful, disabling")
@mergeable
def test_a_merged_adapter_is_saved_as_it_was(case: Case, tmp_path: Path):
    model = trained(case)
    model.save_pretrained(tmp_path / "one")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "two")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "three")
    for name in ("two", "three"):
        assert_equal_files(tmp_path / "one", tmp_path / name)


def test_the_config_is_written_for_inference_and_read_back(case: Case, tmp_path: Path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is case.method.config
    assert read.inference_mode is True
    changed = {"inference_mode", "auto_mapping", "peft_version"}
    ours = model.peft_config["default"].to_dict()
    assert {k: v for k, v in read.to_dict().items() if k not in changed} == {
        k: v for k, v in ours.items() if k not in changed
    }
    assert (read.auto_mapping is None) == (ours["task_type"] is not None)


def test_a_trainable_adapter_trains_what_it_trained(case: Case, mode: str, tmp_path: Path):
    model = trained(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert loaded.training
    assert {p.name for p in loaded.trainable_params()} == {p.name for p in model.trainable_params()}


def test_two_adapters_in_one_folder(case: Case, mode: str, tmp_path: Path):
    model = case.pair()
    one = output(model)
    model.set_adapter("two")
    two = output(model)
    model.save_pretrained(tmp_path / "both")
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"README.md", "one", "two"}
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "both" / "one", adapter_name="one")
    before = [p.name for p in loaded.get_parameters()]
    loaded.load_adapter(tmp_path / "both" / "two", "two")
    assert loaded.active_adapters == ["one"]
    assert set(before) <= {p.name for p in loaded.get_parameters()} | {
        name.replace(".weight", ".base_layer.weight") for name in before
    }
    assert_same(output(loaded), one, "exact")
    loaded.set_adapter("two")
    assert_same(output(loaded), two, "exact")
    model.save_pretrained(tmp_path / "selected", selected_adapters=["two"])
    assert {p.name for p in (tmp_path / "selected").iterdir()} == {"README.md", "two"}
    assert_equal_files(tmp_path / "both" / "two", tmp_path / "selected" / "two", FILES - {"README.md"})


def test_loading_over_an_adapter_replaces_its_weights(case: Case, mode: str, tmp_path: Path):
    model = trained(case)
    model.save_pretrained(tmp_path)
    expected = output(model)
    other = case.adapted()
    own = [id(p) for p in other.get_parameters()]
    assert differ(output(other), expected)
    other.load_adapter(tmp_path, "default")
    assert_same(output(other), expected, "exact")
    assert [id(p) for p in other.get_parameters()] == own
    assert [p.name for p in other.get_parameters()] == [path for path, _ in other.parameters_and_names()]


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("trainable", [False, True])
def test_loading_another_config_over_an_adapter_replaces_it_whole(case: Case, tmp_path: Path, trainable: bool):
    unbiased = {"bias": "none"} if case.trains else {}
    other = {"target_modules": list(case.targets[-1:]), **unbiased}
    small = case.adapted(**other)
    small.save_pretrained(tmp_path)
    model = case.adapted()
    model.load_adapter(tmp_path, "default", is_trainable=trainable)
    assert model.active_adapters == ["default"]
    expected = {p.name for p in weights_of(small, "default")}
    assert {p.name for p in weights_of(model, "default")} == expected
    assert {p.name for p in model.trainable_params()} == (expected if trainable else set())
    assert_same(output(model), output(small))


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_loading_another_config_over_one_of_two_leaves_the_other(case: Case, tmp_path: Path):
    if case.whole:
        return
    unbiased = {"bias": "none"} if case.trains else {}
    case.adapted(target_modules=list(case.targets[-1:]), **unbiased).save_pretrained(tmp_path)
    model = case.pair()
    model.base_model.set_adapter(["one", "two"])
    model.load_adapter(tmp_path, "two")
    assert model.active_adapters == ["one", "two"]
    assert all(p.requires_grad for p in weights_of(model, "one"))
    assert not any(p.requires_grad for p in weights_of(model, "two"))


@mergeable
def test_loading_over_a_merged_adapter_unmerges_it_first(case: Case, tmp_path: Path):
    """Else unmerging would later take out weights that were never put in, and the base would be lost."""
    model = trained(case)
    model.save_pretrained(tmp_path)
    other = case.adapted()
    other.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter default cannot be overwritten when the model is merged. Unmerging"):
        other.load_adapter(tmp_path, "default")
    assert not any(layer.merged for layer in layers_of(other))
    assert_same(output(other), output(model))
    for ours, theirs in zip(layers_of(other), layers_of(case.adapted())):
        assert_same(ours.weight, theirs.weight, "unmerge")


@first
def test_only_the_main_process_writes(first: Case, tmp_path: Path):
    first.adapted().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


@first
def test_what_cannot_be_saved_writes_nothing(first: Case, tmp_path: Path):
    model = first.adapted()
    with pytest.raises(ValueError, match=r"invalid `selected_adapters` arguments.*\['default'\] - got \['q'\]"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["q"])
    with pytest.raises(NotImplementedError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path / "none", safe_serialization=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"Provided path .* should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@first
@pytest.mark.parametrize("writer", ["safetensors.numpy.save_file", "mindspore.save_checkpoint"])
def test_a_write_that_fails_leaves_the_old_adapter(
    first: Case, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = trained(first)
    model.save_pretrained(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    shake(model.trainable_params())

    def full_disk(_: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    failed = "adapter_model.safetensors" if "safetensors" in writer else "adapter_model.ckpt"
    assert (tmp_path / failed).read_bytes() == old[failed]
    assert {p.name for p in tmp_path.iterdir()} == set(old)


@first
def test_keys_that_still_hold_the_adapters_name_load(first: Case, tmp_path: Path):
    model = trained(first)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    places = [place_of(key) for key in tensors]
    old = {".".join(filter(None, (stem, "default", leaf))): tensors[key] for key, (stem, leaf) in zip(tensors, places)}
    assert not set(old) & set(tensors)
    safetensors.numpy.save_file(old, path)  # and without metadata, as old scripts write it
    assert_same(output(PeftModel.from_pretrained(first.base(), tmp_path)), output(model), "exact")


@first
def test_a_given_config_wins_over_the_file(first: Case, tmp_path: Path):
    model = trained(first)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    config = first.config()
    loaded = PeftModel.from_pretrained(first.base(), tmp_path, config=config)
    assert config.inference_mode is False
    assert_same(output(loaded), output(model), "exact")
    with pytest.raises(ValueError, match="must be a PeftConfig, got <class 'dict'>"):
        PeftModel.from_pretrained(first.base(), tmp_path, config={"peft_type": first.method.name})
