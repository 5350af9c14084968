"""What the core does for methods that are not like LoRA: a multiplicative one, one that cannot merge, two at once."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import mindspore as ms
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    ConfigError,
    HiraConfig,
    LNTuningConfig,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftConfig,
    PeftType,
    TrainableTokensConfig,
    get_peft_config,
    get_peft_model,
)
from msft_peft.backend.arrays import as_float32
from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.registry import METHODS, Method, discover, method_of
from tests import nets
from tests.cases import output, shake, weights_of
from tests.tolerances import array, assert_same, differ


@dataclass
class ScaleConfig(TargetedConfig):
    peft_type: str | None = "SCALE"


class ScalePatch(Patch):
    """Scales a dense layer's inputs and adds nothing: W' = W·diag(1 + s)."""

    def setup(self, site: Any, config: ScaleConfig) -> None:
        self.scale = self.weight("scale", (site.in_features,), "zeros")

    def before(self, x: Tensor) -> Tensor:
        return ops.cast(x * (1 + self.scale), x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w * ops.reshape(1 + self.scale, (1, -1)), b


@dataclass
class DeltaConfig(TargetedConfig):
    peft_type: str | None = "DELTA"


class DeltaPatch(Patch):
    """A full delta: everything but the weight itself comes from the defaults."""

    def setup(self, site: Any, config: DeltaConfig) -> None:
        self.delta = self.weight("delta", site.shape, "zeros")

    def delta_weight(self) -> Tensor:
        return self.delta


class TakingPatch(Patch):
    """Begins as half of the base weight, which gives that half up; keeps its delta some levels down."""

    residual = True

    def setup(self, site: Any, config: DeltaConfig) -> None:
        half = as_float32(array(site.from_storage(site.weight))) / 2
        self.inner_delta = self.weight("inner.delta", site.shape, half)
        self.inner_offset = self.weight("inner.offset", (site.out_features,), "zeros")

    def delta_weight(self) -> Tensor:
        return self.inner_delta


SCALE = Method(config=ScaleConfig, patches={"dense": ScalePatch})
DELTA = Method(config=DeltaConfig, patches={"dense": DeltaPatch, "embedding": DeltaPatch, "conv2d": DeltaPatch})


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two methods above, for one test."""
    monkeypatch.setitem(METHODS, "SCALE", SCALE)
    monkeypatch.setitem(METHODS, "DELTA", DELTA)


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> None:
    """DELTA with Patches that take from the base weight."""
    monkeypatch.setitem(METHODS, "DELTA", replace(DELTA, patches={"dense": TakingPatch}))


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_a_method_that_multiplies_unmerges_to_the_bit(mode: str, dtype: Any):
    net = nets.Dense(dtype)
    model = get_peft_model(net, ScaleConfig(target_modules=["lin0", "lin1"]))
    fresh = output(model)
    shake(weights_of(model, "default"))
    expected, before = output(model), array(net.lin0.weight)
    assert differ(expected, fresh)
    model.merge_adapter()
    assert differ(net.lin0.weight, before)
    assert_same(model(model.sample()), expected, "merge")
    model.unmerge_adapter()
    assert array(net.lin0.weight).tobytes() == before.tobytes()
    assert_same(model(model.sample()), expected)


def test_two_that_multiply_merge_in_turn_and_unmerge_to_the_bit():
    net = nets.Dense()
    model = get_peft_model(net, ScaleConfig(target_modules=["lin0"]), adapter_name="one")
    model.add_adapter("two", ScaleConfig(target_modules=["lin0"]))
    shake(weights_of(model, "one"))
    shake(weights_of(model, "two"), seed=2)
    before = array(net.lin0.weight)
    model.base_model.set_adapter(["one", "two"])
    both = output(model)
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["two"])
    assert_same(output(model), both, "merge")
    model.unmerge_adapter()
    assert array(net.lin0.weight).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("net", "target"),
    [(nets.Dense, "lin0"), (nets.Embedding, "emb"), (lambda: nets.Conv(2), "conv")],
    ids=["dense", "embedding", "conv"],
)
def test_a_delta_weight_is_all_that_an_additive_method_must_write(net: Any, target: str, mode: str):
    model = get_peft_model(net(), DeltaConfig(target_modules=[target]))
    fresh = output(model)
    shake(weights_of(model, "default"))
    expected = output(model)
    assert differ(expected, fresh)
    assert_same(model(model.sample()), expected)
    model.merge_adapter()
    assert_same(output(model), expected, "merge")


def test_a_method_that_cannot_merge_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "SCALE", replace(SCALE, merges=False))
    net = nets.Dense()
    model = get_peft_model(net, ScaleConfig(target_modules=["lin0"]))
    shake(weights_of(model, "default"))
    before, expected = array(net.lin0.weight), output(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            MergeError, match="SCALE adapters cannot be merged into the base weights: 'default' is one"
        ):
            call()
    assert array(net.lin0.weight).tobytes() == before.tobytes()
    assert_same(output(model), expected, "exact")
    assert model.unload() is net


def test_methods_do_not_mix_in_one_model():
    model = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(
        ValueError, match=r"Cannot combine adapters with different peft types. Found .*LORA and .*SCALE"
    ):
        model.add_adapter("other", ScaleConfig(target_modules=["lin0"]))
    assert list(model.peft_config) == ["default"]


def test_another_methods_files_are_not_loaded(tmp_path):
    get_peft_model(nets.Dense(), ScaleConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    model = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"]))
    for name in ("other", "default"):
        with pytest.raises(ConfigError, match="different peft types"):
            model.load_adapter(tmp_path, name)
    assert list(model.peft_config) == ["default"]


def test_layers_of_kinds_that_a_method_lacks_are_refused():
    with pytest.raises(ValueError, match=r"Target module emb \(Embedding\) is not supported.*SCALE: \['dense'\]"):
        get_peft_model(nets.Embedding(), ScaleConfig(target_modules=["emb", "lin"]))


# --- the registry ---------------------------------------------------------------------------------------------------


def test_the_methods_that_there_are():
    assert "LORA" in METHODS
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert PeftType.LORA == "LORA"
    assert PeftType("LORA") is PeftType.LORA
    assert method_of(LoraConfig()) is METHODS["LORA"]


def test_a_config_without_a_method():
    @dataclass
    class Unknown(PeftConfig):
        peft_type: str | None = "UNKNOWN"

    with pytest.raises(ConfigError, match=r"peft_type='UNKNOWN' is not available; available are .*'DELTA'.*'LORA'"):
        method_of(Unknown())
    with pytest.raises(ConfigError, match=r"must be a PeftConfig, got <class 'dict'>"):
        method_of({"peft_type": "LORA"})
    with pytest.raises(ConfigError, match="peft_type"):
        get_peft_model(nets.Dense(), PeftConfig())


def test_get_peft_config():
    assert get_peft_config({"peft_type": "LORA", "r": 4}) == LoraConfig(r=4)
    for fields in ({}, {"peft_type": None}, {"peft_type": "FOO"}, {"peft_type": "LORA", "r": 0}):
        with pytest.raises(ConfigError, match="the given dict"):
            get_peft_config(fields)


def test_two_methods_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("twins")
    module.METHOD = Method(config=LoraConfig, patches={})
    package = ModuleType("pack")
    package.__path__ = ["nowhere"]
    info = type("Info", (), {"name": "twins"})
    monkeypatch.setattr("pkgutil.iter_modules", lambda *_: [info])
    monkeypatch.setattr("importlib.import_module", lambda _: module)
    with pytest.raises(ConfigError, match="two methods are called LORA: the second is in twins"):
        discover(package)


def test_what_a_fresh_adapter_adds_is_taken_from_the_base_and_given_back(mode: str, taking: None):
    net = nets.Dense()
    x, expected, before = net.sample(), output(net), array(net.lin0.weight)
    model = get_peft_model(net, DeltaConfig(target_modules=["lin0"]))
    assert_same(array(net.lin0.weight), before / 2)
    assert_same(model(x), expected)
    shake(weights_of(model, "default"))
    trained = output(model)
    assert differ(trained, expected)
    with model.disable_adapter():
        assert differ(output(model), expected)
    model.merge_adapter()
    assert_same(model(x), trained, "merge")
    model.unmerge_adapter()
    assert_same(model(x), trained, "merge")
    model.delete_adapter("default")
    assert_same(array(net.lin0.weight), before)
    assert_same(model(x), expected)


def test_unload_gives_back_what_was_taken_and_merging_for_good_does_not(taking: None):
    net = nets.Dense()
    before = array(net.lin0.weight)
    config = DeltaConfig(target_modules=["lin0"])
    assert_same(array(get_peft_model(net, config).unload().lin0.weight), before)
    model = get_peft_model(net, config)
    shake(weights_of(model, "default"))
    expected = output(model)
    assert_same(output(model.merge_and_unload()), expected, "merge")


def test_what_is_taken_must_come_from_the_base_itself(taking: None):
    model = get_peft_model(nets.Dense(), DeltaConfig(target_modules=["lin0"]), adapter_name="one")
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge the model first"):
        model.add_adapter("two", DeltaConfig(target_modules=["lin1"]))
    assert list(model.peft_config) == ["one"]


def test_weights_some_levels_down(taking: None):
    model = get_peft_model(nets.Dense(), DeltaConfig(target_modules=["lin0"]), adapter_name="one")
    model.add_adapter("two", DeltaConfig(target_modules=["lin0"]))
    inner = model.get_base_model().lin0.inner
    assert sorted(p.name.partition("lin0.")[2] for p in weights_of(model, "two")) == [
        "inner.delta.two",
        "inner.offset.two",
    ]
    assert sorted(inner.delta) == ["one", "two"]
    model.delete_adapter("two")
    assert list(inner.delta) == ["one"]
    model.delete_adapter("one")
    assert "inner" not in model.get_base_model().lin0._cells


def test_float32_unmerges_what_was_merged_though_the_adapter_has_changed_since():
    net = nets.Dense()
    before = array(net.lin0.weight)
    model = get_peft_model(net, DeltaConfig(target_modules=["lin0"]))
    shake(weights_of(model, "default"))
    model.merge_adapter()
    shake(weights_of(model, "default"), seed=2)
    now = array(weights_of(model, "default")[0])
    model.unmerge_adapter()
    assert_same(array(net.lin0.weight), before)
    assert_same(array(weights_of(model, "default")[0]), now, "exact")


class ScaledEmbedding(nn.Embedding):
    """It scales what it looks up, as the embeddings of Gemma 3, BART and others in transformers do."""

    def __init__(self) -> None:
        super().__init__(10, 6, embedding_table="normal")
        self.embed_scale = 8.0

    def construct(self, ids: Tensor) -> Tensor:
        return super().construct(ids) * self.embed_scale


ON_EMBEDDINGS = {
    "LoRA": LoraConfig(target_modules=["0"], r=2),
    "DoRA": LoraConfig(target_modules=["0"], r=2, use_dora=True),
    "HiRA": HiraConfig(target_modules=["0"], r=2),
    "OFT": OFTConfig(target_modules=["0"], oft_block_size=2),
    "LN tuning": LNTuningConfig(target_modules=["0"]),
    "trainable tokens": TrainableTokensConfig(target_modules=["0"], token_indices=[1, 2]),
}


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_an_embedding_that_scales(name: str, mode: str):
    ms.set_seed(5)
    net = nn.SequentialCell(ScaledEmbedding())
    ids = Tensor([[1, 2, 3]], ms.int32)
    plain = array(net(ids))
    model = get_peft_model(net, ON_EMBEDDINGS[name])
    assert_same(model(ids), plain, "merge")
    shake(weights_of(model, "default"))
    adapted = array(model(ids))
    assert differ(adapted, plain)
    model.merge_adapter()
    assert_same(model(ids), adapted, "merge")
