"""`convert_to_lora` and `save_as_lora`: any additive adapter as a LoRA adapter."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor, nn, ops

from msft_peft import (
    AdapterNameError,
    ConfigError,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
)
from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.registry import METHODS, Method
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

KINDS = ("dense", "embedding", "conv1d", "conv2d", "conv3d")


@dataclass
class FullConfig(TargetedConfig):
    peft_type: str | None = "FULL"


class FullPatch(Patch):
    """Adds a weight of its own to the layer's."""

    def setup(self, site: Any, config: FullConfig) -> None:
        self.delta = self.weight("delta", site.shape, "zeros")

    def delta_weight(self) -> Tensor:
        return self.delta


class Residual(FullPatch):
    """The base weight gives up what the adapter begins with."""

    residual = True

    def setup(self, site: Any, config: FullConfig) -> None:
        self.delta = self.weight("delta", site.shape, "ones")


@dataclass
class ScaleConfig(TargetedConfig):
    peft_type: str | None = "SCALE"


class ScalePatch(Patch):
    """Multiplies the layer's weight."""

    def setup(self, site: Any, config: ScaleConfig) -> None:
        self.scale = self.weight("scale", (1,), "ones")

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.mul(y, self.scale)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w * self.scale, b


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods above, for one test."""
    monkeypatch.setitem(METHODS, "FULL", Method(config=FullConfig, patches=dict.fromkeys(KINDS, FullPatch)))
    monkeypatch.setitem(METHODS, "SCALE", Method(config=ScaleConfig, patches={"dense": ScalePatch}))


def full(net: nn.Cell, *targets: str, **settings: Any) -> PeftModel:
    """A net with an adapter of full rank."""
    model = get_peft_model(net.set_train(False), FullConfig(target_modules=list(targets), **settings))
    shake(weights_of(model, "default"))
    return model


NETS = {
    "dense": (nets.Dense, ("lin0", "lin1"), 5),
    "embedding": (nets.Embedding, ("emb", "lin"), 4),
    "conv1d": (partial(nets.Conv, 1), ("conv",), 4),
    "conv2d": (partial(nets.Conv, 2), ("conv",), 4),
    "conv3d": (partial(nets.Conv, 3), ("conv",), 4),
    "gpt2": (nets.Gpt2, ("c_attn", "c_proj"), 6),
    "blocks": (nets.Blocks, ("q", "layers.1.mlp"), 4),
}


@pytest.mark.parametrize("name", NETS)
def test_a_rank_that_is_enough_is_exact(name: str, tmp_path: Path):
    net, targets, rank = NETS[name]
    model = full(net(), *targets)
    expected, before = output(model), state_of(model)
    # Of two layers the other may have a larger rank: then a share of everything does it.
    save_as_lora(tmp_path / "rank", model, rank) if len(targets) == 1 else save_as_lora(tmp_path / "rank", model, 1.0)
    assert state_of(model) == before
    fresh = model.unload()
    base = output(fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "rank")
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert_same(output(loaded), expected, "merge")
    assert differ(output(loaded), base)


def test_the_files_hold_what_convert_returns(tmp_path: Path):
    model = full(nets.Dense(), "lin0", "lin1")
    config, state = convert_to_lora(model, 3)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (3, 3, {}, {})
    assert config.target_modules == ["lin0", "lin1"]
    keys = [f"base_model.model.{lin}.lora_{f}.weight" for lin in ("lin0", "lin1") for f in "AB"]
    assert list(state) == keys
    assert all(isinstance(value, Tensor) for value in state.values())
    save_as_lora(tmp_path, model, 3)
    saved = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {key: value.tobytes() for key, value in saved.items()} == {
        key: array(value).tobytes() for key, value in state.items()
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_fixed_rank_is_the_nearest(rank: int):
    model = full(nets.Dense(), "lin0", "lin1")
    _, state = convert_to_lora(model, rank)
    for layer in layers_of(model):
        key = f"base_model.model.{layer.site.path}.lora_"
        a, b = (array(state[f"{key}{factor}.weight"]) for factor in "AB")
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        delta = array(layer.get_delta_weight("default"))
        lost = np.linalg.svd(delta, compute_uv=False)[rank:]
        np.testing.assert_allclose(np.linalg.norm(delta - b @ a), np.linalg.norm(lost), rtol=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_a_share_of_the_energy(share: float):
    model = full(nets.Blocks(2), "q", "layers.1.mlp")
    config, state = convert_to_lora(model, share)
    assert config.r == config.lora_alpha == 1
    assert config.rank_pattern == config.alpha_pattern
    for layer in layers_of(model):
        r = config.rank_pattern[layer.site.path]
        assert state[f"base_model.model.{layer.site.path}.lora_A.weight"].shape[0] == r
        energy = np.linalg.svd(array(layer.get_delta_weight("default")), compute_uv=False) ** 2
        assert energy[:r].sum() >= share * energy.sum() * (1 - 1e-6)
        assert energy[: r - 1].sum() < share * energy.sum()


def test_nothing_learned_has_rank_one():
    model = get_peft_model(nets.Dense(), FullConfig(target_modules=["lin0"]))
    config, state = convert_to_lora(model, 0.5)
    assert config.rank_pattern == {"lin0": 1}
    assert not array(state["base_model.model.lin0.lora_B.weight"]).any()


class Nested(nn.Cell):
    """A layer whose path is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Dense(6, 6)
        self.inner = nn.CellDict({"lin": nn.Dense(6, 6)})

    def construct(self, x: Tensor) -> Tensor:
        return self.inner["lin"](self.lin(x))

    def sample(self) -> Tensor:
        return nets.floats(3, 6)


def test_patterns_tell_a_path_from_the_end_of_another(tmp_path: Path):
    model = get_peft_model(Nested(), FullConfig(target_modules=["lin"]))
    for layer, rank in zip(layers_of(model), (1, 3), strict=True):
        u = np.random.default_rng(rank).standard_normal((6, rank)).astype(np.float32)
        layer.adapters["default"].delta.copy_(Tensor(u @ u.T))
    expected = output(model)
    config, _ = convert_to_lora(model, 0.9999)
    save_as_lora(tmp_path, model, 0.9999)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert_same(output(loaded), expected, "merge")
    assert sorted(config.rank_pattern.values()) == [1, 3]
    assert [layer.adapters["default"].r for layer in layers_of(loaded)] == [1, 3]


def test_layers_that_are_trained_whole_come_along(tmp_path: Path):
    model = full(nets.Classifier(), "backbone", modules_to_save=["classifier"], task_type="SEQ_CLS")
    expected = output(model)
    save_as_lora(tmp_path, model, 6)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert type(loaded).__name__ == "PeftModelForSequenceClassification"
    assert_same(output(loaded), expected, "merge")


def test_an_adapter_that_began_with_a_part_of_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(METHODS, "FULL", Method(config=FullConfig, patches={"dense": Residual}))
    net = nets.Dense()
    before = output(net)
    model = get_peft_model(net, FullConfig(target_modules=["lin0"]))
    assert_same(output(model), before, "merge")
    shake(weights_of(model, "default"))
    expected = output(model)
    save_as_lora(tmp_path, model, 6)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert_same(output(loaded), expected, "merge")
    assert differ(expected, before)


def test_a_model_with_injected_adapters_and_other_names(tmp_path: Path):
    net = nets.Dense()
    inject_adapter_in_model(FullConfig(target_modules=["lin0"]), net, adapter_name="other")
    shake([net.lin0.adapters["other"].delta])
    expected = output(net)
    save_as_lora(tmp_path, net, 6, adapter_name="other")
    net.lin0.set_requires_grad(["other"], False)
    base = nets.Dense()
    for old, new in zip(base.get_parameters(), [net.lin0.weight, net.lin0.bias, net.lin1.weight], strict=True):
        old.copy_(new)
    assert_same(output(PeftModel.from_pretrained(base, tmp_path)), expected, "merge")


def test_half_of_a_lora_adapter():
    model = get_peft_model(nets.Dense(), LoraConfig(r=4, target_modules=["lin0"], lora_alpha=3))
    shake(weights_of(model, "default"))
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, state = convert_to_lora(model, 2)
    assert (config.r, config.lora_alpha) == (2, 2)
    assert state["base_model.model.lin0.lora_A.weight"].shape == (2, 6)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        _, state = convert_to_lora(model, 4)
    product = array(state["base_model.model.lin0.lora_B.weight"]) @ array(state["base_model.model.lin0.lora_A.weight"])
    assert_same(product, layers_of(model)[0].get_delta_weight("default"), "merge")


@pytest.mark.filterwarnings("ignore:Converting")
def test_trainable_tokens_become_a_low_rank_update_too(tmp_path: Path):
    model = get_peft_model(
        nets.Embedding().set_train(False),
        LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"emb": [1, 7]}),
    )
    shake(weights_of(model, "default"))
    expected = output(model)
    save_as_lora(tmp_path, model, 1.0)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert_same(output(loaded), expected, "merge")
    assert loaded.peft_config["default"].rank_pattern == {"emb": 2, "lin": 2}


def test_what_supports_conversion():
    model = full(nets.Dense(), "lin0", "lin1")
    assert model.supports_lora_conversion()
    assert model.base_model.supports_lora_conversion("default")
    assert not model.supports_lora_conversion("zz")
    assert layers_of(model)[0].supports_lora_conversion()
    assert not layers_of(model)[0].supports_lora_conversion("zz")
    assert not get_peft_model(nets.Dense(), ScaleConfig(target_modules=["lin0"])).supports_lora_conversion()
    grouped = nets.Conv(2, channels=(4, 4), group=2)
    assert not get_peft_model(grouped, LoraConfig(r=2, target_modules=["conv"])).supports_lora_conversion()


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "zero": ({"rank": 0}, ConfigError, "Passing a rank of 0 doesn't make sense"),
    "negative": ({"rank": -1}, ConfigError, "rank of -1"),
    "above one": ({"rank": 1.5}, ConfigError, "must be between 0 and 1 but got 1.5"),
    "nothing": ({"rank": 0.0}, ConfigError, "must be between 0 and 1 but got 0.0"),
    "bool": ({"rank": True}, TypeError, "True"),
    "text": ({"rank": "2"}, TypeError, "'2'"),
    "too large": ({"rank": 6}, ConfigError, r"rank 6 is larger than the weight shape \(5\).*lin1"),
    "unknown adapter": ({"rank": 2, "adapter_name": "zz"}, AdapterNameError, "zz not found"),
    "compile": ({"rank": 2, "compile_kwargs": {}}, NotImplementedError, "compile_kwargs"),
}


def test_an_adapter_that_is_there_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = full(nets.Dense(), "lin0", "lin1")
    save_as_lora(tmp_path, model, 2)
    (tmp_path / "prompt_encoder.safetensors").write_bytes(b"of an older adapter")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("msft_peft.config.write_text", no_space)
        with pytest.raises(OSError, match="No space left"):
            save_as_lora(tmp_path, model, 4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_as_lora(tmp_path, model, 4)
    assert {path.name for path in tmp_path.iterdir()} == before.keys() - {"prompt_encoder.safetensors"}
    assert PeftModel.from_pretrained(nets.Dense(), tmp_path).peft_config["default"].r == 4


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str, tmp_path: Path):
    arguments, error, says = BAD_CALLS[name]
    model = full(nets.Dense(), "lin0", "lin1")
    with pytest.raises(error, match=says):
        convert_to_lora(model, **arguments)
    with pytest.raises(error, match=says):
        save_as_lora(tmp_path / "out", model, **arguments)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted(tmp_path: Path):
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: lin0.*SCALE adapter 'default'"):
        convert_to_lora(get_peft_model(nets.Dense(), ScaleConfig(target_modules=["lin0"])), 2)
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        convert_to_lora(nets.Dense(), 2)
    alora = {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    parameter = {"target_modules": [], "target_parameters": ["lin0.weight"]}
    for option in ({"use_dora": True}, {"lora_bias": True}, alora, parameter):
        model = get_peft_model(nets.Dense(), LoraConfig(**{"target_modules": ["lin0"]} | option))
        with pytest.raises(TypeError, match=r"do not support LoRA conversion: lin0"):
            convert_to_lora(model, 2)
    biased = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"], bias="all"))
    with pytest.raises(ConfigError, match="sets bias=all, this is not supported right now"):
        convert_to_lora(biased, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="should be a directory"):
        save_as_lora(tmp_path / "file", full(nets.Dense(), "lin0"), 2)
