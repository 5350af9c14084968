"""On MindOne's own models. CPU lacks kernels that they need, so it is all but the forward pass that is tested."""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindone.transformers import BertModel, GPT2LMHeadModel, T5ForConditionalGeneration
from mindspore import Tensor, mint
from transformers import BertConfig, GPT2Config, T5Config

from msft_peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from msft_peft.hosts import describe
from tests.hosts.llama import drawn
from tests.tolerances import array, assert_same, differ


def bert() -> Any:
    return BertModel(
        BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=60, n_positions=32))


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60))


# The layers that are adapted by default, as HF names them, and the shapes that HF's files have for them.
CASES = {
    "bert": (bert, "encoder.layer.0.attention.self.query", ["query", "value"], (32, 32)),
    "gpt2": (gpt2, "transformer.h.0.attn.c_attn", ["c_attn"], (32, 96)),
    "t5": (t5, "decoder.block.0.layer.1.EncDecAttention.q", ["q", "v"], (32, 32)),
}


@pytest.mark.parametrize(("make", "path", "targets", "sizes"), CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_injection_and_files(make: Any, path: str, targets: list[str], sizes: tuple[int, int], tmp_path: Path):
    base = make()
    names = list(base.parameters_dict())
    model = get_peft_model(base, LoraConfig(r=3, init_lora_weights=False))
    assert model.peft_config["default"].target_modules == targets
    keys = get_peft_model_state_dict(model)
    key = f"base_model.model.{path}.lora_"
    assert (keys[f"{key}A.weight"].shape, keys[f"{key}B.weight"].shape) == ((3, sizes[0]), (sizes[1], 3))
    assert all("lora_" in p.name for p in model.trainable_params())
    assert len({p.name for p in model.get_parameters()}) == len(list(model.get_parameters()))
    model.save_pretrained(tmp_path)
    saved = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(make(), tmp_path)
    for name, value in get_peft_model_state_dict(again).items():
        np.testing.assert_array_equal(array(value), saved[name])
    assert again.load_report.does_something
    layer = again.get_base_model()
    for part in path.split("."):
        layer = layer._cells[part]
    before, delta = array(layer.weight), array(layer.get_delta_weight("default"))
    merged = dict(again.merge_and_unload().parameters_and_names())
    assert differ(delta, np.zeros_like(delta))
    assert_same(merged[f"{path}.weight"], before + delta, "merge")
    model.unload()
    assert list(base.parameters_dict()) == names


def test_layers_of_mint():
    base = gpt2()
    kinds = {type(cell).__name__: describe(cell, path).kind for path, cell in base.cells_and_names() if cell._params}
    assert kinds == {"Conv1D": "dense", "Dense": "dense", "Embedding": "embedding", "LayerNorm": "norm"}
    assert describe(mint.nn.Linear(4, 6), "x").shape == (6, 4)
    assert describe(mint.nn.Embedding(9, 4), "x").kind == "embedding"


@pytest.mark.graph
def test_a_layer_of_mint_has_a_kernel(mode: str):
    class Net(ms.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mint.nn.Linear(6, 8)

        def construct(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = Tensor(drawn("x", (3, 6)))
    w = array(model.layer.weight) + array(model.layer.get_delta_weight("default"))
    assert_same(model(x), array(x) @ w.T + array(model.layer.bias), "merge")


def test_other_methods():
    model = get_peft_model(t5(), IA3Config())
    keys = get_peft_model_state_dict(model)
    assert keys["base_model.model.encoder.block.0.layer.1.DenseReluDense.wo.ia3_l"].shape == (1, 48)


def test_the_auto_class(tmp_path: Path):
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", provider="mindone")
    assert isinstance(loaded.get_base_model(), GPT2LMHeadModel)
    for name, value in get_peft_model_state_dict(loaded).items():
        assert_same(value, get_peft_model_state_dict(model)[name], "exact")
