"""What wrapping does to a model, and what it leaves alone."""

import copy
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msft_peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from msft_peft.core.layer import TunerLayer
from msft_peft.core.wrapper import ModulesToSaveWrapper
from tests import nets
from tests.cases import Case, fixed_of, life_cases, output, shake, weights_of
from tests.tolerances import array, assert_same, differ

# What depends on the bookkeeping, and not on the kind of layer.
of_life = pytest.mark.parametrize("case", life_cases(), ids=lambda case: case.note)

PREFIX = "base_model.model."


def address(p: ms.Parameter) -> int:
    return p.asnumpy().__array_interface__["data"][0]


def test_a_fresh_adapter_is_the_identity_exactly_if_the_method_says_so(case: Case, mode: str):
    base = case.base()
    x, before = base.sample(), output(base)
    model = get_peft_model(base, case.config())
    fresh = array(model(x))
    if case.method.identity_at_init and case.identity:
        assert_same(fresh, before)
    else:
        assert differ(fresh, before)
    # Most other properties would hold for an adapter that does nothing: random weights must change the output.
    shake(weights_of(model, "default"))
    assert differ(model(x), before)
    assert_same(model(x), output(model))


def test_exactly_the_adapter_trains(case: Case, mode: str):
    base = case.base()
    own = {id(p) for p in base.get_parameters()}
    model = get_peft_model(base, case.config())
    in_place = {p.name for p in model.trainable_params() if id(p) in own}
    assert in_place == {PREFIX + name for name in case.trains}
    added = [p for p in model.get_parameters() if id(p) not in own]
    assert added
    fixed = {id(p) for p in fixed_of(model)}
    assert [p.requires_grad for p in added] == [id(p) not in fixed for p in added]


def test_the_targets_and_nothing_else_are_wrapped(case: Case, mode: str):
    base = case.base()
    before = dict(base.cells_and_names())
    get_peft_model(base, case.config())
    wrapped = {path: cell for path, cell in base.cells_and_names() if isinstance(cell, TunerLayer)}
    copied = {path: cell for path, cell in base.cells_and_names() if isinstance(cell, ModulesToSaveWrapper)}
    assert set(wrapped) == set(case.targets)
    assert set(copied) == set(case.whole)
    assert all(layer.base_layer is before[path] for path, layer in wrapped.items())
    assert all(layer.original_module is before[path] for path, layer in copied.items())
    inside = tuple(f"{path}." for path in (*wrapped, *copied))
    for path, cell in base.cells_and_names():
        if path not in wrapped and path not in copied and not path.startswith(inside):
            assert cell is before[path]


@of_life
def test_wrapping_copies_no_base_weight(case: Case, mode: str):
    base = case.base()
    before = [(p, address(p), array(p)) for p in base.get_parameters()]
    model = get_peft_model(base, case.config())
    after = {id(p) for p in model.get_parameters()}
    for p, where, value in before:
        assert id(p) in after
        assert address(p) == where
        if not (case.residual and p.name.endswith("base_layer.weight")):
            assert_same(p, value, "exact")


def test_wrapping_a_large_model_takes_little_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    base = nn.SequentialCell(nn.Dense(4096, 4096, weight_init="zeros"))
    base[0].weight.asnumpy()
    size = base[0].weight.nbytes
    before = resident()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=1))
    array(model(nets.floats(1, 4096)))
    assert size == 4096 * 4096 * 4
    assert resident() - before < size / 4


def test_parameter_names_are_unique_and_are_paths(case: Case, mode: str):
    model = case.pair()
    paths = [path for path, _ in model.parameters_and_names()]
    names = [p.name for p in model.get_parameters()]
    assert names == paths
    assert len(set(names)) == len(names)
    assert all(name.startswith(PREFIX) for name in names)


def test_base_parameters_are_named_as_in_hf(case: Case, mode: str):
    base = case.base()
    old = {id(p): p.name for p in base.get_parameters()}
    model = get_peft_model(base, case.config())
    for p in model.get_parameters():
        if id(p) not in old:
            continue
        owner, _, leaf = old[id(p)].rpartition(".")
        inside = next((path for path in case.whole if f"{owner}.".startswith(f"{path}.")), None)
        wrapped = next((path for path in case.targets if f"{owner}.".startswith(f"{path}.")), None)
        if wrapped is not None:  # an attention has its weights in layers of its own
            owner = f"{wrapped}.base_layer{owner.removeprefix(wrapped)}"
        elif inside is not None:
            owner = f"{inside}.original_module{owner.removeprefix(inside)}"
        assert p.name == PREFIX + f"{owner}.{leaf}".lstrip(".")


def test_the_state_dict_has_the_same_names_and_no_others(case: Case):
    model = get_peft_model(case.base(), case.config())
    tied = {"base_model.model.head.weight"} if isinstance(model.get_base_model(), nets.Tied) else set()
    # A weight that layers share is under the name of each.
    first = {id(p): name for name, p in reversed(model.state_dict().items())}
    assert set(first.values()) - tied == {p.name for p in model.get_parameters()}


@of_life
def test_injecting_without_a_peft_model(case: Case, mode: str):
    base = case.base()
    own = {id(p) for p in base.get_parameters()}
    model = inject_adapter_in_model(case.config(), base)
    assert model is base
    assert not isinstance(model, PeftModel)
    assert {path for path, cell in base.cells_and_names() if isinstance(cell, TunerLayer)} == set(case.targets)
    assert [p.name for p in model.get_parameters()] == [path for path, _ in model.parameters_and_names()]
    added = [p for p in model.get_parameters() if id(p) not in own]
    assert added
    fixed = {id(p) for p in fixed_of(model)}
    assert [p.requires_grad for p in added] == [id(p) not in fixed for p in added]
    assert {p.name for p in model.trainable_params() if id(p) in own} == set(case.trains)


def test_a_deep_copy_is_equal_and_independent(case: Case):
    model = case.adapted()
    expected = output(model)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.get_parameters()} & {id(p) for p in twin.get_parameters()}
    assert [(p.name, p.requires_grad) for p in twin.get_parameters()] == [
        (p.name, p.requires_grad) for p in model.get_parameters()
    ]
    assert_same(output(twin), expected, "exact")
    for p in model.trainable_params():
        p.copy_(ms.Tensor(np.zeros(p.shape), p.dtype))
    assert differ(output(model), expected)
    assert_same(output(twin), expected, "exact")


def test_each_layer_keeps_its_own_training_flag():
    base = nets.Norms()
    base.set_train(True)
    base.bn.set_train(False)
    model = get_peft_model(base, LoraConfig(target_modules=["lin"], r=1))
    assert (model.training, base.training, base.lin.training, base.bn.training) == (True, True, True, False)


def test_a_second_wrap_warns():
    base = nets.Dense()
    get_peft_model(base, LoraConfig(target_modules=["lin0"], r=1))
    with pytest.warns(UserWarning, match="You are trying to modify a model with PEFT for a second time"):
        get_peft_model(base, LoraConfig(target_modules=["lin0"], r=1), adapter_name="other")
