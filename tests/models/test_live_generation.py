"""Generation against transformers on torch: greedy and beam search, decoders and encoder-decoders, the same tokens."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

import msft_peft.models as models
from tests.models import tiny
from tests.models.test_live_parity import hf_model


def pair(name: str, folder):
    """HF's model and ours with the same weights."""
    family, settings = (tiny.DECODERS | tiny.SEQ2SEQ)[name]
    if name == "t5":
        settings = {**settings, "num_decoder_layers": 2}  # HF's cache has as many layers as the encoder
    auto = "AutoModelForSeq2SeqLM" if name in tiny.SEQ2SEQ else "AutoModelForCausalLM"
    reference = hf_model(auto, family, settings, folder)
    reference.generation_config.max_length = None
    return reference, getattr(models, auto).from_pretrained(folder)


def hf_tokens(reference, ids: np.ndarray, mask: np.ndarray, **options) -> np.ndarray:
    given = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        return reference.generate(**given, do_sample=False, **options).numpy()


# The padding is not token 0: HF's beam search takes that for none, and fills up with the eos token.
BEAMS = [
    {"num_beams": 3},
    {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 2, "length_penalty": -1.0, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
    {"num_beams": 3, "repetition_penalty": 1.3, "min_new_tokens": 4, "early_stopping": True},
    {"num_beams": 2, "min_length": 9, "length_penalty": 0.0},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
]


@pytest.mark.parametrize("name", ["llama3", "mistral", "t5", "mt5"])
def test_tokens(name, tmp_path):
    check(name, tmp_path, BEAMS)


@pytest.mark.graph
@pytest.mark.parametrize("name", ["llama3", "t5"])
def test_tokens_in_graph_mode(name, tmp_path):
    ms.set_context(mode=ms.GRAPH_MODE)
    check(name, tmp_path, [BEAMS[1], BEAMS[4]])


def check(name, folder, cases) -> None:
    reference, model = pair(name, folder)
    free = hf_tokens(reference, tiny.tokens(), tiny.left_mask(), max_new_tokens=10, eos_token_id=None, pad_token_id=2)
    ends = [int(free[0, -6]), int(free[1, -3]), 7, 11, 13]  # some occur early, some late
    stopped = 0
    for i, case in enumerate(cases):
        eos = ends if i % 2 else ends[:1]
        options = {"max_new_tokens": 10, "pad_token_id": 2, "eos_token_id": eos, **case}
        expected = hf_tokens(reference, tiny.tokens(), tiny.left_mask(), **options)
        actual = model.generate(Tensor(tiny.tokens()), Tensor(tiny.left_mask()), **options).asnumpy()
        np.testing.assert_array_equal(actual, expected, err_msg=str(options))
        stopped += int(np.isin(expected[:, -6:-1], eos).any())
    assert stopped  # some text ended early
