"""Adapters of different methods in one model."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
from mindspore import Tensor, ops

from msft_peft import AdapterNameError, ConfigError, LoraConfig, MergeError, PeftMixedModel, PeftModel, get_peft_model
from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.registry import METHODS, Method
from tests import nets
from tests.cases import output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ


@dataclass
class StretchConfig(TargetedConfig):
    peft_type: str | None = "STRETCH"


class StretchPatch(Patch):
    """Stretches a dense layer's outputs: W' = diag(1 + s)·W, for a layer without a bias."""

    def setup(self, site: Any, config: StretchConfig) -> None:
        self.stretch = self.weight("stretch", (site.out_features,), "zeros")

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.cast(y * (1 + self.stretch), y.dtype)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 1 + self.stretch
        return w * ops.reshape(factor, (-1, 1)), None if b is None else b * factor


STRETCH = Method(config=StretchConfig, patches={"dense": StretchPatch}, mixed=True)
BOTH = ["lin0", "lin1"]


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method above, and one that cannot be mixed, for one test."""
    monkeypatch.setitem(METHODS, "STRETCH", STRETCH)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": BOTH} | settings)


def mixed() -> PeftMixedModel:
    ms.set_seed(5)
    model = get_peft_model(nets.Dense(), lora(), adapter_name="lora", mixed=True)
    model.add_adapter("stretch", StretchConfig(target_modules=["lin1"]))
    for seed, name in enumerate(["lora", "stretch"]):
        shake(weights_of(model, name), seed=seed + 1)
    return model


def test_38_adapters_of_two_methods_act_together(mode: str):
    model = mixed()
    assert type(model) is PeftMixedModel
    assert model.active_adapters == model.active_adapter == ["lora"]
    assert_same(model(model.sample()), output(model))
    results = []
    for names in (["lora"], ["stretch"], ["lora", "stretch"], ["stretch", "lora"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        results.append(array(model(model.sample())))
        assert_same(results[-1], output(model))
        assert {p.name.split(".")[-2 if "lora_" in p.name else -1] for p in model.trainable_params()} == set(names)
    assert all(differ(one, other) for one, other in pairwise(results))


def test_38_both_together_are_what_the_weights_say():
    model = mixed()
    model.set_adapter(["lora", "stretch"])
    layer = model.get_base_model().lin1
    w = layer.base_layer.weight + layer.get_delta_weight("lora")
    w = w * ops.reshape(1 + layer.adapters["stretch"].stretch, (-1, 1))
    x = nets.floats(3, 8)
    assert_same(layer(x), ops.matmul(x, w.T), "merge")


def test_38_merging_and_unloading():
    model = mixed()
    model.set_adapter(["lora", "stretch"])
    x, expected = model.sample(), output(model)
    model.merge_adapter()
    assert_same(output(model), expected, "merge")
    model.unmerge_adapter()
    assert_same(output(model), expected)
    base = model.merge_and_unload()
    assert type(base) is nets.Dense
    assert_same(base(x), expected, "merge")


def test_38_disabled_it_is_the_base():
    model = mixed()
    model.set_adapter(["lora", "stretch"])
    ms.set_seed(5)
    with model.disable_adapter():
        assert_same(output(model), output(nets.Dense()))


def test_38_files_of_any_method_are_loaded(tmp_path: Path):
    configs = {"lora": lora(), "stretch": StretchConfig(target_modules=["lin1"])}
    for name, config in configs.items():
        ms.set_seed(5)
        single = get_peft_model(nets.Dense(), config, adapter_name=name)
        shake(weights_of(single, name), seed=3)
        single.save_pretrained(tmp_path)
    ms.set_seed(5)
    model = PeftMixedModel.from_pretrained(nets.Dense(), tmp_path / "lora", adapter_name="lora")
    assert type(model) is PeftMixedModel
    report = model.load_adapter(tmp_path / "stretch", "stretch")
    assert (report.missing_keys, report.does_something) == ((), True)
    model.set_adapter("stretch")
    ms.set_seed(5)
    alone = PeftModel.from_pretrained(nets.Dense(), tmp_path / "stretch")
    assert_same(output(model), output(alone), "exact")


def test_38_deleting_several():
    model = mixed()
    model.add_adapter("third", lora())
    before = state_of(model)
    with pytest.raises(
        AdapterNameError, match=r"Adapter\(s\) \['nope'\] not found, available adapters: \['lora', 'st"
    ):
        model.delete_adapter(["lora", "nope"])
    with pytest.raises(AdapterNameError, match=r"Adapter\(s\) \['nope'\] not found"):
        model.set_adapter("nope")
    assert state_of(model) == before
    model.set_adapter("third")
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"Cannot delete adapter\(s\) \['third'\] while they are merged"):
        model.delete_adapter(["stretch", "third"])
    model.unmerge_adapter()
    assert list(model.peft_config) == ["lora", "stretch", "third"]
    model.set_adapter("lora")
    model.delete_adapter(["stretch", "third"])
    assert list(model.peft_config) == ["lora"]
    assert model.active_adapters == ["lora"]


def test_38_what_is_not_to_be_had():
    model = mixed()
    with pytest.raises(NotImplementedError, match="Saving is not supported for PeftMixedModel"):
        model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()
    with pytest.raises(NotImplementedError, match="Model card creation is not supported for PeftMixedModel"):
        model.create_or_update_model_card("nowhere")
    for name in ("get_layer_status", "get_model_status"):
        with pytest.raises(TypeError, match=f"{name} is not supported for PeftMixedModel"):
            getattr(model, name)()


def test_38_methods_that_do_not_mix_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "STRETCH", replace(STRETCH, mixed=False))
    text = r"`peft_type` 'STRETCH' is not compatible with the `PeftMixedModel`. Compatible types are: .*'LORA'"
    net = nets.Dense()
    before = state_of(net)
    with pytest.raises(ConfigError, match=text):
        get_peft_model(net, StretchConfig(target_modules=["lin1"]), mixed=True)
    assert state_of(net) == before
    model = get_peft_model(net, lora(), mixed=True)
    before = state_of(model)
    with pytest.raises(ConfigError, match=text):
        model.add_adapter("other", StretchConfig(target_modules=["lin1"]))
    with pytest.raises(ConfigError, match="must be a PeftConfig"):
        model.add_adapter("other", {"peft_type": "LORA"})
    with pytest.raises(AdapterNameError, match="already exists"):
        model.add_adapter("default", lora())
    assert state_of(model) == before
