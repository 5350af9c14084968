"""HF's tuner classes, `LoHaModel(model, config, "default")`, which `PeftModel.base_model` is; its tables."""

from typing import Any

import mindspore as ms
import pytest

import msft_peft
from msft_peft import (
    ConfigError,
    LoHaConfig,
    LoHaModel,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PromptTuningConfig,
    Tuner,
    get_peft_model,
)
from msft_peft.registry import METHODS
from tests import nets
from tests.cases import Case, first_cases, output, shake, state_of, weights_of
from tests.tolerances import assert_same

first = pytest.mark.parametrize("first", first_cases(), ids=lambda case: case.method.name)


@first
def test_a_tuner_wraps_and_injects(first: Case, mode: str):
    kind = msft_peft.PEFT_TYPE_TO_TUNER_MAPPING[first.method.name]
    model = get_peft_model(first.base(), first.config())
    assert type(model.base_model) is kind
    tuner = kind(first.base(), first.config(), "default")
    trained = {p.name.removeprefix("base_model."): p.shape for p in model.trainable_params()}
    assert {p.name: p.shape for p in tuner.trainable_params()} == trained
    assert tuner.active_adapters == ["default"]
    for one in (model, tuner):
        shake(one.trainable_params())
    assert_same(output(tuner), output(model), "exact")


def test_a_dict_of_configs():
    tuner = LoHaModel(nets.Dense(), {"mine": LoHaConfig(r=2, target_modules=["lin0"])}, "mine")
    assert list(tuner.peft_config) == ["mine"]
    assert weights_of(tuner, "mine")


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (LoHaModel, LoraConfig(target_modules=["lin0"]), "LoHaModel is not for LORA adapters: take LoraModel"),
        (Tuner, LoraConfig(target_modules=["lin0"]), "Tuner is not for LORA adapters: take LoraModel"),
        (LoraModel, {"other": LoraConfig(target_modules=["lin0"])}, "must be a PeftConfig, got <class 'NoneType'>"),
        (LoraModel, "LORA", "must be a PeftConfig, got <class 'str'>"),
        (LoraModel, LoraConfig(target_modules=["nothing"]), "not found in the base model"),
    ],
)
def test_wrong_configs_change_nothing(kind: Any, config: Any, says: str):
    net = nets.Dense()
    before = state_of(net)
    with pytest.raises(ValueError, match=says):
        kind(net, config, "default")
    assert state_of(net) == before
    with pytest.raises(ConfigError, match=r"`model` must be a mindspore\.nn\.Cell"):
        kind(None, config, "default")


def test_hfs_tables_have_every_method():
    for name, method in METHODS.items():
        assert msft_peft.PEFT_TYPE_TO_CONFIG_MAPPING[msft_peft.PeftType(name)] is method.config
        kind = msft_peft.PEFT_TYPE_TO_TUNER_MAPPING[name]
        assert kind is method.prompt or issubclass(kind, Tuner)
    assert {*msft_peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING} == {task.value for task in msft_peft.TaskType}
    for task, kind in msft_peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items():
        assert kind._task == task


def test_what_a_model_tells_of_itself():
    model = get_peft_model(nets.Dense(), LoHaConfig(r=2, target_modules=["lin0"]))
    assert model.peft_type == "LOHA"
    for dtype in (ms.float16, ms.float32):
        model.get_base_model().dtype = dtype
        assert model.base_model_torch_dtype == dtype
    model.delete_adapter("default")
    assert model.peft_type is None


def test_a_config_from_its_type():
    made = PeftConfig.from_peft_type(peft_type="LOHA", r=3)
    assert type(made) is LoHaConfig
    assert made.r == 3
    assert type(PromptTuningConfig.from_peft_type(num_virtual_tokens=2)) is PromptTuningConfig
    with pytest.raises(ConfigError, match="names no 'peft_type'"):
        PeftConfig.from_peft_type(r=3)
