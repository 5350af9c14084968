"""Adapters off and on; one of several; deleted and added again."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from msft_peft import AdapterNameError, MergeError, PeftModel, get_peft_model
from tests.cases import Case, act_in_turn, first_cases, layers_of, life_cases, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ


@pytest.fixture(params=life_cases(), ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def careful(case: Case) -> contextlib.AbstractContextManager:
    """Biases that were trained in place stay: that must be said, and only then."""
    return pytest.warns(UserWarning, match="Careful, disabling") if case.trains else contextlib.nullcontext()


def flags(model: PeftModel) -> list[bool]:
    return [p.requires_grad for p in model.get_parameters()]


def alone(case: Case, model: PeftModel, name: str) -> PeftModel:
    """A model with a copy of this one adapter of `model`, and no other."""
    unbiased = {"bias": "none"} if case.trains else {}
    twin = get_peft_model(case.base(), case.config(**unbiased), adapter_name=name)
    values = {p.name: p for p in weights_of(model, name)}
    for p in weights_of(twin, name):
        p.copy_(values.pop(p.name))
    assert not values
    return twin


def test_disabled_is_the_base(case: Case, mode: str):
    expected = output(case.base())
    model = case.adapted()
    x, adapted, before = model.sample(), output(model), flags(model)
    with careful(case), model.disable_adapter():
        assert_same(model(x), expected)
        with careful(case), model.disable_adapter():
            assert_same(output(model), expected)
        assert_same(output(model), expected)
    assert_same(model(x), adapted)
    assert flags(model) == before

    with careful(case), contextlib.suppress(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert_same(output(model), adapted, "exact")


def test_layers_stay_disabled_until_enabled(case: Case, mode: str):
    expected = output(case.base())
    model = case.adapted(inference_mode=True)
    adapted = output(model)
    with careful(case):
        model.base_model.disable_adapter_layers()
    with careful(case), model.disable_adapter():
        pass
    assert_same(output(model), expected)
    assert all(layer.disable_adapters for layer in layers_of(model))
    model.base_model.enable_adapter_layers()
    assert_same(output(model), adapted, "exact")
    assert not any(flags(model))


def test_an_adapter_added_to_a_disabled_model_is_disabled_too(case: Case):
    model = case.pair()
    expected = output(case.base())
    with model.disable_adapter():
        model.add_adapter("three", case.config(**({"bias": "none"} if case.trains else {})))
        shake(weights_of(model, "three"), seed=3)
        model.set_adapter("three")
        assert_same(output(model), expected)
    assert differ(output(model), expected)


def test_an_added_adapter_is_inactive_and_frozen(case: Case, mode: str):
    model = case.pair()
    assert model.active_adapters == ["one"]
    assert model.active_adapter == "one"
    assert sorted(model.peft_config) == ["one", "two"]
    assert_same(output(model), output(alone(case, model, "one")), "exact")
    assert all(p.requires_grad for p in weights_of(model, "one"))
    assert weights_of(model, "two")
    assert {id(p) for p in model.trainable_params()} == {id(p) for p in weights_of(model, "one")}


def test_each_adapter_alone_and_both_together(case: Case, mode: str):
    model = case.pair()
    x, one = model.sample(), output(model)
    two = output(alone(case, model, "two"))
    model.set_adapter("two")
    assert model.active_adapters == ["two"]
    assert {id(p) for p in model.trainable_params()} == {id(p) for p in weights_of(model, "two")}
    assert_same(model(x), two)
    assert differ(one, two)

    if case.whole:
        before = state_of(model)
        with pytest.raises(MergeError, match="each trains its own copy of"):
            model.base_model.set_adapter(["one", "two"])
        assert state_of(model) == before
        assert_same(output(model), two, "exact")
        return
    model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one", "two"]
    both = output(model)
    assert differ(both, one)
    assert differ(both, two)
    assert_same(model(x), both)
    trainable = {id(p) for p in (*weights_of(model, "one"), *weights_of(model, "two"))}
    assert {id(p) for p in model.trainable_params()} == trainable
    again = ["one", "two", "one"] if act_in_turn(model) else ["two", "one", "two"]
    model.base_model.set_adapter(again)
    assert_same(output(model), both, "merge")  # the order is no matter but for rounding, and twice is once


@pytest.mark.parametrize("first", first_cases(), ids=lambda case: case.note)
def test_each_row_of_a_batch_goes_through_an_adapter_of_its_own(first: Case, mode: str):
    """Each adapter's rows come out as if they were a batch alone."""
    model = first.pair().set_train(False)
    x = np.concatenate([array(model.sample())] * 2)
    names = [("one", "two", "__base__")[i % 3] for i in range(len(x))]
    for some in (names, names[::-1]):
        wanted: list[Any] = [None] * len(x)
        for name in sorted(set(some)):
            own = [i for i, other in enumerate(some) if other == name]
            model.set_adapter("two" if name == "__base__" else name, inference_mode=True)
            with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                for i, row in zip(own, output(model, Tensor(x[own]))):
                    wanted[i] = row
        assert_same(model(Tensor(x), adapter_names=some), np.stack(wanted))
    assert_same(model(Tensor(x)), output(model, Tensor(x)))


def test_set_adapter_in_inference_mode_leaves_it_frozen(case: Case):
    model = case.pair()
    model.set_adapter("two", inference_mode=True)
    assert model.active_adapters == ["two"]
    assert not any(flags(model))


def test_wrong_names_switch_nothing(case: Case):
    model = case.pair()
    before = state_of(model)
    calls = (
        lambda: model.set_adapter("nope"),
        lambda: model.base_model.set_adapter(["one", "nope"]),
        lambda: model.delete_adapter("nope"),
        lambda: model.base_model.set_requires_grad(["one", "nope"], False),
    )
    for call in calls:
        with pytest.raises(AdapterNameError, match=r"Adapter nope (not found|does not exist)"):
            call()
    for call in (model.base_model.merge_adapter, model.base_model.merge_and_unload, model.set_requires_grad):
        with pytest.raises(AdapterNameError, match=r"no adapter is named. There are \['one', 'two'\]"):
            call(adapter_names=[])
    with pytest.raises(AdapterNameError, match="Adapter with name 'two' already exists"):
        model.add_adapter("two", case.config())
    with pytest.raises(TypeError, match=r"base_model.set_adapter\(\[...\]\)"):
        model.set_adapter(["one", "two"])
    assert state_of(model) == before


def test_deleting_the_active_adapter_makes_another_one_active(case: Case, mode: str, tmp_path: Path):
    model = case.pair()
    two = output(alone(case, model, "two"))
    x = model.sample()
    with pytest.warns(
        UserWarning, match="Adapter one was active which is now deleted. Setting active adapter to two."
    ):
        model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert list(model.peft_config) == ["two"]
    assert weights_of(model, "one") == []
    assert not any("one" in path.split(".") for path, _ in model.cells_and_names())
    assert {id(p) for p in model.trainable_params()} == {id(p) for p in weights_of(model, "two")}
    assert_same(model(x), two)
    assert [p.name for p in model.get_parameters()] == [path for path, _ in model.parameters_and_names()]

    model.save_pretrained(tmp_path)
    model.delete_adapter("two")
    assert (model.active_adapters, model.active_adapter, model.peft_config) == ([], None, {})
    assert {id(p) for p in model.get_parameters()} == {id(p) for p in model.get_base_model().get_parameters()}
    assert len(list(model.get_parameters())) == len(list(case.base().get_parameters()))
    assert model.trainable_params() == []
    assert_same(output(model), output(case.base()))

    model.save_pretrained(tmp_path / "empty")
    model.load_adapter(tmp_path / "two", "two")
    model.set_adapter("two")
    assert_same(output(model), two)


def test_deleting_an_inactive_adapter_changes_nothing_else(case: Case, mode: str):
    model = case.pair()
    one = output(model)
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert weights_of(model, "two") == []
    assert {id(p) for p in model.trainable_params()} == {id(p) for p in weights_of(model, "one")}
    assert_same(output(model), one, "exact")


def test_deleting_one_of_two_active_adapters_leaves_the_other(case: Case):
    model = case.pair()
    if case.whole:
        return
    two = output(alone(case, model, "two"))
    model.base_model.set_adapter(["one", "two"])
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert_same(output(model), two)
    assert {id(p) for p in model.trainable_params()} == {id(p) for p in weights_of(model, "two")}


def test_a_deleted_adapter_can_be_added_again(case: Case, mode: str):
    model = case.pair()
    old = [array(p) for p in weights_of(model, "two")]
    model.delete_adapter("two")
    model.add_adapter("two", case.config(**({"bias": "none"} if case.trains else {})))
    model.set_adapter("two")
    assert len(weights_of(model, "two")) == len(old)
    if case.method.identity_at_init and case.identity:
        assert_same(output(model), output(case.base()))
    shake(weights_of(model, "two"), seed=4)
    assert differ(output(model), output(case.base()))
    assert [p.name for p in model.get_parameters()] == [path for path, _ in model.parameters_and_names()]


def test_only_one_adapter_may_train_biases(case: Case):
    if not case.trains:
        return
    model = case.adapted()
    before = state_of(model)
    for bias in ("none", "all"):
        with pytest.raises(ValueError, match="Only 1 adapter with bias"):
            model.add_adapter("two", case.config(bias=bias))
    assert state_of(model) == before


def test_freezing_an_adapter(case: Case):
    model = case.adapted()
    model.base_model.set_requires_grad("default", False)
    assert model.trainable_params() == []
    model.base_model.set_requires_grad("default", True)
    assert {p.name for p in weights_of(model, "default")} <= {p.name for p in model.trainable_params()}
    assert len(model.trainable_params()) == len(weights_of(model, "default")) + len(case.trains)
