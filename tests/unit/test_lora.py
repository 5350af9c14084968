"""LoRA's numbers against its formulas, and the views that HF's scripts use."""

import math
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import mint, nn

from msft_peft import LoraConfig, MergeError, PeftModel, get_peft_model
from msft_peft.core.layer import TunerLayer
from msft_peft.core.wrapper import ModulesToSaveWrapper
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ


def adapted(net: nn.Cell, targets: Any, shaken: bool = True, **settings: Any) -> PeftModel:
    ms.set_seed(3)
    model = get_peft_model(net, LoraConfig(target_modules=targets, **{"r": 2, "lora_alpha": 6} | settings))
    if shaken:
        shake(weights_of(model, "default"))
    return model


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 3.0),
        ({"lora_alpha": 1}, 0.5),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 3}, 2.0),
        ({"rank_pattern": {"lin": 4}}, 1.5),
        ({"alpha_pattern": {"lin": 5}}, 2.5),
        ({"rank_pattern": {"lin": 4}, "alpha_pattern": {"l.*": 1}, "use_rslora": True}, 0.5),
    ],
    ids=str,
)
def test_the_formula_of_a_dense_layer(settings: dict[str, Any], scaling: float):
    net = nn.SequentialCell(nn.Dense(6, 4))
    net._cells["lin"] = net._cells.pop("0")
    net.cell_list = list(net._cells.values())
    x = nets.floats(3, 6)
    model = adapted(net, ["lin"], **settings)
    layer = layers_of(model)[0]
    a, b, w, bias = (array(p) for p in (*weights_of(model, "default"), layer.weight, layer.bias))
    assert layer.scaling["default"] == pytest.approx(scaling)
    assert_same(model(x), x.asnumpy() @ (w + scaling * b @ a).T + bias, "merge")
    assert_same(layer.get_delta_weight("default"), np.float32(scaling) * b @ a)


def test_the_formula_of_an_embedding():
    model = adapted(nets.Embedding(), ["emb"])
    layer = model.emb
    a, b = (array(p) for p in weights_of(model, "default"))
    assert (a.shape, b.shape) == ((2, 10), (6, 2))
    x = nets.ids(2, 5)
    assert_same(layer(x), (array(layer.weight) + 3 * (b @ a).T)[x.asnumpy()], "merge")


def test_the_formula_of_a_convolution():
    """Two convolutions in a row: one of the layer's own geometry, then one over channels alone."""
    net = nets.Conv(2, stride=(1, 2), pad_mode="pad", padding=(1, 0, 2, 1), has_bias=True)
    x = net.sample()
    model = adapted(net, ["conv"])
    a, b = weights_of(model, "default")
    assert (a.shape, b.shape) == ((2, 2, 3, 3), (4, 2, 1, 1))
    down = nn.Conv2d(2, 2, 3, stride=(1, 2), pad_mode="pad", padding=(1, 0, 2, 1), weight_init=ms.Tensor(array(a)))
    up = nn.Conv2d(2, 4, 1, weight_init=ms.Tensor(array(b)))
    expected = array(model.conv.base_layer(x)) + 3 * array(up(down(x)))
    assert_same(model.conv(x), expected, "merge")


def test_the_formula_of_a_grouped_convolution():
    """As in HF: the first convolution reads all channels, the second is grouped like the layer."""
    net = nets.Conv(2, channels=(4, 6), group=2, pad_mode="valid")
    x = net.sample()
    model = adapted(net, ["conv"], r=4)
    a, b = weights_of(model, "default")
    assert (a.shape, b.shape) == ((4, 4, 3, 3), (6, 2, 1, 1))
    down = nn.Conv2d(4, 4, 3, pad_mode="valid", weight_init=ms.Tensor(array(a)))
    up = nn.Conv2d(4, 6, 1, group=2, weight_init=ms.Tensor(array(b)))
    expected = array(model.conv.base_layer(x)) + 1.5 * array(up(down(x)))
    assert_same(model.conv(x), expected, "merge")


def test_the_delta_goes_in_before_a_fused_activation():
    net = nets.FusedDense()
    x = net.sample()
    model = adapted(net, ["lin0"])
    layer = model.lin0
    a, b = (array(p) for p in weights_of(model, "default"))
    linear = x.asnumpy() @ (array(layer.weight) + 3 * b @ a).T + array(layer.bias)
    assert (linear < 0).any()
    assert_same(layer(x), np.maximum(linear, 0), "merge")


def test_mint_embedding(mode: str):
    """MindSpore's own forward of this layer has no CPU kernel in PyNative: there the base model fails by itself."""
    base = nets.MintEmbedding()
    x = base.sample()
    model = adapted(base, ["emb"])
    a, b = (array(p) for p in weights_of(model, "default"))
    table = array(model.emb.weight) + 3 * (b @ a).T
    if mode == "pynative":
        with pytest.raises(RuntimeError, match="Embedding"):
            base(x)
    else:
        assert_same(model(x), table[x.asnumpy()], "merge")
    model.merge_adapter()
    assert_same(model.emb.weight, table, "merge")
    if mode == "graph":
        assert_same(model(x), table[x.asnumpy()], "merge")


# --- initialisation -------------------------------------------------------------------------------------------------


def big(init: Any) -> tuple[np.ndarray, np.ndarray]:
    model = adapted(nn.SequentialCell(nn.Dense(600, 400)), ["0"], shaken=False, r=50, init_lora_weights=init)
    a, b = (array(p) for p in weights_of(model, "default"))
    return a, b


def test_init_true_is_he_uniform_and_zero():
    a, b = big(True)
    bound = 1 / math.sqrt(600)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.99 * bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not b.any()


@pytest.mark.parametrize("init", ["gaussian", "Gaussian"])
def test_init_gaussian(init: str):
    a, b = big(init)
    assert a.std() == pytest.approx(1 / 50, rel=0.02)
    assert np.abs(a).max() > 3 / 50
    assert not b.any()


def test_init_false_draws_both():
    a, b = big(False)
    assert np.abs(a).max() <= 1 / math.sqrt(600)
    assert np.abs(b).max() <= 1 / math.sqrt(50)
    assert b.std() == pytest.approx(1 / math.sqrt(3 * 50), rel=0.02)


def test_init_of_an_embedding():
    for init, zero in ((True, True), (False, False)):
        net = nn.SequentialCell(nn.Embedding(500, 60))
        a, b = (
            array(p) for p in weights_of(adapted(net, ["0"], shaken=False, r=20, init_lora_weights=init), "default")
        )
        assert a.any() != zero
        assert b.std() == pytest.approx(1, rel=0.1)


def test_the_seed_decides():
    first, again = big(True)[0], big(True)[0]
    assert (first == again).all()
    ms.set_seed(4)
    model = get_peft_model(nn.SequentialCell(nn.Dense(600, 400)), LoraConfig(r=50, target_modules=["0"]))
    assert differ(weights_of(model, "default")[0], first)


def test_the_rank_of_a_grouped_convolution_must_fit():
    net = nets.Conv(2, channels=(4, 4), group=2)
    before = state_of(net)
    with pytest.raises(ValueError, match=r"conv is a convolution with groups=2, of which the rank must be a multiple"):
        adapted(net, ["conv"], r=3)
    assert state_of(net) == before
    model = adapted(net, ["conv"], r=4)
    with pytest.raises(MergeError, match="conv is a convolution with groups=2"):
        model.merge_adapter()


# --- dropout and dtypes ---------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only(mode: str):
    model = adapted(nets.Dense(), ["lin0"], lora_dropout=0.5)
    x = model.sample()
    quiet = output(model)
    model.set_train(True)
    first, second = array(model(x)), array(model(x))
    assert differ(first, second)
    assert differ(first, quiet)
    model.set_train(False)
    assert_same(model(x), quiet)


def test_dropout_is_hfs_attribute():
    layer = adapted(nets.Dense(), ["lin0"], lora_dropout=0.5).lin0
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert isinstance(adapted(nets.Dense(), ["lin0"]).lin0.lora_dropout["default"], nn.Identity)


@pytest.mark.parametrize("base", [ms.float16, ms.bfloat16])
def test_adapters_of_a_half_precision_model_are_float32(base: Any):
    model = get_peft_model(nets.Dense(base), LoraConfig(r=2, target_modules=["lin0"]))
    assert {p.dtype for p in weights_of(model, "default")} == {ms.float32}
    model.add_adapter("two", LoraConfig(r=2, target_modules=["lin0"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in weights_of(model, "two")} == {base}
    assert {p.dtype for p in model.get_base_model().lin1.get_parameters()} == {base}


def test_a_half_precision_adapter(mode: str):
    config = LoraConfig(r=2, target_modules=["lin0", "lin1"])
    model = get_peft_model(nets.Dense(ms.float16), config, autocast_adapter_dtype=False)
    shake(weights_of(model, "default"))
    expected = output(model)
    assert expected.dtype == np.float16
    assert_same(model(model.sample()), expected)
    model.merge_adapter()
    assert_same(output(model), expected, "merge")


def test_bfloat16_weights_merge_and_come_back_to_the_bit():
    """No CPU kernel multiplies bfloat16, so the forward is not tried; merging works in float32."""
    net = nets.Dense(ms.bfloat16)
    model = adapted(net, ["lin0"])
    before = array(net.lin0.weight)
    a, b = (array(p) for p in weights_of(model, "default"))
    model.merge_adapter(safe_merge=True)
    merged = array(net.lin0.weight)
    assert merged.dtype == before.dtype
    expected = before.astype(np.float32) + 3 * b @ a
    assert np.abs(merged.astype(np.float32) - expected).max() <= np.abs(expected).max() / 128
    model.unmerge_adapter()
    assert array(net.lin0.weight).tobytes() == before.tobytes()


def test_tied_weights_are_not_merged():
    """The head shares the embedding's table: merging the embedding's adapter would change the head too."""
    net = nets.Tied()
    model = adapted(net, ["emb", "lin"])
    expected, before = output(model), [array(p).tobytes() for p in model.get_parameters()]
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"emb is tied: emb.* and head hold the same Parameter"):
            call()
        assert [array(p).tobytes() for p in model.get_parameters()] == before
        assert_same(output(model), expected, "exact")
    assert model.unload() is net
    assert net.head.weight is net.emb.embedding_table


# --- HF's views -----------------------------------------------------------------------------------------------------


def test_the_views_are_hfs():
    net = nets.Dense()
    base_layer = net.lin0
    model = adapted(net, ["lin0", "lin1"], rank_pattern={"lin1": 3})
    model.add_adapter("other", LoraConfig(r=5, lora_alpha=5, target_modules=["lin0"]))
    layer = model.base_model.model.lin0
    assert isinstance(layer, TunerLayer)
    assert layer.base_layer is layer.get_base_layer() is base_layer
    assert layer.weight is base_layer.weight
    assert layer.bias is base_layer.bias
    assert model.lin1.bias is None
    assert layer.lora_A["default"].weight.shape == (2, 6)
    assert layer.lora_B["default"].weight.shape == (8, 2)
    assert sorted(layer.lora_A) == sorted(layer.lora_A.keys()) == ["default", "other"]
    assert "other" in layer.lora_A
    assert "nope" not in layer.lora_A
    assert len(layer.lora_B) == 2
    assert layer.scaling == {"default": 3.0, "other": 1.0}
    assert layer.r == {"default": 2, "other": 5}
    assert layer.lora_alpha == {"default": 6, "other": 5}
    assert model.lin1.r == {"default": 3}
    assert layer.active_adapters == ["default"]
    assert layer.disable_adapters is False
    assert layer.merged is False
    assert layer.merged_adapters == []
    assert layer.lora_A["default"].weight.name == "base_model.model.lin0.lora_A.default.weight"
    assert not hasattr(layer, "lora_embedding_A")
    with pytest.raises(AttributeError):
        _ = layer.no_such_attribute
    with pytest.raises(KeyError):
        _ = layer.lora_A["nope"]


def test_the_views_of_an_embedding():
    layer = adapted(nets.Embedding(), ["emb"]).emb
    assert layer.lora_embedding_A["default"].shape == (2, 10)
    assert layer.lora_embedding_B["default"].shape == (6, 2)
    assert layer.lora_embedding_A["default"].name == "base_model.model.emb.lora_embedding_A.default"


def test_writing_through_a_view_is_seen(mode: str):
    model = adapted(nets.Dense(), ["lin0"])
    x, before = model.sample(), output(model)
    assert_same(model(x), before)
    p = model.lin0.lora_B["default"].weight
    p.copy_(ms.Tensor(np.zeros(p.shape, np.float32)))
    after = output(model)
    assert differ(after, before)
    assert_same(model(x), after)


def test_a_view_goes_with_its_adapter():
    model = adapted(nets.Dense(), ["lin0"])
    model.add_adapter("other", LoraConfig(r=1, target_modules=["lin0"]))
    model.delete_adapter("other")
    assert list(model.lin0.lora_A) == ["default"]
    model.delete_adapter("default")
    assert not hasattr(model.lin0, "lora_A")
    assert not hasattr(model.lin0, "scaling")


def test_a_layer_trained_whole_shows_the_copy_in_use():
    model = get_peft_model(nets.Blocks(), LoraConfig(r=1, target_modules=["q"], modules_to_save=["head"]))
    head = model.head
    assert isinstance(head, ModulesToSaveWrapper)
    copy = head.modules_to_save["default"]
    assert copy is not head.original_module
    assert head.weight is copy.weight
    assert head.out_channels == 3
    assert copy.weight.name == "base_model.model.head.modules_to_save.default.weight"
    assert_same(copy.weight, head.original_module.weight, "exact")
    assert (copy.weight.requires_grad, head.original_module.weight.requires_grad) == (True, False)
    with model.disable_adapter():
        assert head.weight is head.original_module.weight


def test_adapters_may_be_on_different_layers(mode: str):
    model = adapted(nets.Dense(), ["lin0"])
    default = output(model)
    model.add_adapter("other", LoraConfig(r=1, target_modules=["lin1"]))
    shake(weights_of(model, "other"), seed=2)
    assert_same(output(model), default, "exact")
    model.set_adapter("other")
    other = output(model)
    assert model.lin0.active_adapters == []
    expected = array(model.lin0.base_layer(model.sample()))
    assert_same(model.lin0(model.sample()), expected)
    model.base_model.set_adapter(["default", "other"])
    assert differ(output(model), other)
    assert differ(output(model), default)


def test_mint_and_nn_layers_have_the_same_files(tmp_path):
    for kind in (nets.Dense, nets.MintLinear):
        model = adapted(kind(), ["lin0"])
        model.save_pretrained(tmp_path / kind.__name__)
    files = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("Dense", "MintLinear")]
    assert files[0] == files[1]
    assert isinstance(model.lin0.base_layer, mint.nn.Linear)
