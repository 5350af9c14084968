"""Vocabularies of another size."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from msft_peft import models
from tests.models import tiny
from tests.tolerances import assert_same


def masked(family: str = "bert") -> models.PreTrainedModel:
    config = models.AutoConfig.for_model(family, **tiny.ENCODERS[family])
    return tiny.scatter(models.AutoModelForMaskedLM.from_config(config))


def logits(model: models.PreTrainedModel, ids: Tensor) -> np.ndarray:
    targets = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **targets)["logits"].asnumpy()


@pytest.mark.parametrize("build", [tiny.decoder, lambda: tiny.decoder("llama"), masked])
def test_old_tokens_score_as_before(build, mode):
    old_tokens_score_as_before(build())


FAMILIES = {name: lambda name=name: tiny.decoder(name) for name in ("gpt2", "opt-350m", "bloom")}
FAMILIES |= {name: lambda name=name: tiny.seq2seq(name) for name in ("t5", "t5-1.1")}
FAMILIES["roberta"] = lambda: masked("roberta")


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name):
    old_tokens_score_as_before(FAMILIES[name]())


def old_tokens_score_as_before(model):
    model.set_train(False)
    ids = Tensor(tiny.tokens())
    before = logits(model, ids)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows = model.get_input_embeddings().weight.asnumpy().copy()
    table = model.resize_token_embeddings(70)
    after = logits(model, ids)
    assert after.shape[-1] == model.config.vocab_size == table.weight.shape[0] == 70
    assert_same(after[..., : tiny.VOCAB], before, "close")
    assert_same(table.weight.asnumpy()[-1], rows.mean(0), "close")
    head = model.get_output_embeddings()
    assert (head.weight is table.weight) == tied
    assert (70,) == (head.bias.shape if head.bias is not None else (70,))
    names = [p.name for p in model.get_parameters()]
    assert names == [path for path, _ in model.parameters_and_names()]
    logits(model, Tensor(np.array([[69, 65]], np.int32)))
    model.resize_token_embeddings(tiny.VOCAB)
    assert_same(logits(model, ids), before, "close")


def test_the_new_size_is_saved(tmp_path):
    model = tiny.decoder()
    model.resize_token_embeddings(60, pad_to_multiple_of=8, mean_resizing=False)
    assert model.config.vocab_size == 64
    assert model.get_input_embeddings().weight.asnumpy()[-1].std() > 0.05
    model.save_pretrained(tmp_path)
    assert models.AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 64


def test_a_body_alone_and_no_change():
    model = models.LlamaModel(models.LlamaConfig(**tiny.DECODERS["llama"][1]))
    table = model.get_input_embeddings()
    weight = table.weight
    assert model.resize_token_embeddings() is table
    assert table.weight is weight
    model.resize_token_embeddings(65)
    assert model(Tensor([[64]], ms.int32))["last_hidden_state"].shape == (1, 1, tiny.WIDTH)


def test_no_tokens_at_all():
    with pytest.raises(ValueError, match="there must be at least one"):
        tiny.decoder().resize_token_embeddings(0)
