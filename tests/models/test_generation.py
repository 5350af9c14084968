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
    from msft_peft.models.generation import _Chooser

    scores = np.tile(np.log(np.array([0.1, 0.4, 0.2, 0.3])), (20000, 1))
    tokens = np.zeros((20000, 0), np.int64)
    for options, expected in (
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 0.5}, np.array([0.01, 0.16, 0.04, 0.09]) / 0.30),
    ):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
        drawn = _Chooser(True, penalty=1.0, seed=0, **settings)(scores, tokens)
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
        ({"attention_mask": np.ones((3, 9))}, r"shape \(3, 9\).*\(3, 12\)"),
        ({"attention_mask": tiny.left_mask()[:, ::-1]}, "padded on the right"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny.decoder().generate(tiny.tokens(), **options)


def test_no_prompt():
    with pytest.raises(ValueError, match="needs a prompt"):
        tiny.decoder().generate()
    assert not hasattr(models.BertForMaskedLM, "generate")
