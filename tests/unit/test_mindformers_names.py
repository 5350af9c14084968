"""Models whose layers have MindFormers' names: configs and files speak HF's, wherever adapters are read or written.

The model is a stand-in; tests/hosts has the real ones.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter_from_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    save_as_lora,
)
from tests import nets
from tests.cases import output, shake, weights_of
from tests.tolerances import assert_same, differ

HF = "base_model.model.model.layers"


class Attention(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Dense(6, 6, has_bias=False), nn.Dense(6, 6, has_bias=False)

    def construct(self, x: Tensor) -> Tensor:
        return ops.add(x, self.wo(ops.relu(self.wq(x))))


class Block(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def construct(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Body(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.CellList([Block(), Block()])

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Llama(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.model = SimpleNamespace(model_type="llama"), Body()

    def construct(self, x: Tensor) -> Tensor:
        return self.model(x)

    def sample(self) -> Tensor:
        return nets.floats(20, 6)


Llama.__module__ = "mindformers.models.llama"


def base() -> nn.Cell:
    ms.set_seed(1)
    return Llama()


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "o_proj"]} | settings)


def adapted(**settings: Any) -> PeftModel:
    model = get_peft_model(base(), config(**settings)).set_train(False)
    shake(weights_of(model, "default"))
    return model


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA")
@pytest.mark.parametrize("rank", [2, 1.0])
def test_saved_as_lora(rank: float, tmp_path: Path):
    model = adapted()
    save_as_lora(tmp_path, model, rank)
    assert_same(output(PeftModel.from_pretrained(base(), tmp_path)), output(model), "merge")


def test_what_took_a_part_of_the_base_is_saved_as_plain_lora(tmp_path: Path):
    model = get_peft_model(base(), config(init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "before")
    shake(weights_of(model, "default"))
    model.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=tmp_path / "before")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "after")
    assert loaded.peft_config["default"].init_lora_weights is True
    assert_same(output(loaded), output(model), "merge")


@pytest.mark.parametrize("dora", [False, True])
def test_hot_swapped(dora: bool):
    new = adapted(target_modules=["q_proj"], use_dora=dora)
    model = adapted(use_dora=dora)
    shake(weights_of(model, "default"), seed=7)
    assert differ(output(model), output(new))
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(new), "default", new.peft_config["default"])
    assert_same(output(model), output(new))


def eva(names: list[str]) -> PeftModel:
    model = get_peft_model(
        base(), config(target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.0))
    )
    batches = [{"x": nets.floats(32, 6, seed=seed)} for seed in range(3)]
    no = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    return initialize_lora_eva_weights(model, batches, **no)


def corda(names: list[str]) -> PeftModel:
    net, settings = base(), config(target_modules=names, init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(net, settings, lambda: net(net.sample()))
    return get_peft_model(net, settings)


def lora_ga(names: list[str]) -> PeftModel:
    net, settings = base(), config(target_modules=names, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        ms.value_and_grad(lambda x: ops.reduce_sum(ops.square(net(x))), None, net.trainable_params())(net.sample())

    preprocess_loraga(net, settings, step)
    return get_peft_model(net, settings)


@pytest.mark.parametrize("make", [eva, corda, lora_ga])
@pytest.mark.parametrize("names", [["q_proj", "o_proj"], ["wq", "wo"]])
def test_started_from_data(make: Callable, names: list[str]):
    model = make(names)
    assert_same(output(model), output(base()), "merge")
    ranks = {key: len(a) for key, a in get_peft_model_state_dict(model).items() if ".lora_A." in key}
    assert set(ranks) <= {f"{HF}.{i}.self_attn.{x}_proj.lora_A.weight" for i in range(2) for x in "qo"}
    assert sum(ranks.values()) == 8
    assert set(model.peft_config["default"].target_modules) == {"q_proj", "o_proj"}
