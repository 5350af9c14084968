"""The Auto classes: the base model, its size and the adapter, from the adapter's folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import msft_peft
from msft_peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    ConfigError,
    LoraConfig,
    NoBaseModelError,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    get_peft_model,
    models,
)
from tests import nets
from tests.models import tiny
from tests.tolerances import assert_same

ROOT = Path(__file__).parents[2]
TASKS = {
    "CAUSAL_LM": ("llama", models.AutoModelForCausalLM, AutoPeftModelForCausalLM),
    "SEQ_2_SEQ_LM": ("t5", models.AutoModelForSeq2SeqLM, AutoPeftModelForSeq2SeqLM),
    "SEQ_CLS": ("bert", models.AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
    "TOKEN_CLS": ("bert", models.AutoModelForTokenClassification, AutoPeftModelForTokenClassification),
    "QUESTION_ANS": ("bert", models.AutoModelForQuestionAnswering, AutoPeftModelForQuestionAnswering),
    "FEATURE_EXTRACTION": ("bert", models.AutoModel, AutoPeftModelForFeatureExtraction),
}


def base_folder(folder: Path, task: str = "CAUSAL_LM", **settings: Any) -> Path:
    """A tiny base model's checkpoint."""
    family, auto, _ = TASKS[task]
    sizes = {"llama": tiny.DECODERS["llama3"][1], "bert": tiny.BERT, "t5": tiny.SEQ2SEQ["t5"][1]}[family]
    tiny.scatter(auto.from_config(models.AutoConfig.for_model(family, **{**sizes, **settings}))).save_pretrained(
        folder
    )
    return folder


def adapter(base: nn.Cell, folder: Path, task: str | None = "CAUSAL_LM", **config: Any) -> PeftModel:
    """An adapter that does something, saved."""
    targets = {"target_modules": ["query", "q_proj", "q"]}
    model = get_peft_model(base, LoraConfig(task_type=task, init_lora_weights=False, **{**targets, **config}))
    model.save_pretrained(folder)
    return model.set_train(False)


def output(model: nn.Cell) -> np.ndarray:
    ids = Tensor(tiny.tokens())
    seq2seq = {"decoder_input_ids": ids} if isinstance(model, PeftModelForSeq2SeqLM) else {}
    outputs = model(input_ids=ids, **seq2seq)
    return next(outputs[key] for key in ("logits", "start_logits", "last_hidden_state") if key in outputs).asnumpy()


@pytest.mark.parametrize("task", TASKS)
def test_each_task(task: str, tmp_path: Path):
    _, auto, peft_auto = TASKS[task]
    base = auto.from_pretrained(base_folder(tmp_path / "base", task, pad_token_id=0))
    model = adapter(base, tmp_path / "adapter", task)
    loaded = peft_auto.from_pretrained(tmp_path / "adapter")
    assert type(loaded).__name__ == peft_auto.__name__.removeprefix("Auto") == type(model).__name__
    assert loaded.trainable_params() == []
    assert_same(output(loaded), output(model), "exact")
    other = AutoPeftModelForCausalLM if task != "CAUSAL_LM" else AutoPeftModelForSeq2SeqLM
    with pytest.raises(ValueError, match=f"Expected target PEFT class: {type(model).__name__}, but you have asked"):
        other.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Cannot use `AutoPeftModel` with a task type"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_options_find_their_way(tmp_path: Path):
    base = models.AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base"))
    adapter(base, tmp_path / "adapter" / "sub")
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", "mine", is_trainable=True, subfolder="sub", dtype="float16", autocast_adapter_dtype=False
    )
    assert list(loaded.peft_config) == ["mine"]
    assert loaded.trainable_params()
    assert loaded.get_base_model().dtype == ms.float16
    with pytest.raises(TypeError, match="no_such_option"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter" / "sub", no_such_option=1)


def test_labels_are_those_of_the_adapters_head(tmp_path: Path):
    folder = base_folder(tmp_path / "base", "SEQ_CLS")
    with pytest.warns(UserWarning, match="new random weights"):
        base = models.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=5, ignore_mismatched_sizes=True
        )
    model = adapter(base, tmp_path / "adapter", "SEQ_CLS")
    with pytest.warns(UserWarning, match="new random weights"):
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert_same(output(loaded), output(model), "exact")


# --- no task --------------------------------------------------------------------------------------------------------


def test_the_class_is_named_by_the_config(tmp_path: Path):
    base = models.AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base"))
    model = adapter(base, tmp_path / "adapter", task=None)
    assert model.peft_config["default"].auto_mapping is None
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is PeftModel
    assert type(loaded.get_base_model()) is models.LlamaForCausalLM
    assert_same(output(loaded), output(model), "exact")


def test_no_library_is_imported_that_was_not_allowed(tmp_path: Path):
    """The config of a stranger's adapter must not run a stranger's code."""
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    adapter(nets.Blocks(), tmp_path / "adapter", task=None, target_modules=["q"], base_model_name_or_path="x")
    path = tmp_path / "adapter" / "adapter_config.json"
    for library in ("evil_library", "os", "transformers_evil", "mindone2"):
        fields = json.loads(path.read_text())
        fields["auto_mapping"] = {"base_model_class": "Net", "parent_library": library}
        path.write_text(json.dumps(fields))
        code = f"from msft_peft import AutoPeftModel\nAutoPeftModel.from_pretrained({str(tmp_path / 'adapter')!r})"
        if library == "evil_library":
            environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "", "GLOG_v": "3"}
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert "imported" not in done.stderr.splitlines()
            assert "which is not in the import allowlist" in done.stderr
        else:
            with pytest.raises(ValueError, match=f"wants to import '{library}' which is not in the import allowlist"):
                AutoPeftModel.from_pretrained(tmp_path / "adapter")


class Own(nets.Blocks):
    """A user's own model, with a from_pretrained."""

    @classmethod
    def from_pretrained(cls, name: str) -> "Own":
        assert name == "mine"
        return cls()


def test_a_users_own_class_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Own.__module__])
    config = {"target_modules": ["q"], "base_model_name_or_path": "mine"}
    model = adapter(Own(), tmp_path / "adapter", task=None, **config)
    monkeypatch.setattr(sys.modules[Own.__module__], "Own", Own)
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=[Own.__module__])
    assert type(loaded.get_base_model()) is Own
    assert sorted(p.name for p in loaded.get_parameters()) == sorted(p.name for p in model.get_parameters())


@pytest.mark.parametrize("mapping", [None, {}, {"base_model_class": "Net"}])
def test_a_config_that_names_no_class(tmp_path: Path, mapping: Any):
    adapter(nets.Blocks(), tmp_path, task=None, target_modules=["q"], base_model_name_or_path="x")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "auto_mapping": mapping}))
    with pytest.raises(ValueError, match="Cannot infer the auto class from the config"):
        AutoPeftModel.from_pretrained(tmp_path)


def test_an_adapter_that_names_no_base_model(tmp_path: Path):
    adapter(nets.Blocks(), tmp_path, target_modules=["q"])
    with pytest.raises(ConfigError, match=r"names no base model.*PeftModelForCausalLM.from_pretrained\(base_model"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)


# --- providers ------------------------------------------------------------------------------------------------------


def test_where_no_library_has_the_model(tmp_path: Path):
    """It says what was tried and what to install."""
    adapter(models.AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base")), tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(NoBaseModelError) as caught:
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for text in ("msft_peft: ", "'mamba'", "mindone: not installed; pip install mindone", "pip install mindnlp"):
        assert text in str(caught.value)
    with pytest.raises(NoBaseModelError, match="mindnlp: not installed; pip install mindnlp"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", provider="mindnlp")
    with pytest.raises(ValueError, match="provider='torch' is none of msft_peft, mindone, mindnlp, mindformers"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", provider="torch")


@pytest.fixture
def mindone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for mindone, which gives our own model; what it was asked for is in `asked`."""
    package = tmp_path / "libraries" / "mindone"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "transformers.py").write_text(
        "from msft_peft import models\n"
        "asked = []\n"
        "class AutoModelForCausalLM:\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, name, **options):\n"
        "        asked.append((name, options))\n"
        "        return models.AutoModelForCausalLM.from_pretrained(name)\n"
        "class AutoModel:\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, name, **options):\n"
        "        return object()\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    yield lambda: sys.modules["mindone.transformers"].asked
    for name in ("mindone", "mindone.transformers"):
        sys.modules.pop(name, None)


def test_a_provider_by_choice(mindone: Any, tmp_path: Path):
    name = str(base_folder(tmp_path / "base"))
    model = adapter(models.AutoModelForCausalLM.from_pretrained(name), tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", provider="mindone", mindspore_dtype=ms.float32, token="t"
    )
    assert mindone() == [(name, {"mindspore_dtype": ms.float32, "token": "t"})]
    assert_same(output(loaded), output(model), "exact")


def test_a_provider_in_turn(mindone: Any, tmp_path: Path):
    """Where the reference models lack the task, the next library is asked; one that gives no Cell is passed over."""
    base = models.AutoModel.from_pretrained(base_folder(tmp_path / "base", "FEATURE_EXTRACTION"))
    adapter(base, tmp_path / "adapter", "FEATURE_EXTRACTION")
    with pytest.raises(NoBaseModelError, match=r"AutoModel cannot load it: `model` must be a mindspore\.nn\.Cell"):
        AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter", provider="mindone")
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    config.task_type = "SEQ_2_SEQ_LM"
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NoBaseModelError, match=r"mindone: mindone.transformers has no AutoModelForSeq2SeqLM"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


# --- other vocabularies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 40])
def test_resized_embeddings_come_back(tmp_path: Path, tied: bool, size: int):
    """The adapter's tensors say how many tokens it was trained with."""
    base = models.AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base", tie_word_embeddings=tied))
    table = base.resize_token_embeddings(size)
    assert table is base.get_input_embeddings()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model.set_train(False)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_base_model().config.vocab_size == size
    ids = Tensor(tiny.tokens() % size)
    assert_same(loaded(ids)["logits"], model(ids)["logits"], "exact")
    head, table = loaded.get_base_model().get_output_embeddings(), loaded.get_base_model().get_input_embeddings()
    assert (head.weight is table.weight) == tied


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapted_embedding_tells_its_size(tmp_path: Path, config: dict[str, Any]):
    base = models.AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base", tie_word_embeddings=False))
    base.resize_token_embeddings(70)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_base_model().config.vocab_size == 70


@pytest.mark.parametrize(("added", "size"), [(64, 65), (30, tiny.VOCAB)])
def test_the_tokenizer_beside_the_adapter_counts(tmp_path: Path, added: int, size: int):
    base = models.AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base"))
    adapter(base, tmp_path / "adapter")
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": added, "content": "<new>"}]}
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(vocabulary))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_base_model().config.vocab_size == size
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ConfigError, match=r"tokenizer.json is no tokenizer.json that can be read"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


# --- the names ------------------------------------------------------------------------------------------------------


def test_the_classes_are_not_built_themselves():
    with pytest.raises(OSError, match="is designed to be instantiated using"):
        AutoPeftModelForCausalLM()


def test_the_names_come_when_they_are_asked_for():
    code = (
        "import sys, msft_peft\n"
        "assert 'msft_peft.auto' not in sys.modules and 'msft_peft.models' not in sys.modules\n"
        "assert msft_peft.AutoPeftModelForCausalLM.__module__ == 'msft_peft.auto'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'AutoPeftModelForNothing'"):
        _ = msft_peft.AutoPeftModelForNothing
    assert AutoPeftModelForCausalLM._target is PeftModelForCausalLM
