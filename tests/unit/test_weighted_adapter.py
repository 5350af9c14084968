"""`add_weighted_adapter`: what becomes of the model. The arithmetic itself: test_combine.py."""

from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msft_peft import AdapterNameError, ConfigError, LoraConfig, LoraModel, PeftModel, get_peft_model, save_as_lora
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ


def adapted(net: nn.Cell, **configs: dict[str, Any]) -> PeftModel:
    """A net with an adapter for each config, of random weights; the first is active."""
    model = None
    for seed, (name, config) in enumerate(configs.items()):
        config = LoraConfig(**{"r": 2, "lora_alpha": 3} | config)
        if model is None:
            model = get_peft_model(net.set_train(False), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        shake(weights_of(model, name), seed=seed)
    return model


def delta_at(model: PeftModel, path: str, adapter: str) -> np.ndarray:
    """What an adapter adds to a layer's weight; zeros where it adds nothing."""
    layer = by_path(model, path)
    if adapter not in layer.adapters:
        return np.zeros(layer.weight.shape, np.float32)
    return array(layer.get_delta_weight(adapter))


def by_path(model: PeftModel, path: str) -> Any:
    return dict(model.get_base_model().cells_and_names())[path]


def both(*targets: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Configs of two adapters, "a" and "b"."""
    settings = {"target_modules": list(targets)} | settings
    return {
        name: {"target_modules": list(targets), **settings, "lora_alpha": alpha}
        for name, alpha in (("a", 3), ("b", 1))
    }


NETS = {
    "dense": (nets.Dense, ("lin0", "lin1")),
    "embedding": (nets.Embedding, ("emb", "lin")),
    "conv1d": (partial(nets.Conv, 1), ("conv",)),
    "conv2d": (partial(nets.Conv, 2), ("conv",)),
    "conv3d": (partial(nets.Conv, 3), ("conv",)),
    "gpt2": (nets.Gpt2, ("c_attn", "c_proj")),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("combination_type", ["cat", "svd"])
def test_the_exact_sum_on_every_kind_of_layer(name: str, combination_type: str):
    net, targets = NETS[name]
    model = adapted(net(), **both(*targets, fan_in_fan_out=name == "gpt2"))
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "c", combination_type, svd_rank=4)
    for path in targets:
        expected = 0.7 * delta_at(model, path, "a") - 1.5 * delta_at(model, path, "b")
        assert_same(delta_at(model, path, "c"), expected.astype(np.float32), "merge")
        assert differ(expected, delta_at(model, path, "a"))


def test_grouped_convolutions_keep_their_groups(mode: str):
    model = adapted(nets.Conv(2, channels=(4, 4), group=2), **both("conv"))
    x = model.sample()

    layer = layers_of(model)[0]

    def change(name: str) -> np.ndarray:
        """What the adapter adds to the layer's output."""
        model.set_adapter(name)
        return array(layer(x)) - array(layer.base_layer(x))

    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "c", "cat")
    assert_same(change("c"), (0.7 * change("a") - 1.5 * change("b")), "merge")
    before = state_of(model)
    with pytest.raises(ValueError, match="groups=2"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "d", "svd")
    assert state_of(model) == before


def test_the_new_adapter_is_idle_until_it_is_set(mode: str):
    model = adapted(nets.Dense(), **both("lin0", "lin1"))
    assert isinstance(model.base_model, LoraModel)
    x, alone = model.sample(), output(model)
    assert_same(model(x), alone)
    before = {p.name: array(p) for p in model.get_parameters()}
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", "cat")
    assert model.active_adapters == ["a"]
    assert_same(model(x), alone)
    now = {p.name: p for p in model.get_parameters()}
    assert all(now[name].asnumpy().tobytes() == value.tobytes() for name, value in before.items())
    new = set(now) - set(before)
    assert new == {f"base_model.model.{lin}.lora_{f}.c.weight" for lin in ("lin0", "lin1") for f in "AB"}
    assert all(p.requires_grad == ("a" in name.split(".")) for name, p in now.items())

    model.set_adapter("c")
    assert differ(output(model), alone)
    assert_same(model(x), output(model))
    assert all(p.requires_grad for p in weights_of(model, "c"))


def test_a_compiled_step_sees_the_new_adapter():
    model = adapted(nets.Dense(), **both("lin0", "lin1"))

    @ms.jit
    def predict(x):
        return model(x)

    x = model.sample()
    first = array(predict(x))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", "svd")
    assert_same(predict(x), first)
    model.set_adapter("c")
    assert_same(predict(x), output(model))
    assert differ(predict(x), first)


def test_names_go_on_from_where_the_model_stands():
    model = adapted(nets.Dense(), **both("lin0"))
    outer = nn.SequentialCell(model)
    outer.update_parameters_name()
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", "cat")
    assert all(p.name == path for path, p in outer.parameters_and_names())
    assert any(p.name == "0.base_model.model.lin0.lora_A.c.weight" for p in outer.get_parameters())


def test_adding_while_another_adapter_is_merged_or_disabled():
    model = adapted(nets.Dense(), **both("lin0", "lin1"))
    model.merge_adapter()
    merged = output(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", "cat")
    assert_same(output(model), merged, "exact")
    model.unmerge_adapter()
    with model.disable_adapter():
        base = output(model)
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "d", "cat")
        assert_same(output(model), base, "exact")
    assert delta_at(model, "lin0", "d").tobytes() == delta_at(model, "lin0", "c").tobytes()


def test_it_is_saved_and_loaded_like_any_other(tmp_path: Path):
    model = adapted(nets.Dense(), **both("lin0", "lin1"))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", "cat")
    model.set_adapter("c")
    expected = output(model)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    base = model.unload()
    assert_same(output(PeftModel.from_pretrained(base, tmp_path / "c")), expected, "exact")


def test_ranks_of_single_layers():
    model = adapted(
        nets.Dense(),
        a={"target_modules": ["lin0", "lin1"], "r": 3, "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 7}},
        b={"target_modules": ["lin0", "lin1"], "r": 3, "rank_pattern": {"lin1": 4}},
    )
    ranks = {}
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["a", "b"], [0.7, -1.5], kind, kind)
        config = model.peft_config[kind]
        ranks[kind] = config.r
        assert (config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (config.r, {}, {})
        assert all(layer.scaling[kind] == 1 for layer in layers_of(model))
    assert ranks == {"cat": 3 + 4, "svd": 4}
    for path in ("lin0", "lin1"):
        expected = 0.7 * delta_at(model, path, "a") - 1.5 * delta_at(model, path, "b")
        assert_same(delta_at(model, path, "cat"), expected.astype(np.float32), "merge")


def test_rslora_is_not_taken_over():
    model = adapted(nets.Dense(), **both("lin0", use_rslora=True))
    model.add_weighted_adapter(["a", "b"], [1, 1], "c", "cat")
    assert layers_of(model)[0].scaling["c"] == 1
    expected = delta_at(model, "lin0", "a") + delta_at(model, "lin0", "b")
    assert_same(delta_at(model, "lin0", "c"), expected, "merge")


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("combination_type", ["cat", "linear", "svd", "ties"])
def test_adapters_of_different_layers(combination_type: str):
    model = adapted(nets.Dense(), a={"target_modules": ["lin0"]}, b={"target_modules": ["lin1"]})
    density = 1.0 if combination_type == "ties" else None
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "c", combination_type, density=density)
    assert model.peft_config["c"].target_modules == ["lin0", "lin1"]
    for path in ("lin0", "lin1"):
        expected = 0.7 * delta_at(model, path, "a") - 1.5 * delta_at(model, path, "b")
        assert_same(delta_at(model, path, "c"), expected.astype(np.float32), "merge")


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_exactly_the_layers_that_they_have_together(order: str):
    model = adapted(
        nets.Blocks(2),
        a={"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "layers"},
        b={"target_modules": ["q", "v"], "exclude_modules": ["layers.0.attn.v", "layers.0.attn.q"]},
    )
    model.add_weighted_adapter(list(order), [1, 1], "c", "cat")
    paths = [layer.site.path for layer in layers_of(model) if "c" in layer.adapters]
    assert paths == ["layers.0.attn.q", "layers.1.attn.q", "layers.1.attn.v"]
    again = get_peft_model(nets.Blocks(2), model.peft_config["c"])
    assert [layer.site.path for layer in layers_of(again)] == paths


def test_regexes_are_joined():
    model = adapted(nets.Dense(), a={"target_modules": "lin0"}, b={"target_modules": "lin."})
    model.add_weighted_adapter(["a", "b"], [1, 1], "c", "cat")
    assert model.peft_config["c"].target_modules == "(lin0)|(lin.)"
    assert all("c" in layer.adapters for layer in layers_of(model))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_layer_that_one_of_them_trains_whole_is_copied(order: str):
    model = adapted(
        nets.Classifier(),
        a={"target_modules": ["backbone"], "modules_to_save": ["classifier"]},
        b={"target_modules": ["backbone"]},
    )
    original = array(by_path(model, "classifier").original_module[0].weight)
    model.add_weighted_adapter(list(order), [1, 1], "c", "cat")
    copies = by_path(model, "classifier").modules_to_save
    ours, theirs = copies["c"][0].weight, copies["a"][0].weight
    assert array(ours).tobytes() == array(theirs).tobytes() != original.tobytes()
    assert ours is not theirs
    assert ours.name == "base_model.model.classifier.modules_to_save.c.0.weight"
    assert model.peft_config["c"].modules_to_save == ["classifier"]
    shake([ours])
    assert differ(ours, theirs)


def test_one_adapter_alone_is_scaled():
    model = adapted(nets.Dense(), **both("lin0"))
    for kind in ("svd", "cat", "ties"):
        model.add_weighted_adapter(["a"], [-0.5], kind, kind, density=0.5)
        assert model.peft_config[kind].r == 2
        assert_same(delta_at(model, "lin0", kind), (-0.5 * delta_at(model, "lin0", "a")).astype(np.float32), "merge")


def test_one_adapter_alone_can_be_cut_to_a_rank():
    model = adapted(nets.Dense(), **both("lin0", "lin1"))
    model.add_weighted_adapter(["a"], [2.0], "c", "svd", svd_rank=1)
    assert model.peft_config["c"].r == 1
    for path in ("lin0", "lin1"):
        delta = 2 * delta_at(model, path, "a")
        lost = np.linalg.svd(delta, compute_uv=False)[1:]
        assert lost[0] > 0.1
        np.testing.assert_allclose(np.linalg.norm(delta - delta_at(model, path, "c")), np.linalg.norm(lost), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Converting")
def test_replicated_blocks(tmp_path: Path):
    replication = {"target_modules": ["q"], "layer_replication": [[0, 2], [1, 2]]}
    model = adapted(nets.Blocks(2), a=replication, b=replication)
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "c", "cat")
    model.set_adapter("c")
    expected = output(model)
    assert len([layer for layer in layers_of(model) if "c" in layer.adapters]) == 3
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    save_as_lora(tmp_path / "lora", model, 4, adapter_name="c")
    base = model.unload()
    for folder in ("c", "lora"):
        loaded = PeftModel.from_pretrained(base, tmp_path / folder)
        assert_same(output(loaded), expected, "merge")
        base = loaded.unload()


def test_half_precision_models():
    model = adapted(nets.Dense(ms.float16), **both("lin0", "lin1"))
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "c", "cat")
    expected = 0.7 * delta_at(model, "lin0", "a") - 1.5 * delta_at(model, "lin0", "b")
    assert_same(delta_at(model, "lin0", "c"), expected.astype(np.float32), "merge")


BAD: dict[str, tuple[dict[str, dict], list, dict[str, Any], type[Exception], str]] = {
    "the name is taken": (both("lin0"), ["a", "b"], {"adapter_name": "b"}, AdapterNameError, "'b' already exists"),
    "not a name": (both("lin0"), ["a", "b"], {"adapter_name": "x.y"}, AdapterNameError, "cannot name an adapter"),
    "unknown adapter": (both("lin0"), ["a", "zz"], {}, AdapterNameError, "Adapter zz does not exist"),
    "no adapters": (both("lin0"), [], {"weights": []}, AdapterNameError, "must be a list"),
    "a string": (both("lin0"), "ab", {}, AdapterNameError, "must be a list"),
    "too few weights": (both("lin0"), ["a", "b"], {"weights": [1.0]}, ConfigError, "1 for 2"),
    "infinite weight": (both("lin0"), ["a", "b"], {"weights": [1.0, np.inf]}, ConfigError, "finite"),
    "unknown type": (both("lin0"), ["a"], {"weights": [1], "combination_type": "x"}, ConfigError, "Invalid combin"),
    "no density": (both("lin0"), ["a", "b"], {"combination_type": "dare_ties_svd"}, ConfigError, "needs `density`"),
    "bad density": (
        both("lin0"),
        ["a", "b"],
        {"combination_type": "ties", "density": -0.1},
        ConfigError,
        "Density should be >= 0",
    ),
    "bad sign method": (
        both("lin0"),
        ["a", "b"],
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"},
        ConfigError,
        "Unimplemented mask method",
    ),
    "bad rank": (both("lin0"), ["a", "b"], {"svd_rank": 0}, ConfigError, "`svd_rank`"),
    "bad clamp": (both("lin0"), ["a", "b"], {"svd_clamp": 2}, ConfigError, "`svd_clamp`"),
    "driver": (both("lin0"), ["a", "b"], {"svd_driver": "gesvd"}, NotImplementedError, "svd_driver"),
    "unequal ranks": (
        {"a": {"target_modules": ["lin0"]}, "b": {"target_modules": ["lin0"], "r": 3}},
        ["a", "b"],
        {"combination_type": "linear"},
        ConfigError,
        "All adapters must have the same r value",
    ),
    "unequal ranks of a layer": (
        {"a": {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 1}}, "b": {"target_modules": ["lin1"]}},
        ["a", "b"],
        {"combination_type": "linear"},
        ConfigError,
        "At lin1 they differ",
    ),
    "mixed targets": (
        {"a": {"target_modules": ["lin0"]}, "b": {"target_modules": "lin."}},
        ["a", "b"],
        {},
        ConfigError,
        "all adapter configs should follow the same target modules type",
    ),
    "trained whole twice": (
        both("lin0", modules_to_save=["lin1"]),
        ["a", "b"],
        {},
        ConfigError,
        r"modules_to_save, but found 1 such instance\(s\): lin1",
    ),
    "DoRA": (both("lin0", use_dora=True), ["a", "b"], {}, NotImplementedError, "more than a product of two factors"),
    "aLoRA": (
        both("lin0", alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        ["a", "b"],
        {},
        NotImplementedError,
        "more than a product of two factors",
    ),
    "target_parameters": (
        both("lin0", target_parameters=["lin1.weight"]),
        ["a", "b"],
        {},
        ConfigError,
        r"does not support targeting nn.Parameter \(problematic adapter 'a'\)",
    ),
    "trainable tokens": (
        both("lin0", trainable_token_indices={"lin1": [1]}),
        ["a", "b"],
        {},
        NotImplementedError,
        "trainable tokens",
    ),
    "lora_bias": (both("lin0", lora_bias=True), ["a"], {"weights": [1]}, NotImplementedError, "lora_bias"),
    "biases": (
        {"a": {"target_modules": ["lin0"], "bias": "all"}},
        ["a"],
        {"weights": [1]},
        ConfigError,
        "Only 1 adapter with bias",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_leaves_no_trace(name: str):
    configs, adapters, settings, error, says = BAD[name]
    model = adapted(nets.Dense(), **configs)
    before = state_of(model)
    with pytest.raises(error, match=says):
        model.add_weighted_adapter(adapters, **{"weights": [1, 1], "adapter_name": "c"} | settings)
    assert state_of(model) == before
    assert issubclass(error, ValueError | NotImplementedError)
