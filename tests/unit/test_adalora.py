"""AdaLoRA's schedule in MindSpore's own training, and what it refuses."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, dataset, nn, ops
from mindspore.train import Callback, RunContext
from mindspore.train.callback import _InternalCallbackParam

from msft_peft import AdaLoraCallback, AdaLoraConfig, ConfigError, LoraConfig, PeftModel, get_peft_model
from msft_peft.backend.arrays import write
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

SETTINGS = {"init_r": 4, "target_r": 2, "total_step": 6, "tfinal": 2, "target_modules": ["lin0", "lin1"]}


def adapted(**changes) -> PeftModel:
    ms.set_seed(3)
    model = get_peft_model(nets.Dense(), AdaLoraConfig(**SETTINGS | changes))
    shake(weights_of(model, "default"))
    return model


def ranks(model: PeftModel) -> int:
    """How many singular values are not zero."""
    return sum(np.count_nonzero(array(layer.lora_E["default"])) for layer in layers_of(model))


BAD = {
    "total_step": ({"total_step": None}, "supply a value > 0"),
    "no phase": ({"tinit": 5}, "don't allow for a budgeting phase"),
    "deltaT": ({"deltaT": 0}, "`deltaT` should be a positive integer"),
    "beta": ({"beta1": 1.0}, "`beta1` must lie between 0 and 1"),
    "orth": ({"orth_reg_weight": -1.0}, "`orth_reg_weight` should be greater than or equal to 0"),
    "dora": ({"use_dora": True}, "ADALORA does not support DoRA"),
    "pattern": ({"rank_pattern": {"lin0.lora_E": 3}}, "must be a list of True and False, got 3"),
    "short pattern": ({"rank_pattern": {"lin0.lora_E": [True]}}, "must say it of init_r = 4 ranks, got 1"),
    "steps": ({"total_step": "x"}, "`total_step` must be int"),
    "first steps": ({"tinit": "x"}, "`tinit` must be int"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_values_are_refused_at_once(case: tuple):
    changes, text = case
    with pytest.raises(ValueError, match=text):
        AdaLoraConfig(**SETTINGS | changes)


@pytest.mark.parametrize(
    "field", [{"use_rslora": True}, {"alpha_pattern": {"lin0": 3}}, {"init_lora_weights": "gaussian"}]
)
def test_what_hf_ignores_of_lora_is_refused(field: dict):
    with pytest.raises(NotImplementedError, match=f"AdaLoraConfig.{next(iter(field))}"):
        get_peft_model(nets.Dense(), AdaLoraConfig(**SETTINGS | field))


def test_models_train_prunes_the_ranks(mode: str):
    model = adapted()
    x = array(model.sample())
    target = array(nets.floats(*output(model).shape, seed=3))
    rows = dataset.NumpySlicesDataset({"x": x, "target": target}, shuffle=False).batch(len(x)).repeat(6)
    optimizer = nn.SGD(model.trainable_params(), 0.05)
    engine = ms.train.Model(nets.Loss(model), optimizer=optimizer)
    engine.train(1, rows, callbacks=[AdaLoraCallback(model)], dataset_sink_mode=False)
    assert ranks(model) == 2 * 2
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4
    assert {"optimizer", "_kept"}.isdisjoint(model.base_model._cells)
    assert_same(model(model.sample()), output(model))


def test_a_jitted_step_sees_the_pruned_ranks(tmp_path):
    model = adapted()
    x = model.sample()
    target = nets.floats(*output(model).shape, seed=3)
    gradient = ms.value_and_grad(nets.Loss(model), None, model.trainable_params())
    optimizer = model.base_model.keeps_gradients(nn.SGD(model.trainable_params(), 0.05))

    @ms.jit
    def step(x, target):
        loss, grads = gradient(x, target)
        return ops.depend(loss, optimizer(grads))

    for number in range(1, 7):
        before = output(model)
        step(x, target)
        model.base_model.update_and_allocate(number)
        assert differ(output(model), before)
    assert ranks(model) == 4
    model.base_model.update_and_allocate(7)
    assert ranks(model) == 4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert sum(layer.adapters["default"].shape_of("lora_E")[0] for layer in layers_of(again)) == 4
    assert_same(output(again), output(model))


def test_a_layer_may_lose_all_its_ranks(tmp_path):
    pattern = {"lin0.lora_E": [False] * 4, "lin1.lora_E": [True] * 4}
    model = adapted(rank_pattern=pattern)
    lin0 = layers_of(model)[0].adapters["default"]
    assert lin0.shape_of("lora_A") == (0, 6)
    ms.set_seed(3)
    one = get_peft_model(nets.Dense(), AdaLoraConfig(**SETTINGS | {"rank_pattern": pattern}))
    for p in layers_of(one)[1].adapters["default"].get_parameters():
        if p.requires_grad:
            p.copy_(p + 0.3)
    expected = output(one)
    one.save_pretrained(tmp_path)
    ms.set_seed(3)
    assert_same(output(PeftModel.from_pretrained(nets.Dense(), tmp_path)), expected)
    assert one.peft_config["default"].rank_pattern == pattern


def test_gradients_must_be_there():
    model = adapted()
    step = model.base_model.update_and_allocate
    with pytest.raises(ConfigError, match="needs the gradients of the step"):
        step(0)
    with pytest.raises(ConfigError, match="there are 6 trainable parameters, and 1 gradients"):
        step(0, [Tensor(0.0)])
    with pytest.raises(ConfigError, match="has seen no gradients"):
        step(4)
    model.add_adapter("two", AdaLoraConfig(**SETTINGS))
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ConfigError, match="needs one active adapter"):
        step(0)
    with pytest.raises(TypeError, match="does not support add_weighted_adapter"):
        model.base_model.add_weighted_adapter(["default", "two"], [1, 1], "sum")


def test_the_callback_is_for_adalora():
    with pytest.raises(ConfigError, match="is for a PeftModel with an AdaLoRA adapter, got LoraModel"):
        AdaLoraCallback(get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"])))
    model = adapted()
    callback = AdaLoraCallback(model)
    for seen, text in (
        ({"dataset_sink_mode": True}, "dataset_sink_mode=False"),
        ({"train_network": nets.Loss(model)}, "finds no optimizer in Loss"),
    ):
        with pytest.raises(ConfigError, match=text):
            callback.on_train_begin(RunContext(_InternalCallbackParam(seen)))


class Broken(Exception):
    pass


class Breaks(Callback):
    def on_train_step_end(self, run_context):
        raise Broken


def test_a_model_that_has_trained_before(mode: str):
    """Its compiled step must learn of the optimizer that keeps gradients, and of the user's own again."""
    model = adapted()
    x = array(model.sample())
    target = array(nets.floats(*output(model).shape, seed=3))
    rows = dataset.NumpySlicesDataset({"x": x, "target": target}, shuffle=False).batch(len(x)).repeat(6)
    optimizer = nn.SGD(model.trainable_params(), 0.05)
    engine = ms.train.Model(nets.Loss(model), optimizer=optimizer)
    engine.train(1, rows, dataset_sink_mode=False)
    for _ in range(2):
        with pytest.raises(Broken):
            engine.train(1, rows, callbacks=[AdaLoraCallback(model), Breaks()], dataset_sink_mode=False)
    assert engine.train_network.optimizer.optimizer is optimizer
    engine.train(1, rows, callbacks=[AdaLoraCallback(model)], dataset_sink_mode=False)
    assert engine.train_network.optimizer is optimizer
    assert ranks(model) == 2 * 2
    kept = model.base_model._kept.cell.gradients()
    assert all(array(gradient).any() for gradient in kept)
    last = [array(gradient).copy() for gradient in kept]
    engine.train(1, rows, dataset_sink_mode=False)
    assert all(np.array_equal(array(a), b) for a, b in zip(kept, last)), "the optimizer is still wrapped"


def test_gradients_that_are_all_zero_prune_nothing():
    model = adapted()
    nothing = [ops.zeros_like(p) for p in model.trainable_params()]
    before = output(model)
    with pytest.raises(ConfigError, match="All gradients that AdaLoRA has seen are zero"):
        model.base_model.update_and_allocate(1, nothing)
    assert_same(output(model), before, "exact")
    for layer in layers_of(model):
        write(layer.lora_E["default"], np.zeros((4, 1), np.float32))
    model.base_model.update_and_allocate(1, nothing)


def steps(model: PeftModel, numbers: range, rate: float = 0.05) -> list[float]:
    """Train by hand; the losses."""
    x = model.sample()
    target = nets.floats(*output(model).shape, seed=3)
    optimizer = nn.SGD(model.trainable_params(), rate)
    gradient = ms.value_and_grad(nets.Loss(model), None, optimizer.parameters)
    losses = []
    for number in numbers:
        loss, grads = gradient(x, target)
        optimizer(grads)
        model.base_model.update_and_allocate(number, grads)
        losses.append(float(array(loss)))
    return losses


def base() -> nn.Cell:
    ms.set_seed(3)
    return nets.Dense()


def test_a_layer_without_ranks_does_nothing_and_trains_nothing(mode: str, tmp_path):
    pattern = {"lin0.lora_E": [False] * 4, "lin1.lora_E": [True] * 4}
    model = get_peft_model(base(), AdaLoraConfig(**SETTINGS | {"rank_pattern": pattern}))
    shake(weights_of(model, "default"))
    empty = layers_of(model)[0].adapters["default"]
    assert {p.name for p in model.trainable_params()} == {p.name for p in weights_of(model, "default")}
    assert all("lin1" in p.name for p in model.trainable_params())
    assert float(array(empty.penalty())) == 0
    steps(model, range(1, 4))
    assert differ(output(model), output(base()))
    model.save_pretrained(tmp_path)
    assert_same(output(PeftModel.from_pretrained(base(), tmp_path)), output(model))


def test_training_goes_on_with_the_ranks_that_are_left(tmp_path):
    """What is pruned then is said of all ranks that there once were, as HF's files do."""
    model = adapted()
    steps(model, range(1, 2))
    first = model.peft_config["default"].rank_pattern
    model.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(base(), tmp_path / "first", is_trainable=True)
    steps(model, range(2, 7))
    second = model.peft_config["default"].rank_pattern
    assert sum(map(sum, first.values())) > sum(map(sum, second.values()))
    for layer, kept in second.items():
        assert len(kept) == 4
        assert all(was or not now for was, now in zip(first[layer], kept))
    model.save_pretrained(tmp_path / "second")
    assert_same(output(PeftModel.from_pretrained(base(), tmp_path / "second")), output(model))


def test_a_pattern_is_about_the_layers_that_are_adapted():
    net = base()
    before = state_of(net)
    with pytest.raises(ConfigError, match=r"`rank_pattern` names \['lin2.lora_E'\].*\['lin0.lora_E', 'lin1.lora_E'\]"):
        get_peft_model(net, AdaLoraConfig(**SETTINGS | {"rank_pattern": {"lin2.lora_E": [True] * 4}}))
    assert state_of(net) == before


def test_what_cannot_be_pruned():
    model = adapted()
    ones = [ops.ones_like(p) for p in model.trainable_params()]
    model.merge_adapter()
    with pytest.raises(ConfigError, match="default is merged into the base weights"):
        model.base_model.update_and_allocate(1, ones)
    with pytest.raises(ConfigError, match=r"ranks of 4 \(`init_r`\) to 5 \(`target_r`\)"):
        adapted(target_r=5).base_model.update_and_allocate(1, ones)
