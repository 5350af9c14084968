"""Status of layers and models, and the switches on models with injected adapters."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msft_peft import (
    AdapterNameError,
    LoraConfig,
    MergeError,
    functional,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from tests import nets
from tests.cases import layers_of, output, shake, weights_of
from tests.tolerances import array, assert_same, differ


def config(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets or ["q", "v"]), **settings)


def two(**settings: Any) -> nn.Cell:
    """Adapters "one" (active, everywhere) and "two" (on q alone) in a model without a wrapper."""
    ms.set_seed(3)
    net = inject_adapter_in_model(config("q", "v", **settings), nets.Blocks(), "one")
    net = inject_adapter_in_model(config("q", **settings), net, "two")
    functional.set_adapter(net, "one")
    shake([*weights_of(net, "one"), *weights_of(net, "two")])
    return net


def test_status_of_every_kind_of_layer():
    class Kinds(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.emb = nn.Dense(2, 2), nn.Embedding(3, 2)
            self.conv1, self.conv2, self.conv3 = nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)
            self.head = nn.Dense(2, 2)

    targets = ["lin", "emb", "conv1", "conv2", "conv3"]
    model = get_peft_model(Kinds(), config(*targets, modules_to_save=["head"]))
    layers = model.get_layer_status()
    assert [(layer.name, layer.module_type) for layer in layers] == [
        ("model.lin", "lora.Linear"),
        ("model.emb", "lora.Embedding"),
        ("model.conv1", "lora.Conv1d"),
        ("model.conv2", "lora.Conv2d"),
        ("model.conv3", "lora.Conv3d"),
        ("model.head", "ModulesToSaveWrapper"),
    ]
    for layer in layers:
        assert layer.enabled is True
        assert layer.active_adapters == layer.available_adapters == ["default"]
        assert layer.requires_grad == {"default": True}
        assert layer.devices == {"default": ["cpu"]}
        assert (layer.merged_adapters, layer.quantization_backend) == ([], None)
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("Kinds", "LoraModel")
    assert status.peft_types == {"default": "LORA"}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == 6


def test_status_of_single_parameters_and_of_tokens():
    class Model(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin, self.stack = nn.Embedding(5, 4), nn.Dense(4, 4), nn.Dense(4, 4)

    model = get_peft_model(
        Model(), config("lin", target_parameters=["stack.weight"], trainable_token_indices={"emb": [1]})
    )
    assert [(layer.name, layer.module_type) for layer in model.get_layer_status()] == [
        ("model.emb.token_adapter", "TrainableTokensLayer"),
        ("model.lin", "lora.Linear"),
        ("model.stack", "lora.ParamWrapper"),
    ]


def test_irregular_states_are_told():
    model = get_peft_model(nets.Blocks(), config())
    first, second = layers_of(model)[:2]
    assert model.get_model_status().enabled is True
    first.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    first.enable_adapters(True)
    second.activate([])
    assert [layer.active_adapters for layer in model.get_layer_status()[:2]] == [["default"], []]
    assert model.get_model_status().active_adapters == "irregular"
    second.activate(["default"])
    first.lora_A["default"].weight.requires_grad = False
    assert model.get_layer_status()[0].requires_grad == {"default": "irregular"}
    assert model.get_model_status().requires_grad == {"default": "irregular"}
    first.merge(["default"])
    assert model.get_model_status().merged_adapters == "irregular"
    first.unmerge()
    assert model.get_model_status().merged_adapters == []


def test_copies_of_whole_layers_do_not_make_a_merge_irregular():
    model = get_peft_model(nets.Blocks(), config("q", modules_to_save=["head"]))
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_adapters_on_some_layers_are_not_irregular():
    net = two()
    status = get_model_status(net)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    assert status.active_adapters == ["one"]
    assert status.available_adapters == ["one", "two"]
    assert status.requires_grad == {"one": True, "two": False}
    functional.set_adapter(net, ["one", "two"])
    status = get_model_status(net)
    assert status.active_adapters == ["one", "two"]
    assert status.requires_grad == {"one": True, "two": True}
    assert [layer.available_adapters for layer in get_layer_status(net)] == [["one", "two"], ["one"]] * 2
    assert [layer.name for layer in get_layer_status(net)][:2] == ["layers.0.attn.q", "layers.0.attn.v"]


def test_what_has_no_adapters_has_no_status():
    for call in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="No adapter layers found in the model, please ensure that it's a PEFT"):
            call(nets.Blocks())
        for bad in (3, None, "model"):
            with pytest.raises(TypeError, match=r"a model is a mindspore\.nn\.Cell, got"):
                call(bad)


def test_properties_of_a_peft_model():
    model = get_peft_model(nets.Blocks(), config())
    assert model.modules_to_save is None
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.base_model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
    model.add_adapter("two", config(modules_to_save=["head"]))
    assert model.modules_to_save == {"head"}
    model.set_requires_grad("two")
    assert model.get_model_status().requires_grad == {"default": True, "two": True}
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("default")
    model.delete_adapter("two")
    assert not model.has_active_enabled_adapter


# --- switches without a PeftModel -----------------------------------------------------------------------------------


def test_set_adapter_is_seen_everywhere(mode: str):
    net = two()
    one = net(net.sample())
    functional.set_adapter(net, "two")
    two_ = net(net.sample())
    assert differ(one, two_)
    assert_same(two_, output(net))
    assert {p.name.split(".")[-2] for p in net.trainable_params()} == {"two"}
    functional.set_adapter(net, "one", inference_mode=True)
    assert_same(net(net.sample()), one)
    assert net.trainable_params() == []


def test_set_requires_grad():
    net = two()
    functional.set_requires_grad(net, ["one", "two"], False)
    assert net.trainable_params() == []
    functional.set_requires_grad(net, "two")
    assert {p.name.split(".")[-2] for p in net.trainable_params()} == {"two"}


def test_delete_adapter(mode: str):
    net = two()
    functional.set_adapter(net, "two")
    expected = net(net.sample())
    functional.set_adapter(net, "one")
    with pytest.warns(UserWarning, match="Adapter one was active which is now deleted. Setting active adapter to two"):
        assert functional.delete_adapter(net, "one", prefix="lora_") == ["two"]
    assert weights_of(net, "one") == []
    assert_same(net(net.sample()), expected)
    assert functional.delete_adapter(net, "two") is None
    ms.set_seed(3)
    assert_same(net(net.sample()), output(nets.Blocks()))


def test_names_that_are_not_there():
    net = two()
    for call in (functional.set_adapter, functional.set_requires_grad, functional.cast_adapter_dtype):
        with pytest.raises(AdapterNameError, match="Adapter nope not found"):
            call(net, "nope")
    with pytest.raises(AdapterNameError, match="Adapter nope does not exist"):
        functional.delete_adapter(net, "nope")
    layers_of(net)[0].merge(["one"])
    with pytest.raises(MergeError, match="while they are merged"):
        functional.delete_adapter(net, "one")
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first"):
        functional.set_adapter(net, "two")


def test_they_work_on_a_peft_model_too():
    model = get_peft_model(nets.Blocks(), config())
    model.add_adapter("two", config())
    functional.set_adapter(model, ["default", "two"])
    assert model.active_adapters == ["default", "two"]
    functional.delete_adapter(model, "two")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


def test_cast_adapter_dtype(mode: str):
    model = get_peft_model(nets.Dense(ms.float16), config("lin0"), autocast_adapter_dtype=False)
    shake(weights_of(model, "default"))
    model.set_requires_grad("default", False)
    before = {p.name: (p.dtype, array(p)) for p in weights_of(model, "default")}
    assert {dtype for dtype, _ in before.values()} == {ms.float16}
    functional.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert {p.dtype for p in weights_of(model, "default")} == {ms.float16}
    expected = model(model.sample())
    functional.cast_adapter_dtype(model, "default")
    for p in weights_of(model, "default"):
        assert (p.dtype, p.requires_grad) == (ms.float32, False)
        np.testing.assert_array_equal(array(p), before[p.name][1].astype(np.float32))
    assert_same(model(model.sample()), expected)
    layer = layers_of(model)[0]
    assert layer.lora_A["default"].weight is layer.adapters["default"].lora_A
