"""Checkpoints of MindPet and MindFormers as adapter directories of HF, and back."""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor, nn, ops

from msft_peft import (
    BottleneckAdapterConfig,
    ConfigError,
    LoadError,
    LoraConfig,
    LowRankAdapterConfig,
    PeftModel,
    delta,
    get_peft_model,
    mindpet_to_peft,
    peft_to_mindpet,
)
from msft_peft.errors import PeftWarning
from msft_peft.graph import freeze_delta
from msft_peft.io.adapter import read_tensors
from msft_peft.models import LlamaConfig, LlamaForCausalLM
from tests.cases import layers_of, shake
from tests.tolerances import array, assert_same, differ

FORMATS = ["ckpt", "safetensors"]


class Net(nn.Cell):
    def __init__(self, dense: nn.Cell) -> None:
        super().__init__()
        self.layer, self.head = dense, nn.Dense(8, 3)

    def construct(self, x: Tensor) -> Tensor:
        return self.head(ops.tanh(self.layer(x)))


F32 = {"compute_dtype": ms.float32}
KINDS = {
    "lora": (lambda: delta.LoRADense(6, 8, 2, 5, **F32), {"lora_alpha": 5}, LoraConfig),
    "adapter": (
        lambda: delta.AdapterDense(6, 8, bottleneck_size=3, **F32),
        {"config": {"pet_type": "adapter"}},
        BottleneckAdapterConfig,
    ),
    "low_rank_adapter": (
        lambda: delta.LowRankAdapterDense(6, 8, reduction_factor=2, low_rank_size=2, non_linearity="relu", **F32),
        {"config": {"pet_type": "low_rank_adapter", "non_linearity": "relu"}},
        LowRankAdapterConfig,
    ),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, file_format: str, tmp_path: Path):
    make, arguments, config_class = KINDS[kind]
    net = Net(make())
    freeze_delta(net, kind, exclude=["head*"])
    shake(net.trainable_params())
    path = str(tmp_path / f"theirs.{file_format}")
    trained = {p.name: array(p) for p in net.trainable_params()}
    ms.save_checkpoint([{"name": n, "data": Tensor(a)} for n, a in trained.items()], path, format=file_format)

    config = mindpet_to_peft(path, tmp_path / "hf", modules_to_save=["head"], **arguments)
    assert isinstance(config, config_class)
    assert config.target_modules == ["layer"]
    plain = Net(nn.Dense(6, 8, net.layer.weight, net.layer.bias))
    model = PeftModel.from_pretrained(plain, tmp_path / "hf")
    x = Tensor(np.random.default_rng(1).standard_normal((4, 6)), ms.float32)
    assert_same(model(x), net.set_train(False)(x))
    with model.disable_adapter():
        assert differ(model(x), net(x))

    back = str(tmp_path / "back" / f"ours.{file_format}")
    block = peft_to_mindpet(tmp_path / "hf", back)
    assert block["pet_type"] == kind
    assert block["target_modules"] == "layer$"
    loaded = ms.load_checkpoint(back, format=file_format)
    assert {name: array(p).tobytes() for name, p in loaded.items()} == {n: a.tobytes() for n, a in trained.items()}


LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_adapter(folder: Path, **settings: Any) -> PeftModel:
    base = LlamaForCausalLM(LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=2))
    model = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": LINEAR} | settings))
    shake(model.trainable_params())
    model.save_pretrained(folder)
    return model


def deltas(model: PeftModel) -> dict[str, np.ndarray]:
    return {layer.site.path: array(layer.adapters["default"].delta_weight()) for layer in layers_of(model)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mcore"])
def test_llama_under_mindformers_names(architecture: str, tmp_path: Path):
    llama_adapter(tmp_path / "a")
    block = peft_to_mindpet(tmp_path / "a", tmp_path / "mf.ckpt", architecture)
    assert (block["lora_rank"], block["lora_alpha"]) == (2, 6)
    names = set(ms.load_checkpoint(str(tmp_path / "mf.ckpt")))
    if architecture == "mcore":
        inner = [f"self_attention.linear_{x}" for x in (*"qkv", "proj")]
        inner += ["mlp.gating", "mlp.hidden", "mlp.linear_fc2"]
        stem = "decoder.layers"
    else:
        inner = [f"attention.w{x}" for x in "qkvo"] + [f"feed_forward.w{n}" for n in (1, 2, 3)]
        stem = "model.layers"
        assert block["target_modules"] == "w1$|w2$|w3$|wk$|wo$|wq$|wv$"
    assert names == {f"{stem}.{n}.{i}.mindpet_delta_lora_{x}" for n in range(2) for i in inner for x in "ab"}
    config = mindpet_to_peft(tmp_path / "mf.ckpt", tmp_path / "b", config=block, architecture=architecture)
    first, second = (read_tensors(tmp_path / folder).arrays for folder in "ab")
    assert {key: a.tobytes() for key, a in first.items()} == {key: a.tobytes() for key, a in second.items()}
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 6, {})


def test_fused_layers_have_the_same_update(tmp_path: Path):
    before = deltas(llama_adapter(tmp_path / "a"))
    sizes = [16, 8, 8]
    block = peft_to_mindpet(tmp_path / "a", tmp_path / "mf.safetensors", "llama", fused=True)
    assert block["lora_rank"] == 6  # three factors of rank 2 beside each other; the others are filled up
    tensors = safetensors.numpy.load_file(tmp_path / "mf.safetensors")
    assert tensors["model.layers.1.attention.w_qkv.mindpet_delta_lora_b"].shape == (32, 6)
    assert tensors["model.layers.0.feed_forward.w_gate_hidden.mindpet_delta_lora_a"].shape == (6, 16)
    mindpet_to_peft(tmp_path / "mf.safetensors", tmp_path / "b", config=block, architecture="llama", qkv_sizes=sizes)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=2))
    after = deltas(PeftModel.from_pretrained(base, tmp_path / "b"))
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert_same(after[path], value)
    with pytest.raises(ConfigError, match=r"w_qkv has 32 rows, which \[10, 10, 10\] do not make up"):
        mindpet_to_peft(tmp_path / "mf.safetensors", tmp_path / "c", lora_alpha=6, architecture="llama")


def test_ranks_and_scalings_of_their_own_become_one(tmp_path: Path):
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1, r"layers\.1.*o_proj": 8}}
    before = deltas(llama_adapter(tmp_path / "a", use_rslora=True, **patterns))
    block = peft_to_mindpet(tmp_path / "a", tmp_path / "mf.ckpt", "llama")
    assert block["lora_rank"] == 3
    mindpet_to_peft(tmp_path / "mf.ckpt", tmp_path / "b", config=block, architecture="llama")
    base = LlamaForCausalLM(LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=2))
    after = deltas(PeftModel.from_pretrained(base, tmp_path / "b"))
    for path, value in before.items():
        assert_same(after[path], value)


def factors(rng: np.random.Generator, layer: str, out: int, in_: int = 6, r: int = 2) -> dict[str, np.ndarray]:
    a, b = rng.standard_normal((r, in_)), rng.standard_normal((out, r))
    return {f"{layer}.mindpet_delta_lora_a": a.astype("f4"), f"{layer}.mindpet_delta_lora_b": b.astype("f4")}


def test_gpt2(tmp_path: Path):
    rng, block = np.random.default_rng(0), "backbone.blocks.3."
    given = {}
    for name in ("attention.dense1", "attention.dense2", "attention.dense3", "attention.projection", "output.mapping"):
        given |= factors(rng, block + name, 6)
    config = mindpet_to_peft(given, tmp_path / "hf", lora_alpha=4, architecture="gpt2")
    assert config.target_modules == [f"transformer.h.3.{end}" for end in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert config.rank_pattern == {"transformer.h.3.attn.c_attn": 6}
    assert config.alpha_pattern == {"transformer.h.3.attn.c_attn": 12}  # the scaling is the same, 2
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "adapter_model.safetensors")
    stem = "base_model.model.transformer.h.3.attn.c_attn.lora_"
    whole = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
    parts = [given[f"{block}attention.dense{i}.mindpet_delta_lora_b"] for i in (1, 2, 3)]
    downs = [given[f"{block}attention.dense{i}.mindpet_delta_lora_a"] for i in (1, 2, 3)]
    assert_same(whole, np.concatenate([b @ a for a, b in zip(downs, parts)]))
    out = peft_to_mindpet(tmp_path / "hf", tmp_path / "mf.safetensors", "gpt2")
    assert (out["lora_rank"], out["lora_alpha"]) == (6, 12)
    back = safetensors.numpy.load_file(tmp_path / "mf.safetensors")
    assert back.keys() == given.keys()
    for i in (1, 2, 3):
        a, b = (back[f"{block}attention.dense{i}.mindpet_delta_lora_{x}"] for x in "ab")
        assert_same(b @ a, parts[i - 1] @ downs[i - 1])


def test_glm_and_older_names(tmp_path: Path):
    rng = np.random.default_rng(0)
    stem = "transformer.encoder.layers.0."
    given = factors(rng, f"{stem}self_attention.query_key_value", 10) | factors(rng, f"{stem}mlp.dense_4h_to_h", 6)
    older = {name.replace("mindpet_delta", "tk_delta"): value for name, value in given.items()}
    for tensors in (given, older):
        config = mindpet_to_peft(tensors, tmp_path / "hf", lora_alpha=4, architecture="glm", qkv_sizes=[6, 2, 2])
        ends = ["mlp.down_proj", *(f"self_attn.{x}_proj" for x in "kqv")]
        assert config.target_modules == [f"model.layers.0.{end}" for end in ends]
    peft_to_mindpet(tmp_path / "hf", tmp_path / "mf.safetensors", "glm", fused=True)
    back = safetensors.numpy.load_file(tmp_path / "mf.safetensors")
    # All three share A, as they came, so that not a bit has changed.
    assert {name: value.tobytes() for name, value in back.items()} == {n: v.tobytes() for n, v in given.items()}


@pytest.mark.parametrize("projection", [False, True])
def test_prefixes(projection: bool, tmp_path: Path):
    cell = delta.PrefixEncoder(3, 2, 2, 4, projection, 5, 0.0).set_train(False)
    shake(cell.trainable_params())
    ms.save_checkpoint(cell, str(tmp_path / "mf.ckpt"))
    run = {"num_layers": 2, "num_heads": 2, "hidden_size": 8}
    run["pet_config"] = {"pet_type": "ptuning2", "pre_seq_len": 3, "prefix_projection": projection, "dropout_prob": 0}
    config = mindpet_to_peft(tmp_path / "mf.ckpt", tmp_path / "hf", config=run)
    sizes = (config.num_virtual_tokens, config.num_layers, config.num_attention_heads, config.token_dim)
    assert sizes == (3, 2, 2, 8)
    prompt = safetensors.numpy.load_file(tmp_path / "hf" / "adapter_model.safetensors")["prompt_embeddings"]
    for layer, prefix in enumerate(cell(1, ms.float32)):
        expected = prompt.reshape(3, 2, 2, 2, 4)[:, layer].transpose(1, 2, 0, 3)
        assert_same(array(prefix)[:, 0], expected, "merge")
    block = peft_to_mindpet(tmp_path / "hf", tmp_path / "back.ckpt")
    fresh = delta.PrefixEncoder(3, 2, 2, 4, block["prefix_projection"], 5, 0.0).set_train(False)
    ms.load_param_into_net(fresh, ms.load_checkpoint(str(tmp_path / "back.ckpt")), strict_load=True)
    for ours, theirs in zip(fresh(2, ms.float32), cell(2, ms.float32)):
        assert_same(ours, theirs, "merge")
    with pytest.warns(PeftWarning, match="rotary positions"):
        mindpet_to_peft(tmp_path / "mf.ckpt", tmp_path / "rotary", config=run, architecture="llama")


class Layered(nn.Cell):
    """A `PrefixLayer` in each of two layers."""

    def __init__(self, tokens: int = 4, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.CellList([nn.Dense(1, 1) for _ in range(12)])
        for block in self.blocks:
            block.prefix = delta.PrefixLayer(tokens, 2, 2, width, 5, 3, 0.0)
        self.update_parameters_name()


def prefixes_of(net: Layered) -> list[tuple[np.ndarray, np.ndarray]]:
    return [tuple(array(part) for part in block.prefix()) for block in net.blocks]


def saved(net: nn.Cell, path: Path) -> Path:
    ms.save_checkpoint(net, str(path), choice_func=lambda name: "mindpet_delta" in name)
    return path


SIZES = {"num_layers": 12, "num_heads": 2, "hidden_size": 6}
LAYERED = SIZES | {"pet_config": {"pet_type": "prefixtuning", "prefix_token_num": 4, "mid_dim": 3}}


def test_prefixes_in_each_layer(tmp_path: Path):
    net = Layered().set_train(False)
    shake(net.trainable_params())
    config = mindpet_to_peft(saved(net, tmp_path / "theirs.ckpt"), tmp_path / "hf", config=LAYERED)
    assert (config.num_virtual_tokens, config.num_layers, config.token_dim) == (4, 12, 6)
    prompt = safetensors.numpy.load_file(tmp_path / "hf" / "adapter_model.safetensors")["prompt_embeddings"]
    for number, (key, value) in enumerate(prefixes_of(net)):  # layer 10 comes after layer 2
        assert_same(prompt.reshape(4, 12, 2, 6)[:, number], np.stack([key, value], 1), "merge")

    block = peft_to_mindpet(tmp_path / "hf", tmp_path / "back.ckpt", prefix_layers="blocks.{}.prefix")
    assert block == {"pet_type": "prefixtuning", "prefix_token_num": 4, "mid_dim": 4, "dropout_rate": 0.0}
    again = mindpet_to_peft(tmp_path / "back.ckpt", tmp_path / "again", config=LAYERED)
    assert again.num_virtual_tokens == 4
    kept = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")["prompt_embeddings"]
    assert kept.tobytes() == prompt.tobytes()
    fresh = Layered().set_train(False)
    for cell in fresh.blocks:
        cell.prefix = delta.PrefixLayer(4, 2, 2, 6, 4, block["mid_dim"], block["dropout_rate"]).set_train(False)
    fresh.update_parameters_name()
    ms.load_param_into_net(fresh, ms.load_checkpoint(str(tmp_path / "back.ckpt")))
    for ours, theirs in zip(prefixes_of(fresh), prefixes_of(net)):
        assert_same(ours[0], theirs[0], "merge")
        assert_same(ours[1], theirs[1], "merge")


def test_a_prefix_of_mindpets_own_layer_is_key_and_value(tmp_path: Path):
    rng, stem = np.random.default_rng(0), "mindpet_delta_prefixtuning_"
    shapes = {"wte.embedding_table": (4, 5), "control_trans.0.weight": (3, 5), "control_trans.0.bias": (3,)}
    shapes |= {"control_trans.2.weight": (6, 3), "control_trans.2.bias": (6,)}
    given = {stem + name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    mindpet_to_peft(given, tmp_path / "hf", config=LAYERED | {"num_layers": 1})
    prompt = safetensors.numpy.load_file(tmp_path / "hf" / "adapter_model.safetensors")["prompt_embeddings"]
    assert (prompt[:, :6] == prompt[:, 6:]).all()
    h = np.tanh(
        given[f"{stem}wte.embedding_table"] @ given[f"{stem}control_trans.0.weight"].T
        + given[f"{stem}control_trans.0.bias"]
    )
    assert_same(prompt[:, :6], h @ given[f"{stem}control_trans.2.weight"].T + given[f"{stem}control_trans.2.bias"])


@pytest.mark.parametrize(
    ("drop", "run", "kind", "text"),
    [
        (None, {"num_layers": 3}, ConfigError, "num_layers=3, but the checkpoint has prefixes in 12 layers"),
        (None, {"hidden_size": 4}, ConfigError, "neither token_dim=4 nor twice that"),
        (
            "blocks.3.prefix.mindpet_delta_prefixtuning_wte.embedding_table",
            {},
            LoadError,
            "blocks.3.prefix lacks its wte",
        ),
        ("blocks.3.prefix.mindpet_delta_prefixtuning_control_trans.2.bias", {}, LoadError, "control_trans.2.bias"),
    ],
)
def test_prefixes_that_do_not_fit(drop: str | None, run: dict, kind: type, text: str, tmp_path: Path):
    given = {p.name: array(p) for p in Layered().get_parameters() if "mindpet_delta" in p.name}
    given.pop(drop, None)
    with pytest.raises(kind, match=text):
        mindpet_to_peft(given, tmp_path / "hf", config=LAYERED | run)
    assert not (tmp_path / "hf").exists()


def test_where_the_layers_prefixes_go_must_be_said_right(tmp_path: Path):
    given = {p.name: array(p) for p in Layered().get_parameters() if "mindpet_delta" in p.name}
    mindpet_to_peft(given, tmp_path / "hf", config=LAYERED)
    for path in ("blocks.prefix", "blocks.{}.{}"):
        with pytest.raises(ConfigError, match=r"must hold \{\} once"):
            peft_to_mindpet(tmp_path / "hf", tmp_path / "mf.ckpt", prefix_layers=path)
    llama_adapter(tmp_path / "lora")
    with pytest.raises(ConfigError, match="prefix_layers is for prefixes"):
        peft_to_mindpet(tmp_path / "lora", tmp_path / "mf.ckpt", prefix_layers="blocks.{}.prefix")
    assert not (tmp_path / "mf.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "kind", "text"),
    [
        ({}, {}, ConfigError, "pass lora_alpha, or the pet_config"),
        ({}, {"lora_alpha": 4, "architecture": "lama"}, ConfigError, "architecture='lama' has no map"),
        ({}, {"config": {"pet_type": "adapter"}}, ConfigError, "weights of LORA, but the config is of BOTTLENECK"),
        ({"l.mindpet_delta_lora_b": None}, {"lora_alpha": 4}, LoadError, "factors is missing at l"),
        ({"l.mindpet_delta_lora_b": None, "l.mindpet_delta_lora_a": None}, {}, LoadError, "found none"),
        (
            {"x.mindpet_delta_adapter_block.mindpet_delta_adapter_up_sampler.bias": np.ones(3, "f4")},
            {"lora_alpha": 4},
            LoadError,
            "those of several methods",
        ),
    ],
)
def test_refusals(change: dict, arguments: dict, kind: type, text: str, tmp_path: Path):
    given = factors(np.random.default_rng(0), "l", 4) | change
    with pytest.raises(kind, match=text):
        mindpet_to_peft({k: v for k, v in given.items() if v is not None}, tmp_path / "hf", **arguments)
    assert not (tmp_path / "hf").exists()


def test_an_adapter_that_is_there_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = factors(np.random.default_rng(0), "layer", 8)
    get_peft_model(Net(nn.Dense(6, 8)), LoraConfig(target_modules=["layer"])).save_pretrained(tmp_path)
    (tmp_path / "prompt_encoder.safetensors").write_bytes(b"of an older adapter")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("msft_peft.config.write_text", no_space)
        with pytest.raises(OSError, match="No space left"):
            mindpet_to_peft(given, tmp_path, lora_alpha=4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    mindpet_to_peft(given, tmp_path, lora_alpha=4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(Net(nn.Dense(6, 8)), tmp_path)
    assert_same(layers_of(loaded)[0].lora_A["default"].weight, given["layer.mindpet_delta_lora_a"])


def test_weights_of_the_base_model_are_left_out_and_said(tmp_path: Path):
    given = factors(np.random.default_rng(0), "l", 4) | {"l.weight": np.ones((4, 6), "f4")}
    with pytest.warns(PeftWarning, match=r"1 other tensors of the checkpoint are left out, \['l.weight'\]"):
        mindpet_to_peft(given, tmp_path / "hf", lora_alpha=4)
    assert len(safetensors.numpy.load_file(tmp_path / "hf" / "adapter_model.safetensors")) == 2


def test_broken_files(tmp_path: Path):
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name in ("a.ckpt", "a.safetensors", "missing.ckpt"):
        with pytest.raises(LoadError, match=name):
            mindpet_to_peft(tmp_path / name, tmp_path / "hf", lora_alpha=4)


def test_what_mindpet_cannot_say(tmp_path: Path):
    llama_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(LoadError, match=r"no counterpart of these tensors.*lora_magnitude_vector"):
        peft_to_mindpet(tmp_path / "dora", tmp_path / "mf.ckpt")
    llama_adapter(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"must end with .ckpt or .safetensors"):
        peft_to_mindpet(tmp_path / "plain", tmp_path / "mf.bin")
    assert not (tmp_path / "mf.ckpt").exists()
