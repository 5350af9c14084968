"""What is given in the place of a config, a model, a name or a number, and is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import msft_peft
from msft_peft import (
    AdapterNameError,
    ConfigError,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    preprocess_corda,
    set_peft_model_state_dict,
)
from msft_peft.config import NOT_BUILT
from msft_peft.registry import METHODS
from tests import nets

TARGETS = ["lin0", "lin1"]
FIELDS: list[tuple[str, Any]] = [
    ("target_modules", 5),
    ("target_modules", [1]),
    ("target_modules", ["a", 1]),
    ("target_modules", {"a": 1}),
    ("modules_to_save", 5),
    ("modules_to_save", [1]),
    ("exclude_modules", 5),
    ("layers_to_transform", "a"),
    ("layers_to_transform", ["0"]),
    ("target_parameters", 5),
    ("target_parameters", [1]),
    ("rank_pattern", ["a"]),
    ("rank_pattern", {1: 2}),
    ("alpha_pattern", {"a": "b"}),
    ("layer_replication", 5),
    ("layer_replication", [5]),
    ("layer_replication", [[0]]),
    ("loftq_config", "4bit"),
    ("trainable_token_indices", {"a": 5}),
    ("revision", 5),
    ("base_model_name_or_path", ["a"]),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=map(str, FIELDS))
def test_a_field_of_another_type_is_named(field: str, value: Any):
    with pytest.raises(ConfigError, match=rf"`{field}`?.* must be .*got "):
        LoraConfig(**{field: value})
    with pytest.raises(ConfigError, match=rf"a\.json is no valid LoraConfig: `{field}`?.* must be .*got "):
        PeftConfig.from_dict({"peft_type": "LORA", field: value}, origin="a.json")


@pytest.mark.parametrize("pattern", ["(", ["layers", "("]])
def test_a_layers_pattern_that_is_no_regex(pattern: Any):
    with pytest.raises(ConfigError, match=r"`layers_pattern`: '\(' is no valid regular expression"):
        LoraConfig(target_modules=TARGETS, layers_to_transform=0, layers_pattern=pattern)


MODELS: dict[str, Callable[[Any], Any]] = {
    "get_peft_model": lambda model: get_peft_model(model, LoraConfig(target_modules=TARGETS)),
    "mixed": lambda model: get_peft_model(model, LoraConfig(target_modules=TARGETS), mixed=True),
    "inject": lambda model: inject_adapter_in_model(LoraConfig(target_modules=TARGETS), model),
}


@pytest.mark.parametrize("wrong", [None, "x"])
@pytest.mark.parametrize("call", MODELS.values(), ids=MODELS)
def test_no_model(call: Callable, wrong: Any):
    with pytest.raises(ConfigError, match=r"`model` must be a mindspore\.nn\.Cell, got "):
        call(wrong)


@pytest.mark.parametrize("name", ["OSFConfig", "GloraModel", "WaveFTEncoder"])
def test_a_method_of_hfs_that_is_not_built(name: str):
    with pytest.raises(AttributeError, match=f"{name}.* is a method of HF peft .* that is not built here yet"):
        getattr(msft_peft, name)
    assert not hasattr(msft_peft, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'Nonsense'$"):
        _ = msft_peft.Nonsense


def test_files_of_methods_that_are_not_built(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OSF", "effective_rank": 3}')
    with pytest.raises(ConfigError, match="peft_type='OSF', a method of HF peft that is not built here yet"):
        msft_peft.PeftModel.from_pretrained(nets.Dense(), tmp_path)
    assert not set(NOT_BUILT) & set(METHODS)


@pytest.fixture
def model() -> Any:
    return get_peft_model(nets.Dense(), LoraConfig(target_modules=TARGETS, r=2))


CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "weights a str": (
        lambda m: m.add_weighted_adapter(["default"], "a", "w"),
        ConfigError,
        "`weights` must be a list",
    ),
    "weights a number": (lambda m: m.add_weighted_adapter(["default"], 0.5, "w"), ConfigError, "got 0.5"),
    "weights none": (lambda m: m.add_weighted_adapter(["default"], None, "w"), ConfigError, "got None"),
    "weights of strings": (lambda m: m.add_weighted_adapter(["default"], ["a"], "w"), ConfigError, r"got \['a'\]"),
    "density": (
        lambda m: m.add_weighted_adapter(["default"], [1.0], "w", "ties", density="x"),
        ConfigError,
        "`density` should be a finite number",
    ),
    "clamp": (
        lambda m: m.add_weighted_adapter(["default"], [1.0], "w", "svd", svd_clamp="x"),
        ConfigError,
        "`svd_clamp` should be a finite number",
    ),
    "no state": (lambda m: set_peft_model_state_dict(m, None), TypeError, "a state dict is a mapping .* got NoneType"),
    "delta of none": (
        lambda m: m.base_model.model.lin0.get_delta_weight("x"),
        AdapterNameError,
        "Adapter x not found at lin0",
    ),
    "scale": (lambda m: m.base_model.model.lin0.set_scale("default", "x"), ConfigError, "scaling at lin0 .*got 'x'"),
    "scale by": (lambda m: m.base_model.model.lin0.scale_layer("x"), ConfigError, "scaling at lin0 .*got 'x'"),
    "unscale": (lambda m: m.base_model.model.lin0.unscale_layer("x"), ConfigError, "scaling at lin0 .*got 'x'"),
    "no config for CorDA": (lambda m: preprocess_corda(m, None), ConfigError, "`lora_config` must be a LoraConfig"),
    "no model to convert": (lambda m: convert_to_lora("x", 4), TypeError, "`model` must be a mindspore.nn.Cell"),
    "a dict that is none": (lambda m: PeftConfig.from_dict([1]), ConfigError, "must be a dict of fields, got list"),
}


@pytest.mark.parametrize(("call", "kind", "says"), CALLS.values(), ids=CALLS)
def test_a_call_with_something_else(call: Callable, kind: type[Exception], says: str, model: Any):
    before = {name: p.asnumpy().copy() for name, p in model.parameters_and_names()}
    with pytest.raises(kind, match=says):
        call(model)
    assert list(model.peft_config) == ["default"]
    assert all((before[name] == p.asnumpy()).all() for name, p in model.parameters_and_names())


@pytest.mark.parametrize("names", [["default", "other"], ["other"]])
def test_adapters_of_another_method_cannot_be_combined(names: list[str]):
    mixed = get_peft_model(nets.Dense(), LoraConfig(target_modules=TARGETS, r=2), mixed=True)
    mixed.add_adapter("other", LoHaConfig(target_modules=TARGETS, r=2))
    with pytest.raises(ConfigError, match="combines LoRA adapters, and 'other' is one of LOHA"):
        mixed.add_weighted_adapter(names, [1.0] * len(names), "new")
    assert sorted(mixed.peft_config) == ["default", "other"]
