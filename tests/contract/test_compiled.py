"""Compiled code sees every switch: GRAPH_MODE, a user's own `ms.jit` function, and a compiled training step.

A compiled graph does not notice that a Python attribute changed, so each of these fails silently where it is not
taken care of: the numbers are those of before.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from msft_peft import PeftModel
from msft_peft.core.layer import TunerLayer
from tests.cases import KINDS, Case, first_cases, in_pynative, layers_of, output, shake, weights_of
from tests.nets import Loss, floats
from tests.tolerances import array, assert_same, differ

pytestmark = pytest.mark.graph

first = pytest.mark.parametrize("first", first_cases(), ids=lambda case: case.note)


def graph_mode(model: PeftModel) -> Callable[[Tensor], Any]:
    ms.set_context(mode=ms.GRAPH_MODE)
    return model


def users_jit(model: PeftModel) -> Callable[[Tensor], Any]:
    @ms.jit
    def predict(x):
        return model(x)

    return predict


def jit_in_graph_mode(model: PeftModel) -> Callable[[Tensor], Any]:
    ms.set_context(mode=ms.GRAPH_MODE)
    return users_jit(model)


CALLERS = {"graph mode": graph_mode, "jit": users_jit, "jit in graph mode": jit_in_graph_mode}


def disable(model: PeftModel, folder: Path) -> None:
    model.base_model.disable_adapter_layers()


def add_and_set(model: PeftModel, folder: Path) -> None:
    model.load_adapter(folder, "three")
    model.set_adapter("three")


def delete(model: PeftModel, folder: Path) -> None:
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")


SWITCHES: dict[str, Callable[[PeftModel, Path], Any]] = {
    "set_adapter": lambda model, folder: model.set_adapter("two"),
    "set both": lambda model, folder: model.base_model.set_adapter(["one", "two"]),
    "disable": disable,
    "delete_adapter": delete,
    "load over": lambda model, folder: model.load_adapter(folder, "one"),
    "add and set": add_and_set,
    "unload": lambda model, folder: model.unload(),
    "numbers": lambda model, folder: shake(weights_of(model, "one"), seed=5),
}
# These leave the output as it is; stale code would add the adapter twice, or not at all.
MERGES: dict[str, tuple[Callable[[PeftModel], Any], Callable[[PeftModel], Any]]] = {
    "merge": (lambda model: None, lambda model: model.merge_adapter()),
    "unmerge": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "merge_and_unload": (lambda model: None, lambda model: model.merge_and_unload()),
}


def base_numbers(layer: TunerLayer) -> np.ndarray:
    """The base layer's weight and bias."""
    return np.concatenate([array(p).ravel() for p in (layer.weight, layer.bias) if p is not None])


def crossed(options: Iterable[str], cases: Iterable[Case] = tuple(first_cases())) -> pytest.MarkDecorator:
    """Every method with each option, the callers in turn; the `KINDS` with each option and each caller."""
    found = [
        pytest.param(case, CALLERS[caller], option, id=f"{case.note}-{caller}-{option}")
        for case in cases
        for i, option in enumerate(options)
        for j, caller in enumerate(CALLERS)
        if case.method.name in KINDS or j == i % len(CALLERS)
    ]
    return pytest.mark.parametrize(("first", "caller", "name"), found)


@pytest.fixture
def folder(first: Case, tmp_path: Path) -> Path:
    """A third adapter, on disk."""
    model = first.adapted("default")
    shake(weights_of(model, "default"), seed=8)
    model.save_pretrained(tmp_path)
    return tmp_path


@crossed(SWITCHES)
def test_a_switch_is_seen(first: Case, folder: Path, caller: Callable, name: str):
    model = first.pair()
    x, before = model.sample(), output(model)
    call = caller(model)
    assert_same(call(x), before)
    SWITCHES[name](model, folder)
    after = output(model, x)
    assert differ(after, before)
    assert_same(call(x), after)


@crossed(MERGES, [case for case in first_cases() if case.can_merge])
def test_a_merge_is_seen(first: Case, caller: Callable, name: str):
    model = first.pair()
    x, expected, layers = model.sample(), output(model), layers_of(model)
    prepare, merge = MERGES[name]
    call = caller(model)
    prepare(model)
    before = [base_numbers(layer) for layer in layers]
    assert_same(call(x), expected, "merge")
    merge(model)
    assert all(differ(base_numbers(layer), old) for layer, old in zip(layers, before, strict=True))
    assert_same(call(x), expected, "merge")


@crossed(["disable"])
def test_the_disabled_block_is_seen_at_both_ends(first: Case, caller: Callable, name: str):
    model = first.pair()
    x, adapted = model.sample(), output(model)
    call = caller(model)
    assert_same(call(x), adapted)
    with model.disable_adapter():
        assert_same(call(x), output(first.base()))
    assert_same(call(x), adapted)


def steps() -> list:
    """Each method with what changes a step."""
    names = ["set_adapter", "disable", "load over", "merge", "delete_adapter", "set both"]
    return [
        pytest.param(case, name, id=f"{case.note}-{name}")
        for case in first_cases()
        for name in names
        if name != "merge" or case.can_merge
    ]


@pytest.mark.parametrize(("first", "name"), steps())
def test_a_compiled_training_step_sees_a_switch(first: Case, folder: Path, name: str):
    model = first.pair()
    x = model.sample()
    target = floats(*output(model).shape, seed=3)
    weights = [*weights_of(model, "one"), *weights_of(model, "two")]
    gradient = ms.value_and_grad(Loss(model), None, weights)

    @ms.jit
    def step(x, target):
        return gradient(x, target)

    with in_pynative():
        before, _ = gradient(x, target)
    assert_same(step(x, target)[0], before, "gradient")

    if name == "merge":
        model.merge_adapter()
        assert all(layer.merged for layer in layers_of(model))
    else:
        SWITCHES[name](model, folder)
    for p in weights:
        p.requires_grad = True  # so that PyNative differentiates them all, as compiled code does
    with in_pynative():
        after, expected = gradient(x, target)
    loss, grads = step(x, target)
    assert_same(loss, after, "gradient")
    assert (abs(array(after) - array(before)) > 1e-4) == (name != "merge")
    for ours, theirs in zip(grads, expected):
        assert_same(ours, theirs, "gradient")


@first
def test_freezing_is_seen_by_a_step_made_afterwards(first: Case):
    """The weights that a step trains are chosen when it is made."""
    model = first.pair()
    x = model.sample()
    target = floats(*output(model).shape, seed=3)
    for name in ("one", "two"):
        model.set_adapter(name)
        optimizer = ms.nn.SGD(model.trainable_params(), 0.1)
        gradient = ms.value_and_grad(Loss(model), None, optimizer.parameters)

        def step(x, target, gradient=gradient, optimizer=optimizer):
            loss, grads = gradient(x, target)
            optimizer(grads)
            return loss

        before = {p.name: array(p) for p in model.get_parameters()}
        ms.jit(step)(x, target)
        moved = {p.name for p in model.get_parameters() if (array(p) != before[p.name]).any()}
        assert moved == {p.name for p in weights_of(model, name)}


@first
def test_a_compiled_model_is_not_compiled_again_without_need(first: Case):
    from msft_peft.backend.graphs import compiled_count

    model = first.pair()
    x = model.sample()
    call = users_jit(model)
    call(x)
    count = compiled_count()
    assert count is None or count > 0
    call(x)
    shake(weights_of(model, "one"))
    call(x)
    assert compiled_count() == count
    model.set_adapter("two")
    assert compiled_count() in (0, None)
