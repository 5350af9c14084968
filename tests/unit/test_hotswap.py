"""Another adapter's numbers under compiled code, with no recompilation; and scalings that change."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Parameter, Tensor, nn, ops

from msft_peft import (
    LoraConfig,
    PeftModel,
    check_hotswap_configs_compatible,
    check_if_peft_model,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    rescale_adapter_scale,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from msft_peft.backend import graphs
from tests import nets
from tests.cases import in_pynative, layers_of, output, shake, state_of
from tests.tolerances import array, assert_same, differ

NETS: dict[str, tuple[Callable[[], nn.Cell], list[str]]] = {
    "dense": (nets.Dense, ["lin0", "lin1"]),
    "embedding": (nets.Embedding, ["emb", "lin"]),
    "conv2d": (lambda: nets.Conv(2), ["conv"]),
    "conv1d": (lambda: nets.Conv(1), ["conv"]),
    "grouped": (lambda: nets.Conv(2, channels=(4, 4), group=2), ["conv"]),
}


def adapter(net: str, r: int, alpha: float, seed: int = 1, **settings: Any) -> PeftModel:
    build, targets = NETS[net]
    ms.set_seed(5)
    config = LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": targets} | settings)
    model = get_peft_model(build(), config).set_train(False)
    shake(model.trainable_params(), seed)
    return model


def swap(model: nn.Cell, other: PeftModel) -> None:
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])


def compiled_objects() -> set[int]:
    """Identities of what MindSpore holds compiled."""
    compiler = graphs._COMPILER
    assert compiler is not None
    cells = [id(value) for held in compiler.cells_compile_cache.values() for value in held]
    return {hash(key) for key in compiler.ms_compile_cache} | set(cells)


def users_jit(model: nn.Cell) -> Callable[[Tensor], Any]:
    @ms.jit
    def predict(x):
        return model(x)

    return predict


def graph_mode(model: nn.Cell) -> Callable[[Tensor], Any]:
    ms.set_context(mode=ms.GRAPH_MODE)
    return model


@pytest.mark.graph
@pytest.mark.parametrize("caller", [users_jit, graph_mode])
@pytest.mark.parametrize("net", NETS)
def test_63_swapping_under_compiled_code_compiles_nothing(net: str, caller: Callable):
    # Made beforehand: every new PeftModel drops what is compiled.
    others = [adapter(net, *settings) for settings in ((2, 16, 2), (8, 4, 3), (6, 5, 4), (4, 8, 1))]
    states = [(get_peft_model_state_dict(other), other.peft_config["default"]) for other in others]
    outputs = [output(other) for other in others]
    model = adapter(net, 4, 8)
    expected = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    x = model.sample()
    call = caller(model)
    assert_same(call(x), expected)
    count, objects = graphs.compiled_count(), compiled_objects()
    assert count
    for (state, config), wanted in zip(states, outputs):
        hotswap_adapter_from_state_dict(model, state, "default", config)
        assert_same(call(x), wanted)
        assert_same(output(model), wanted)
        assert (graphs.compiled_count(), compiled_objects()) == (count, objects)
    assert all(differ(wanted, expected) for wanted in outputs[:3])


class SeveralResults(nn.Cell):
    """Sums along the way, as language models return them beside their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Dense(10, 10), nn.Dense(10, 3)

    def construct(self, x: Tensor) -> dict[str, Tensor]:
        sums = ()
        for layer in (self.lin0, self.lin1):
            x = ops.tanh(layer(x))
            sums += (x.sum(-1),)
        return {"y": x, "sums": sums}


@pytest.mark.graph
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("caller", [users_jit, graph_mode])
def test_63_a_model_that_returns_several_things_is_swapped_too(caller: Callable, dora: bool):
    config = LoraConfig(r=4, target_modules=["lin0", "lin1"], init_lora_weights=False, use_dora=dora)
    model, other = (get_peft_model(SeveralResults(), config).set_train(False) for _ in range(2))
    shake(other.trainable_params(), 3)
    set_base_model_state_dict(other, get_base_model_state_dict(model))
    x = nets.floats(2, 10)
    expected, wanted = model(x)["y"], other(x)["y"]
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    call = caller(model)
    assert_same(call(x)["y"], expected)
    count = graphs.compiled_count()
    swap(model, other)
    assert_same(call(x)["y"], wanted)
    assert graphs.compiled_count() == count
    assert differ(wanted, expected)


@pytest.mark.graph
def test_63_a_training_step_goes_on_with_the_new_adapter():
    other = adapter("dense", 2, 16, seed=2)
    model = adapter("dense", 4, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    x = model.sample()
    target = nets.floats(*output(model).shape, seed=3)
    gradient = ms.value_and_grad(nets.Loss(model), None, model.trainable_params())

    @ms.jit
    def step(x, target):
        return gradient(x, target)

    step(x, target)
    count = graphs.compiled_count()
    swap(model, other)
    loss, grads = step(x, target)
    assert graphs.compiled_count() == count
    with in_pynative():
        expected_loss, expected = gradient(x, target)
    assert_same(loss, expected_loss, "gradient")
    for mine, wanted in zip(grads, expected):
        assert_same(mine, wanted, "gradient")
    # The padding gets no gradient: it stays zero whatever trains.
    assert not array(grads[0])[2:].any()
    assert array(grads[0])[:2].any()


@pytest.mark.graph
def test_63_without_preparation_an_equal_scaling_compiles_nothing():
    same, other, smaller = (adapter("dense", *how) for how in ((4, 8, 2), (4, 3, 3), (2, 3, 4)))
    model = adapter("dense", 4, 8)
    x = model.sample()
    call = users_jit(model)
    call(x)
    count, objects = graphs.compiled_count(), compiled_objects()
    swap(model, same)
    assert (graphs.compiled_count(), compiled_objects()) == (count, objects)
    assert_same(call(x), output(same))
    swap(model, other)
    assert graphs.compiled_count() == 0
    assert_same(call(x), output(other))
    swap(model, smaller)
    assert_same(call(x), output(smaller))


@pytest.mark.parametrize("net", NETS)
def test_preparing_changes_no_output_and_no_file(net: str, mode: str, tmp_path: Path):
    model = adapter(net, 4, 8)
    expected, state = output(model), get_peft_model_state_dict(model)
    names = [(p.name, p.requires_grad) for p in model.get_parameters()]
    model.save_pretrained(tmp_path / "before")
    prepare_model_for_compiled_hotswap(model, target_rank=10, config=model.peft_config, check_compiled="ignore")
    assert_same(model(model.sample()), expected)
    assert [(p.name, p.requires_grad) for p in model.get_parameters()] == names
    for key, value in get_peft_model_state_dict(model).items():
        assert_same(value, state[key], "exact")
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    (tmp_path / "after" / "adapter_model.safetensors").unlink()
    ms.set_seed(5)
    assert_same(output(PeftModel.from_pretrained(NETS[net][0](), tmp_path / "after")), expected)


@pytest.mark.parametrize("net", NETS)
def test_a_swapped_adapter_is_saved_as_what_it_is(net: str, tmp_path: Path):
    model, other = adapter(net, 4, 8), adapter(net, 2, 3, seed=2)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    swap(model, other)
    model.save_pretrained(tmp_path)
    ms.set_seed(5)
    assert_same(output(PeftModel.from_pretrained(NETS[net][0](), tmp_path)), output(other), "close")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 3)
    report = set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert report.missing_keys == report.unexpected_keys == report.mismatched == ()
    if net != "grouped":
        expected = output(model)
        model.merge_adapter()
        assert_same(output(model), expected, "merge")
        model.unmerge_adapter()
        assert_same(output(model), expected)


def test_swapping_from_files(tmp_path: Path, mode: str):
    model, other = adapter("dense", 4, 8), adapter("dense", 4, 16, seed=2)
    other.save_pretrained(tmp_path)
    model(model.sample())
    hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert_same(model(model.sample()), output(other))
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace("lin", "old"): value for key, value in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file({key: value * 2 for key, value in tensors.items()}, path)
    hotswap_adapter(model, tmp_path, "default", key_mapping={r"^old": "lin"})
    assert differ(output(model), output(other))


@pytest.mark.parametrize("dora", [False, True])
def test_63_layers_that_the_new_adapter_lacks_add_nothing(dora: bool):
    model = adapter("dense", 4, 8, use_dora=dora)
    other = adapter("dense", 4, 8, seed=2, target_modules=["lin0"], use_dora=dora)
    swap(model, other)
    assert_same(output(model), output(other))
    assert model.peft_config["default"].target_modules == ["lin0", "lin1"]


class Experts(nn.Cell):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = Parameter(np.random.default_rng(0).standard_normal((3, 5, 6)).astype(np.float32), name="w")

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(x, ops.transpose(self.w, (0, 2, 1)))


class Mixture(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def construct(self, x: Tensor) -> Tensor:
        return self.experts(x)

    def sample(self) -> Tensor:
        return nets.floats(2, 6)


def test_adapters_of_single_parameters_are_swapped(mode: str, tmp_path: Path):
    model, other = (
        get_peft_model(Mixture(), LoraConfig(r=r, target_modules=[], target_parameters=["experts.w"])) for r in (2, 3)
    )
    for seed, one in enumerate((model, other)):
        shake(one.trainable_params(), seed + 1)
    expected = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_same(model(model.sample()), expected)
    swap(model, other)
    assert_same(model(model.sample()), output(other))
    model.save_pretrained(tmp_path)
    assert_same(output(PeftModel.from_pretrained(Mixture(), tmp_path)), output(other))


@pytest.mark.parametrize("tokens", [[1], [2, 3], None])
def test_other_trainable_tokens_are_refused(tokens: list | None):
    model, other = (
        adapter("embedding", 2, 4, trainable_token_indices=some and {"emb": some}, target_modules=["lin"])
        for some in ([1, 2], tokens)
    )
    with pytest.raises(ValueError, match="Configs are incompatible: for trainable_token_indices"):
        swap(model, other)
    same = adapter("embedding", 2, 4, seed=3, trainable_token_indices={"emb": [1, 2]}, target_modules=["lin"])
    swap(model, same)
    assert_same(output(model), output(same))


def test_patterns_of_ranks_are_followed():
    model = adapter("dense", 4, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    other = adapter("dense", 2, 6, seed=2, rank_pattern={"lin1": 5})
    swap(model, other)
    assert_same(output(model), output(other))


def test_injected_adapters_are_swapped_too():
    ms.set_seed(5)
    config = LoraConfig(r=4, target_modules=["lin0", "lin1"])
    net = inject_adapter_in_model(config, nets.Dense()).set_train(False)
    prepare_model_for_compiled_hotswap(net, target_rank=6)
    other = adapter("dense", 6, 3, seed=2)
    swap(net, other)
    assert_same(output(net), output(other))


# --- what cannot be swapped -----------------------------------------------------------------------------------------

INCOMPATIBLE = {
    "rslora": ({"use_rslora": True}, "Configs are incompatible: for use_rslora, False != True"),
    "dropout": ({"lora_dropout": 0.1}, "Configs are incompatible: for lora_dropout, 0.0 != 0.1"),
    "alpha": ({"alpha_pattern": {"lin0": 2}}, "Configs are incompatible: for alpha_pattern, {} != {'lin0': 2}"),
    "dora": ({"use_dora": True}, "Configs are incompatible: for use_dora, False != True"),
}


@pytest.mark.parametrize(("settings", "text"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_63_incompatible_configs_change_nothing(settings: dict, text: str):
    model, other = adapter("dense", 4, 8), adapter("dense", 4, 8, seed=2, **settings)
    before = state_of(model)
    with pytest.raises(ValueError, match="Configs are incompatible") as error:
        swap(model, other)
    assert text in str(error.value)
    with pytest.raises(ValueError, match="Configs are incompatible"):
        check_hotswap_configs_compatible(model.peft_config["default"], other.peft_config["default"])
    assert state_of(model) == before


def test_compatible_configs():
    check_hotswap_configs_compatible(LoraConfig(), LoraConfig(r=3, lora_alpha=5, target_modules=["x"], bias="all"))
    other = LoraConfig()
    other.peft_type = "OTHER"
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and OTHER"):
        check_hotswap_configs_compatible(LoraConfig(), other)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but OTHER was passed"):
        check_hotswap_configs_compatible(other, other)


def test_63_tensors_that_do_not_fit_change_nothing():
    model, other = adapter("dense", 4, 8), adapter("dense", 4, 8, seed=2)
    state, config = get_peft_model_state_dict(other), other.peft_config["default"]
    key = next(key for key in state if "lora_A" in key)
    before = state_of(model)
    bad = {
        "unexpected keys found: stray": state | {"stray": np.zeros(1)},
        "size mismatch for": state | {key: np.zeros((2, 2), np.float32)},
        "none of the 0 tensors is a weight of the adapter": {},
        f"lin0 has some of its weights, but not {key}": {k: value for k, value in state.items() if k != key},
    }
    for text, tensors in bad.items():
        with pytest.raises(RuntimeError, match=f"Hot swapping the adapter did not succeed, {text}"):
            hotswap_adapter_from_state_dict(model, tensors, "default", config)
        assert state_of(model) == before
    dora = adapter("dense", 4, 8, use_dora=True)
    no_magnitude = {k: v for k, v in get_peft_model_state_dict(dora).items() if "lin1.lora_magnitude" not in k}
    with pytest.raises(RuntimeError, match=r"lin1 has some of its weights, but not .*lin1.lora_magnitude_vector"):
        hotswap_adapter_from_state_dict(dora, no_magnitude, "default", dora.peft_config["default"])
    with pytest.raises(RuntimeError, match=r"lin0 needs rank 6, but .* has room for 4: call prepare_model_for_comp"):
        swap(model, adapter("dense", 6, 8))
    with pytest.raises(ValueError, match="Adapter nope not found"):
        hotswap_adapter_from_state_dict(model, state, "nope", config)
    assert state_of(model) == before


def test_preparing_what_cannot_be_prepared():
    with pytest.raises(ValueError, match="No adapter layers found on the model, make sure call `prepare_model_for_co"):
        prepare_model_for_compiled_hotswap(nets.Dense())
    model = adapter("dense", 4, 8)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"target rank 2, but the original rank is larger \(4\). This is not"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    for bad in (6.0, "8", True):
        with pytest.raises(ValueError, match="target_rank must be an integer"):
            prepare_model_for_compiled_hotswap(model, target_rank=bad)
    with pytest.raises(ValueError, match="check_compiled must be one of 'error', 'warn' or 'ignore', got 'maybe'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="maybe")
    with pytest.raises(ValueError, match="a multiple of 2 at conv"):
        prepare_model_for_compiled_hotswap(adapter("grouped", 4, 8), target_rank=7)
    assert state_of(model) == before
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge the model first"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_a_merged_adapter_is_unmerged_before_it_is_swapped():
    model, other = adapter("dense", 4, 8), adapter("dense", 4, 8, seed=2)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="cannot be replaced when the model is merged. Unmerging the model first"):
        swap(model, other)
    assert_same(output(model), output(other))


# --- scalings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
def test_64_rescaling_is_seen_by_compiled_code_and_undone(live: bool):
    model = adapter("dense", 4, 8)
    if live:
        prepare_model_for_compiled_hotswap(model)
    x, full = model.sample(), output(model)
    call = users_jit(model)
    call(x)
    count = graphs.compiled_count()
    with rescale_adapter_scale(model, 0):
        ms.set_seed(5)
        assert_same(call(x), output(nets.Dense()))
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(model, 3):
        assert {float(s) for layer in layers_of(model) for s in layer.scaling.values()} == {3.0}
        half = call(x)
        assert_same(half, output(model))
    assert differ(half, full)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 2):
        raise KeyError
    assert_same(call(x), full)
    if live:
        assert graphs.compiled_count() == count


def test_64_rescaling_that_makes_no_sense():
    model = adapter("dense", 4, 8)
    for bad in ("2", None, True):
        with pytest.raises(TypeError, match="Argument multiplier should be of type float, got"):
            rescale_adapter_scale(model, bad).__enter__()
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        rescale_adapter_scale(nets.Dense(), 2).__enter__()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapters are merged at lin0: unmerge them before you change a scaling"):
        rescale_adapter_scale(model, 2).__enter__()


def test_the_scale_of_a_layer(mode: str):
    model = adapter("dense", 4, 8)
    layer = layers_of(model)[0]
    x, full = model.sample(), array(model(model.sample()))
    assert layer.scaling == {"default": 2.0}
    layer.set_scale("default", 3)
    assert layer.scaling == {"default": 6.0}
    assert differ(model(x), full)
    assert_same(model(x), output(model))
    layer.scale_layer(2)
    assert layer.scaling == {"default": 12.0}
    layer.unscale_layer(4)
    assert layer.scaling == {"default": 3.0}
    layer.set_scale("somewhere else", 5)
    layer.unscale_layer()
    assert layer.scaling == {"default": 2.0}
    assert_same(model(x), full)
    with pytest.raises(ZeroDivisionError):
        layer.unscale_layer(0)
    with pytest.raises(ValueError, match=r"a scaling at lin0 must be a finite number, got \{'default': nan\}"):
        layer.set_scale("default", float("nan"))
    layer.merge(["default"])
    for call in (lambda: layer.set_scale("default", 2), lambda: layer.scale_layer(2), layer.unscale_layer):
        with pytest.raises(ValueError, match="Adapters are merged at lin0"):
            call()


class Difference(nn.Cell):
    def __init__(self, one: nn.Cell, other: nn.Cell) -> None:
        super().__init__()
        self.one, self.other = one, other

    def construct(self, x: Tensor) -> Tensor:
        return self.one(x) - self.other(x)


@pytest.mark.graph
def test_a_copy_of_a_prepared_model_has_scalings_of_its_own():
    """A frozen reference beside the model that trains, in one graph."""
    model = adapter("dense", 4, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    reference = copy.deepcopy(model)
    both = Difference(model, reference)
    x, call = model.sample(), users_jit(both)
    assert not differ(call(x), 0 * output(model))
    for layer in layers_of(reference):
        layer.set_scale("default", 0.5)
    assert_same(call(x), output(model) - output(reference))
    assert differ(call(x), 0 * output(model))


def test_is_it_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter("dense", 4, 8).save_pretrained(tmp_path / "yes")
    assert check_if_peft_model(tmp_path / "yes")
    (tmp_path / "no").mkdir()
    assert not check_if_peft_model(tmp_path / "no")
    assert not check_if_peft_model(tmp_path / "gone")
    (tmp_path / "no" / "adapter_config.json").write_text("{")
    assert not check_if_peft_model(tmp_path / "no")
