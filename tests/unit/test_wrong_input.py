"""What is given in the place of a config, a model, a name or a number, and is none."""

import json
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
    PeftModel,
    convert_to_lora,
    functional,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    preprocess_corda,
    rescale_adapter_scale,
    set_peft_model_state_dict,
)
from msft_peft.config import NOT_BUILT
from msft_peft.registry import METHODS
from msft_peft.tuners.lora.hotswap import hotswap_adapter
from tests import nets
from tests.cases import state_of

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


@pytest.mark.parametrize("kind", ["Config", "Model", "Encoder"])
def test_a_method_of_hfs_that_is_not_built(kind: str):
    name = list(NOT_BUILT.values())[-1] + kind
    with pytest.raises(AttributeError, match=f"{name}.* is a method of HF peft .* that is not built here yet"):
        getattr(msft_peft, name)
    assert not hasattr(msft_peft, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'Nonsense'$"):
        _ = msft_peft.Nonsense


def test_files_of_methods_that_are_not_built(tmp_path: Path):
    name = list(NOT_BUILT)[-1]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name, "r": 3}))
    with pytest.raises(ConfigError, match=f"peft_type='{name}', a method of HF peft that is not built here yet"):
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


NAMED = "an adapter is named by a string, got "
SEVERAL = "adapters are named by a string or a list of strings, got "
# What takes one name, what takes one or several, a path, a dict, strings: with each, whatever it is given instead.
ONE_NAME: dict[str, Callable[[Any, Any], Any]] = {
    "delete_adapter": lambda m, name: m.delete_adapter(name),
    "the tuner's delete_adapter": lambda m, name: m.base_model.delete_adapter(name),
    "functional.delete_adapter": functional.delete_adapter,
    "functional.cast_adapter_dtype": functional.cast_adapter_dtype,
    "add_adapter": lambda m, name: m.add_adapter(name, LoraConfig(target_modules=TARGETS)),
    "inject_adapter_in_model": lambda m, name: inject_adapter_in_model(LoraConfig(), nets.Dense(), name),
    "add_weighted_adapter": lambda m, name: m.add_weighted_adapter(["default"], [1.0], name),
    "supports_lora_conversion": lambda m, name: m.supports_lora_conversion(name),
    "convert_to_lora": lambda m, name: convert_to_lora(m, 2, name),
    "get_peft_model_state_dict": lambda m, name: get_peft_model_state_dict(m, adapter_name=name),
    "get_delta_weight": lambda m, name: m.base_model.model.lin0.get_delta_weight(name),
}
NAMES: dict[str, Callable[[Any, Any], Any]] = {
    "the tuner's set_adapter": lambda m, names: m.base_model.set_adapter(names),
    "functional.set_adapter": functional.set_adapter,
    "set_requires_grad": lambda m, names: m.set_requires_grad(names),
    "functional.set_requires_grad": functional.set_requires_grad,
    "merge_adapter": lambda m, names: m.merge_adapter(names),
    "merge_and_unload": lambda m, names: m.merge_and_unload(adapter_names=names),
    "save_pretrained": lambda m, names: m.save_pretrained("nowhere", selected_adapters=names),
    "add_weighted_adapter": lambda m, names: m.add_weighted_adapter(names, [1.0], "w"),
}
PATHS: dict[str, Callable[[Any, Any], Any]] = {
    "save_directory": lambda m, path: m.save_pretrained(path),
    "output_dir": lambda m, path: m.create_or_update_model_card(path),
    "model_id": lambda m, path: m.load_adapter(path, "new"),
    "model_id of from_pretrained": lambda m, path: PeftModel.from_pretrained(nets.Dense(), path),
    "model_id of a config": lambda m, path: PeftConfig.from_pretrained(path),
    "model_id of weights": lambda m, path: load_peft_weights(path),
    "model_id of a swap": lambda m, path: hotswap_adapter(m, path, "default"),
    "path_json_file": lambda m, path: PeftConfig.from_json_file(path),
    "save_directory of a config": lambda m, path: LoraConfig().save_pretrained(path),
}
DICTS: dict[str, Callable[[Any, Any], Any]] = {
    "state_dict": lambda m, state: m.save_pretrained("nowhere", state_dict=state),
    "state_dict of tensors": lambda m, state: get_peft_model_state_dict(m, state),
    "state_dict of targets": lambda m, state: inject_adapter_in_model(LoraConfig(), nets.Dense(), state_dict=state),
    "output_state_dict": lambda m, state: m.base_model.subtract_mutated_init(state, "default"),
    "metrics": lambda m, metrics: m.create_or_update_model_card("nowhere", metrics=metrics),
    "gradient_checkpointing_kwargs": lambda m, kwargs: m.gradient_checkpointing_enable(kwargs),
}
LISTS: dict[str, Callable[[Any, Any], Any]] = {
    "tags": lambda m, tags: m.create_or_update_model_card("nowhere", tags=tags),
    "adapter_names": lambda m, names: m.set_train(False)(m.sample(), adapter_names=names),
    "blocks": lambda m, blocks: m.gradient_checkpointing_enable(blocks=blocks),
}
WRONG: list[tuple[dict[str, Callable], tuple[Any, ...], type[Exception], str]] = [
    (ONE_NAME, (5, None, ["default"], {"a": 1}, b"x"), AdapterNameError, NAMED),
    (NAMES, (5, 1.5, True, [1], [["default"]], b"x"), AdapterNameError, SEVERAL),
    (PATHS, (5, None, ["x"], b"x"), TypeError, r"` must be a path \(a string or an os.PathLike\), got "),
    (DICTS, (5, "x", [1], {1: 2}), TypeError, "` must be a dict with strings for keys, got "),
    (LISTS, (5, [1], b"x"), TypeError, "` must be a list of strings, got "),
]
TABLE = [
    pytest.param(name, call, value, kind, says, id=f"{name}={value!r}")
    for calls, values, kind, says in WRONG
    for name, call in calls.items()
    for value in values
]


@pytest.mark.parametrize(("name", "call", "value", "kind", "says"), TABLE)
def test_an_argument_of_another_type(name: str, call: Callable, value: Any, kind: type, says: str, model: Any):
    """It is named where it is not plain, and nothing has changed."""
    model.set_train(False)
    before = state_of(model)
    with pytest.raises(kind, match=says) as raised:
        call(model, value)
    assert kind is AdapterNameError or f"`{name.split()[0]}`" in str(raised.value)
    assert state_of(model) == before
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("wrong", [5, "x", None])
def test_what_has_no_layers_to_rescale(wrong: Any):
    with pytest.raises(ConfigError, match=r"`model` must be a mindspore\.nn\.Cell"), rescale_adapter_scale(wrong, 2.0):
        pass


@pytest.mark.parametrize("mapping", [5, "x", {"a": 1}, ["a"]])
def test_a_key_mapping_that_is_none(mapping: Any, model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="`key_mapping` must be a "):
        model.load_adapter(tmp_path, "new", key_mapping=mapping)
    assert list(model.peft_config) == ["default"]


# By `init_lora_weights`, where the field goes with one.
SUB_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "eva_config": ("eva", {"rho": "x"}),
    "corda_config": ("corda", {"corda_method": 5}),
    "lora_ga_config": ("lora_ga", {"stable_gamma": "x"}),
    "loftq_config": ("loftq", {"loftq_bits": "x"}),
    "kasa_config": (True, {"beta": "x"}),
    "use_bdlora": (True, {"nblocks": "x"}),
    "velora_config": (True, {"scale": "x"}),
    "monteclora_config": (True, {"num_samples": "x"}),
    "arrow_config": (True, {"top_k": "x"}),
}


@pytest.mark.parametrize("name", SUB_CONFIGS)
def test_a_sub_config_s_field_of_another_type(name: str):
    init, wrong = SUB_CONFIGS[name]
    (field,) = wrong
    for given, says in (
        (wrong, f"`{name}`: .*`{field}`"),
        ({"nope": 1}, f"`{name}` has no field nope"),
        (5, f"`{name}`.* must be .*got"),
    ):
        with pytest.raises(ConfigError, match=says):
            LoraConfig(init_lora_weights=init, **{name: given})


@pytest.mark.parametrize("names", [["default", "other"], ["other"]])
def test_adapters_of_another_method_cannot_be_combined(names: list[str]):
    mixed = get_peft_model(nets.Dense(), LoraConfig(target_modules=TARGETS, r=2), mixed=True)
    mixed.add_adapter("other", LoHaConfig(target_modules=TARGETS, r=2))
    with pytest.raises(ConfigError, match="combines LoRA adapters, and 'other' is one of LOHA"):
        mixed.add_weighted_adapter(names, [1.0] * len(names), "new")
    assert sorted(mixed.peft_config) == ["default", "other"]
