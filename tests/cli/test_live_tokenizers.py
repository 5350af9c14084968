"""Texts by the `tokenizers` package and by transformers, where they are installed."""

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from msft_peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from msft_peft.cli import main
from msft_peft.hosts.text import open_tokenizer
from msft_peft.models import AutoModelForCausalLM
from tests.models import tiny

TEXTS = ["preheat the oven to 350 degrees", "place the cookie dough in the oven"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> tokenizers.Tokenizer:
    """A tokenizer of words, with a token that the base model does not know, saved beside an adapter."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXTS, tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    made.add_tokens([f"<new{i}>" for i in range(tiny.VOCAB)])
    tiny.decoder("llama3").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(tmp_path / "adapter")
    return made


def test_generate_with_the_tokenizer_beside_the_adapter(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["generate", str(tmp_path / "adapter"), TEXTS[0], "--max-new-tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_ids"] == tokenizer.encode(TEXTS[0]).ids
    assert found["text"] == tokenizer.decode(found["new_ids"])
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.get_base_model().config.vocab_size == tokenizer.get_vocab_size() > tiny.VOCAB


@pytest.mark.parametrize("absent", [None, "tokenizers", "both"])
def test_by_either_library_or_none(
    tokenizer: tokenizers.Tokenizer, absent: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import importlib.util

    find = importlib.util.find_spec
    missing = {"tokenizers": {"tokenizers"}, "both": {"tokenizers", "transformers"}}.get(absent or "", set())
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    if absent == "both":
        with pytest.raises(ValueError, match="pip install tokenizers"):
            open_tokenizer(tmp_path / "adapter")
        return
    text = open_tokenizer(tmp_path / "adapter")
    assert text is not None
    ids = text.encode(TEXTS[1])
    assert ids == tokenizer.encode(TEXTS[1]).ids
    assert text.decode(ids).split() == TEXTS[1].split()


def test_no_tokenizer_and_a_broken_one(tokenizer: tokenizers.Tokenizer, tmp_path: Path):
    assert open_tokenizer(tmp_path / "base") is None
    (tmp_path / "adapter" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is no tokenizer that can be read"):
        open_tokenizer(tmp_path / "adapter")
