"""Generation: the cache gives the tokens of the whole forward; padding, ends, draws and prefixes behave."""

import numpy as np
import pytest
from mindspore import Tensor

import msft_peft.models as models
from tests.models import tiny


def naive(model, ids: np.ndarray, count: int) -> np.ndarray:
    """Greedy tokens by running the whole text again for each."""
    for _ in range(count):
        scores = model(Tensor(ids))["logits"].asnumpy()[:, -1]
        ids = np.concatenate([ids, scores.argmax(-1)[:, None].astype(ids.dtype)], 1)
    return ids


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_cache_equals_no_cache(name):
    model = tiny.decoder(name)
    expected = naive(model, tiny.tokens(), 9)
    np.testing.assert_array_equal(model.generate(tiny.tokens(), max_new_tokens=9, eos_token_id=[]).asnumpy(), expected)


@pytest.mark.graph
def test_graph_mode_compiles_twice(monkeypatch):
    import mindspore as ms

    model = tiny.decoder("mistral")
    expected = model.generate(tiny.tokens(), max_new_tokens=9, eos_token_id=[]).asnumpy()
    short = model.generate(tiny.tokens(3, 5), tiny.left_mask(3, 5) | 1, max_new_tokens=20, eos_token_id=[]).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_array_equal(model.generate(tiny.tokens(), max_new_tokens=9, eos_token_id=[]).asnumpy(), expected)
    compiled = len(model.compile_cache)
    assert compiled == 2
    again = model.generate(tiny.tokens(3, 5), max_new_tokens=20, eos_token_id=[]).asnumpy()
    np.testing.assert_array_equal(again, short)
    assert len(model.compile_cache) == compiled


def test_left_padding_changes_no_token():
    model = tiny.decoder("qwen2")
    batch = model.generate(tiny.tokens(), tiny.left_mask(), max_new_tokens=8, eos_token_id=[]).asnumpy()
    alone = model.generate(tiny.tokens()[:1, 4:], max_new_tokens=8, eos_token_id=[]).asnumpy()
    np.testing.assert_array_equal(batch[:1, 4:], alone)


def test_ends_at_eos_and_fills_with_padding():
    model = tiny.decoder()
    free = model.generate(tiny.tokens(), max_new_tokens=8, eos_token_id=[]).asnumpy()
    end = int(free[0, 13])
    ended = model.generate(tiny.tokens(), max_new_tokens=8, eos_token_id=[end], pad_token_id=1).asnumpy()
    stops = [list(row[12:]).index(end) for row in free if end in row[12:]]
    for row, expected in zip(ended, free):
        stop = list(expected[12:]).index(end) + 13 if end in expected[12:] else len(expected)
        np.testing.assert_array_equal(row[:stop], expected[: len(row)][:stop])
        assert (row[stop:] == 1).all()
    assert stops
    one = model.generate(tiny.tokens()[:1], max_new_tokens=8, eos_token_id=end)
    assert one.shape[1] == 12 + stops[0] + 1  # stops early


def test_draws_repeat_with_the_seed_and_follow_the_options():
    import mindspore as ms

    model = tiny.decoder()
    greedy = model.generate(tiny.tokens(), max_new_tokens=6, eos_token_id=[]).asnumpy()

    def draw(**options):
        return model.generate(tiny.tokens(), max_new_tokens=6, eos_token_id=[], do_sample=True, **options).asnumpy()

    np.testing.assert_array_equal(draw(seed=1, temperature=3.0), draw(seed=1, temperature=3.0))
    assert (draw(seed=1, temperature=3.0) != draw(seed=2, temperature=3.0)).any()
    ms.set_seed(7)
    first = draw(temperature=3.0)
    ms.set_seed(7)
    np.testing.assert_array_equal(draw(temperature=3.0), first)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        np.testing.assert_array_equal(draw(seed=3, **options), greedy)


def test_draws_have_the_probabilities_of_the_scores():
    from msft_peft.models.generation_config import GenerationConfig
    from msft_peft.models.search import Sampling

    scores = np.tile(np.log(np.array([0.1, 0.4, 0.2, 0.3])), (20000, 1))
    prompts = np.zeros((20000, 0), np.int64)
    for options, expected in (
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 0.5}, np.array([0.01, 0.16, 0.04, 0.09]) / 0.30),
    ):
        search = Sampling(GenerationConfig(do_sample=True, seed=0, **{"top_k": 0, **options}), prompts, 5)
        assert not search.advance(scores)
        drawn = search.tokens[:, 0]
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, expected, atol=0.015)


def test_prefix_of_keys_and_values_and_embeddings():
    model = tiny.decoder("llama")
    ids = tiny.tokens()
    prefix = model(Tensor(ids[:, :5]), use_cache=True)["past_key_values"]
    expected = model.generate(ids, max_new_tokens=6, eos_token_id=[]).asnumpy()
    with_prefix = model.generate(ids[:, 5:], past_key_values=prefix, max_new_tokens=6, eos_token_id=[]).asnumpy()
    np.testing.assert_array_equal(with_prefix, expected[:, 5:])
    embeds = model.get_input_embeddings()(Tensor(ids))
    added = model.generate(inputs_embeds=embeds, max_new_tokens=6, eos_token_id=[]).asnumpy()
    np.testing.assert_array_equal(added, expected[:, 12:])


@pytest.mark.graph
def test_prefix_in_graph_mode():
    import mindspore as ms

    model = tiny.decoder("llama3")
    ids = tiny.tokens()
    prefix = model(Tensor(ids[:, :5]), use_cache=True)["past_key_values"]
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=[]).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    actual = model.generate(ids[:, 5:], past_key_values=prefix, max_new_tokens=4, eos_token_id=[]).asnumpy()
    np.testing.assert_array_equal(actual, expected[:, 5:])


def test_lengths_and_training_state():
    model = tiny.decoder()
    model.set_train()
    assert model.generate(tiny.tokens(), max_length=15, eos_token_id=[]).shape == (3, 15)
    assert model.training
    with pytest.raises(ValueError, match="would add -2 tokens to a prompt of 12"):
        model.generate(tiny.tokens(), max_length=10)
    assert model.generate(Tensor(tiny.tokens()), eos_token_id=[]).shape == (3, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 should be > 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"early_stopping": "always"}, "early_stopping='always' should be True, False or 'never'"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 should be at most num_beams=2"),
        ({"num_return_sequences": 2}, "at most num_beams=1, unless do_sample=True"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 is not built"),
        ({"attention_mask": np.ones((3, 9))}, r"shape \(3, 9\).*\(3, 12\)"),
        ({"attention_mask": tiny.left_mask()[:, ::-1]}, "padded on the right"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny.decoder().generate(tiny.tokens(), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_token": 3, "beams": 2}, TypeError, r"\['beams', 'max_new_token'\], which it does not have"),
        ({"generation_config": {"max_new_token": 3}}, TypeError, r"\['max_new_token'\]"),
        ({"streamer": print}, TypeError, "streamer"),
        ({"typical_p": 0.9}, NotImplementedError, "typical_p=0.9 is not built"),
        ({"generation_config": {"num_beam_groups": 2}}, NotImplementedError, "num_beam_groups=2"),
        ({"decoder_input_ids": tiny.tokens()}, TypeError, "decoder_input_ids"),
    ],
)
def test_options_that_are_not_there(options, error, message):
    with pytest.raises(error, match=message):
        tiny.decoder().generate(tiny.tokens(), **options)


def test_generation_config_and_what_wins():
    class Config:
        def to_dict(self):
            return {
                "max_new_tokens": 3,
                "use_cache": True,
                "typical_p": 1.0,
                "eos_token_id": None,
                "temperature": None,
            }

    model = tiny.decoder(eos_token_id=None)
    wanted = model.generate(tiny.tokens(), max_new_tokens=3).asnumpy()
    for given in (Config(), {"max_new_tokens": 3}):
        np.testing.assert_array_equal(model.generate(tiny.tokens(), generation_config=given).asnumpy(), wanted)
    assert model.generate(tiny.tokens(), generation_config=Config(), max_new_tokens=5).shape == (3, 17)


def test_none_is_no_end():
    model = tiny.decoder(eos_token_id=list(range(tiny.VOCAB)))
    assert model.generate(tiny.tokens(), max_new_tokens=3).shape == (3, 13)
    assert model.generate(tiny.tokens(), max_new_tokens=3, eos_token_id=None).shape == (3, 15)
    assert model.generate(tiny.tokens(), max_new_tokens=4, min_new_tokens=2, eos_token_id=5).shape[1] >= 14


def test_several_draws_of_each_prompt(capsys):
    model = tiny.decoder(eos_token_id=None)
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 1}
    drawn = model.generate(tiny.tokens(), num_return_sequences=3, temperature=2.0, show_progress=True, **options)
    drawn = drawn.asnumpy()
    assert "Generating" in capsys.readouterr().err
    np.testing.assert_array_equal(drawn[:, :12], np.repeat(tiny.tokens(), 3, 0))
    assert len({tuple(row) for row in drawn}) == 9
    greedy = model.generate(tiny.tokens(), num_return_sequences=2, top_k=1, **options).asnumpy()
    wanted = model.generate(tiny.tokens(), max_new_tokens=6).asnumpy()
    np.testing.assert_array_equal(greedy, np.repeat(wanted, 2, 0))


def test_wide_beams_find_the_best_text():
    """With as many beams as tokens the search is exhaustive for two steps."""
    model = tiny.decoder(eos_token_id=None)
    ids = tiny.tokens(1, 5)
    best = model.generate(ids, max_new_tokens=2, num_beams=tiny.VOCAB, num_return_sequences=3).asnumpy()
    every = np.stack(np.meshgrid(np.arange(tiny.VOCAB), np.arange(tiny.VOCAB), indexing="ij"), -1).reshape(-1, 2)
    texts = np.concatenate([np.repeat(ids, len(every), 0), every], 1)
    scores = model(Tensor(texts.astype(np.int32)))["logits"].asnumpy()[:, 4:6].astype(np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    sums = np.take_along_axis(scores, every[:, :, None], 2).sum((1, 2))
    np.testing.assert_array_equal(best, texts[np.argsort(-sums)[:3]])


def naive_seq2seq(model, ids: np.ndarray, mask: np.ndarray, count: int, **given) -> np.ndarray:
    """Greedy tokens by running the whole text again for each."""
    text = np.zeros((len(ids), 1), np.int32)
    for _ in range(count):
        outputs = model(Tensor(ids), Tensor(mask), decoder_input_ids=Tensor(text), **given)
        picked = outputs["logits"].asnumpy()[:, -1].argmax(-1)
        text = np.concatenate([text, picked[:, None].astype(np.int32)], 1)
    return text


@pytest.mark.parametrize("name", tiny.SEQ2SEQ)
def test_caches_of_an_encoder_decoder(name):
    model = tiny.seq2seq(name, eos_token_id=None)
    expected = naive_seq2seq(model, tiny.tokens(), tiny.left_mask(), 7)
    assert len(np.unique(expected)) > 4
    given = {"attention_mask": tiny.left_mask(), "max_new_tokens": 7}
    np.testing.assert_array_equal(model.generate(tiny.tokens(), **given).asnumpy(), expected)
    encoded = model.get_encoder()(Tensor(tiny.tokens()), Tensor(tiny.left_mask()))
    np.testing.assert_array_equal(model.generate(encoder_outputs=encoded, **given).asnumpy(), expected)
    embeds = model.get_input_embeddings()(Tensor(tiny.tokens()))
    np.testing.assert_array_equal(model.generate(inputs_embeds=embeds, **given).asnumpy(), expected)
    for begun in (expected[:, :4], expected[:, 1:4]):  # the start token is put first where it is missing
        text = model.generate(tiny.tokens(), tiny.left_mask(), decoder_input_ids=begun, max_length=8).asnumpy()
        np.testing.assert_array_equal(text, expected)


def prefix_of(model) -> tuple:
    """Random keys and values of four slots, for each layer of the decoder."""
    random = np.random.RandomState(6)
    layers, heads = model.config.num_decoder_layers, model.config.num_heads
    values = random.normal(0, 1, (layers, 2, 3, heads, 4, model.config.d_kv)).astype(np.float32)
    return tuple((Tensor(k), Tensor(v)) for k, v in values)


def test_prefix_of_an_encoder_decoder_counts_from_the_first_token_on():
    model = tiny.seq2seq("t5", eos_token_id=None)
    prefix = prefix_of(model)
    expected = naive_seq2seq(model, tiny.tokens(), tiny.left_mask(), 6, past_key_values=prefix)
    assert (expected != naive_seq2seq(model, tiny.tokens(), tiny.left_mask(), 6)).any()
    given = {"attention_mask": tiny.left_mask(), "max_new_tokens": 6, "past_key_values": prefix}
    np.testing.assert_array_equal(model.generate(tiny.tokens(), **given).asnumpy(), expected)
    beams = model.generate(tiny.tokens(), **given, num_beams=2).asnumpy()
    assert beams.shape == expected.shape


@pytest.mark.graph
def test_graph_mode_compiles_an_encoder_decoder_once_for_a_bucket():
    import mindspore as ms

    from msft_peft.backend.graphs import compiled_count

    model = tiny.seq2seq("t5", eos_token_id=None)
    prefix = prefix_of(model)
    calls = [
        ((tiny.tokens(), tiny.left_mask()), {"max_new_tokens": 6, "past_key_values": prefix, "num_beams": 2}),
        ((tiny.tokens(3, 9), tiny.left_mask(3, 9)), {"max_new_tokens": 9, "past_key_values": prefix, "num_beams": 2}),
    ]
    expected = [model.generate(*inputs, **options).asnumpy() for inputs, options in calls]
    ms.set_context(mode=ms.GRAPH_MODE)
    counts = []
    for (inputs, options), wanted in zip(calls, expected):
        np.testing.assert_array_equal(model.generate(*inputs, **options).asnumpy(), wanted)
        counts.append(compiled_count())
    assert counts[0] == counts[1]


def test_what_an_encoder_decoder_refuses():
    model = tiny.seq2seq("t5", decoder_start_token_id=None)
    with pytest.raises(ValueError, match=r"needs input_ids .* or encoder_outputs"):
        model.generate()
    with pytest.raises(ValueError, match="does not know what to begin with"):
        model.generate(tiny.tokens())
    with pytest.raises(ValueError, match=r"shape \(3, 9\).*\(3, 12\)"):
        model.generate(tiny.tokens(), np.ones((3, 9)), decoder_start_token_id=0)
    with pytest.raises(TypeError, match="num_beem"):
        model.generate(tiny.tokens(), num_beem=2)


def test_no_prompt():
    with pytest.raises(ValueError, match="needs a prompt"):
        tiny.decoder().generate()
    assert not hasattr(models.BertForMaskedLM, "generate")
