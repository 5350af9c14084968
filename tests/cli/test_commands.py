"""The command line: what it prints and writes, its exit codes, and that no user's mistake gives a traceback."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor
from mindspore.common.np_dtype import bfloat16

from msft_peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    load_peft_weights,
)
from msft_peft.cli import main, parser
from msft_peft.io.conversion import convert
from msft_peft.models import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from tests import nets
from tests.models import tiny
from tests.tolerances import assert_same

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama that takes bytes."""
    tiny.decoder("llama3", vocab_size=256).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of it that does something."""
    saved(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", task_type="CAUSAL_LM")
    return tmp_path / "adapter"


def saved(model: Any, folder: Path, **config: Any) -> PeftModel:
    settings = {"r": 4, "init_lora_weights": False, **config}
    made = get_peft_model(model, LoraConfig(**settings))
    made.save_pretrained(folder)
    return made.set_train(False)


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def inspected(capsys: pytest.CaptureFixture, *arguments: Any) -> dict[str, Any]:
    assert run("inspect", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect(adapter: Path, base: Path, capsys: pytest.CaptureFixture):
    found = inspected(capsys, adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    weights = load_peft_weights(adapter)
    assert (found["method"], found["task"], found["base_model"], found["r"]) == ("LORA", "CAUSAL_LM", str(base), 4)
    assert found["target_modules"] == ["q_proj", "v_proj"]
    assert found["parameters"] == sum(t.size for t in weights.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert (found["does_something"], found["finite"], found["dtypes"]) == (True, True, ["float32"])
    layers = {layer["layer"]: layer for layer in found["layers"]}
    assert len(layers) == 4
    wrapped = dict(model.get_base_model().cells_and_names())
    for name, layer in layers.items():
        delta = wrapped[name].get_delta_weight("default").asnumpy()
        assert layer["update"] == pytest.approx(float(np.linalg.norm(delta)), rel=1e-5)
        assert layer["rank"] == 4
    assert run("inspect", adapter) == 0
    table = capsys.readouterr().out
    for text in ("LORA for CAUSAL_LM", f"{found['parameters']:,} in 8 tensors", "does anything  yes", *layers):
        assert text in table


CASES: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"q": 2}, "alpha_pattern": {"v": 32}, "target_modules": ["q", "v"]},
    "rslora": {"use_rslora": True, "target_modules": ["q"]},
    "dora": {"use_dora": True, "target_modules": ["q"]},
    "head and bias": {"modules_to_save": ["head"], "bias": "lora_only", "target_modules": ["q"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q"]},
}


@pytest.mark.parametrize("case", CASES)
def test_updates_of_lora_s_kinds(case: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = saved(nets.Blocks(), tmp_path, **CASES[case])
    found = inspected(capsys, tmp_path)
    cells = dict(model.get_base_model().cells_and_names())
    told = {layer["layer"]: layer["update"] for layer in found["layers"] if "update" in layer}
    assert bool(told) == (case in ("patterns", "rslora", "head and bias"))
    assert found["does_something"] is (True if told else None)
    for name, update in told.items():
        delta = cells[name].get_delta_weight("default").asnumpy()
        assert update == pytest.approx(float(np.linalg.norm(delta)), rel=1e-5)


def test_an_adapter_that_does_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    saved(AutoModelForCausalLM.from_pretrained(base), tmp_path / "fresh", init_lora_weights=True)
    assert inspected(capsys, tmp_path / "fresh")["does_something"] is False
    assert run("inspect", tmp_path / "fresh") == 0
    assert "every update is zero" in capsys.readouterr().out
    options = {"init_lora_weights": True, "use_dora": True, "task_type": "CAUSAL_LM"}
    saved(AutoModelForCausalLM.from_pretrained(base), tmp_path / "dora", **options)
    assert inspected(capsys, tmp_path / "dora")["does_something"] is None
    assert inspected(capsys, tmp_path / "dora", "--with-base")["does_something"] is False


def test_weights_that_are_not_finite(adapter: Path, capsys: pytest.CaptureFixture):
    path = adapter / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays[next(iter(arrays))][0, 0] = np.nan
    safetensors.numpy.save_file(arrays, path)
    assert run("inspect", adapter) == 0
    assert "WARNING" in capsys.readouterr().out


# --- merge ----------------------------------------------------------------------------------------------------------


def test_merge(adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (base / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    assert run("merge", base, adapter, tmp_path / "merged", "--max-shard-size", "20KB") == 0
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < names
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = Tensor(tiny.tokens())
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids)["logits"]
    assert_same(merged(ids)["logits"], expected, "merge")
    assert run("merge", base, adapter, tmp_path / "merged") == 1
    assert "is there already and not empty" in capsys.readouterr().err
    assert run("merge", base, adapter, tmp_path / "half", "--dtype", "float16") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == ms.float16


def test_merge_checks_the_weights_that_the_adapter_leaves_alone(
    adapter: Path, base: Path, tmp_path: Path, capsys: Any
):
    model = AutoModelForCausalLM.from_pretrained(base)
    weight = model.lm_head.weight.asnumpy().copy()  # tied to the embedding
    weight[0, 0] = np.nan
    model.lm_head.weight.copy_(Tensor(weight))
    model.save_pretrained(tmp_path / "broken")
    assert run("merge", tmp_path / "broken", adapter, tmp_path / "out") == 1
    assert "not finite in base_model.model.model.embed_tokens.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["default", "mine"])
def test_adapters_there_and_back(case: str, name: str, tmp_path: Path):
    """Our own checkpoint gives the very file that HF's readers take, and that file gives a checkpoint that we read."""
    model = get_peft_model(nets.Blocks(), LoraConfig(init_lora_weights=False, **CASES[case]), adapter_name=name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    convert(folder / "adapter_model.ckpt", tmp_path / "new" / "adapter_model.safetensors")
    original = (folder / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "new" / "adapter_model.safetensors").read_bytes() == original
    convert(folder / "adapter_model.safetensors", tmp_path / "other" / "adapter_model.ckpt", "mine")
    (tmp_path / "other" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    loaded = PeftModel.from_pretrained(nets.Blocks(), tmp_path / "other")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == original


def test_virtual_tokens(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """An adapter without layers: looked at, converted there and back, used; there is nothing to merge."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "a")
    original = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    convert(tmp_path / "a" / "adapter_model.ckpt", tmp_path / "b" / "adapter_model.safetensors")
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == original
    convert(tmp_path / "b" / "adapter_model.safetensors", tmp_path / "c" / "adapter_model.ckpt")
    (tmp_path / "c" / "adapter_config.json").write_bytes((tmp_path / "a" / "adapter_config.json").read_bytes())
    assert run("generate", tmp_path / "a", "--ids", "1,2", "--max-new-tokens", 3) == 0
    assert run("generate", tmp_path / "c", "--ids", "1,2", "--max-new-tokens", 3) == 0
    first, second = capsys.readouterr().out.split()
    assert first == second
    assert inspected(capsys, tmp_path / "a")["parameters"] == 3 * tiny.WIDTH
    assert run("merge", base, tmp_path / "a", tmp_path / "merged") == 1
    assert "there is nothing to merge" in capsys.readouterr().err


def test_whole_models(base: Path, tmp_path: Path):
    convert(base / "model.safetensors", tmp_path / "model.ckpt")
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(base).config)
    assert ms.load_param_into_net(model, ms.load_checkpoint(str(tmp_path / "model.ckpt"))) == ([], [])
    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16, np.int64])
def test_dtypes_survive(dtype: Any, tmp_path: Path):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    safetensors.numpy.save_file({"a.weight": array}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "a.safetensors", tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_convert_on_the_command_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    source, target = adapter / "adapter_model.ckpt", tmp_path / "a.safetensors"
    assert run("convert", source, target) == 0
    assert "8 tensors" in capsys.readouterr().out
    assert run("convert", source, target) == 1
    assert "--force" in capsys.readouterr().err
    assert run("convert", source, target, "--force") == 0


def test_to_mindpet_and_back(adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    architecture = ("--architecture", "llama")
    config = LoraConfig.from_pretrained(adapter)
    config.init_lora_weights = True  # MindPet knows no other way to begin
    config.save_pretrained(adapter)
    assert run("convert", "--to", "mindpet", *architecture, adapter, tmp_path / "mf.ckpt") == 0
    block = json.loads(capsys.readouterr().out)
    assert (block["pet_type"], block["lora_rank"]) == ("lora", 4)
    assert any("attention.wq" in name for name in ms.load_checkpoint(str(tmp_path / "mf.ckpt")))
    back = ("convert", "--from", "mindpet", *architecture, tmp_path / "mf.ckpt", tmp_path / "back")
    assert run(*back) == 1
    assert "alpha" in capsys.readouterr().err
    assert run(*back, "--lora-alpha", block["lora_alpha"]) == 0
    one, two = (load_peft_weights(folder) for folder in (adapter, tmp_path / "back"))
    assert one.keys() == two.keys()
    for key in one:
        assert_same(one[key], two[key], "exact")
    for option in (("--lora-alpha", 8), architecture):
        assert run("convert", adapter / "adapter_model.ckpt", tmp_path / "x.safetensors", *option) == 1
        assert "goes with --from mindpet" in capsys.readouterr().err


# --- generate -------------------------------------------------------------------------------------------------------


def test_generate(adapter: Path, base: Path, capsys: pytest.CaptureFixture):
    prompt = "Preheat"
    options = ("--max-new-tokens", 5, "--json")
    assert run("generate", adapter, prompt, "--tokenizer", "bytes", *options) == 0
    found = json.loads(capsys.readouterr().out)
    ids = list(prompt.encode())
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    expected = model.generate(Tensor(np.array([ids], np.int32)), max_new_tokens=5).asnumpy()[0]
    assert found["prompt_ids"] + found["new_ids"] == list(expected)
    assert found["text"] == bytes(found["new_ids"]).decode(errors="replace")
    assert run("generate", adapter, "--base", base, "--ids", ",".join(map(str, ids)), "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.strip() == ",".join(map(str, found["new_ids"]))
    for _ in range(2):
        assert run("generate", base, "--ids", "1 2", "--sample", "--seed", 3, "--max-new-tokens", 5) == 0
    first, second = capsys.readouterr().out.split()
    assert first == second != ",".join(map(str, found["new_ids"]))


def test_generate_with_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture):
    tiny.seq2seq("t5").save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model = saved(base, tmp_path / "adapter", task_type="SEQ_2_SEQ_LM")
    ids = Tensor(np.array([[5, 6, 7]], np.int32))
    for name, expected in (("adapter", model), ("base", AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"))):
        assert run("generate", tmp_path / name, "--ids", "5,6,7", "--max-new-tokens", 4) == 0
        tokens = expected.generate(ids, max_new_tokens=4).asnumpy()[0]
        assert capsys.readouterr().out.strip() == ",".join(map(str, tokens[1:]))


# --- mistakes -------------------------------------------------------------------------------------------------------


def mistakes(base: Path, adapter: Path, tmp: Path) -> list[tuple[tuple[Any, ...], str]]:
    (tmp / "broken").mkdir()
    (tmp / "broken" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp / "broken" / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    return [
        (("inspect", tmp / "nothing"), "Can't find 'adapter_config.json'"),
        (("inspect", tmp / "broken"), "is no valid safetensors file"),
        (("inspect", base), "Can't find 'adapter_config.json'"),
        (("merge", tmp / "nothing", adapter, tmp / "out"), "nothing"),
        (("merge", base, adapter, tmp / "out", "--max-shard-size", "much"), "a size must be a number of bytes"),
        (("merge", base, adapter, tmp / "out", "--dtype", "float8"), "is none of float32"),
        (("merge", base, adapter, tmp / "out", "--provider", "torch"), "is none of msft_peft"),
        (("merge", base, tmp / "broken", tmp / "out"), "Cannot infer the auto class"),
        (("convert", tmp / "nothing.ckpt", tmp / "a.safetensors"), "there is no file"),
        (("convert", adapter / "adapter_model.ckpt", tmp / "a.bin"), ".safetensors and .ckpt are written"),
        (
            ("convert", adapter / "adapter_model.safetensors", tmp / "a.ckpt", "--adapter-name", "a b"),
            "cannot name an",
        ),
        (("convert", adapter / "README.md", tmp / "a.ckpt"), "are read"),
        (("convert", tmp / "broken" / "adapter_model.safetensors", tmp / "a.ckpt"), "is no valid safetensors file"),
        (("generate", adapter, "Hello"), "has a tokenizer. Name its folder"),
        (("generate", adapter, "--ids", "1,999"), "the model has the tokens 0 to 255"),
        (("generate", base, "--base", base, "--ids", "1"), "it is no adapter"),
        (("generate", adapter, "--ids", "1", "--max-new-tokens", "0"), "generate would add 0 tokens"),
        (("generate", adapter, "", "--tokenizer", "bytes"), "the prompt is empty"),
        (("push", tmp / "nothing", "you/x"), "holds no saved adapter or model"),
        (("finetune", tmp / "nothing.yaml"), "No such file"),
    ]


def test_mistakes_are_told_in_one_message(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    before = sorted(tmp_path.rglob("*"))
    for arguments, says in mistakes(base, adapter, tmp_path):
        assert run(*arguments) == 1, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "msft-peft: error: " in captured.err, arguments
        assert says in captured.err, (arguments, captured.err)
        assert "Traceback" not in captured.err
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "broken" not in str(path)]
    assert made == []
    with pytest.raises(ValueError, match="Can't find"):
        run("--traceback", "inspect", tmp_path / "nothing")


@pytest.mark.parametrize("arguments", ["", "nonsense", "merge a", "generate m", "generate m --ids x", "push a"])
def test_mistakes_in_the_command_line(arguments: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        run(*arguments.split())
    assert caught.value.code == 2
    assert "usage: msft-peft" in capsys.readouterr().err


def test_help_is_worth_reading(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    commands = parser()._subparsers._group_actions[0].choices
    assert set(commands) == {"inspect", "merge", "convert", "generate", "finetune", "push"}
    for name, command in commands.items():
        assert name in text
        page = command.format_help()
        assert len(page) > 600, name
        options = [action for action in command._actions if action.dest != "help"]
        assert [action.dest for action in options if not action.help] == [], name


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("msft_peft.cli.inspection.inspect_adapter", interrupt)
    assert run("inspect", "x") == 130
    assert "interrupted" in capsys.readouterr().err


def test_as_a_module(adapter: Path):
    command = [sys.executable, "-m", "msft_peft", "inspect", str(adapter), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "LORA"
