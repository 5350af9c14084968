"""Merging folds adapters into the base weights, and unmerging takes them out."""

from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn

from msft_peft import MergeError, PeftModel
from msft_peft.backend.arrays import FLOAT_DTYPES
from msft_peft.core.wrapper import Wrapper
from tests.cases import Case, layers_of, life_cases, output, read_the_base, weights_of
from tests.tolerances import array, assert_same, differ

# What depends on the bookkeeping, and not on the kind of layer.
of_life = pytest.mark.parametrize("case", life_cases(), ids=lambda case: case.note)


def base_weights(model: PeftModel) -> list[Any]:
    """Weight and bias of each adapted layer, in one: a method may change either."""
    parts = [[array(p).ravel() for p in (layer.weight, layer.bias) if p is not None] for layer in layers_of(model)]
    return [np.concatenate(some) for some in parts]


def cells_of(net: nn.Cell) -> dict[str, int]:
    return {path: id(cell) for path, cell in net.cells_and_names() if path}


def test_merged_and_unmerged_outputs_agree(case: Case, mode: str):
    model = case.adapted()
    x, unmerged, before = model.sample(), output(model), base_weights(model)
    if not case.can_merge:
        with pytest.raises(MergeError):
            model.merge_adapter()
        assert [w.tobytes() for w in base_weights(model)] == [w.tobytes() for w in before]
        assert_same(output(model), unmerged, "exact")
        return
    model.merge_adapter()
    merged = base_weights(model)
    assert all(layer.merged_adapters == ["default"] and layer.merged for layer in layers_of(model))
    assert all(differ(new, old) for new, old in zip(merged, before))
    assert_same(model(x), unmerged, "merge")

    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do."):
        model.merge_adapter()
    assert [w.tobytes() for w in base_weights(model)] == [w.tobytes() for w in merged]

    model.unmerge_adapter()
    for new, old in zip(base_weights(model), before):
        assert_same(new, old, "unmerge")
    assert not any(layer.merged_adapters or layer.merged for layer in layers_of(model))
    assert_same(model(x), unmerged)

    restored = base_weights(model)
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        model.unmerge_adapter()
    assert [w.tobytes() for w in base_weights(model)] == [w.tobytes() for w in restored]


@of_life
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_safe_merge_writes_no_nan(case: Case, mode: str, bad: float):
    model = case.adapted()
    before = base_weights(model)
    last = layers_of(model)[-1]
    p = next(p for p in last.get_parameters() if "default" in p.name.split(".") and p.dtype in FLOAT_DTYPES)
    broken = array(p)
    # One number is enough; but among many MindSpore's topk does not choose a NaN, so that VB-LoRA's logits lose a row.
    broken[0 if case.method.name == "VBLORA" else (0,) * broken.ndim] = bad
    p.copy_(Tensor(broken))
    calls = [lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)]
    for call in calls:
        with pytest.raises(
            MergeError, match="NaNs detected in the merged weights" if case.can_merge else "cannot be merged"
        ):
            call()
        assert [w.tobytes() for w in base_weights(model)] == [w.tobytes() for w in before]
        assert not any(layer.merged for layer in layers_of(model))


@of_life
def test_a_safe_merge_of_sound_weights_is_a_merge(case: Case):
    plain, safe = case.adapted(), case.adapted()
    if not case.can_merge:
        with pytest.raises(MergeError):
            safe.merge_adapter(safe_merge=True)
        return
    plain.merge_adapter()
    safe.merge_adapter(safe_merge=True)
    assert [w.tobytes() for w in base_weights(safe)] == [w.tobytes() for w in base_weights(plain)]


def test_merging_two_adapters_one_after_the_other(case: Case, mode: str):
    model = case.pair()
    before = base_weights(model)
    if not case.can_merge:
        with pytest.raises(MergeError):
            model.merge_adapter(["one", "two"])
        assert [w.tobytes() for w in base_weights(model)] == [w.tobytes() for w in before]
        return
    one = output(model)
    model.merge_adapter(["one"])
    if read_the_base(model):
        with pytest.raises(MergeError, match="merge all of them in one call"):
            model.merge_adapter(["one", "two"])
        model.unmerge_adapter()
        model.merge_adapter(["one", "two"])
    else:
        with pytest.warns(UserWarning, match="Already following adapters were merged one. You are now additionally m"):
            model.merge_adapter(["one", "two"])
    assert all(layer.merged_adapters == ["one", "two"] for layer in layers_of(model))
    merged = output(model)
    model.unmerge_adapter()
    assert_same(output(model), one)
    for new, old in zip(base_weights(model), before):
        assert_same(new, old, "unmerge")
    if not case.whole:  # two copies of one layer cannot both be in use
        model.base_model.set_adapter(["one", "two"])
        assert_same(merged, output(model), "merge")
        assert differ(merged, one)


@of_life
def test_an_unknown_adapter_cannot_be_merged(case: Case):
    model = case.adapted()
    before = base_weights(model)
    for call in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(ValueError, match=r"Adapter nope not found. There are \['default'\]"):
            call(["default", "nope"])
    assert [w.tobytes() for w in base_weights(model)] == [w.tobytes() for w in before]


def test_merge_and_unload_leaves_the_base_models_own_cells(case: Case, mode: str):
    base = case.base()
    cells, names = cells_of(base), [p.name for p in base.get_parameters()]
    model = case.adapted(base=base)
    expected = output(model)
    if not case.can_merge:
        with pytest.raises(MergeError):
            model.merge_and_unload()
        assert_same(output(model), expected, "exact")
        return
    merged = model.merge_and_unload()
    assert merged is base
    assert not hasattr(merged, "peft_config")
    assert not any(isinstance(cell, Wrapper) for _, cell in merged.cells_and_names())
    assert [p.name for p in merged.get_parameters()] == names
    assert list(cells_of(merged)) == list(cells)
    replaced = {path for path, cell in cells_of(merged).items() if cell != cells[path]}
    assert all(path.startswith(case.whole) for path in replaced)
    assert bool(replaced) == bool(case.whole)
    assert_same(merged(merged.sample()), expected, "merge")
    assert {p.dtype for p in merged.get_parameters()} == {p.dtype for p in case.base().get_parameters()}


@of_life
def test_merge_and_unload_of_one_adapter_of_two(case: Case):
    """The other one leaves nothing: if it took something from the base weights, it has given that back."""
    alone, model = case.pair(), case.pair()
    alone.set_adapter("two")
    beside = output(alone)
    alone.delete_adapter("one")
    expected = output(alone)
    assert differ(expected, beside) if case.residual else not differ(expected, beside)
    if not case.can_merge:
        with pytest.raises(MergeError):
            model.merge_and_unload(adapter_names=["two"])
        return
    assert_same(output(model.merge_and_unload(adapter_names=["two"])), expected, "merge")


@of_life
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_back_the_base_model(case: Case, mode: str, merged: bool):
    base = case.base()
    cells, names = cells_of(base), [p.name for p in base.get_parameters()]
    numbers = [array(p) for p in base.get_parameters()]
    expected = output(base)
    model = case.adapted(base=base)
    if merged and case.can_merge:
        model.merge_adapter()
    unloaded = model.unload()
    assert unloaded is base
    assert not hasattr(unloaded, "peft_config")
    assert cells_of(unloaded) == cells
    assert [p.name for p in unloaded.get_parameters()] == names
    for p, old in zip(unloaded.get_parameters(), numbers):
        assert_same(p, old, "unmerge" if merged or case.residual else "exact")
    assert_same(unloaded(unloaded.sample()) if not merged else output(unloaded), expected)
    again = case.adapted(base=unloaded)
    assert weights_of(again, "default")


@of_life
def test_switching_a_merged_model_unmerges_it_first(case: Case):
    model = case.pair()
    if not case.can_merge:
        return
    one = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first."):
        model.set_adapter("two")
    assert not any(layer.merged for layer in layers_of(model))
    model.set_adapter("one")
    assert_same(output(model), one)


@of_life
def test_a_merged_adapter_cannot_be_deleted(case: Case):
    model = case.pair()
    if not case.can_merge:
        return
    model.merge_adapter()
    merged = output(model)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['one'\] while they are merged."):
        model.delete_adapter("one")
    assert_same(output(model), merged, "exact")
    model.delete_adapter("two")
    model.unmerge_adapter()
    model.delete_adapter("one")
    assert_same(output(model), output(case.base()))


@of_life
def test_a_disabled_model_acts_as_its_base_whatever_is_merged(case: Case):
    model = case.adapted(**({"bias": "none"} if case.trains else {}))
    with model.disable_adapter():
        expected = output(model)
    assert case.residual or np.array_equal(expected, output(case.base()))
    if not case.can_merge:
        return
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(output(model), expected)
        with pytest.raises(MergeError, match="The adapters are disabled"):
            model.merge_adapter()
        assert_same(output(model), expected)
