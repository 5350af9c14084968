"""TinyLoRA: which layers share a vector, what the frozen factors are, and what is refused."""

import numpy as np
import pytest

from msft_peft import ConfigError, PeftModel, TinyLoraConfig, get_peft_model
from tests import nets
from tests.cases import layers_of, output, shake, weights_of
from tests.tolerances import array, assert_same


def tinylora(net=nets.Blocks, targets=("q", "v", "head"), **settings) -> PeftModel:
    model = get_peft_model(net().set_train(False), TinyLoraConfig(target_modules=list(targets), u=4, **settings))
    shake(weights_of(model, "default"))
    return model


@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, [0, 1, 2, 3, 4]), (0.4, [0, 1, 2, 2, 2]), (0.6, [0, 0, 1, 1, 1]), (1.0, [0] * 5)]
)
def test_neighbours_share_a_vector(tying, groups):
    model = tinylora(weight_tying=tying)
    vectors = [layer.adapters["default"].vector() for layer in layers_of(model)]
    names = [v.name.rpartition("tinylora_v.")[2] for v in vectors]
    assert names == [f"default.{group}" for group in groups]
    assert len(model.trainable_params()) == len(set(groups))


def test_the_factors_are_the_weight_s_first_singular_vectors():
    model = tinylora(nets.Dense, ("lin0", "lin1"), r=3)
    for layer in layers_of(model):
        patch = layer.adapters["default"]
        a, b, w = (array(p) for p in (patch.tinylora_A, patch.tinylora_B, layer.base_layer.weight))
        u, s, v = np.linalg.svd(w)
        assert_same(b @ a, (u[:, :3] * s[:3]) @ v[:3])
        # Half of each value on each side.
        assert_same((a * a).sum(1), s[:3])


@pytest.mark.parametrize("kept", [True, False])
def test_random_matrices_in_files_and_drawn_again(tmp_path, kept):
    model = tinylora(save_projection=kept, projection_seed=7, weight_tying=0.5)
    expected = output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert_same(output(loaded), expected, "exact")
    assert (b"tinylora_P" in (tmp_path / "adapter_model.safetensors").read_bytes()) == kept


def test_without_a_start_of_zero_the_vectors_are_drawn():
    for start in ("uniform", False):
        v = array(layers_of(fresh(start))[0].adapters["default"].vector())
        assert 0 < np.abs(v).max() <= 0.5
    assert not array(layers_of(fresh(True))[0].adapters["default"].vector()).any()


def fresh(start) -> PeftModel:
    config = TinyLoraConfig(target_modules=["head"], init_weights=start, init_v_bound=0.5)
    return get_peft_model(nets.Blocks(), config)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"u": 0},
        {"weight_tying": 1.1},
        {"weight_tying": float("nan")},
        {"projection_seed": 2**64},
        {"init_v_bound": float("inf")},
        {"tinylora_dropout": 1.0},
        {"init_weights": "gaussian"},
    ],
    ids=str,
)
def test_what_it_refuses(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TinyLoraConfig(**settings)
