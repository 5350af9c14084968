"""Uni-LoRA: the choice that HF makes, kept or made again, and what is refused."""

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy

from msft_peft import ConfigError, LoadError, PeftModel, UniLoraConfig, get_peft_model
from tests import nets
from tests.cases import layers_of, output, shake, weights_of
from tests.tolerances import array, assert_same

VECTOR = {"target_modules": ["lin0", "lin1"], "r": 2, "theta_d_length": 11}


def unilora(**settings) -> PeftModel:
    ms.set_seed(5)
    model = get_peft_model(nets.Dense().set_train(False), UniLoraConfig(**VECTOR | settings))
    shake(weights_of(model, "default"))
    return model


def test_the_map_from_the_vector_keeps_lengths():
    model = unilora()
    patches = [layer.adapters["default"] for layer in layers_of(model)]
    theta = array(patches[0].shared.unilora_theta_d)
    entries = np.concatenate([array(factor).ravel() for patch in patches for factor in patch.factors()])
    assert_same(np.float32(np.square(entries).sum()), np.float32(np.square(theta).sum()))
    places = np.concatenate([array(p.unilora_indices_A).ravel() for p in patches])
    assert len(np.unique(places)) > 5


@pytest.mark.parametrize("kept", [True, False])
def test_the_choice_in_files(tmp_path, kept):
    model = unilora(save_indices=kept, proj_seed=3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    assert len(tensors) == (9 if kept else 1)
    x = nets.Dense().sample()
    assert_same(output(PeftModel.from_pretrained(model.unload(), tmp_path), x), output(unilora(proj_seed=3), x))
    if kept:
        # Not the places that the seed gives, but those of the file count.
        key = "base_model.model.lin0.unilora_indices_A"
        tensors[key] = np.zeros_like(tensors[key])
        safetensors.numpy.save_file(tensors, file)
        (tmp_path / "adapter_model.ckpt").unlink()
        loaded = PeftModel.from_pretrained(nets.Dense(), tmp_path)
        assert not array(layers_of(loaded)[0].adapters["default"].unilora_indices_A).any()
        tensors[key][0, 0] = 11
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(LoadError, match="places that a vector of theta_d_length=11 does not have"):
            PeftModel.from_pretrained(nets.Dense(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"theta_d_length": 0},
        {"proj_seed": -1},
        {"proj_seed": 0.5},
        {"unilora_dropout": 1.5},
        {"init_theta_d_bound": 0.0},
        {"init_theta_d_bound": float("inf")},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_what_it_refuses(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        UniLoraConfig(**settings)
