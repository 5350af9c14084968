"""The reference models by themselves: both modes agree, gradients are true, masks mask, replaced layers are used."""

from collections import Counter
from functools import partial

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Tensor, nn

import msft_peft.models as models
from msft_peft.backend.activations import GELU, gelu_tanh
from msft_peft.models.attention import SoftmaxMix
from msft_peft.models.bloom import alibi_slopes
from msft_peft.models.layers import Conv1D, Embedding, LayerNorm, RMSNorm, activation
from msft_peft.models.losses import classification_loss, cross_entropy
from tests.models import tiny


def classifier(family: str = "bert", **overrides):
    config = models.AutoConfig.for_model(family, **{**tiny.ENCODERS[family], **overrides})
    return tiny.scatter(models.AutoModelForSequenceClassification.from_config(config))


# A model of every architecture, with a head.
EACH = {name: partial(tiny.decoder, name) for name in ("llama3", "gpt2", "opt-350m", "bloom-post")}
EACH |= {name: partial(classifier, name) for name in tiny.ENCODERS}
# Whose graphs differ.
COMPILED = [build for name, build in EACH.items() if name != "roberta"]
each = pytest.mark.parametrize("build", EACH.values(), ids=EACH)


@pytest.mark.graph
@pytest.mark.parametrize("build", COMPILED)
def test_modes_agree(build):
    model = build()
    mask = tiny.left_mask()
    labels = tiny.tokens() if hasattr(model, "generate") else np.array([0, 1, 1], np.int32)
    batch = {"input_ids": tiny.tokens(), "attention_mask": mask, "labels": labels}
    loss, logits, gradients = tiny.loss_logits_gradients(model, batch)
    ms.set_context(mode=ms.GRAPH_MODE)
    graph_loss, graph_logits, graph_gradients = tiny.loss_logits_gradients(model, batch)
    tiny.close(graph_loss, loss, 1e-5)
    tiny.close(graph_logits, logits, 1e-5)
    for name, gradient in gradients.items():
        tiny.close(graph_gradients[name], gradient, 1e-5)
    outputs = model(Tensor(tiny.tokens()), Tensor(mask))  # a Cell called as a root, without labels
    assert list(outputs) == ["logits"]
    tiny.close(outputs["logits"].asnumpy(), logits, 1e-5)


@pytest.mark.parametrize("build", [lambda: tiny.decoder("qwen3"), classifier], ids=["qwen3", "bert"])
def test_gradients_match_finite_differences(build):
    model = build()
    mask = tiny.left_mask()
    is_decoder = model.config.model_type == "qwen3"
    # A padding token sees nothing: its softmax is flat and has no slope, so no label may follow one.
    follows = np.pad(mask[:, :-1], [(0, 0), (1, 0)])
    labels = np.where(follows == 1, tiny.tokens(), -100) if is_decoder else np.array([0, 1, 1])
    batch = {"input_ids": tiny.tokens(), "attention_mask": mask, "labels": labels.astype(np.int32)}
    columns = [Tensor(column) for column in batch.values()]
    net = models.LossOnly(model, tuple(batch))
    _, _, gradients = tiny.loss_logits_gradients(model, batch)
    random = np.random.RandomState(3)
    for p in model.trainable_params():
        start, direction = p.asnumpy().copy(), random.normal(size=p.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        losses = []
        for step in (0.02, -0.02):
            p.copy_(Tensor(start + step * direction))
            losses.append(float(net(*columns)))
        p.copy_(Tensor(start))
        slope, expected = (losses[0] - losses[1]) / 0.04, float((gradients[p.name] * direction).sum())
        assert abs(slope - expected) < 2e-3 + 0.02 * abs(expected), p.name


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_padding_on_the_left_changes_nothing(name):
    model = tiny.decoder(name)
    whole = model(Tensor(tiny.tokens()), Tensor(tiny.left_mask()), position_ids=Tensor(_positions(tiny.left_mask())))
    alone = model(Tensor(tiny.tokens()[:1, 4:]))
    tiny.close(whole["logits"].asnumpy()[:1, 4:], alone["logits"].asnumpy())


def test_padding_on_the_right_changes_nothing_in_bert():
    model = classifier()
    mask = np.ones((3, 12), np.int32)
    mask[0, 9:] = 0
    whole = model(Tensor(tiny.tokens()), Tensor(mask))["logits"].asnumpy()[:1]
    tiny.close(whole, model(Tensor(tiny.tokens()[:1, :9]))["logits"].asnumpy())


def _positions(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.cumsum(-1) - 1, 0).astype(np.int32)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "gpt2", "opt", "bloom"])
def test_cache_in_parts_equals_the_whole(name):
    """Appended, and in slots of a cache of fixed size, of which some are empty."""
    model = tiny.decoder(name)
    ids, mask = Tensor(tiny.tokens()), Tensor(tiny.left_mask())
    for whole_mask in (None, mask):
        whole = model(ids, whole_mask)["logits"].asnumpy()
        first = model(ids[:, :11], None if whole_mask is None else mask[:, :11], use_cache=True)
        past = first["past_key_values"]
        second = model(ids[:, 11:], whole_mask, past_key_values=past)
        real = tiny.left_mask() == 1 if whole_mask is not None else slice(None)
        tiny.close(np.concatenate([first["logits"].asnumpy(), second["logits"].asnumpy()], 1)[real], whole[real])
        slots = tuple(tuple(ms.ops.pad(x, (0, 0, 0, 4), value=9.0) for x in pair) for pair in past)
        longer = None if whole_mask is None else ms.ops.pad(mask, (0, 3))
        place = Tensor(np.array([11], np.int32))
        second = model(ids[:, 11:], longer, past_key_values=slots, cache_position=place, use_cache=True)
        tiny.close(second["logits"].asnumpy(), whole[:, 11:])
        assert second["past_key_values"][0][0].shape == slots[0][0].shape


@each
def test_embeddings_in_place_of_ids(build):
    """By themselves, and behind a prefix of another dtype."""
    model = build()
    config, ids = model.config, Tensor(tiny.tokens())
    embedded = model.get_input_embeddings()(ids)
    groups, width = config.get("num_key_value_heads", config.num_attention_heads), config.hidden_size
    shape = (config.num_hidden_layers, 2, 3, groups, 5, width // config.num_attention_heads)
    prefix = Tensor(np.random.RandomState(0).normal(size=shape).astype(np.float16))
    past = tuple((layer[0], layer[1]) for layer in prefix)
    alone = model(ids)["logits"].asnumpy()
    behind = model(ids, past_key_values=past)["logits"].asnumpy()
    assert np.abs(behind - alone).max() > 1e-2
    tiny.close(model(inputs_embeds=embedded)["logits"].asnumpy(), alone, 1e-6)
    tiny.close(model(inputs_embeds=embedded, past_key_values=past)["logits"].asnumpy(), behind, 1e-6)
    with pytest.raises(ValueError, match=r"12 columns.*need"):
        model(ids, Tensor(tiny.left_mask()), past_key_values=past)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)


def test_hidden_states_and_logits_to_keep():
    model = tiny.decoder()
    outputs = model(Tensor(tiny.tokens()), output_hidden_states=True, logits_to_keep=2)
    assert [state.shape for state in outputs["hidden_states"]] == [(3, 12, tiny.WIDTH)] * 3
    assert outputs["logits"].shape == (3, 2, tiny.VOCAB)
    tiny.close(outputs["logits"].asnumpy(), model(Tensor(tiny.tokens()))["logits"].asnumpy()[:, -2:])


class Bent(nn.Cell):
    """Stands for an adapter's wrapper around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def construct(self, x):
        y = self.base_layer(x)
        return y + y * y


@each
def test_every_projection_can_be_replaced(build):
    model = build()
    ids = Tensor(tiny.tokens())
    before = model(ids)["logits"].asnumpy()
    found = [path for path, cell in model.cells_and_names() if isinstance(cell, nn.Dense | Conv1D | Embedding)]
    assert len(found) >= 8
    for path in found:
        owner, _, name = path.rpartition(".")
        parent = model.get_sub_cell(owner) if owner else model
        layer = parent._cells[name]
        parent._cells[name] = Bent(layer)
        assert np.abs(model(ids)["logits"].asnumpy() - before).max() > 1e-3, path
        parent._cells[name] = layer


def test_names_are_unique_and_those_of_hf():
    model = tiny.decoder("qwen2")
    names = [p.name for p in model.get_parameters()]
    assert len(set(names)) == len(names)
    assert names == [path for path, _ in model.parameters_and_names()]
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"} <= set(names)
    names = [p.name for p in models.LossOnly(classifier()).get_parameters()]
    assert {"bert.encoder.layer.0.attention.self.query.weight", "classifier.bias"} <= set(names)


def test_tied_weights_are_one_parameter():
    tied, free = tiny.decoder("llama3"), tiny.decoder("llama")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(tied.parameters_and_names())
    assert free.lm_head.weight is not free.model.embed_tokens.weight
    masked = models.BertForMaskedLM(models.BertConfig(**tiny.BERT))
    assert masked.cls.predictions.decoder.weight is masked.get_input_embeddings().weight


class Doubled(nn.Cell):
    """Stands for an adapter's wrapper around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def construct(self, x):
        return self.base_layer(x) * 2.0


def test_encoder_and_decoder_share_the_embedding():
    model = tiny.seq2seq("t5")
    names = [p.name for p in model.get_parameters()]
    assert names == [path for path, _ in model.parameters_and_names()]
    assert {"shared.weight", "decoder.block.0.layer.1.EncDecAttention.q.weight"} <= set(names)
    assert not {"lm_head.weight", "encoder.embed_tokens.weight"} & set(names)
    ids = Tensor(tiny.tokens())
    before = model(ids, decoder_input_ids=ids, use_cache=True)
    model.set_input_embeddings(Doubled(model.get_input_embeddings()))
    after = model(ids, decoder_input_ids=ids)
    assert np.abs((after["logits"] - before["logits"]).asnumpy()).max() > 1e-2
    difference = after["encoder_last_hidden_state"] - before["encoder_last_hidden_state"]
    assert np.abs(difference.asnumpy()).max() > 1e-2


def test_labels_become_decoder_inputs():
    model = tiny.seq2seq("mt5", decoder_start_token_id=5)
    labels = np.array([[7, 8, -100, 9]], np.int32)
    moved = model.prepare_decoder_input_ids_from_labels(Tensor(labels)).asnumpy()
    np.testing.assert_array_equal(moved, [[5, 7, 8, 0]])
    with pytest.raises(ValueError, match=r"decoder_start_token_id is None.*pass decoder_input_ids"):
        tiny.seq2seq("t5", decoder_start_token_id=None)(Tensor(tiny.tokens()), labels=Tensor(labels))


def test_t5_drops_in_training_only():
    model, ids = tiny.seq2seq("t5", dropout_rate=0.3), Tensor(tiny.tokens())
    still = model(ids, labels=ids)["logits"].asnumpy()
    np.testing.assert_array_equal(model(ids, labels=ids)["logits"].asnumpy(), still)
    model.set_train()
    assert np.abs(model(ids, labels=ids)["logits"].asnumpy() - still).max() > 1e-2


def test_t5_refuses():
    model, ids = tiny.seq2seq("t5"), Tensor(tiny.tokens())
    with pytest.raises(ValueError, match="either decoder_input_ids or decoder_inputs_embeds"):
        model(ids)
    with pytest.raises(ValueError, match=r"5 columns.*12 new"):
        model(ids, decoder_input_ids=ids, decoder_attention_mask=Tensor(np.ones((3, 5), np.int32)))
    with pytest.raises(ValueError, match="'swish-gelu', not '<activation>'"):
        models.T5Config(feed_forward_proj="swish-gelu")


def test_random_weights_repeat_with_the_seed():
    ms.set_seed(5)
    first = tiny.decoder("llama")
    ms.set_seed(5)
    second = tiny.decoder("llama")
    for p, q in zip(first.get_parameters(), second.get_parameters()):
        np.testing.assert_array_equal(p.asnumpy(), q.asnumpy())
    weights = models.LlamaForCausalLM(models.LlamaConfig(**tiny.DECODERS["llama"][1])).model.layers[0].mlp.up_proj
    assert abs(weights.weight.asnumpy().std() - tiny.STD) < 0.02
    assert not weights.bias.asnumpy().any()
    embeddings = models.BertModel(models.BertConfig(**tiny.BERT)).get_input_embeddings()
    assert not embeddings.weight.asnumpy()[0].any()


def test_loss_only_trains_in_model(mode):
    model = tiny.decoder("llama", num_hidden_layers=1)
    for name, p in model.parameters_and_names():
        p.requires_grad = "q_proj" in name or "lm_head" in name
    net = models.LossOnly(model, ("input_ids", "labels"))
    ids = tiny.tokens()
    before = float(net(Tensor(ids), Tensor(ids)))
    data = ds.GeneratorDataset([(row, row) for row in ids], ["input_ids", "labels"], shuffle=False).batch(3)
    optimizer = nn.SGD(net.trainable_params(), 0.05)
    ms.train.Model(net, optimizer=optimizer).train(6, data, dataset_sink_mode=False)
    assert float(net(Tensor(ids), Tensor(ids))) < before - 0.1


def test_loss_only_counts_its_columns():
    ids = Tensor(tiny.tokens())
    with pytest.raises(ValueError, match=r"expects 2 columns.*got 3"):
        models.LossOnly(tiny.decoder(), ("input_ids", "labels"))(ids, ids, ids)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        *[(name, rate) for name in tiny.ENCODERS for rate in ("attention_probs_dropout_prob", "classifier_dropout")],
        *[("gpt2", rate) for rate in ("attn_pdrop", "embd_pdrop", "resid_pdrop")],
        *[(name, "attention_dropout") for name in ("llama3", "opt", "bloom")],
        *[("opt", "dropout"), ("bloom", "hidden_dropout")],
    ],
)
def test_dropout_acts_in_training_only(name, rate, monkeypatch):
    """And no Dropout acts twice: compiled code would drop the same both times."""
    model = EACH[name](**{rate: 0.5}) if name in tiny.ENCODERS else tiny.decoder(name, **{rate: 0.5})
    ids = Tensor(tiny.tokens())
    still = model(ids)["logits"].asnumpy()
    np.testing.assert_array_equal(model(ids)["logits"].asnumpy(), still)
    model.set_train()
    calls, act = Counter(), nn.Dropout.construct

    def construct(self, x):
        calls[id(self)] += 1
        return act(self, x)

    monkeypatch.setattr(nn.Dropout, "construct", construct)
    assert np.abs(model(ids)["logits"].asnumpy() - still).max() > 1e-3
    assert set(calls.values()) == (set() if name == "llama3" else {1})


def test_gradient_of_padding_row_is_zero():
    model = classifier()
    model.set_train()
    ids = tiny.tokens()
    ids[:, -3:] = 0
    batch = {"input_ids": ids, "labels": np.array([0, 1, 1], np.int32)}
    _, _, gradients = tiny.loss_logits_gradients(model, batch)
    gradient = gradients["bert.embeddings.word_embeddings.weight"]
    assert not gradient[0].any()
    assert gradient[ids[0, 0]].any()


def test_cross_entropy_ignores():
    logits = np.random.RandomState(0).randn(4, 7).astype(np.float32)
    labels = np.array([3, -100, 0, -100], np.int32)
    log_odds = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tiny.close(cross_entropy(Tensor(logits), Tensor(labels)).asnumpy(), -(log_odds[0, 3] + log_odds[2, 0]) / 2, 1e-5)
    assert np.isnan(float(cross_entropy(Tensor(logits), Tensor(np.full(4, -100, np.int32)))))
    gradient = ms.grad(lambda x: cross_entropy(x, Tensor(labels)))(Tensor(logits)).asnumpy()
    assert not gradient[[1, 3]].any()
    expected = np.exp(log_odds[0])
    expected[3] -= 1
    tiny.close(gradient[0], expected / 2, 1e-6)


def test_classification_loss_by_problem_type():
    logits = Tensor(np.array([[0.5, -1.0], [2.0, 30.0]], np.float32))
    labels = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    x = logits.asnumpy().astype(np.float64)
    many = np.mean(np.log1p(np.exp(x)) - x * labels)
    tiny.close(classification_loss(logits, Tensor(labels), None).asnumpy(), np.float32(many), 1e-5)
    squares = np.mean((x - labels) ** 2)
    tiny.close(classification_loss(logits, Tensor(labels), "regression").asnumpy(), np.float32(squares), 1e-5)
    one = classification_loss(logits[:, :1], Tensor(np.array([1.0, 0.0], np.float32)), None)
    tiny.close(one.asnumpy(), np.float32((0.25 + 4) / 2), 1e-5)
    with pytest.raises(ValueError, match="problem_type 'ranking'"):
        classification_loss(logits, Tensor(labels), "ranking")


def test_gelu_is_exact(mode):
    from math import erf, exp, pi, sqrt

    x = np.concatenate([np.linspace(-9, 9, 2001), [-1e4, -60, 60, 1e4, 1e20]]).astype(np.float32)
    cell = GELU()
    expected = [v * 0.5 * (1 + erf(v / sqrt(2))) if v > -12 else 0.0 for v in x.astype(np.float64)]
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), expected, atol=1e-6, rtol=1e-6)
    slopes = [0.5 * (1 + erf(v / sqrt(2))) + v * exp(-v * v / 2) / sqrt(2 * pi) for v in x[:2001].astype(np.float64)]
    np.testing.assert_allclose(ms.grad(cell)(Tensor(x[:2001])).asnumpy(), slopes, atol=2e-6)
    tanh_form = 0.5 * x[:2001] * (1 + np.tanh(np.sqrt(2 / pi) * (x[:2001] + 0.044715 * x[:2001].astype(float) ** 3)))
    np.testing.assert_allclose(gelu_tanh(Tensor(x[:2001])).asnumpy(), tanh_form, atol=2e-6)


def test_norms_are_those_of_the_papers():
    x = np.random.RandomState(0).normal(3.0, 2.0, (4, 5, 16)).astype(np.float32)
    rms, layer = tiny.scatter(RMSNorm(16, 1e-6)), tiny.scatter(LayerNorm(16, 1e-12))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * rms.weight.asnumpy()
    tiny.close(rms(Tensor(x)).asnumpy(), expected, 1e-6)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True)) * layer.weight.asnumpy() + layer.bias.asnumpy()
    tiny.close(layer(Tensor(x)).asnumpy(), expected, 1e-6)
    for norm in (rms, layer):
        fast = norm(Tensor(x)).asnumpy()
        assert norm.average is not None
        norm.average = None  # the formula for other devices
        tiny.close(norm(Tensor(x)).asnumpy(), fast, 1e-6)
    few = x[:1]  # so few rows have a formula of their own
    rms, layer = tiny.scatter(RMSNorm(16, 1e-6)), tiny.scatter(LayerNorm(16, 1e-12))
    weights = Tensor(np.random.RandomState(1).randn(*few.shape).astype(np.float32))
    for norm in (rms, layer):
        tiny.close(norm(Tensor(few)).asnumpy(), norm(Tensor(x)).asnumpy()[:1], 1e-6)

        def loss(x, weights, norm=norm):
            return (norm(x)[:1] * weights).sum()

        slopes = [ms.grad(loss)(Tensor(rows), weights).asnumpy()[:1] for rows in (few, x)]
        tiny.close(slopes[0], slopes[1], 1e-5)
    half = rms(Tensor(x).astype(ms.float16))
    assert half.dtype == ms.float16


def test_attention_gradient_is_that_of_softmax():
    random = np.random.RandomState(0)
    scores, v = (Tensor(random.randn(2, 3, 4, n).astype(np.float32)) for n in (5, 6))
    v = Tensor(random.randn(2, 3, 5, 6).astype(np.float32))
    cell, weights = SoftmaxMix(), Tensor(random.randn(2, 3, 4, 6).astype(np.float32))

    def fused(scores, v):
        return (cell(scores, v)[0] * weights).sum()

    def plain(scores, v):
        return (ms.ops.matmul(ms.ops.softmax(scores, -1), v) * weights).sum()

    for ours, theirs in zip(ms.grad(fused, (0, 1))(scores, v), ms.grad(plain, (0, 1))(scores, v)):
        tiny.close(ours.asnumpy(), theirs.asnumpy(), 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'.*default, linear, llama3"),
        ({"hidden_act": "quick"}, "hidden_act 'quick' is not built.*silu"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.decoder("llama", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt2", {"activation_function": "quick"}, "'quick' is not built"),
        ("opt", {"layerdrop": 0.1}, r"layerdrop=0\.1"),
    ],
)
def test_what_decoders_are_not_built_for_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.decoder(name, **settings)


@pytest.mark.parametrize(("name", "most"), [("gpt2", 64), ("opt-350m", 64), ("bert", 64), ("roberta", 62)])
def test_texts_have_positions(name, most, mode):
    model = EACH[name]()
    ids = np.full((1, most + 1), 7, np.int32)
    assert np.isfinite(model(Tensor(ids[:, 1:]))["logits"].asnumpy()).all()
    with pytest.raises(ValueError, match=rf"{most + 1} tokens.*longer than the {most} positions"):
        model(Tensor(ids))


def test_gpt2_has_no_cross_attention():
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        models.GPT2Model(models.GPT2Config(add_cross_attention=True, n_layer=1))


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_array_equal(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rtol=1e-6)


def test_roberta_counts_positions_from_its_padding():
    model = classifier("roberta")
    ids = tiny.tokens()
    ids[0, :3] = ids[1, 5] = ids[2, 9:] = 1
    expected = np.where(ids == 1, 1, np.cumsum(ids != 1, 1) + 1 + 4)
    np.testing.assert_array_equal(model.roberta.positions(Tensor(ids), 4, 16).asnumpy(), expected)
    given = model(Tensor(ids), position_ids=Tensor((np.cumsum(ids != 1, 1) * (ids != 1) + 1).astype(np.int32)))
    tiny.close(model(Tensor(ids))["logits"].asnumpy(), given["logits"].asnumpy(), 1e-6)
    with pytest.raises(ValueError, match="pad_token_id, which is None"):
        classifier("roberta", pad_token_id=None)


def test_aliases_of_a_config_stand_for_its_own_names():
    config = models.GPT2Config(hidden_size=32, n_head=2)
    assert (config.n_embd, config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 32, 2, 12)
    config.num_hidden_layers = 3
    assert (config.n_layer, config.get("num_key_value_heads")) == (3, None)
    assert not {"hidden_size", "num_hidden_layers"} & set(config.to_dict())
    assert models.BloomConfig(n_embed=48).hidden_size == 48
    assert models.OPTConfig(hidden_size=48).word_embed_proj_dim == 48
    with pytest.raises(AttributeError, match="GPT2Config has no setting 'invented'"):
        _ = config.invented


def test_opt_without_biases_and_weights_of_norms():
    """Galactica's kind of OPT."""
    plain = tiny.decoder("opt", enable_bias=False, layer_norm_elementwise_affine=False)
    assert all(p.ndim == 2 for p in plain.get_parameters())
    full = tiny.decoder("opt")
    for name, p in full.parameters_and_names():
        p.set_data(
            dict(plain.parameters_and_names()).get(name, Tensor(np.full(p.shape, "norm.w" in name, np.float32)))
        )
    ids = Tensor(tiny.tokens())
    tiny.close(plain(ids)["logits"].asnumpy(), full(ids)["logits"].asnumpy(), 1e-6)


def test_bert_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="relative_key"):
        models.BertModel(models.BertConfig(**tiny.BERT, position_embedding_type="relative_key"))
    with pytest.raises(TypeError, match="needs a BertConfig, got a LlamaConfig"):
        models.BertModel(models.LlamaConfig())
    assert activation("gelu_new") is gelu_tanh


def test_sequences_need_a_padding_token():
    config = models.LlamaConfig(**tiny.DECODERS["llama3"][1])
    model = models.LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"config.pad_token_id is None"):
        model(Tensor(tiny.tokens()))
    assert model(Tensor(tiny.tokens()[:1]))["logits"].shape == (1, 2)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_answers_are_scored_by_the_head(family):
    sizes = {"llama": tiny.DECODERS["llama"][1], "bert": tiny.ENCODERS["bert"], "t5": tiny.SEQ2SEQ["t5"][1]}[family]
    config = models.AutoConfig.for_model(family, **sizes)
    model = tiny.scatter(models.AutoModelForQuestionAnswering.from_config(config)).set_train(False)
    seen = []
    model.qa_outputs.register_forward_hook(lambda cell, inputs, output: seen.append(output.asnumpy()))
    starts, ends = Tensor(np.array([1, 2, 0], np.int32)), Tensor(np.array([3, 2, 1], np.int32))
    outputs = model(Tensor(tiny.tokens()), start_positions=starts, end_positions=ends)
    (scores,) = seen
    tiny.close(outputs["start_logits"].asnumpy(), scores[..., 0], 1e-6)
    tiny.close(outputs["end_logits"].asnumpy(), scores[..., 1], 1e-6)
    assert 0 < float(outputs["loss"]) < 20
