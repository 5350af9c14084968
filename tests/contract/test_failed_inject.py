"""A call that fails leaves the model as it was: cells, names, flags, numbers and configs."""

from collections.abc import Callable
from typing import Any

import pytest
from mindspore import nn

from msft_peft import NoMatchingPeftModuleError, PeftModel, get_peft_model, inject_adapter_in_model
from msft_peft.hosts import describe
from tests import nets
from tests.cases import Case, block_cases, output, state_of
from tests.tolerances import assert_same

BAD_NAMES = ["", " ", "a.b", ".", "..", "a/b", "a\\b", " a", "a b", "a:b", "ä", "*", "a\tb", "a\nb", "a\0b", "x" * 300]
CELL_NAMES = ["training", "phase", "construct", "keys", "update", "cls_name", "get_parameters"]

nested = pytest.mark.parametrize("nested", block_cases(), ids=lambda case: case.note)

BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such target": (
        {"target_modules": ["nope"]},
        NoMatchingPeftModuleError,
        r"Target modules \['nope'\] not found",
    ),
    "regex without a match": ({"target_modules": "attn.q"}, NoMatchingPeftModuleError, "regex that must match"),
    "all excluded": (
        {"target_modules": ["q"], "exclude_modules": ["q"]},
        NoMatchingPeftModuleError,
        "All modules were excluded. This is likely unintended.",
    ),
    "no targets": ({"target_modules": None}, ValueError, "Please specify `target_modules`"),
    "a layer of no known kind": (
        {"target_modules": ["attn"]},
        ValueError,
        r"Target module layers.0.attn \(Attention\)",
    ),
    "one good, one of no known kind": ({"target_modules": ["q", "attn"]}, ValueError, "is not supported. Currently"),
    "no such layer to save": ({"modules_to_save": ["nope"]}, NoMatchingPeftModuleError, "'nope' matches none of"),
    "no such block": (
        {"target_modules": ["q"], "layers_to_transform": 7},
        NoMatchingPeftModuleError,
        "layers_to_tran",
    ),
    "broken regex": ({"target_modules": "(q"}, ValueError, r"\(q"),
}

ENTRANCES: dict[str, Callable[..., Any]] = {
    "get_peft_model": lambda base, config, name="default": get_peft_model(base, config, adapter_name=name),
    "PeftModel": lambda base, config, name="default": PeftModel(base, config, name),
    "inject": lambda base, config, name="default": inject_adapter_in_model(config, base, adapter_name=name),
}


def finds_targets(case: Case, base: nn.Cell) -> bool:
    sites = {path: site for path, cell in base.cells_and_names() if (site := describe(cell, path)) is not None}
    find = case.method.find_targets
    return find is not None and find(case.config(target_modules=None), "custom", sites) is not None


@nested
@pytest.mark.parametrize("settings", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
@pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES)
def test_a_bad_config_leaves_the_model_as_it_was(nested: Case, settings: tuple, enter: Callable[..., Any], mode: str):
    changes, kind, text = settings
    base = nested.base()
    if changes == {"target_modules": None} and finds_targets(nested, base):
        return  # in any model, so that naming none is no fault
    before, expected = state_of(base), output(base)
    with pytest.raises(kind, match=text):
        enter(base, nested.config(**changes))
    assert state_of(base) == before
    assert not hasattr(base, "peft_config")
    assert_same(output(base), expected, "exact")


@nested
@pytest.mark.parametrize("settings", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_second_config_leaves_the_first_adapter_alone(nested: Case, settings: tuple, mode: str):
    changes, kind, text = settings
    if changes == {"target_modules": None} and finds_targets(nested, nested.base()):
        return
    model = nested.adapted()
    before, expected = state_of(model), output(model)
    with pytest.raises(kind, match=text):
        model.add_adapter("other", nested.config(**changes))
    assert state_of(model) == before
    assert list(model.peft_config) == ["default"]
    assert_same(output(model), expected, "exact")


@nested
@pytest.mark.parametrize("name", BAD_NAMES + CELL_NAMES, ids=repr)
def test_a_name_that_cannot_be_one_is_refused_first(nested: Case, name: str):
    base = nested.base()
    before = state_of(base)
    for enter in ENTRANCES.values():
        with pytest.raises(ValueError, match="cannot name an adapter") as error:
            enter(base, nested.config(), name)
        assert repr(name)[:50] in str(error.value)
        assert state_of(base) == before
    model = nested.adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        model.add_adapter(name, nested.config())
    assert state_of(model) == before


@nested
@pytest.mark.parametrize("name", [None, 1, b"a", ("a",)], ids=repr)
def test_a_name_must_be_a_string(nested: Case, name: Any):
    base = nested.base()
    before = state_of(base)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        get_peft_model(base, nested.config(), adapter_name=name)
    assert state_of(base) == before


@nested
@pytest.mark.parametrize("config", [{"r": 8}, None, "LORA", object()], ids=lambda config: type(config).__name__)
def test_what_is_no_config_is_refused(nested: Case, config: Any):
    base = nested.base()
    before = state_of(base)
    for enter in ENTRANCES.values():
        with pytest.raises(ValueError, match="The input config must be a PeftConfig, got <class"):
            enter(base, config)
    model = nested.adapted()
    middle = state_of(model)
    with pytest.raises(ValueError, match=r"PeftConfig|different peft types"):
        model.add_adapter("other", config)
    assert state_of(base) == before
    assert state_of(model) == middle


@nested
def test_a_taken_name_is_refused(nested: Case):
    base = nested.base()
    inject_adapter_in_model(nested.config(), base)
    before = state_of(base)
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        inject_adapter_in_model(nested.config(), base)
    assert state_of(base) == before


@nested
def test_near_names_are_suggested(nested: Case):
    with pytest.raises(NoMatchingPeftModuleError, match=r"match none of its \d+ modules. Nearest names: .*\battn\b"):
        get_peft_model(nested.base(), nested.config(target_modules=["atn"]))


@nested
def test_a_failed_wrap_can_be_repeated_rightly(nested: Case):
    base = nested.base()
    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(base, nested.config(target_modules=["nope"]))
    assert_same(output(nested.adapted(base=base)), output(nested.adapted()), "exact")


def test_a_model_without_layers():
    for case in block_cases():
        with pytest.raises(NoMatchingPeftModuleError):
            get_peft_model(nets.nn.ReLU(), case.config(target_modules=["q"]))
