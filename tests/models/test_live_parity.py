"""The reference models against transformers on torch: logits, losses, gradients, tokens, files in both directions."""

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor

import msft_peft.models as models
from tests.models import tiny


def hf_model(auto: str, family: str, settings: dict, folder) -> "torch.nn.Module":
    """Build HF's model with random weights, biases and norms included, and save it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, attn_implementation="eager", **settings)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
            elif family in ("t5", "mt5"):  # drawn by layer, too small or too large in a net of this size
                p.copy_(torch.randn_like(p) * tiny.STD)
    model.save_pretrained(folder)
    return model


def hf_step(model, batch: dict[str, np.ndarray], key: str = "logits"):
    """HF's loss, logits and gradients."""
    outputs = model(**{name: torch.tensor(column).long() for name, column in batch.items()})
    model.zero_grad()
    outputs.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.item(), outputs[key].detach().numpy(), gradients


def compare_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        np.testing.assert_allclose(
            gradient, theirs[name], rtol=1e-3, atol=1e-4 * np.abs(theirs[name]).max() + 5e-6, err_msg=name
        )


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoder(name, mode, tmp_path):
    family, settings = tiny.DECODERS[name]
    reference = hf_model("AutoModelForCausalLM", family, settings, tmp_path)
    model = models.AutoModelForCausalLM.from_pretrained(tmp_path)
    mask = tiny.left_mask()
    # What a padding token sees is nobody's business, so that it predicts nothing.
    labels = np.where(mask * np.pad(mask, [(0, 0), (1, 0)])[:, :-1] == 1, tiny.tokens(), -100)
    labels[1, :5] = -100
    batch = {"input_ids": tiny.tokens(), "attention_mask": mask, "labels": labels}
    loss, logits, gradients = tiny.loss_logits_gradients(model, batch)
    hf_loss, hf_logits, hf_gradients = hf_step(reference, batch)
    tiny.close(logits[mask == 1], hf_logits[mask == 1])
    tiny.close(loss, np.float32(hf_loss), 1e-5)
    compare_gradients(gradients, hf_gradients)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "gpt2", "opt-350m", "bloom-post"])
def test_greedy_tokens(name, mode, tmp_path):
    family, settings = tiny.DECODERS[name]
    reference = hf_model("AutoModelForCausalLM", family, settings, tmp_path)
    model = models.AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 10, "pad_token_id": 0}
    prompt = {"input_ids": torch.tensor(tiny.tokens()).long(), "attention_mask": torch.tensor(tiny.left_mask())}
    free = reference.generate(**prompt, do_sample=False, eos_token_id=None, **options).numpy()
    ends = [int(free[0, 14]), int(free[1, 17])]
    for extra in ({"eos_token_id": ends}, {"eos_token_id": ends[0], "repetition_penalty": 1.4}):
        expected = reference.generate(**prompt, do_sample=False, **options, **extra).numpy()
        actual = model.generate(Tensor(tiny.tokens()), Tensor(tiny.left_mask()), **options, **extra)
        np.testing.assert_array_equal(actual.asnumpy(), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt-350m", "bloom"])
def test_transformers_reads_what_we_write(name, tmp_path):
    model = tiny.decoder(name)
    model.save_pretrained(tmp_path)
    options = {"output_loading_info": True, "attn_implementation": "eager"}  # its other ones forget GPT-2's scale
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert not any(report.values())
    assert type(reference).__name__ == type(model).__name__
    expected = reference(torch.tensor(tiny.tokens()).long()).logits.detach().numpy()
    tiny.close(model(Tensor(tiny.tokens()))["logits"].asnumpy(), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m", "bloom"])
def test_sharded_checkpoint(name, tmp_path):
    """Of a model; and of its body alone, whose keys have no prefix, where that holds the tied head."""
    family, settings = tiny.DECODERS[name]
    reference = hf_model("AutoModelForCausalLM", family, settings, tmp_path / "whole")
    part = reference.base_model if reference.config.tie_word_embeddings else reference
    part.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model = models.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    expected = reference(torch.tensor(tiny.tokens()).long()).logits.detach().numpy()
    tiny.close(model(Tensor(tiny.tokens()))["logits"].asnumpy(), expected)


def test_bfloat16_checkpoint_becomes_float32(tmp_path):
    family, settings = tiny.DECODERS["llama3"]
    hf_model("AutoModelForCausalLM", family, settings, tmp_path / "whole").bfloat16().save_pretrained(
        tmp_path / "half"
    )
    model = models.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    expected = reference(torch.tensor(tiny.tokens()).long()).logits.detach().numpy()
    tiny.close(model(Tensor(tiny.tokens()))["logits"].asnumpy(), expected)


@pytest.mark.parametrize("labels", [np.array([1, 0, 2]), np.array([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]], np.float32)])
def test_decoder_classifies_sequences(labels, tmp_path):
    family, settings = tiny.DECODERS["llama3"]
    settings = {**settings, "num_labels": 3, "pad_token_id": 0}
    reference = hf_model("AutoModelForSequenceClassification", family, settings, tmp_path)
    model = models.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = tiny.tokens()
    ids[0, 8:] = 0
    outputs = model(Tensor(ids), Tensor((ids != 0).astype(np.int32)), labels=Tensor(labels))
    mask = torch.tensor(ids != 0).long()
    expected = reference(torch.tensor(ids).long(), attention_mask=mask, labels=torch.tensor(labels))
    tiny.close(outputs["logits"].asnumpy(), expected.logits.detach().numpy())
    tiny.close(outputs["loss"].asnumpy(), expected.loss.detach().numpy())


TASKS = {
    "SequenceClassification": ({"num_labels": 3}, {"labels": np.array([0, 2, 1])}),
    "TokenClassification": ({"num_labels": 3}, {"labels": np.where(tiny.tokens() % 4, tiny.tokens() % 3, -100)}),
    "QuestionAnswering": ({}, {"start_positions": np.array([3, 4, 0]), "end_positions": np.array([5, 40, 2])}),
    "MaskedLM": ({"hidden_act": "gelu_new"}, {"labels": np.where(tiny.tokens() % 3, -100, tiny.tokens())}),
}
HEADS = [(name, task) for name in tiny.ENCODERS for task in TASKS]
HEADS += [(name, task) for name in ("llama3", "gpt2", "bloom") for task in list(TASKS)[:3]]
HEADS += [("opt-350m", "SequenceClassification"), ("opt-350m", "QuestionAnswering"), ("mistral", "QuestionAnswering")]


@pytest.mark.parametrize(("name", "task"), HEADS)
def test_heads(name, task, mode, tmp_path):
    """In training, with nothing dropped, and with padding at the ends."""
    family, settings = tiny.DECODERS[name] if name in tiny.DECODERS else (name, tiny.ENCODERS[name])
    extra, labels = TASKS[task]
    settings = {"pad_token_id": 0, "classifier_dropout": 0.0, **settings, **extra}
    reference = hf_model("AutoModelFor" + task, family, settings, tmp_path).train()
    model = getattr(models, "AutoModelFor" + task).from_pretrained(tmp_path).set_train()
    assert type(model).__name__ == type(reference).__name__
    mask = tiny.left_mask()[:, ::-1].copy()
    batch = {"input_ids": np.where(mask, tiny.tokens(), settings["pad_token_id"]), "attention_mask": mask, **labels}
    if name in tiny.ENCODERS:
        batch["token_type_ids"] = np.random.RandomState(2).randint(0, 2, mask.shape)
    key = "end_logits" if task == "QuestionAnswering" else "logits"
    loss, logits, gradients = tiny.loss_logits_gradients(model, batch, key)
    hf_loss, hf_logits, hf_gradients = hf_step(reference, batch, key)
    tiny.close(logits, hf_logits)
    tiny.close(loss, np.float32(hf_loss), 1e-5)
    compare_gradients(gradients, hf_gradients)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "opt-350m", "bloom-post"])
def test_decoder_behind_a_prefix(name, mode, tmp_path):
    family, settings = tiny.DECODERS[name]
    reference = hf_model("AutoModelForCausalLM", family, settings, tmp_path)

    def logits(outputs):
        return outputs["logits"]

    check_prefix(reference, models.AutoModelForCausalLM.from_pretrained(tmp_path), logits, tiny.left_mask())


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_encoder_behind_a_prefix(family, mode, tmp_path):
    """Its heads in transformers take no prefix: HF peft goes by the body, as this does."""
    reference = hf_model("AutoModel", family, tiny.ENCODERS[family], tmp_path)
    model = models.AutoModel.from_pretrained(tmp_path)

    def all_of(outputs):
        return outputs["last_hidden_state"] + outputs["pooler_output"].reshape((3, 1, -1))

    check_prefix(reference, model, all_of, tiny.left_mask()[:, ::-1], embedded=family == "bert")


def check_prefix(reference, model, read, mask: np.ndarray, embedded: bool = True) -> None:
    """Keys and values of 5 slots before a text, `embedded` or as ids: outputs, and the gradients of what went in."""
    config, random = model.config, np.random.RandomState(4)
    groups = config.get("num_key_value_heads", config.num_attention_heads)
    shape = (config.num_hidden_layers, 2, 3, groups, 5, config.hidden_size // config.num_attention_heads)
    prefix = random.normal(size=shape).astype(np.float32)
    ids = np.where(mask, tiny.tokens(), config.pad_token_id or 0)
    embeds = reference.get_input_embeddings()(torch.tensor(ids).long()).detach().numpy()
    mask = np.concatenate([np.ones((3, 5), np.int32), mask], 1)

    theirs = [torch.tensor(value, requires_grad=True) for value in (prefix, embeds)]
    cache = transformers.DynamicCache.from_legacy_cache(tuple((layer[0], layer[1]) for layer in theirs[0]))
    text = {"inputs_embeds": theirs[1]} if embedded else {"input_ids": torch.tensor(ids).long()}
    expected = read(reference(**text, attention_mask=torch.tensor(mask), past_key_values=cache))
    slopes = random.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(slopes)).sum().backward()

    def forward(prefix, embeds):
        past = tuple((layer[0], layer[1]) for layer in prefix)
        if embedded:
            output = read(model(inputs_embeds=embeds, attention_mask=Tensor(mask), past_key_values=past))
        else:
            output = read(model(Tensor(ids), Tensor(mask), past_key_values=past))
        return (output * Tensor(slopes)).sum(), output

    def call(prefix, embeds):
        return ms.value_and_grad(forward, (0, 1), None, has_aux=True)(prefix, embeds)

    run = ms.jit(call) if ms.get_context("mode") == ms.GRAPH_MODE else call
    (_, output), gradients = run(Tensor(prefix), Tensor(embeds))
    tiny.close(output.asnumpy(), expected.detach().numpy())
    for gradient, value in zip(gradients, theirs[: 1 + embedded]):
        compare_gradients({"input": gradient.asnumpy()}, {"input": value.grad.numpy()})


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_transformers_reads_the_encoders_that_we_write(family, tmp_path):
    config = models.AutoConfig.for_model(family, **tiny.ENCODERS[family])
    model = tiny.scatter(models.AutoModelForMaskedLM.from_config(config))
    model.save_pretrained(tmp_path)
    reference, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = reference(torch.tensor(tiny.tokens()).long()).logits.detach().numpy()
    tiny.close(model(Tensor(tiny.tokens()))["logits"].asnumpy(), expected)


T5_TASKS = {
    "Seq2SeqLM": ({}, {"labels": np.where(tiny.tokens(3, 7) % 4, tiny.tokens(3, 7), -100)}, "logits"),
    "SequenceClassification": ({"num_labels": 3}, {"labels": np.array([0, 2, 1])}, "logits"),
    "TokenClassification": ({"num_labels": 3}, {"labels": tiny.tokens() % 3}, "logits"),
    "QuestionAnswering": (
        {},
        {"start_positions": np.array([3, 4, 0]), "end_positions": np.array([5, 40, 2])},
        "end_logits",
    ),
}


@pytest.mark.parametrize(
    ("name", "task"), [(name, "Seq2SeqLM") for name in tiny.SEQ2SEQ] + [("t5", t) for t in T5_TASKS][1:]
)
def test_t5(name, task, mode, tmp_path):
    family, settings = tiny.SEQ2SEQ[name]
    extra, labels, key = T5_TASKS[task]
    reference = hf_model("AutoModelFor" + task, family, {**settings, **extra}, tmp_path)
    model = getattr(models, "AutoModelFor" + task).from_pretrained(tmp_path)
    ids = tiny.tokens()
    ids[:, [5, 9]] = 1  # eos, where sequences are classified
    mask = tiny.left_mask()[:, ::-1].copy()
    mask[:, 9] = 1
    batch = {"input_ids": ids, "attention_mask": mask, **labels}
    loss, logits, gradients = tiny.loss_logits_gradients(model, batch, key)
    hf_loss, hf_logits, hf_gradients = hf_step(reference, batch, key)
    tiny.close(logits, hf_logits)
    tiny.close(loss, np.float32(hf_loss), 1e-5)
    compare_gradients(gradients, hf_gradients)


def test_t5_without_a_head(tmp_path):
    family, settings = tiny.SEQ2SEQ["t5"]
    whole = hf_model("AutoModelForSeq2SeqLM", family, settings, tmp_path)
    ids, later = tiny.tokens(), tiny.tokens(3, 5)
    mask, later_mask = tiny.left_mask(), tiny.left_mask(3, 5) | 1
    later_mask[0, :2] = 0
    reference = transformers.AutoModel.from_pretrained(tmp_path)
    expected = reference(
        inputs_embeds=reference.shared(torch.tensor(ids).long()),
        attention_mask=torch.tensor(mask),
        decoder_inputs_embeds=reference.shared(torch.tensor(later).long()),
        decoder_attention_mask=torch.tensor(later_mask),
        output_hidden_states=True,
    )
    model = models.AutoModel.from_pretrained(tmp_path)
    assert type(model) is models.T5Model
    embed = model.get_input_embeddings()
    outputs = model(
        inputs_embeds=embed(Tensor(ids)),
        attention_mask=Tensor(mask),
        decoder_inputs_embeds=embed(Tensor(later)),
        decoder_attention_mask=Tensor(later_mask),
        output_hidden_states=True,
    )
    seen = later_mask == 1
    tiny.close(outputs["last_hidden_state"].asnumpy()[seen], expected.last_hidden_state.detach().numpy()[seen])
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(outputs[name]) == len(expected[name])
        for ours, theirs in zip(outputs[name], expected[name]):
            if name.startswith("enc"):
                tiny.close(ours.asnumpy()[mask == 1], theirs.detach().numpy()[mask == 1])
    encoder = models.T5EncoderModel.from_pretrained(tmp_path)
    encoded = encoder(Tensor(ids), Tensor(mask))["last_hidden_state"].asnumpy()
    tiny.close(
        encoded[mask == 1], whole.encoder(torch.tensor(ids).long(), torch.tensor(mask))[0].detach().numpy()[mask == 1]
    )


def test_t5_behind_a_prefix(mode, tmp_path):
    """What HF peft's prefix tuning hands to T5: keys and values before the decoder's own, and no cross-attention."""
    family, settings = tiny.SEQ2SEQ["t5"]
    reference = hf_model("AutoModelForSeq2SeqLM", family, settings, tmp_path)
    model = models.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    prefix = np.random.RandomState(5).normal(0, 1, (3, 2, 3, 3, 4, 8)).astype(np.float32)  # layers, k/v, B, N, P, D
    past = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    for i, (k, v) in enumerate(prefix):
        past.self_attention_cache.update(torch.tensor(k), torch.tensor(v), i)
    past.is_updated = dict.fromkeys(range(3), False)
    ids, mask, later = tiny.tokens(), tiny.left_mask(), tiny.tokens(3, 5)
    expected = (
        reference(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask),
            decoder_input_ids=torch.tensor(later).long(),
            past_key_values=past,
        )
        .logits.detach()
        .numpy()
    )
    pairs = ms.mutable(tuple((Tensor(k), Tensor(v)) for k, v in prefix))
    given = {"attention_mask": Tensor(mask), "past_key_values": pairs}
    tiny.close(model(Tensor(ids), decoder_input_ids=Tensor(later), **given)["logits"].asnumpy(), expected)
    plain = model(Tensor(ids), decoder_input_ids=Tensor(later), attention_mask=Tensor(mask))["logits"].asnumpy()
    assert np.abs(plain - expected).max() > 0.1


@pytest.mark.parametrize("both_ways", [True, False])
def test_t5_buckets_of_distances(both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    from msft_peft.models.t5_stack import distance_buckets

    for buckets, farthest in ((32, 128), (8, 16), (16, 20), (64, 500)):
        distance = torch.arange(-farthest - 9, farthest + 10)
        expected = T5Attention._relative_position_bucket(distance, both_ways, buckets, farthest).numpy()
        ours = distance_buckets(buckets, farthest, both_ways)
        np.testing.assert_array_equal(ours[np.clip(distance.numpy(), -farthest, farthest) + farthest], expected)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_transformers_reads_the_t5_that_we_write(name, tmp_path):
    model = tiny.seq2seq(name)
    model.save_pretrained(tmp_path)
    reference, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    labels = tiny.tokens(3, 5)
    expected = reference(torch.tensor(tiny.tokens()).long(), labels=torch.tensor(labels).long())
    tiny.close(
        model(Tensor(tiny.tokens()), labels=Tensor(labels))["logits"].asnumpy(), expected.logits.detach().numpy()
    )


@pytest.mark.parametrize("family", models.config.CONFIG_CLASSES)
def test_defaults_are_those_of_transformers(family):
    ours = models.AutoConfig.for_model(family).to_dict()
    theirs = transformers.AutoConfig.for_model(family).to_dict()
    if theirs.get("head_dim", 0) is None:  # Mistral's: the width of a head, once it is asked for
        theirs["head_dim"] = theirs["hidden_size"] // theirs["num_attention_heads"]
    different = {key: (value, theirs[key]) for key, value in ours.items() if key in theirs and value != theirs[key]}
    assert not different
