"""Weights that all layers of one adapter share: there once, and living as long as the adapter."""

import copy
import warnings

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor

from msft_peft import (
    ConfigError,
    LoadError,
    PeftModel,
    PeftWarning,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests import nets
from tests.cases import layers_of, output, shake, weights_of
from tests.tolerances import array, assert_same, differ

VERA = {"target_modules": ["q", "v", "head"], "r": 3}


def vera(seed: int = 0, **settings) -> PeftModel:
    ms.set_seed(5)
    model = get_peft_model(nets.Blocks().set_train(False), VeraConfig(**VERA | settings))
    shake(weights_of(model, "default"), seed=seed)
    return model


def shared_of(model, name="default"):
    return {id(layer.adapters[name].shared): layer.adapters[name].shared for layer in layers_of(model)}


def test_there_is_one_of_them():
    model = vera()
    assert len(layers_of(model)) == 5
    (shared,) = shared_of(model).values()
    projections = [p for p in model.get_parameters() if p.name.split(".")[-2] in ("vera_A", "vera_B")]
    assert {id(p) for p in projections} == {id(shared.vera_A), id(shared.vera_B)}
    assert [p.shape for p in projections] == [(3, 4), (4, 3)]
    # HF's scripts ask a layer for it; it hangs in the tree at the first one.
    assert layers_of(model)[0].vera_A["default"] is shared.vera_A
    assert {layer.requires_grad["default"] for layer in get_layer_status(model)} == {True}


def test_a_copy_of_the_model_has_one_of_its_own():
    model = vera()
    (mine,), (theirs,) = shared_of(model).values(), shared_of(copy.deepcopy(model)).values()
    assert mine.vera_A is not theirs.vera_A
    assert_same(mine.vera_A, theirs.vera_A, "exact")


def test_each_adapter_has_its_own(mode, tmp_path):
    """Other seeds, ranks and layers beside each other; what is loaded into one leaves the others alone."""
    model = vera()
    alone = output(model)
    model.add_adapter("two", VeraConfig(target_modules=["head"], r=5, projection_prng_key=1, d_initial=0.7))
    shake(weights_of(model, "two"), seed=3)
    assert_same(output(model), alone, "exact")
    model.set_adapter("two")
    two = array(model(model.sample()))
    assert differ(two, alone)
    model.save_pretrained(tmp_path)
    model.delete_adapter("two")
    assert_same(array(model(model.sample())), alone)
    model.load_adapter(tmp_path / "two", "two")
    model.set_adapter("two")
    assert_same(array(model(model.sample())), two)
    model.delete_adapter("default")
    assert_same(array(model(model.sample())), two)


def test_a_mixed_batch(mode):
    model = vera()
    model.add_adapter("two", VeraConfig(target_modules=["q"], r=5, projection_prng_key=1))
    shake(weights_of(model, "two"), seed=3)
    x = nets.floats(3, 2, 4)
    rows = [output(model, x)[0]]
    model.set_adapter("two")
    rows.append(output(model, x)[1])
    with model.disable_adapter():
        rows.append(output(model, x)[2])
    found = array(model(x, adapter_names=["default", "two", "__base__"]))
    for row, wanted in zip(found, rows):
        assert_same(row, wanted)


def test_files_hold_it_once_or_not_at_all(tmp_path):
    for kept in (True, False):
        model = vera(save_projection=kept)
        model.save_pretrained(tmp_path / str(kept))
        keys = set(safetensors.numpy.load_file(tmp_path / str(kept) / "adapter_model.safetensors"))
        beside = {key for key in keys if not key.startswith("base_model.model.")}
        assert beside == ({"base_model.vera_A", "base_model.vera_B"} if kept else set())
        assert len(keys - beside) == 10
        loaded = PeftModel.from_pretrained(vera().unload(), tmp_path / str(kept))
        assert_same(output(loaded), output(model), "exact")


def test_the_file_wins_over_the_seed(tmp_path):
    model = vera()
    (shared,) = shared_of(model).values()
    shared.vera_A.copy_(Tensor(array(shared.vera_A) * 2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vera().unload(), tmp_path)
    assert_same(output(loaded), output(model), "exact")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    small = {**tensors, "base_model.vera_A": tensors["base_model.vera_A"][:, :3].copy()}
    for found, text in ((small, r"vera_A: the file has shape \(3, 3\), the model \(3, 4\)"), (None, "missing")):
        left = {key: value for key, value in tensors.items() if key != "base_model.vera_A"}
        safetensors.numpy.save_file(left if found is None else found, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LoadError, match=text):
            PeftModel.from_pretrained(vera().unload(), tmp_path)


def test_injected_without_a_peft_model():
    base = vera().unload()
    inject_adapter_in_model(VeraConfig(**VERA), base)
    shake(weights_of(base, "default"))
    state = get_peft_model_state_dict(base)
    assert {"base_model.vera_A", "layers.0.attn.q.vera_lambda_b"} <= set(state)
    other = inject_adapter_in_model(VeraConfig(r=3), vera().unload(), state_dict=state)
    assert set_peft_model_state_dict(other, state).faults() == []
    assert_same(output(other), output(base), "exact")


def test_compiled_code_sees_what_is_loaded_into_it(tmp_path):
    model = vera()
    (shared,) = shared_of(model).values()
    x, step = model.sample(), _compiled(model)
    before = array(step(x))
    assert_same(before, output(model))
    changed = {"base_model.vera_A": np.ones(shared.vera_A.shape, np.float32)}
    with pytest.warns(UserWarning, match="missing"):
        set_peft_model_state_dict(model, changed)
    assert differ(step(x), before)
    assert_same(step(x), output(model))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"r": 0}, ValueError, "`r` should be a positive integer"),
        ({"projection_prng_key": 1.5}, ValueError, r"`projection_prng_key` should be an integer in \[-2"),
        ({"vera_dropout": 1.0}, ValueError, "`vera_dropout` is a probability"),
        ({"d_initial": float("inf")}, ValueError, "`d_initial` should be a finite number"),
        ({"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only"),
    ],
)
def test_what_vera_refuses(settings, error, text):
    with pytest.raises(error, match=text):
        VeraConfig(**settings)


def _compiled(model):
    def step(x):
        return model(x)

    return ms.jit(step)


# --- VB-LoRA -------------------------------------------------------------------------------------------------------

BANK = {"target_modules": ["q", "head"], "r": 2, "num_vectors": 5, "vector_length": 1, "init_vector_bank_bound": 1.0}


def vblora(**settings) -> PeftModel:
    ms.set_seed(5)
    model = get_peft_model(nets.Blocks().set_train(False), VBLoRAConfig(**BANK | settings))
    shake(weights_of(model, "default"))
    return model


def test_the_bank_trains_and_merges_as_it_was():
    """It may change while an adapter is merged: what was put in is taken out again."""
    model = vblora()
    (shared,) = shared_of(model).values()
    bank = shared.vblora_vector_bank
    assert bank.requires_grad
    assert sum(p is bank for p in model.trainable_params()) == 1
    before = [array(layer.weight) for layer in layers_of(model)]
    model.merge_adapter()
    bank.copy_(Tensor(array(bank) + 1))
    model.unmerge_adapter()
    for layer, weight in zip(layers_of(model), before):
        assert_same(layer.weight, weight, "unmerge")
    assert array(bank).max() > 1.5


def test_only_the_highest_are_kept(tmp_path, capsys):
    model = vblora(save_only_topk_weights=True, topk=3)
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    shapes = {key.removeprefix("base_model.model.head.vblora_"): (a.shape, a.dtype) for key, a in tensors.items()}
    assert shapes["logits_A_topk_indices"] == ((2, 4, 3), np.uint8)
    assert shapes["logits_A_topk_weights"] == ((2, 4, 2), np.float32)
    assert set(get_peft_model_state_dict(model)) == set(tensors)
    model.print_savable_parameters()
    size = sum(array.nbytes for array in tensors.values()) // 4
    assert capsys.readouterr().out.startswith(f"VB-LoRA params to-be-saved (float32-equivalent): {size:,d} || total")

    loaded = PeftModel.from_pretrained(vblora().unload(), tmp_path)
    assert_same(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "again")
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(np.allclose(again[key], value, atol=1e-6) for key, value in tensors.items())

    with pytest.raises(LoadError, match="for inference only"):
        PeftModel.from_pretrained(vblora().unload(), tmp_path, is_trainable=True)
    (tmp_path / "adapter_model.safetensors").unlink()
    trained = PeftModel.from_pretrained(vblora().unload(), tmp_path, is_trainable=True).set_train(False)
    assert_same(output(trained), output(model), "exact")


def test_the_highest_alone_serve_and_do_not_train(tmp_path, mode):
    """Most logits are -∞ then: gradients would be no numbers, or zero, without a word."""
    model = vblora(save_only_topk_weights=True)
    expected = output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vblora().unload(), tmp_path)
    loaded.load_adapter(tmp_path, "second")
    with pytest.warns(PeftWarning, match="second is active and stays frozen: .* save_only_topk_weights=True"):
        loaded.set_adapter("second")
    assert_same(array(loaded(loaded.sample())), expected)
    assert not loaded.trainable_params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.set_adapter("default", inference_mode=True)
        loaded.set_requires_grad("default", False)
    for call in (loaded.set_requires_grad, loaded.base_model.set_requires_grad):
        with pytest.raises(ConfigError, match=r"Adapter default cannot be trained: .* adapter_model\.ckpt"):
            call(["default"])
    assert not loaded.trainable_params()
    fresh = PeftModel.from_pretrained(vblora().unload(), tmp_path)
    fresh.add_adapter("whole", VBLoRAConfig(**BANK))
    fresh.set_adapter("whole")
    assert fresh.trainable_params()


@pytest.mark.parametrize("spoilt", ["far", "lost"])
def test_what_is_no_choice_of_vectors(tmp_path, spoilt):
    model = vblora(save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.head.vblora_logits_A_topk_"
    if spoilt == "far":
        tensors[key + "indices"] = tensors[key + "indices"] + np.uint8(5)
    else:
        del tensors[key + "weights"]
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match="not among num_vectors=5" if spoilt == "far" else "needs .*topk_weights"):
        PeftModel.from_pretrained(vblora().unload(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"topk": 6}, ValueError, r"`topk` \(6\) must not be larger than `num_vectors` \(5\)"),
        ({"num_vectors": 0}, ValueError, "`num_vectors` should be a positive integer"),
        (
            {"vector_length": 3},
            ValueError,
            "`in_features` 4 must be divisible by `vector_length` 3: at layers.0.attn.q",
        ),
        ({"vector_length": 4}, ValueError, "`out_features` 3 must be divisible by `vector_length` 4: at head"),
        ({"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only"),
    ],
)
def test_what_vblora_refuses(settings, error, text):
    with pytest.raises(error, match=text):
        vblora(**settings)


def dense() -> nets.Dense:
    ms.set_seed(5)
    return nets.Dense().set_train(False)


def randlora(tmp_path) -> tuple[PeftModel, dict[str, np.ndarray]]:
    """A saved adapter, and the tensors as HF would have written them: the random matrices at each layer again."""
    config = RandLoraConfig(target_modules=["lin0", "lin1"], r=2, randlora_alpha=2)
    model = get_peft_model(dense(), config)
    shake(weights_of(model, "default"))
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(key for key in tensors if key.endswith(("_A", "_B"))) == [
        "base_model.randlora_A",
        "base_model.randlora_B",
    ]
    copies = {
        f"base_model.model.{layer}.{name}": tensors[f"base_model.{name}"]
        for layer in ("lin0", "lin1")
        for name in ("randlora_A", "randlora_B")
    }
    return model, tensors | copies


@pytest.mark.parametrize("lost", [[], ["base_model.randlora_A"], ["base_model.model.lin1.randlora_B"]], ids=str)
def test_randlora_reads_files_with_copies(tmp_path, lost):
    model, tensors = randlora(tmp_path)
    for key in lost:
        del tensors[key]
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(dense(), tmp_path)
    assert loaded.load_report.missing_keys == loaded.load_report.unexpected_keys == ()
    assert_same(output(loaded), output(model), "exact")


def test_randlora_s_copies_must_agree(tmp_path):
    _, tensors = randlora(tmp_path)
    tensors["base_model.model.lin1.randlora_B"] = tensors["base_model.randlora_B"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"lin1\.randlora_B is another matrix than base_model\.randlora_B"):
        PeftModel.from_pretrained(dense(), tmp_path)


def test_randlora_misses_what_is_nowhere(tmp_path):
    _, tensors = randlora(tmp_path)
    rest = {key: array for key, array in tensors.items() if not key.endswith("randlora_A")}
    safetensors.numpy.save_file(rest, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"missing adapter keys.*base_model\.randlora_A"):
        PeftModel.from_pretrained(dense(), tmp_path)
