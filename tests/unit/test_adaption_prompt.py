"""Adaption prompts: our models, their numbers in half precision, several at once, what is refused."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from msft_peft import AdaptionPromptConfig, ConfigError, LoraConfig, MergeError, get_peft_model
from msft_peft.models import AutoModelForCausalLM
from tests import nets
from tests.cases import output, shake, weights_of
from tests.models import tiny
from tests.tolerances import array, assert_same, differ

PROMPT = {"adapter_len": 2, "adapter_layers": 1, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_our_other_models_of_the_family(name: str):
    """A closed gate changes nothing, an open one does; its prompt has a key in each of the shared heads."""
    model = get_peft_model(tiny.decoder(name).set_train(False), AdaptionPromptConfig(**PROMPT))
    ids = Tensor(np.array([[5, 9, 3, 7]], np.int32))
    with model.disable_adapter():
        base = array(model(ids)["logits"])
    assert_same(model(ids)["logits"], base)
    shake(weights_of(model, "default"))
    assert differ(model(ids)["logits"], base)
    assert model.peft_config["default"].to_dict()["target_modules"] == "self_attn"
    assert model.peft_config["default"].is_adaption_prompt
    assert not LoraConfig().is_adaption_prompt


def test_half_precision(tmp_path: Path):
    """The weights stay in float32 unless told otherwise."""
    model = tiny.decoder("llama").set_train(False)
    model.save_pretrained(tmp_path)
    ids = Tensor(np.array([[5, 9, 3, 7]], np.int32))
    wide = get_peft_model(model, AdaptionPromptConfig(**PROMPT))
    shake(weights_of(wide, "default"))
    for autocast, dtype in ((True, ms.float32), (False, ms.float16)):
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float16").set_train(False)
        narrow = get_peft_model(half, AdaptionPromptConfig(**PROMPT), autocast_adapter_dtype=autocast)
        for p, q in zip(weights_of(narrow, "default"), weights_of(wide, "default")):
            assert (p.name, p.dtype) == (q.name, dtype)
            p.copy_(Tensor(array(q), dtype))
        y = narrow(ids)["logits"]
        assert y.dtype == ms.float16
        np.testing.assert_allclose(array(y).astype(np.float32), array(wide(ids)["logits"]), atol=0.05)


def test_several_at_once_add_up():
    """Of one block: what they do to its attention is a sum."""
    ms.set_seed(5)
    config = AdaptionPromptConfig(target_modules=["look"], adapter_len=2, adapter_layers=1)
    model = get_peft_model(nets.Reading().set_train(False), config, adapter_name="one")
    model.add_adapter("two", config)
    for seed, name in enumerate(("one", "two")):
        shake(weights_of(model, name), seed=seed)
    layer = model.base_model.model.layers[1].look
    x = model.sample()
    with model.disable_adapter():
        base = array(layer(x))
    parts = []
    for names in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(names)
        parts.append(array(layer(x)) - base)
    assert_same(parts[2], parts[0] + parts[1])


def test_what_it_refuses():
    base = nets.Reading().set_train(False)
    before = output(base)
    for settings, said in (
        ({"adapter_len": None}, "needs adapter_len"),
        ({"adapter_layers": None}, "needs adapter_layers"),
        ({"adapter_layers": 3}, "more adapter layers '3' than the model has '2'"),
        ({"target_modules": "attn"}, "is not supported. Currently"),
        ({"target_modules": None}, "no default is known"),
    ):
        with pytest.raises(ConfigError, match=said):
            get_peft_model(base, AdaptionPromptConfig(**{"target_modules": "look"} | PROMPT | settings))
    for name in ("adapter_len", "adapter_layers"):
        with pytest.raises(ConfigError, match=f"`{name}` must be a whole number of at least 1"):
            AdaptionPromptConfig(**{name: 0})
    assert_same(output(base), before, "exact")
    settings = {"target_modules": "look", "adapter_len": 2, "adapter_layers": 1}
    model = get_peft_model(base, AdaptionPromptConfig(**settings))
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(MergeError, match="cannot be merged into a weight"):
        model.base_model.model.layers[1].look.check_merge(["default"], finite=False)
