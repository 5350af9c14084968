"""Files: what is written is read again; what is broken, missing or dangerous is refused, all of it at once."""

import json
import stat
import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.common.np_dtype import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import msft_peft.models as models
from tests.models import tiny


@pytest.fixture
def folder(tmp_path):
    """A saved decoder."""
    tiny.decoder("qwen2").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    """Change the tensors of a saved model."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def logits(model) -> np.ndarray:
    return model(Tensor(tiny.tokens()))["logits"].asnumpy()


def weights(model) -> dict[str, np.ndarray]:
    return {name: p.asnumpy() for name, p in model.parameters_and_names()}


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_round_trip(name, tmp_path):
    model = tiny.decoder(name)
    model.save_pretrained(tmp_path / "one")
    again = models.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(again) is type(model)
    np.testing.assert_array_equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) & stat.S_IRUSR
    with pytest.raises(TypeError, match="push_to_hub"):
        tiny.decoder().save_pretrained(folder, push_to_hub=True)


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    def crash(arrays, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("msft_peft.models.checkpoint.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        tiny.decoder().save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_every_misfit_is_listed_at_once(folder):
    def spoil(arrays):
        del arrays["model.norm.weight"]
        del arrays["model.layers.0.self_attn.q_proj.bias"]
        arrays["model.extra"] = np.zeros(3, np.float32)
        arrays["lm_head.weight"] = np.zeros((7, tiny.WIDTH), np.float32)

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM cannot be filled.*4 misfits") as error:
        models.AutoModelForCausalLM.from_pretrained(folder)
    for line in (
        "missing: model.norm.weight (24,)",
        "missing: model.layers.0.self_attn.q_proj.bias (24,)",
        "unexpected: model.extra (3,)",
        "misshapen: lm_head.weight is (7, 24) in the checkpoint, (61, 24) in the model",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_a_broken_file_is_named(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors' is no readable safetensors file"):
        models.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json' "):
        models.AutoConfig.from_pretrained(folder)


def shard(folder) -> None:
    """Split a saved model into two files and an index."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: files[i % 2] for i, key in enumerate(sorted(arrays))}
    for file in files:
        save_file({key: arrays[key] for key in arrays if where[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def edit_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_shards(folder):
    whole = logits(models.AutoModelForCausalLM.from_pretrained(folder))
    shard(folder)
    np.testing.assert_array_equal(logits(models.AutoModelForCausalLM.from_pretrained(folder)), whole)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names shards that are not there: .*00002-of-00002"):
        models.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors"])
def test_an_index_may_not_climb_out(folder, name):
    shard(folder)
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match="lies outside the folder"):
        models.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("change", [lambda i: i.pop("weight_map"), lambda i: i["weight_map"].update(x=3)])
def test_a_broken_index_is_named(folder, change):
    shard(folder)
    edit_index(folder, change)
    with pytest.raises(ValueError, match="is no index of weights"):
        models.AutoModelForCausalLM.from_pretrained(folder)


def test_places_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        models.AutoModel.from_pretrained(tmp_path / "nowhere")
    tiny.decoder().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of model.safetensors, pytorch_model.bin .*found: config.json"):
        models.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not read"):
        models.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lies outside the folder"):
        models.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="../..")


@pytest.mark.parametrize("stored", [np.float16, bfloat16])
def test_half_precision(folder, stored):
    full = weights(models.AutoModelForCausalLM.from_pretrained(folder))
    rewrite(folder, lambda arrays: arrays.update({k: v.astype(stored) for k, v in arrays.items()}))
    own = ms.float16 if stored is np.float16 else ms.float32  # bfloat16 has hardly any kernels on CPU
    for dtype, expected in ((None, own), ("float32", ms.float32), ("bfloat16", ms.bfloat16), (ms.float16, ms.float16)):
        model = models.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {p.dtype for p in model.get_parameters()} == {expected}
        for name, value in weights(model).items():
            np.testing.assert_allclose(value.astype(np.float32), full[name], rtol=2e-2, atol=1e-3)
    with pytest.raises(ValueError, match="dtype='int8' is none of float32"):
        models.AutoModelForCausalLM.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt-350m", "bloom"])
def test_float16_runs(name, tmp_path):
    tiny.decoder(name).save_pretrained(tmp_path)
    full = logits(models.AutoModelForCausalLM.from_pretrained(tmp_path))
    half = models.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float16")
    out = half(Tensor(tiny.tokens()), labels=Tensor(tiny.tokens()))
    assert out["logits"].dtype == ms.float16
    tiny.close(out["logits"].asnumpy().astype(np.float32), full, 2e-2)
    assert np.isfinite(float(out["loss"]))


def test_a_new_head_is_drawn_with_a_warning(tmp_path):
    models.BertForMaskedLM(models.BertConfig(**tiny.BERT)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"new random weights for .*'classifier.bias', 'classifier.weight'"):
        model = models.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.classifier.weight.shape == (5, tiny.WIDTH)
    assert abs(model.classifier.weight.asnumpy().std() - tiny.STD) < 0.08
    model.save_pretrained(tmp_path / "head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = models.AutoModelForTokenClassification.from_pretrained(tmp_path / "head")
    np.testing.assert_array_equal(again.classifier.weight.asnumpy(), model.classifier.weight.asnumpy())
    with pytest.raises(ValueError, match=r"misshapen: classifier.bias"):
        models.AutoModelForTokenClassification.from_pretrained(tmp_path / "head", num_labels=2)
    with pytest.warns(UserWarning, match="new random weights"):
        other = models.AutoModelForTokenClassification.from_pretrained(
            tmp_path / "head", num_labels=2, ignore_mismatched_sizes=True
        )
    assert other.classifier.weight.shape == (2, tiny.WIDTH)


def test_body_and_heads_read_each_other(folder, tmp_path):
    model = models.AutoModelForCausalLM.from_pretrained(folder)
    body = models.AutoModel.from_pretrained(folder)
    assert isinstance(body, models.Qwen2Model)
    state = model.model(Tensor(tiny.tokens()))["last_hidden_state"].asnumpy()
    np.testing.assert_array_equal(body(Tensor(tiny.tokens()))["last_hidden_state"].asnumpy(), state)
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        models.AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    tied = models.AutoModelForCausalLM.from_pretrained(tmp_path / "body", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "bloom", "llama3"])
def test_files_without_the_body_s_prefix(name, tmp_path):
    """As the Hub has GPT-2 and BLOOM, with the masks that old GPT-2 files carry, and with a tied head or without."""
    model = tiny.decoder(name)
    model.save_pretrained(tmp_path)
    prefix = model.base_model_prefix + "."

    def age(arrays):
        for key in list(arrays):
            arrays[key.removeprefix(prefix)] = arrays.pop(key)
        if name == "gpt2":
            arrays["h.0.attn.bias"] = np.zeros((1, 1, 64, 64), np.float32)
            arrays["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
        if name == "bloom":
            arrays["lm_head.weight"] = arrays["word_embeddings.weight"].copy()

    rewrite(tmp_path, age)
    again = models.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(again), logits(model))
    body = models.AutoModel.from_pretrained(tmp_path)
    assert type(body) is type(model.base_model)


def test_bodies_of_another_name(folder, tmp_path):
    """A Llama that answers questions calls its body otherwise, in HF's files too: all read each other."""
    with pytest.warns(UserWarning, match="new random weights"):
        reader = models.AutoModelForQuestionAnswering.from_pretrained(folder)
    assert {name.split(".")[0] for name, _ in reader.parameters_and_names()} == {"transformer", "qa_outputs"}
    reader.save_pretrained(tmp_path / "reader")
    expected = weights(models.AutoModel.from_pretrained(folder))
    for name, value in weights(models.AutoModel.from_pretrained(tmp_path / "reader")).items():
        np.testing.assert_array_equal(value, expected[name])
    with pytest.warns(UserWarning, match="'score.weight'"):
        models.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reader")


def test_old_bert_names(tmp_path):
    model = tiny.scatter(models.BertModel(models.BertConfig(**tiny.BERT)))
    model.save_pretrained(tmp_path)

    def age(arrays):
        for key in list(arrays):
            new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            arrays["bert." + new] = arrays.pop(key)
        arrays["bert.embeddings.position_ids"] = np.arange(64)[None]
        arrays["cls.seq_relationship.weight"] = np.zeros((2, tiny.WIDTH), np.float32)

    rewrite(tmp_path, age)
    again = models.AutoModel.from_pretrained(tmp_path)
    for name, value in weights(model).items():
        np.testing.assert_array_equal(weights(again)[name], value)


def test_auto_classes_name_what_they_have(folder):
    with pytest.raises(ValueError, match="AutoModelForMaskedLM has no model for model_type 'qwen2'; it has: bert"):
        models.AutoModelForMaskedLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"model_type 'mamba' is not built.*llama, mistral, qwen2, qwen3.*bert"):
        models.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(TypeError, match="is not built itself"):
        models.AutoModel()


def test_the_class_must_fit_the_family(folder):
    with pytest.raises(ValueError, match=r"model_type 'llama', but this config.json says 'qwen2'"):
        models.LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(TypeError, match=r"\['attn_implementation'\] are neither settings of Qwen2Config"):
        models.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def test_config_keeps_what_it_does_not_know():
    labels = {"0": "no", "1": "yes", "2": "both"}
    config = models.AutoConfig.from_dict({"model_type": "bert", "id2label": labels, "invented": 7})
    assert (config.num_labels, config.id2label[2], config.label2id["yes"], config.invented) == (3, "both", 1, 7)
    assert config.get("absent", 5) == 5
    again = models.AutoConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    again.num_labels = 2
    assert again.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert models.LlamaConfig(num_attention_heads=8, hidden_size=64).head_dim == 8


def test_hub_ids_go_to_the_hub(folder, monkeypatch):
    shard(folder)
    calls = []

    def snapshot_download(repo, allow_patterns, **options):
        calls.append((repo, allow_patterns, options))
        return str(folder)

    monkeypatch.setattr("msft_peft.backend.hub.snapshot_download", snapshot_download)
    model = models.AutoModelForCausalLM.from_pretrained("someone/model", revision="v1", token="t", rope_theta=5e5)
    assert (model.name_or_path, model.config.rope_theta) == ("someone/model", 5e5)
    assert {(repo, options["revision"], options["token"]) for repo, _, options in calls} == {
        ("someone/model", "v1", "t")
    }
    asked = {pattern for _, patterns, _ in calls for pattern in patterns}
    assert {"config.json", "model.safetensors", "model-00001-of-00002.safetensors"} <= asked


def test_loading_copies_no_weight_twice(tmp_path):
    """The arrays that were read are the weights: nothing else holds as much memory."""
    model = tiny.decoder("llama")
    model.save_pretrained(tmp_path)
    read = []
    original = ms.from_numpy

    def watch(array):
        read.append(array)
        return original(array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms, "from_numpy", watch)
        loaded = models.AutoModelForCausalLM.from_pretrained(tmp_path)
    views = {array.__array_interface__["data"][0] for array in read}
    assert {p.asnumpy().__array_interface__["data"][0] for p in loaded.get_parameters()} == views


def test_large_checkpoints_are_written_in_shards(tmp_path):
    model = tiny.decoder()
    model.save_pretrained(tmp_path)
    whole = {p.name: p.asnumpy() for p in models.AutoModelForCausalLM.from_pretrained(tmp_path).get_parameters()}
    for size in ("8KB", 3000, "12.5 kib"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        names = {path.name for path in tmp_path.iterdir()}
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert names == {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}
        assert len(names) > 4
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
        loaded = models.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(np.array_equal(p.asnumpy(), whole[p.name]) for p in loaded.get_parameters())
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    before = (tmp_path / "model.safetensors").read_bytes()
    for size in ("", "five", "0", -1, "5XB", "1.2.3GB", None):
        with pytest.raises(ValueError, match="a size must be a number of bytes"):
            model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").read_bytes() == before
