"""LoraConfig: HF peft 0.21.2's 42 fields, their defaults, their checks and their JSON."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from msft_peft import ConfigError, LoraConfig, LoraRuntimeConfig, PeftConfig, TaskType, get_peft_config, get_peft_model
from tests import nets
from tests.cases import state_of

# HF peft 0.21.2, written down by hand from its LoraConfig.
DEFAULTS: dict[str, Any] = {
    "task_type": None,
    "peft_type": "LORA",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=False),
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}

# Another value for every field that a user sets, with what else it needs.
OTHERS: dict[str, dict[str, Any]] = {
    "task_type": {"task_type": "CAUSAL_LM"},
    "auto_mapping": {"auto_mapping": {"base_model_class": "Net", "parent_library": "nets"}},
    "peft_version": {"peft_version": "0.1.0"},
    "base_model_name_or_path": {"base_model_name_or_path": "some/model"},
    "revision": {"revision": "main"},
    "inference_mode": {"inference_mode": True},
    "r": {"r": 3},
    "target_modules": {"target_modules": ["q", "v"]},
    "exclude_modules": {"exclude_modules": ["v"]},
    "lora_alpha": {"lora_alpha": 32},
    "lora_dropout": {"lora_dropout": 0.1},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "bias": {"bias": "all"},
    "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "layers_to_transform": {"layers_to_transform": [0, 2], "target_modules": ["q"]},
    "layers_pattern": {"layers_pattern": "layers", "layers_to_transform": 1, "target_modules": ["q"]},
    "rank_pattern": {"rank_pattern": {"q": 4}},
    "alpha_pattern": {"alpha_pattern": {"q": 4}},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "megatron_core": {"megatron_core": "other"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "loftq_config": {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"},
    "eva_config": {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    "corda_config": {"corda_config": {"verbose": True}, "init_lora_weights": "corda"},
    "lora_ga_config": {"lora_ga_config": {"direction": "ArB2r"}, "init_lora_weights": "lora_ga"},
    "use_dora": {"use_dora": True},
    "velora_config": {"velora_config": {"num_groups": 2}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
    "use_qalora": {"use_qalora": True},
    "qalora_group_size": {"qalora_group_size": 4},
    "monteclora_config": {"monteclora_config": {"num_samples": 2}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["w"]},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "kasa_config": {"kasa_config": {"beta": 0.1}},
    "ensure_weight_tying": {"ensure_weight_tying": True},
}

NOT_BUILT = ("megatron_config", "use_qalora")

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dora a word": ({"use_dora": "yes"}, ValueError, "`use_dora` must be True or False, got 'yes'"),
    "inference a number": ({"inference_mode": 1}, ValueError, "`inference_mode` must be True or False, got 1"),
    "r zero": ({"r": 0}, ValueError, "`r` should be a positive integer value but the value passed is 0"),
    "r negative": ({"r": -1}, ValueError, "`r` should be a positive integer"),
    "r a float": ({"r": 8.0}, ValueError, "`r` should be a positive integer"),
    "r a bool": ({"r": True}, ValueError, "`r` must be int, got True"),
    "rank_pattern zero": ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]"),
    "dropout one": ({"lora_dropout": 1.0}, ValueError, r"`lora_dropout` is a probability in \[0, 1\), got 1.0"),
    "dropout negative": ({"lora_dropout": -0.1}, ValueError, "`lora_dropout`"),
    "bias unknown": ({"bias": "foo"}, NotImplementedError, "Requested bias: foo, is not implemented."),
    "init unknown": ({"init_lora_weights": "foo"}, ValueError, "Unknown initialization init_lora_weights='foo'"),
    "init None": ({"init_lora_weights": None}, ValueError, "Unknown initialization init_lora_weights=None"),
    "task unknown": (
        {"task_type": "FOO_TASK"},
        ValueError,
        "Invalid task type: 'FOO_TASK'. Must be one of the follow",
    ),
    "loftq without config": ({"init_lora_weights": "loftq"}, ValueError, "`loftq_config` must be specified"),
    "layers beside a regex": (
        {"target_modules": ".*q", "layers_to_transform": 1},
        ValueError,
        "`layers_to_transform` cannot be used when `target_modules` is a str.",
    ),
    "pattern beside a regex": (
        {"target_modules": ".*q", "layers_pattern": "layers"},
        ValueError,
        "`layers_pattern` cannot be used when `target_modules` is a str.",
    ),
    "pattern without layers": (
        {"target_modules": ["q"], "layers_pattern": "layers"},
        ValueError,
        "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
    ),
    "modules_to_save a string": ({"modules_to_save": "head"}, ValueError, r"`modules_to_save` must be list\[str\]"),
    "target_parameters a string": ({"target_parameters": "w"}, TypeError, "`target_parameters` must be a list"),
    "dora with megatron": (
        {"use_dora": True, "megatron_config": {"a": 1}},
        ValueError,
        "DoRA does not support megatr",
    ),
    "lora_bias with dora": (
        {"use_dora": True, "lora_bias": True},
        ValueError,
        "lora_bias=True is not supported for D",
    ),
    "names of adapters a number": (
        {"arrow_config": {"task_adapter_names": 5}},
        ValueError,
        r"`arrow_config`: `task_adapter_names` must be list\[str\] \| None, got 5",
    ),
    "entropy a word": (
        {"monteclora_config": {"use_entropy": "no"}},
        ValueError,
        "`monteclora_config`: `use_entropy` must be True or False, got 'no'",
    ),
    "strict a word": (
        {"use_bdlora": {"match_strict": "no"}},
        ValueError,
        "`match_strict` must be True or False",
    ),
    "modules with numbers": (
        {"use_bdlora": {"target_modules_bd_a": [1]}},
        ValueError,
        r"`target_modules_bd_a` must be list\[str\] \| None, got \[1\]",
    ),
    "gamma a word": (
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": "x"}},
        ValueError,
        "`lora_ga_config`: `stable_gamma` must be int, got 'x'",
    ),
    "rho none": (
        {"init_lora_weights": "eva", "eva_config": {"rho": None}},
        ValueError,
        "`eva_config`: `rho` must be float, got None",
    ),
    "rho not a number": (
        {"init_lora_weights": "eva", "eva_config": {"rho": float("nan")}},
        ValueError,
        "`rho` should be a finite number",
    ),
    "cache a number": (
        {"init_lora_weights": "corda", "corda_config": {"cache_file": 3}},
        ValueError,
        r"`corda_config`: `cache_file` must be str \| None, got 3",
    ),
    "loftq mistyped": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bit": 4}},
        ValueError,
        "`loftq_config` has no field loftq_bit; the fields of LoftQConfig are",
    ),
    "loftq bits a list": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": [4]}},
        ValueError,
        r"`loftq_config`: `loftq_bits` must be int, got \[4\]",
    ),
    "loftq a word": (
        {"init_lora_weights": "loftq", "loftq_config": "4bit"},
        ValueError,
        "`loftq_config` must be dict",
    ),
    "lora_bias with an init": ({"lora_bias": True, "init_lora_weights": "pissa"}, ValueError, "lora_bias=True needs"),
}


def test_the_fields_and_defaults_are_hfs():
    config = LoraConfig()
    assert len(DEFAULTS) == 42
    assert {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} == DEFAULTS


def test_every_field_has_another_value_below():
    assert set(OTHERS) == set(DEFAULTS) - {"peft_type", "runtime_config"}


def test_configs_share_no_defaults():
    LoraConfig().rank_pattern["q"] = 1
    assert LoraConfig().rank_pattern == {}


@pytest.mark.parametrize("name", OTHERS)
def test_each_field_is_accepted_and_survives_json(name: str, tmp_path: Path):
    config = LoraConfig(**OTHERS[name])
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        assert value == type(value)(**OTHERS[name][name])
    else:
        assert value == OTHERS[name][name]
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is LoraConfig
    assert getattr(read, name) == getattr(config, name)
    assert read.to_json() == config.to_json()
    assert get_peft_config(config.to_dict()) == config


def test_files_of_corda_may_be_paths(tmp_path: Path):
    config = LoraConfig(init_lora_weights="corda", corda_config={"cache_file": tmp_path / "cache"})
    assert json.loads(config.to_json())["corda_config"]["cache_file"] == str(tmp_path / "cache")


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_names_may_come_in_any_collection_and_any_order(kind: type):
    names = kind("kvqabcde")
    config = LoraConfig(target_modules=names, exclude_modules=names, modules_to_save=names)
    assert config.target_modules == config.exclude_modules == sorted("kvqabcde")
    # A list of modules keeps its order, as in HF; a set has none, and files must be the same in each run.
    assert config.modules_to_save == (list("kvqabcde") if kind in (list, tuple) else sorted("kvqabcde"))
    json.loads(config.to_json())


def test_the_json_is_hfs(tmp_path: Path):
    LoraConfig(r=4, task_type=TaskType.SEQ_CLS, target_modules={"query", "value"}).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True)
    expected = DEFAULTS | {"r": 4, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    del expected["runtime_config"]
    assert fields == expected


def test_runtime_settings_are_never_written_nor_read(tmp_path: Path):
    config = LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert "runtime_config" not in config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = PeftConfig.from_dict({"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}})
    assert read.runtime_config == LoraRuntimeConfig()


@pytest.mark.parametrize("settings", BAD.values(), ids=BAD)
def test_bad_values_are_refused_at_once(settings: tuple):
    arguments, kind, text = settings
    with pytest.raises(kind, match=text):
        LoraConfig(**arguments)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_regex_that_does_not_compile_is_named(name: str):
    with pytest.raises(ConfigError, match=r"\(q"):
        get_peft_model(nets.Blocks(1), LoraConfig(**{"target_modules": ["q"], name: "(q"}))


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_cannot_be_built_is_refused_on_a_model_and_not_before(name: str):
    base = nets.Dense()
    before = state_of(base)
    config = LoraConfig(**{"target_modules": ["lin0"]} | OTHERS[name])
    with pytest.raises(NotImplementedError, match=rf"LoraConfig\.{name}=.* (MindSpore|Megatron)"):
        get_peft_model(base, config)
    assert state_of(base) == before


def test_the_runtime_option_that_is_not_built():
    config = LoraConfig(target_modules=["lin0"], runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    with pytest.raises(NotImplementedError, match=r"LoraConfig\.runtime_config"):
        get_peft_model(nets.Dense(), config)


@pytest.mark.parametrize("name", ["megatron_core", "qalora_group_size"])
def test_settings_of_options_that_are_off_are_harmless(name: str):
    get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"], **OTHERS[name]))


def test_sub_configs_that_are_ignored_are_said_to_be():
    with pytest.warns(
        UserWarning, match="`loftq_config` specified but will be ignored when `init_lora_weights` is not"
    ):
        config = LoraConfig(loftq_config={"loftq_bits": 4}, target_modules=["lin0"])
    get_peft_model(nets.Dense(), config)
    with pytest.warns(UserWarning, match="aLoRA is currently only supported for CAUSAL_LM task."):
        LoraConfig(alora_invocation_tokens=[1])


def test_unknown_fields_are_dropped_with_one_warning(tmp_path: Path):
    fields = {"peft_type": "LORA", "zeta": 1, "r": 4, "brand_new_field": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['brand_new_field', 'zeta'\] for class Lora"
    ) as w:
        config = PeftConfig.from_pretrained(tmp_path)
    assert len(w) == 1
    assert str(tmp_path) in str(w[0].message)
    assert config == LoraConfig(r=4)


def test_the_smallest_file(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type":"LORA","target_modules":["a"]}')
    assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(target_modules=["a"])
    assert LoraConfig.from_pretrained(str(tmp_path)) == LoraConfig(target_modules=["a"])


def test_a_subfolder(tmp_path: Path):
    LoraConfig(r=5).save_pretrained(tmp_path / "sub")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="sub").r == 5
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_bad_value_in_a_file_names_the_file(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}')
    with pytest.raises(ConfigError, match=r"adapter_config.json.*`r` should be a positive integer"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_config_with_an_unknown_bias_in_a_file_names_the_file(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "bias": "foo"}')
    with pytest.raises((ConfigError, NotImplementedError), match=r"adapter_config.json.*Requested bias: foo"):
        PeftConfig.from_pretrained(tmp_path)


def test_wrapping_changes_no_config():
    config = LoraConfig(target_modules="all-linear")
    before = config.to_dict()
    model = get_peft_model(nets.Dense(), config)
    assert config.to_dict() == before
    assert model.peft_config["default"].target_modules == ["lin0", "lin1"]


def test_task_types_are_hfs():
    names = "SEQ_CLS SEQ_2_SEQ_LM CAUSAL_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()
    assert [task.value for task in TaskType] == names
    for name in names:
        assert LoraConfig(task_type=name).to_json() == LoraConfig(task_type=TaskType(name)).to_json()
        assert TaskType(name) == name


def test_a_config_is_not_prompt_learning():
    assert LoraConfig().is_prompt_learning is False
