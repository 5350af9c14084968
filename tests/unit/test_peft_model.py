"""PeftModel: what it prints, forwards, and says of itself."""

import contextlib
import os
import stat
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from huggingface_hub import ModelCard
from mindspore import Tensor, nn, ops

import msft_peft
from msft_peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from msft_peft.backend.arrays import write
from msft_peft.backend.files import replacing, write_text
from msft_peft.backend.hub import fetch
from msft_peft.core import inject
from msft_peft.core.wrapper import wrappers
from msft_peft.errors import ConfigError
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

Q = {"r": 2, "target_modules": ["q"]}


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]):
    net = nn.SequentialCell(nn.Dense(16, 24), nn.Dense(24, 4))
    get_peft_model(net, LoraConfig(r=4, target_modules=["0"])).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 160 || all params: 668 || trainable%: 23.9521\n"


def test_print_trainable_parameters_of_a_large_model(capsys: pytest.CaptureFixture[str]):
    model = get_peft_model(nn.SequentialCell(nn.Dense(1000, 1500)), LoraConfig(r=4, target_modules=["0"]))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 10,000 || all params: 1,511,500 || trainable%: 0.6616\n"
    assert model.get_nb_trainable_parameters() == (10_000, 1_511_500)


def test_copies_and_frozen_adapters_count_too():
    model = get_peft_model(nets.Blocks(1), LoraConfig(modules_to_save=["head"], **Q))
    base = sum(p.size for p in nets.Blocks(1).get_parameters())
    adapter, head = 2 * 4 + 4 * 2, 4 * 3 + 3
    assert model.get_nb_trainable_parameters() == (adapter + head, base + adapter + head)
    model.add_adapter("other", LoraConfig(**Q))
    assert model.get_nb_trainable_parameters() == (adapter + head, base + 2 * adapter + head)


def test_the_base_models_attributes_are_to_be_had():
    base = nets.Blocks(model_type="llama")
    base.generate = lambda x, times=1: [x] * times
    model = get_peft_model(base, LoraConfig(**Q))
    assert model.get_base_model() is base
    assert model.base_model.model is base
    assert model.layers is base.layers
    assert model.config == {"model_type": "llama"}
    assert model.generate(1, times=2) == [1, 1]
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    assert not hasattr(model, "nothing_like_it")


def test_arguments_go_through(mode: str):
    class Two(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Dense(4, 4)

        def construct(self, x, y, factor=None):
            z = self.lin(x) - y
            return z if factor is None else z * factor

    x, y = nets.floats(2, 4), nets.floats(2, 4, seed=8)
    net = Two()
    model = get_peft_model(net, LoraConfig(r=1, target_modules=["lin"]))
    assert_same(model(x, y), net(x, y))
    assert_same(model(x, y, factor=y), net(x, y, y))


def test_active_adapter_and_config():
    model = get_peft_model(nets.Blocks(), LoraConfig(**Q))
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    assert model.active_peft_config is model.peft_config["default"]
    assert model.peft_config == {"default": LoraConfig(**Q)}
    model.add_adapter("other", LoraConfig(r=1, target_modules=["v"]))
    model.set_adapter("other")
    assert model.active_peft_config.r == 1


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (None, "PeftModel"),
        ("CAUSAL_LM", "PeftModelForCausalLM"),
        ("SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM"),
        ("SEQ_CLS", "PeftModelForSequenceClassification"),
        ("TOKEN_CLS", "PeftModelForTokenClassification"),
        ("QUESTION_ANS", "PeftModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
    ],
)
def test_the_task_decides_the_class(task: str | None, kind: str, tmp_path: Path):
    model = get_peft_model(nets.Classifier(), LoraConfig(r=1, target_modules=["backbone"], task_type=task))
    assert type(model) is getattr(msft_peft, kind)
    model.save_pretrained(tmp_path)
    assert type(PeftModel.from_pretrained(nets.Classifier(), tmp_path)) is type(model)
    # As in HF, the file decides, not the class that is asked.
    asked = msft_peft.PeftModelForCausalLM
    assert type(asked.from_pretrained(nets.Classifier(), tmp_path)) is (asked if task is None else type(model))
    heads = {"SEQ_CLS": True, "TOKEN_CLS": True}.get(task, False)
    assert any("modules_to_save" in p.name for p in model.get_parameters()) is heads
    tag = ModelCard.load(tmp_path / "README.md").data.pipeline_tag
    assert tag == ("text-generation" if task == "CAUSAL_LM" else None)


def test_the_base_models_name_is_kept(tmp_path: Path):
    base = nets.Blocks()
    base.config = {"model_type": "llama", "_name_or_path": "some/model"}
    model = get_peft_model(base, LoraConfig(**Q), revision="v1")
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("some/model", "v1")
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "some/model"
    text = r"`base_model_name_or_path` was renamed from 'other' to 'some/model'. Please ensure that the correct base"
    base = nets.Blocks()
    base.config = {"_name_or_path": "some/model"}
    with pytest.warns(UserWarning, match=text):
        get_peft_model(base, LoraConfig(base_model_name_or_path="other", **Q))


def test_training_mode_follows_the_base_model():
    for training in (False, True):
        model = get_peft_model(nets.Blocks().set_train(training), LoraConfig(lora_dropout=0.5, **Q))
        model.add_adapter("other", LoraConfig(lora_dropout=0.5, r=1, target_modules=["v"]))
        drops = [cell for _, cell in model.cells_and_names() if isinstance(cell, nn.Dropout)]
        assert len(drops) == 4
        assert {cell.training for cell in (*drops, *layers_of(model), model, model.get_base_model())} == {training}
        model.set_train(not training)
        assert {cell.training for cell in (*drops, *layers_of(model), model, model.get_base_model())} == {not training}


def test_nothing_warns_without_need(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(nets.Blocks(), LoraConfig(modules_to_save=["head"], **Q))
        model.add_adapter("other", LoraConfig(**Q))
        model.set_adapter("other")
        with model.disable_adapter():
            model(model.sample())
        model.merge_adapter()
        model.unmerge_adapter()
        model.delete_adapter("default")
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(nets.Blocks(), tmp_path / "other")
        model.unload()


# --- files ----------------------------------------------------------------------------------------------------------


def test_new_files_get_the_usual_permissions(tmp_path: Path):
    old = os.umask(0o027)
    try:
        get_peft_model(nets.Blocks(), LoraConfig(**Q)).save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    assert set(modes.values()) == {0o640}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "öld")
    with contextlib.suppress(ZeroDivisionError), replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary != path
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "öld"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(NotADirectoryError, match="should be a directory, not a file"):
        write_text(path / "below", "x")


def test_fetch(tmp_path: Path):
    write_text(tmp_path / "sub" / "a", "x")
    assert fetch(tmp_path, "a", subfolder="sub") == tmp_path / "sub" / "a"
    assert fetch(str(tmp_path / "sub"), "a") == tmp_path / "sub" / "a"
    assert fetch(tmp_path, "a") is None
    for source in (tmp_path / "absent", "not a/repo id/at all", "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match="is no directory here, and 'a' could not be had from the Hub"):
            fetch(source, "a", local_files_only=True)


def test_mistyped_options_are_refused(tmp_path: Path):
    model = get_peft_model(nets.Blocks(), LoraConfig(**Q))
    model.save_pretrained(tmp_path)
    base = nets.Blocks()
    before = state_of(base)
    for load in (partial(PeftModel.from_pretrained, base), LoraConfig.from_pretrained, load_peft_weights):
        with pytest.raises(TypeError, match=r"unexpected keyword arguments \['device_map', 'revison'\]"):
            load(tmp_path, revison="main", device_map="auto")
    assert state_of(base) == before


def test_loading_from_a_subfolder(tmp_path: Path):
    model = get_peft_model(nets.Blocks(), LoraConfig(**Q), adapter_name="mine")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nets.Blocks(), tmp_path, subfolder="mine")
    assert len(weights_of(loaded, "default")) == len(weights_of(model, "mine"))
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        PeftModel.from_pretrained(nets.Blocks(), tmp_path)


def test_a_model_trained_on_a_lazy_base_is_saved(tmp_path: Path):
    """Weights that were never used are initialised on the way out, not lost."""
    model = get_peft_model(nets.Blocks(), LoraConfig(init_lora_weights=False, **Q))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nets.Blocks(), tmp_path)
    for p, q in zip(weights_of(model, "default"), weights_of(loaded, "default")):
        assert_same(p, q, "exact")


# --- the model card -------------------------------------------------------------------------------------------------


def saved_card(folder: Path, **config: Any) -> ModelCard:
    base = nets.Blocks()
    if config:
        base.config = config
    get_peft_model(base, LoraConfig(**Q)).save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_of_a_nameless_model(tmp_path: Path):
    card = saved_card(tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.base_model is None
    assert {"lora", "mindspore"} <= set(card.data.tags)
    assert card.data.tags == sorted(card.data.tags)
    assert "### Framework versions\n\n- PEFT 0.21.2" in card.text


def test_the_card_names_the_base_model(tmp_path: Path):
    card = saved_card(tmp_path, _name_or_path="some/model", model_type="llama")
    assert card.data.base_model == "some/model"
    assert {"base_model:adapter:some/model", "transformers"} <= set(card.data.tags)
    assert "some/model" in card.text


def test_a_card_that_is_there_keeps_its_text(tmp_path: Path):
    text = "---\nlicense: mit\ntags:\n- mine\npipeline_tag: fill-mask\n---\n# My own words\n"
    (tmp_path / "README.md").write_text(text)
    card = saved_card(tmp_path, _name_or_path="some/model")
    assert "# My own words" in card.text
    assert "Framework versions" not in card.text
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == ("mit", "fill-mask", "peft")
    assert {"mine", "lora"} <= set(card.data.tags)
    again = (tmp_path / "README.md").read_bytes()
    saved_card(tmp_path, _name_or_path="some/model")
    assert (tmp_path / "README.md").read_bytes() == again


def test_the_card_says_what_the_adapter_is_and_how_to_load_it(tmp_path: Path):
    base = nets.Blocks()
    base.config = {"_name_or_path": "some/model"}
    config = LoraConfig(use_dora=True, task_type="CAUSAL_LM", **Q)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    trained = sum(p.size for p in model.trainable_params())
    assert f"A LORA adapter for CAUSAL_LM of **{trained:,}** weights" in text
    for row in (
        f"| r | {config.r} |",
        f"| target_modules | {', '.join(config.target_modules)} |",
        "| use_dora | True |",
    ):
        assert row in text
    assert "lora_dropout" not in text
    for library in ("msft_peft", "peft"):
        assert f"from {library} import AutoPeftModelForCausalLM" in text


def test_the_results_in_a_card_are_replaced(tmp_path: Path):
    model = get_peft_model(nets.Blocks(), LoraConfig(**Q))
    model.create_or_update_model_card(tmp_path, metrics={"loss": 1.25}, tags=["mine"])
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Results\n\n| metric | value |\n|---|---|\n| loss | 1.25 |" in card.text
    assert "mine" in card.data.tags
    for _ in range(2):
        model.create_or_update_model_card(tmp_path, metrics={"f1|macro": 0.5, "steps": 3})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.text.count("## Results") == 1
        assert "| f1\\|macro | 0.5 |\n| steps | 3 |" in card.text
        assert "1.25" not in card.text
        assert "### Framework versions" in card.text
        assert card.data.metrics == ["f1|macro", "loss", "steps"]
    again = (tmp_path / "README.md").read_bytes()
    model.create_or_update_model_card(tmp_path, metrics={"f1|macro": 0.5, "steps": 3})
    assert (tmp_path / "README.md").read_bytes() == again


@pytest.mark.parametrize("text", ["", "no front matter", "---\n---\n"])
def test_a_card_without_metadata_gets_it(tmp_path: Path, text: str):
    (tmp_path / "README.md").write_text(text)
    assert saved_card(tmp_path).data.library_name == "peft"


# --- a whole life ---------------------------------------------------------------------------------------------------


def test_the_names_survive_everything(tmp_path: Path):
    """Optimizers, checkpoints and graphs go by `p.name`: after each structural change it must be the path."""
    net = nets.Blocks()
    first = [p.name for p in net.get_parameters()]

    def check(model: nn.Cell) -> None:
        names = [p.name for p in model.get_parameters()]
        assert names == [path for path, _ in model.parameters_and_names()]
        assert len(set(names)) == len(names)
        nn.Adam(list(model.get_parameters()))

    model = get_peft_model(net, LoraConfig(modules_to_save=["head"], **Q))
    check(model)
    model.add_adapter("other", LoraConfig(r=1, target_modules="all-linear", exclude_modules=["head"]))
    check(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "third")
    check(model)
    model.delete_adapter("other")
    check(model)
    ms.save_checkpoint(model, str(tmp_path / "all.ckpt"))
    assert len(ms.load_checkpoint(str(tmp_path / "all.ckpt"))) == len(list(model.get_parameters()))
    shake(weights_of(model, "default"))
    expected = output(model)
    merged = model.merge_and_unload()
    check(merged)
    assert [p.name for p in merged.get_parameters()] == first
    assert_same(output(merged), expected, "merge")
    again = get_peft_model(merged, LoraConfig(**Q))
    check(again)
    assert_same(output(again), expected, "merge")


def test_adding_looks_through_the_model_no_oftener_when_there_are_many(monkeypatch: pytest.MonkeyPatch):
    model, walks, counts = get_peft_model(nets.Blocks(1), LoraConfig(**Q)), [], []
    monkeypatch.setattr(inject, "wrappers", lambda root: walks.append(root) or wrappers(root))
    for i in range(6):
        walks.clear()
        model.add_adapter(f"n{i}", LoraConfig(**Q))
        counts.append(len(walks))
    assert counts[1:] == counts[:1] * 5
    assert counts[0] > 0


class HandTied(nn.Cell):
    """Its head reads the table that another layer has, and its own scale comes from a norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm = nn.Embedding(10, 4, embedding_table="normal"), nn.LayerNorm((4,), epsilon=1e-5)

    def construct(self, x: Tensor) -> Tensor:
        h = self.norm(self.emb(x)) * self.norm.gamma
        return ops.matmul(h, ops.transpose(self.emb.embedding_table, (1, 0)))


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["emb"]), LNTuningConfig(target_modules=["norm"])])
def test_a_model_may_read_the_attributes_of_an_adapted_layer(config: PeftConfig, mode: str):
    ms.set_seed(5)
    net = HandTied()
    x = Tensor(np.array([[1, 2]], np.int32))
    wanted = output(net, x)
    model = get_peft_model(net, config)
    assert_same(model(x), wanted)
    layer = layers_of(model)[0]
    write(layer.weight, 2 * array(layer.weight))  # and sees what is written there, also in compiled code
    assert_same(model(x), output(model, x))
    assert differ(model(x), wanted)
    with pytest.raises(AttributeError, match="nowhere"):
        layer.nowhere  # noqa: B018


def test_a_layer_that_is_read_and_never_called_is_refused():
    net = nn.TransformerEncoderLayer(8, 2, 16)
    before = state_of(net)
    with pytest.raises(ConfigError, match=r"nn\.MultiheadAttention reads the weight of this layer and never calls it"):
        get_peft_model(net, LoraConfig(target_modules=["out_proj", "dense1"]))
    with pytest.raises(ConfigError, match="reads the weight of this layer"):
        get_peft_model(nn.MultiheadAttention(8, 2), LoraConfig(target_modules=["out_proj"]))
    assert state_of(net) == before
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert [layer.site.path for layer in layers_of(model)] == ["dense1", "dense2"]


CALLS_ON_A_PEFT_MODEL = {
    "get_peft_model": lambda model, folder: get_peft_model(model, LoraConfig(**Q), "x"),
    "inject": lambda model, folder: inject.inject_adapter_in_model(LoraConfig(**Q), model, "x"),
    "from_pretrained": lambda model, folder: PeftModel.from_pretrained(model, folder, "x"),
}


@pytest.mark.parametrize("name", CALLS_ON_A_PEFT_MODEL)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_peft_model_is_no_base_model(name: str, tmp_path: Path):
    model = get_peft_model(nets.Blocks(), LoraConfig(**Q))
    model.save_pretrained(tmp_path)
    before = state_of(model)
    with pytest.raises(ConfigError, match="The model is a PeftModel already"):
        CALLS_ON_A_PEFT_MODEL[name](model, tmp_path)
    assert state_of(model) == before


def test_loading_over_a_model_that_has_adapters_says_so(tmp_path: Path):
    net = nets.Blocks()
    get_peft_model(net, LoraConfig(**Q)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        PeftModel.from_pretrained(net, tmp_path)


def test_hfs_order_of_arguments(tmp_path: Path):
    model = get_peft_model(nets.Blocks(), LoraConfig(**Q)).set_train()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "two", True, "cpu", False, False, True)
    assert model.training
    model.load_adapter(tmp_path, "three", torch_device="cpu")
    assert not any(cell.training for _, cell in model.cells_and_names())
    PeftModel.from_pretrained(nets.Blocks(), tmp_path, "default", True, None, True, False, True)
    loads = (partial(model.load_adapter, adapter_name="four"), partial(PeftModel.from_pretrained, nets.Blocks()))
    for load in loads:
        with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload=True"):
            load(model_id=tmp_path, ephemeral_gpu_offload=True)
