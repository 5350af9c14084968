"""`msft-peft finetune`: it learns, logs, evaluates, goes on from where it was; and mistakes in its file are told."""

import json
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
import yaml
from huggingface_hub import ModelCard

from msft_peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, ConfigError
from msft_peft.cli import data, main
from msft_peft.cli.finetuning import Run, last_checkpoint, read_plan
from msft_peft.hosts.text import Bytes
from msft_peft.models import AutoConfig, AutoModelForSequenceClassification
from tests.models import tiny

CHORUS = ["abcabcabcabc", "xyzxyzxyzxyz", "the the the", "0101010101"]


def written(folder: Path, **changes: Any) -> Path:
    """A whole plan on disk: base model, data, the file; `changes` go into its sections."""
    if not (folder / "base").exists():
        tiny.decoder("llama3", vocab_size=256, initializer_range=0.1).save_pretrained(folder / "base")
        lines = [json.dumps({"text": text}) for text in CHORUS]
        (folder / "train.jsonl").write_text("\n".join(lines))
    plan: dict[str, Any] = {
        "model": str(folder / "base"),
        "output": str(folder / "out"),
        "tokenizer": "bytes",
        "peft": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "train.jsonl"), "max_length": 12},
        "training": {
            "steps": 6,
            "batch_size": 2,
            "learning_rate": 0.02,
            "eval_every": 3,
            "warmup_steps": 2,
            "compile": False,
        },
    }
    for key, value in changes.items():
        plan[key] = {**plan[key], **value} if isinstance(value, dict) else value
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("compiled", [True, False])
def test_it_learns_and_tells(compiled: bool, tmp_path: Path, capsys: pytest.CaptureFixture):
    plan = written(tmp_path, training={"compile": compiled, "steps": 12})
    assert main(["finetune", str(plan)]) == 0
    results = json.loads(capsys.readouterr().out)
    log = log_of(tmp_path / "out")
    steps = [line for line in log if "learning_rate" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in log if "eval_loss" in line] == [3, 6, 9, 12]
    evals = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert evals == sorted(evals, reverse=True)
    assert evals[-1] < evals[0] - 0.02
    assert results["eval_loss"] == evals[-1]
    rates = [line["learning_rate"] for line in steps]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.02])
    assert rates[3:] == pytest.approx([0.02 * (1 - i / 10) for i in range(1, 10)])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"| eval_loss | {evals[-1]:.6g} |" in card.text
    # What it wrote is what it measured.
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    eos = model.get_base_model().config.eos_token_id
    rows = data.language_examples(
        tmp_path / "train.jsonl", {"prompt": "prompt", "text": "text"}, Bytes().encode, 12, 0, eos
    )
    losses, counts = [], []
    for ids, mask, labels in rows.batches(1):
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        losses.append(float(model(**{name: ms.Tensor(column) for name, column in batch.items()})["loss"]))
        counts.append((labels[:, 1:] != data.IGNORED).sum())
    assert np.average(losses, weights=counts) == pytest.approx(evals[-1], rel=1e-4)


def test_resuming_is_as_if_nothing_had_happened(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    settings = {"epochs": 3, "steps": None, "batch_size": 3, "save_every": 2, "weight_decay": 0.1}
    plan = written(tmp_path, output=str(whole), training=settings)
    assert main(["finetune", str(plan)]) == 0
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    plan = written(tmp_path, output=str(torn), training=settings)

    saved = Run._save

    def interrupt(run: Run, number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        saved(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", interrupt)
        assert main(["finetune", str(plan)]) == 130
    assert last_checkpoint(torn) == torn / "checkpoint-2"
    (torn / "checkpoint-9").mkdir()  # one that was never finished
    assert main(["finetune", str(plan)]) == 1
    assert "Pass --resume" in capsys.readouterr().err
    other = written(tmp_path, output=str(torn), training={**settings, "learning_rate": 0.1})
    assert main(["finetune", str(other), "--resume"]) == 1
    assert "is of a run with other settings" in capsys.readouterr().err
    plan = written(tmp_path, output=str(torn), training=settings)
    assert main(["finetune", str(plan), "--resume"]) == 0
    one, other_weights = weights(whole), weights(torn)
    assert one.keys() == other_weights.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other_weights[key])
    logs = [[{**line, "seconds": 0} for line in log_of(folder)] for folder in (whole, torn)]
    assert logs[0] == logs[1]


def test_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = AutoConfig.for_model("bert", **{**tiny.BERT, "vocab_size": 256})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    labels = {"good": "yes", "bad": "no", "fine": "yes", "evil": "maybe"}
    rows = [f"{word * 3}\t{label}" for word, label in labels.items()]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(rows))
    plan = written(
        tmp_path,
        model=str(tmp_path / "bert"),
        peft={"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
        data={"train": str(tmp_path / "train.tsv"), "eval": str(tmp_path / "train.tsv"), "text": "sentence"},
        training={"steps": 25, "batch_size": 3, "eval_every": 0, "schedule": "cosine"},
    )
    assert main(["finetune", str(plan)]) == 0
    captured = capsys.readouterr()
    assert "msft-peft: warning: BertForSequenceClassification was given new random weights" in captured.err
    results = json.loads(captured.out)
    assert results["eval_accuracy"] == 1.0
    with pytest.warns(UserWarning, match="new random weights"):
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.get_base_model().config.num_labels == 3
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["maybe", "no", "yes"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": 5}, "model must be str"),
    ({"peft": "LORA"}, "peft must be dict"),
    ({"nonsense": 1}, "unknown settings ['nonsense']"),
    ({"training": {"lr": 1}}, "training: unknown settings ['lr']"),
    ({"training": {"batch_size": "8"}}, "training: batch_size must be int, got '8'"),
    ({"training": {"compile": 1}}, "training: compile must be bool"),
    ({"training": {"batch_size": 0}}, "batch_size=0 is below 1"),
    ({"training": {"steps": 0}}, "steps=0 is below 1"),
    ({"training": {"epochs": 0}}, "epochs=0 leaves no step to train"),
    ({"training": {"warmup_steps": -5}}, "warmup_steps=-5 is below 0"),
    ({"training": {"learning_rate": float("nan")}}, "learning_rate=nan is below 0, or not finite"),
    ({"training": {"schedule": "zigzag"}}, "is none of linear, cosine and constant"),
    ({"data": {"train": None}}, "data: train must be str"),
    ({"data": {"max_length": 1}}, "max_length=1 is below 2"),
    ({"data": {"train": "nothing.jsonl"}}, "nothing.jsonl"),
    ({"data": {"train": "plan.yaml"}}, "none of .jsonl, .tsv and .txt"),
    ({"data": {"text": "words"}}, "a record has no 'words' but ['text']"),
    ({"tokenizer": None}, "has no tokenizer: name one"),
    ({"model": "nothing/at/all"}, "is no folder"),
    ({"peft": {"peft_type": "NONE"}}, "peft_type='NONE'"),
    ({"peft": {"r": 0}}, "r"),
    ({"peft": {"task_type": "TOKEN_CLS"}}, "task_type must be CAUSAL_LM or SEQ_CLS"),
    ({"peft": {"target_modules": ["nothing"]}}, "not found in the base model"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says for _, says in BAD])
def test_mistakes_in_the_file(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", str(written(tmp_path, **changes))]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", [-2, 256])
def test_tokens_that_the_model_does_not_have(token: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, token, 3]}))
    assert main(["finetune", str(written(tmp_path, data={"train": str(tmp_path / "ids.jsonl"), "eval": None}))]) == 1
    assert f"there is the token {token}, and the model has the tokens 0 to 255 alone" in capsys.readouterr().err


def test_files_that_are_no_plan(tmp_path: Path):
    for text, says in (("a: [", "no valid YAML"), ("- 1", "wanted settings by name"), ("", "wanted settings by name")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_plan(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    with pytest.raises(ConfigError, match="no valid YAML"):
        read_plan(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{broken', "line 2 is no JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]', "line 2: wanted an object, got list"),
        ("a.tsv", "text\tlabel\nx\n", "line 2: another number of fields"),
        ("a.txt", "\n\n", "holds no records"),
        ("a.jsonl", '{"text": "xy"}\n{"input_ids": "abc"}', "a.jsonl: `input_ids` must be a list .* got 'abc'"),
        ("a.jsonl", '{"input_ids": [1, 2, null]}', r"a.jsonl: `input_ids` must be a list .* got \[1, 2, None\]"),
        ("a.jsonl", '{"input_ids": [1, 2.5]}', r"a.jsonl: `input_ids` must be a list .* got \[1, 2.5\]"),
        ("a.jsonl", '{"input_ids": [1, 4294967296]}', "a.jsonl: `input_ids` must be a list"),
        ("a.jsonl", '{"text": "x"}', "no row has a token to be predicted"),
    ],
)
def test_broken_data(name: str, text: str, says: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    names = {"text": "text", "prompt": "prompt", "completion": "completion", "label": "label"}
    with pytest.raises(ConfigError, match=says):
        data.language_examples(tmp_path / name, names, Bytes().encode, 8, 0, None)


def test_rows(tmp_path: Path):
    names = {"text": "text", "prompt": "p", "completion": "c", "label": "label"}
    (tmp_path / "a.jsonl").write_text('{"p": "ab", "c": "cd"}\n{"input_ids": [1, 2, 3]}\n{"text": "abcdefgh"}')
    rows = data.language_examples(tmp_path / "a.jsonl", names, Bytes().encode, 6, 0, 9).columns
    assert rows["input_ids"].tolist() == [[97, 98, 99, 100, 9, 0], [1, 2, 3, 0, 0, 0], [97, 98, 99, 100, 101, 102]]
    assert rows["labels"].tolist() == [[-100, -100, 99, 100, 9, -100], [1, 2, 3, -100, -100, -100], [*range(97, 103)]]
    assert rows["attention_mask"].sum(1).tolist() == [5, 3, 6]
    (tmp_path / "a.txt").write_text("abcd\n\nef\n")
    rows = data.language_examples(tmp_path / "a.txt", names, Bytes().encode, 4, 0, 9).columns
    assert rows["input_ids"].tolist() == [[97, 98, 99, 100], [9, 101, 102, 9]]
    examples = data.Examples({"input_ids": np.arange(5)[:, None]})
    order = np.array([4, 2, 0, 1, 3])
    assert [batch[0][:, 0].tolist() for batch in examples.batches(2, order)] == [[4, 2], [0, 1], [3, 4]]
    assert [batch[0][:, 0].tolist() for batch in examples.batches(2)] == [[0, 1], [2, 3], [4]]
    assert [len(batch[0]) for batch in examples.batches(12, order)] == [12]
