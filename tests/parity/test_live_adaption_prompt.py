"""Adaption prompts against HF peft on transformers' models: numbers, gradients, files, tokens."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import nn

import msft_peft
from msft_peft import models

from . import ours, theirs
from .cases import make_weight, same, same_dicts
from .test_live_models import DECODER
from .test_live_prompts import GPT2

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER | {"num_hidden_layers": 3, "num_key_value_heads": 4}),
    "mistral": ("MistralForCausalLM", DECODER | {"num_key_value_heads": 2, "sliding_window": 4}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"n_layer": 3}),
}
PROMPT = {"task_type": "CAUSAL_LM", "adapter_len": 3, "adapter_layers": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a model's checkpoint, written by transformers; made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def folder(name: str) -> Path:
        kind, settings = MODELS[name]
        kind = getattr(transformers, kind)
        module, rng = kind(kind.config_class(**settings)), np.random.default_rng(0)
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(torch.tensor(make_weight(key, tuple(p.shape), rng)))
        module.save_pretrained(root / name)
        return root / name

    return folder


def hf_adapter(name: str, folder: Path, seed: int = 1, scale: float = 0.7, **changes: Any):
    base = getattr(transformers, MODELS[name][0]).from_pretrained(folder, attn_implementation="eager")
    model = peft.get_peft_model(base, peft.AdaptionPromptConfig(**PROMPT | changes)).eval()
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.tensor(scale * rng.standard_normal(tuple(p.shape)).astype(np.float32))
    return model


def our_base(name: str, folder: Path) -> nn.Cell:
    return getattr(models, MODELS[name][0]).from_pretrained(folder)


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    ids, mask = rng.integers(3, 30, (2, 6)).astype(np.int32), np.ones((2, 6), np.int32)
    mask[1, 4:] = 0
    return ids, mask


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, ids, mask):
        outputs = self.model(input_ids=ids, attention_mask=mask, labels=ids)
        return outputs["loss"], outputs["logits"]


def our_numbers(model):
    params = model.trainable_params()
    step = ms.value_and_grad(Loss(model), None, params, has_aux=True)

    def call(ids, mask):
        return step(ids, mask)

    run = ms.jit(call) if ms.get_context("mode") == ms.GRAPH_MODE else call
    (loss, logits), grads = run(*map(ms.Tensor, batch()))
    keys = [p.name.replace(".default", "").removeprefix("base_model.model.") for p in params]
    return loss.asnumpy(), logits.asnumpy(), {key: g.asnumpy() for key, g in zip(keys, grads)}


def hf_numbers(model):
    ids, mask = (torch.tensor(x).long() for x in batch())
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids)
    outputs.loss.backward()
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return outputs.loss.item(), outputs.logits.detach().numpy(), {key: g.numpy() for key, g in grads.items()}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_files(name, mode, checkpoints, tmp_path):
    """Counts, logits, loss, every gradient; then each library reads what the other wrote."""
    folder = checkpoints(name)
    hf = hf_adapter(name, folder)
    hf.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = msft_peft.PeftModel.from_pretrained(our_base(name, folder), tmp_path / "theirs", is_trainable=True)
    mine.set_train(False)
    assert ours.printed(mine) == theirs.printed(hf)
    (loss, logits, grads), (hf_loss, hf_logits, hf_grads) = our_numbers(mine), hf_numbers(hf)
    same("model output", logits, hf_logits, "logits")
    same("model output", loss, hf_loss, "loss")
    same_dicts("model gradient", grads, hf_grads)
    assert all(np.abs(g).max() > 1e-4 for g in hf_grads.values())

    mine.save_pretrained(tmp_path / "ours")
    base = getattr(transformers, MODELS[name][0]).from_pretrained(folder, attn_implementation="eager")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids, mask = (torch.tensor(x).long() for x in batch())
    with torch.no_grad():
        same("model output", back(input_ids=ids, attention_mask=mask).logits.numpy(), hf_logits, "read by HF")
    one, two = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert one == two
    texts = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name, checkpoints, tmp_path):
    """With two adapters, and with none."""
    folder, ids = checkpoints(name), batch()[0]
    hf = hf_adapter(name, folder, scale=4.0)
    other = hf_adapter(name, folder, 3, 4.0, adapter_len=2, adapter_layers=1)
    for model, where in ((hf, "one"), (other, "two")):
        model.save_pretrained(tmp_path / where)
    mine = msft_peft.PeftModel.from_pretrained(our_base(name, folder), tmp_path / "one", "one")
    mine.load_adapter(tmp_path / "two", "two")
    more, tokens = {"max_new_tokens": 6, "do_sample": False}, []
    for model, adapter in ((other, "two"), (hf, "one")):
        mine.set_adapter(adapter)
        with torch.no_grad():
            wanted = model.generate(input_ids=torch.tensor(ids).long(), eos_token_id=None, **more).tolist()
        assert mine.generate(ids, eos_token_id=[], **more).asnumpy().tolist() == wanted
        tokens.append(wanted)
    with mine.disable_adapter(), hf.disable_adapter(), torch.no_grad():
        wanted = hf.generate(input_ids=torch.tensor(ids).long(), eos_token_id=None, **more).tolist()
        assert mine.generate(ids, eos_token_id=[], **more).asnumpy().tolist() == wanted
    assert wanted not in tokens


def test_a_fresh_adapter_where_the_projection_has_a_bias(tmp_path):
    """HF adds that bias twice, so that even a closed gate changes the model."""
    kind = transformers.LlamaForCausalLM
    module, rng = kind(kind.config_class(**DECODER, attention_bias=True)).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for key, p in module.named_parameters():
            p.copy_(torch.tensor(make_weight(key, tuple(p.shape), rng)))
        module.save_pretrained(tmp_path)
        ids = batch()[0] % 30
        wanted = module(torch.tensor(ids).long()).logits.numpy()
        hf = peft.get_peft_model(module, peft.AdaptionPromptConfig(**PROMPT))
        assert np.abs(hf(torch.tensor(ids).long()).logits.numpy() - wanted).max() > 0.1
    base = models.LlamaForCausalLM.from_pretrained(tmp_path)
    mine = msft_peft.get_peft_model(base, msft_peft.AdaptionPromptConfig(**PROMPT)).set_train(False)
    same("model output", mine(ms.Tensor(ids))["logits"].asnumpy(), wanted)


def test_heads_of_tasks(tmp_path):
    """HF trains and saves none with this method; here they are, and HF reads them, as weights of the base model."""
    kind, rng = transformers.LlamaForSequenceClassification, np.random.default_rng(0)
    kind(kind.config_class(**DECODER, num_labels=3)).save_pretrained(tmp_path / "base")
    settings, ids = PROMPT | {"task_type": "SEQ_CLS"}, batch()[0]
    hf = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.AdaptionPromptConfig(**settings)).eval()
    for p in hf.parameters():
        if p.requires_grad:
            p.data = torch.tensor(rng.standard_normal(tuple(p.shape)).astype(np.float32))
    hf.save_pretrained(tmp_path / "theirs")
    base = functools.partial(models.LlamaForSequenceClassification.from_pretrained, tmp_path / "base")
    read = msft_peft.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    assert read.load_report.faults() == []
    with torch.no_grad():
        wanted = hf(torch.tensor(ids).long()).logits.numpy()
    same("model output", read(ms.Tensor(ids))["logits"].asnumpy(), wanted)

    mine = msft_peft.get_peft_model(base(), msft_peft.AdaptionPromptConfig(**settings)).set_train(False)
    assert "base_model.model.score.modules_to_save.default.weight" in {p.name for p in mine.trainable_params()}
    for p in mine.trainable_params():
        p.copy_(ms.Tensor(rng.standard_normal(p.shape).astype(np.float32)))
    y = mine(ms.Tensor(ids))["logits"].asnumpy()
    mine.save_pretrained(tmp_path / "ours")
    again = msft_peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True).set_train(False)
    same("model output", again(ms.Tensor(ids))["logits"].asnumpy(), y)
    assert {p.name for p in again.trainable_params()} == {p.name for p in mine.trainable_params()}
    with pytest.warns(UserWarning, match="modules_to_save"):
        back = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    with torch.no_grad():
        same("model output", back(torch.tensor(ids).long()).logits.numpy(), y)


def test_how_it_begins(checkpoints):
    """Closed gates, and prompts of variance 1."""
    hf = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(checkpoints("llama")),
        peft.AdaptionPromptConfig(**PROMPT | {"adapter_len": 500}),
    )
    config = msft_peft.AdaptionPromptConfig(**PROMPT | {"adapter_len": 500})
    mine = msft_peft.get_peft_model(our_base("llama", checkpoints("llama")), config)
    wanted = {n: p.detach().numpy() for n, p in hf.named_parameters() if p.requires_grad}
    found = {p.name.removesuffix(".default"): p.asnumpy() for p in mine.trainable_params()}
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}
    for key, value in found.items():
        assert abs(value.mean() - wanted[key].mean()) < 0.05
        assert abs(value.std() - wanted[key].std()) < 0.05


def test_what_hf_refuses(checkpoints):
    """The same built-in kind of error, from either library."""
    folder = checkpoints("llama")
    bert = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for base, settings in (
        (lambda models: models.LlamaForCausalLM.from_pretrained(folder), {"adapter_layers": 4}),
        (lambda models: models.BertModel(models.BertConfig(**bert)), {}),
        (lambda models: models.LlamaForCausalLM.from_pretrained(folder), {"target_modules": "nope"}),
    ):
        for library, zoo in ((peft, transformers), (msft_peft, models)):
            with pytest.raises(ValueError):  # noqa: PT011
                library.get_peft_model(base(zoo), library.AdaptionPromptConfig(**PROMPT | settings))
