"""What may happen to a model while adapters are merged into its base weights."""

from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file

from msft_peft import (
    LoraConfig,
    MergeError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from msft_peft.models import LlamaConfig, LlamaForCausalLM
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

TARGETS = ["lin0", "lin1"]


def base() -> nets.Dense:
    ms.set_seed(5)
    return nets.Dense().set_train(False)


def adapted(net: nn.Cell, name: str = "default", seed: int = 1, **settings) -> PeftModel:
    model = get_peft_model(net, LoraConfig(**{"target_modules": TARGETS, "r": 2} | settings), adapter_name=name)
    shake(weights_of(model, name), seed)
    return model


@pytest.mark.parametrize("r", [2, 3])
def test_a_merged_adapter_is_replaced_from_files(tmp_path: Path, r: int, mode: str):
    """The base weights are themselves again beneath the new one, which acts and learns."""
    saved = adapted(base(), seed=9, r=r)
    saved.save_pretrained(tmp_path)
    net = base()
    adapted(net).merge_adapter()
    with pytest.warns(UserWarning, match="Adapter default is merged, and another one takes its place"):
        model = PeftModel.from_pretrained(net, tmp_path, is_trainable=True)
    assert_same(output(model), output(saved))
    gradient = ms.value_and_grad(nets.Loss(model), None, model.trainable_params())
    x = model.sample()
    assert all((array(g) != 0).any() for g in gradient(x, Tensor(output(model) + 1))[1])
    assert_same(output(model.unload()), output(base()), "merge")


def test_a_merged_adapter_is_replaced_by_a_fresh_one():
    net = base()
    model = adapted(net, "mine")
    model.add_adapter("other", LoraConfig(target_modules=["lin0"], r=2))
    shake(weights_of(model, "other"), 4)
    model.merge_adapter(["mine", "other"])
    with pytest.warns(UserWarning, match="Adapter mine is merged"):
        fresh = get_peft_model(net, LoraConfig(target_modules=TARGETS, r=4), adapter_name="mine")
    assert_same(output(fresh), output(base()), "merge")
    assert not any(layer.merged for layer in layers_of(fresh))


def test_a_safe_merge_counts_the_adapters_together():
    model = get_peft_model(nets.Dense(ms.float16), LoraConfig(r=1, lora_alpha=1, target_modules=["lin0"]), "one")
    model.add_adapter("two", LoraConfig(r=1, lora_alpha=1, target_modules=["lin0"]))
    for name in ("one", "two"):  # 40,000 each: float16 ends at 65,504
        for p in weights_of(model, name):
            p.copy_(Tensor(np.full(p.shape, 200, np.float32)))
    before = state_of(model)
    with pytest.raises(MergeError, match=r"NaNs detected in the merged weights\. The adapter two"):
        model.merge_adapter(["one", "two"], safe_merge=True)
    assert state_of(model) == before
    model.merge_adapter(["one"], safe_merge=True)


def llama() -> LlamaForCausalLM:
    ms.set_seed(5)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).set_train(False)


def with_embedding() -> PeftModel:
    model = get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2))
    shake(weights_of(model, "default"))
    return model


def with_biases() -> PeftModel:
    model = adapted(base(), target_modules=["lin0"], bias="all", lora_bias=True)
    shake(model.trainable_params(), 3)
    return model


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("make", [with_embedding, with_biases])
def test_files_are_those_of_the_adapter_that_is_not_merged(tmp_path: Path, make: Callable[[], PeftModel]):
    """The base model's own weights that they hold, too: its embeddings, its trained biases."""
    model = make()
    ids = Tensor(np.array([[3, 1, 2]], np.int32))
    x = ids if make is with_embedding else model.sample()
    model.save_pretrained(tmp_path / "before")
    states = [get_peft_model_state_dict(model)]
    wanted = array(model(x)["logits"] if make is with_embedding else model(x))
    model.merge_adapter()
    merged = state_of(model)
    model.save_pretrained(tmp_path / "merged")
    states.append(get_peft_model_state_dict(model))
    assert state_of(model) == merged
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert one.keys() == two.keys() == states[0].keys() == states[1].keys()
    for key in one:
        # What is taken out of a float32 weight again may differ in its last bit.
        for other in (two[key], states[0][key], states[1][key]):
            assert_same(other, one[key], "merge" if key.endswith("base_layer.weight") else "exact")
    net = llama() if make is with_embedding else base()
    loaded = PeftModel.from_pretrained(net, tmp_path / "merged")
    found = array(loaded(x)["logits"] if make is with_embedding else loaded(x))
    assert_same(found, wanted, "merge")


def test_a_state_dict_is_written_into_an_unmerged_model():
    model, other = adapted(base()), adapted(base(), seed=7)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="cannot be overwritten when the model is merged"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert_same(output(model), output(other))
    assert differ(output(model), output(base()))
