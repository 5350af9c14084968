"""State dicts out of a model and into one, by whatever name, and what is said of what does not fit."""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Parameter, Tensor

from msft_peft import (
    AdapterNameError,
    LoadError,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftModel,
    ShiraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from msft_peft.backend.graphs import compiled_count
from tests import nets
from tests.cases import output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

P = "base_model.model."
# Components of the paths in nets.Blocks and of parameter names there: HF loses tensors under such names.
NASTY = ["0", "attn", "layers", "q", "weight", "lora_A", "o", "base_layer", "default"]


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "modules_to_save": ["head"]} | changes)


def blocks(name: str = "default", seed: int = 1, **changes: Any) -> PeftModel:
    ms.set_seed(3)
    model = get_peft_model(nets.Blocks(), config(**changes), adapter_name=name)
    shake(model.trainable_params(), seed=seed)
    return model


def injected(seed: int = 1, **changes: Any) -> nets.Blocks:
    ms.set_seed(3)
    net = inject_adapter_in_model(config(**changes), nets.Blocks())
    shake(net.trainable_params(), seed=seed)
    return net


# --- the adapter's tensors ------------------------------------------------------------------------------------------


def test_the_state_dict_is_what_the_file_holds(tmp_path: Path):
    model = blocks()
    model.save_pretrained(tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    state = get_peft_model_state_dict(model)
    assert state.keys() == stored.keys()
    assert len(state) == 10
    read = load_peft_weights(tmp_path)
    for key in stored:
        assert type(state[key]) is Tensor
        assert_same(state[key], stored[key], "exact")
        assert_same(read[key], stored[key], "exact")


def test_the_state_dict_is_a_copy():
    model = blocks()
    before = {key: array(value) for key, value in get_peft_model_state_dict(model).items()}
    kept = get_peft_model_state_dict(model)
    shake(model.trainable_params(), seed=4)
    for key, value in kept.items():
        assert_same(value, before[key], "exact")


@pytest.mark.parametrize("name", NASTY)
def test_adapters_named_like_parts_of_paths(name: str):
    """HF filters keys by substrings: it saves too little, and reports other adapters' keys as missing."""
    model = blocks("first", modules_to_save=None)
    model.add_adapter(name, config(modules_to_save=None, r=3))
    shake(weights_of(model, "first"), seed=2)
    adapters = {"first": 2, name: 3}
    for adapter, rank in adapters.items():
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        assert len(state) == 8
        assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {rank}
        assert not any(f".{adapter}." in key.split("lora_")[1] for key in state)
        changed = {key: Tensor(array(value) + 1) for key, value in state.items()}
        report = set_peft_model_state_dict(model, changed, adapter_name=adapter)
        assert (report.missing_keys, report.unexpected_keys, len(report.applied)) == ((), (), 8)
        for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items():
            assert_same(value, changed[key], "exact")


@pytest.mark.parametrize("kind", ["arrays", "tensors", "parameters"])
@pytest.mark.parametrize("names", ["hf", "bare", "old", "parameter names", "another adapter's"])
def test_a_state_dict_goes_into_another_model(names: str, kind: str, mode: str):
    source = blocks("other" if names == "another adapter's" else "default")
    expected = output(source)
    adapter = source.active_adapter
    state = get_peft_model_state_dict(source, adapter_name=adapter)
    if names == "bare":
        state = {key.removeprefix(P): value for key, value in state.items()}
    elif names == "old":
        state = {".default.".join(key.rsplit(".", 1)): value for key, value in state.items()}
    elif names == "parameter names":
        state = {p.name: p for p in source.trainable_params()}
    make = {"arrays": array, "tensors": lambda v: Tensor(array(v)), "parameters": lambda v: Parameter(array(v))}[kind]
    target = blocks(seed=7)
    assert differ(output(target), expected)
    report = set_peft_model_state_dict(target, {key: make(value) for key, value in state.items()})
    assert (report.missing_keys, report.unexpected_keys, report.mismatched) == ((), (), ())
    assert len(report.applied) == 10
    assert_same(target(target.sample()), expected)


def test_injected_adapters_have_keys_without_a_prefix():
    net = injected()
    state = get_peft_model_state_dict(net)
    assert {f"{P}{key}" for key in state} == set(get_peft_model_state_dict(blocks()))
    other = injected(seed=5)
    assert differ(output(other), output(net))
    set_peft_model_state_dict(other, state)
    assert_same(output(other), output(net), "exact")
    # A PeftModel's file goes into a plain model too.
    third = injected(seed=6)
    set_peft_model_state_dict(third, get_peft_model_state_dict(blocks()))
    assert_same(output(third), output(net), "exact")


@pytest.mark.graph
def test_compiled_code_sees_new_weights_without_a_recompilation():
    model, other = blocks(), blocks(seed=9)
    x = model.sample()

    @ms.jit
    def step(x):
        return model(x)

    step(x)
    count = compiled_count()
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert_same(step(x), output(other))
    assert compiled_count() == count


def test_values_from_another_state_dict():
    model = blocks()
    before = get_peft_model_state_dict(model)
    snapshot = {name: Tensor(array(p)) for name, p in model.parameters_dict().items()}
    shake(model.trainable_params(), seed=4)
    for key, value in get_peft_model_state_dict(model, snapshot).items():
        assert_same(value, before[key], "exact")
    gone = [name for name in snapshot if "layers.1" in name and "lora_B" in name]
    for name in gone:
        del snapshot[name]
    with pytest.raises(LoadError) as error:
        get_peft_model_state_dict(model, snapshot)
    assert all(name in str(error.value) for name in gone)


def test_51_values_from_another_state_dict_are_saved(tmp_path: Path):
    model = blocks()
    snapshot, expected = {name: array(p) for name, p in model.parameters_dict().items()}, output(model)
    shake(model.trainable_params(), seed=4)
    model.save_pretrained(tmp_path, state_dict=snapshot)
    assert differ(output(model), expected)
    ms.set_seed(3)
    assert_same(output(PeftModel.from_pretrained(nets.Blocks(), tmp_path)), expected, "exact")
    (tmp_path / "adapter_model.safetensors").unlink()
    ms.set_seed(3)
    assert_same(output(PeftModel.from_pretrained(nets.Blocks(), tmp_path)), expected, "exact")
    name = next(name for name in snapshot if "lora_A" in name)
    for bad in ({}, snapshot | {name: np.zeros((3, 3))}):
        with pytest.raises(LoadError, match=name):
            model.save_pretrained(tmp_path / "none", state_dict=bad)
    assert not (tmp_path / "none").exists()


class Lm(nets.nn.Cell):
    """Something with embeddings at both ends, as a language model names them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin, self.lm_head = nets.nn.Embedding(7, 4), nets.nn.Dense(4, 4), nets.nn.Dense(4, 7)

    def get_input_embeddings(self) -> nets.nn.Cell:
        return self.embed

    def get_output_embeddings(self) -> nets.nn.Cell:
        return self.lm_head


@pytest.mark.parametrize(
    ("targets", "wanted", "saved"),
    [
        (["lin"], "auto", set()),
        (["lin"], True, {"embed.weight", "lm_head.weight"}),
        (["lin", "embed"], "auto", {"embed.base_layer.weight"}),
        (["lin", "lm_head"], "auto", {"lm_head.base_layer.weight"}),
        (["lin", "embed"], False, set()),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_49_embeddings_are_saved_where_they_are_asked_for(targets: list, wanted: Any, saved: set, tmp_path: Path):
    model = get_peft_model(Lm(), LoraConfig(target_modules=targets))
    state = get_peft_model_state_dict(model, save_embedding_layers=wanted)
    assert {key.removeprefix(P) for key in state if ".lora_" not in key} == saved
    model.save_pretrained(tmp_path, save_embedding_layers=wanted)
    assert set(load_peft_weights(tmp_path)) == set(state)
    for key, value in state.items():
        state[key] = array(value) + 1
    report = set_peft_model_state_dict(model, state)
    assert set(report.applied) == set(state)
    for key, value in get_peft_model_state_dict(model, save_embedding_layers=wanted).items():
        assert_same(value, state[key], "exact")


def test_biases_and_embeddings_are_among_them():
    model = get_peft_model(nets.Blocks(1), LoraConfig(target_modules=["q"], bias="all"))
    keys = set(get_peft_model_state_dict(model))
    assert f"{P}layers.0.norm.bias" in keys
    assert f"{P}layers.0.attn.q.base_layer.bias" in keys
    with pytest.raises(ValueError, match="save_embedding_layers must be True, False or 'auto', got 'yes'"):
        get_peft_model_state_dict(model, save_embedding_layers="yes")


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_the_report_lists_what_does_not_fit():
    model = blocks()
    state = get_peft_model_state_dict(model)
    missing = f"{P}layers.0.attn.q.lora_B.weight"
    del state[missing]
    state["stray"] = Tensor(np.zeros(2, np.float32))
    before = array(model.get_base_model().layers[0].attn.q.lora_B["default"].weight)
    with pytest.warns(UserWarning, match="Found missing adapter keys .*Found unexpected keys"):
        report = set_peft_model_state_dict(model, state)
    assert report.missing_keys == (missing,)
    assert report.unexpected_keys == ("stray",)
    assert len(report.applied) == 9
    assert_same(model.get_base_model().layers[0].attn.q.lora_B["default"].weight, before, "exact")
    for part in ("9 tensors loaded", missing, "stray"):
        assert part in str(report)


def test_other_shapes_change_nothing_unless_they_are_ignored():
    model = blocks()
    state = {key: Tensor(array(value) + 1) for key, value in get_peft_model_state_dict(model).items()}
    wrong = f"{P}layers.1.attn.v.lora_A.weight"
    state[wrong] = Tensor(np.zeros((9, 9), np.float32))
    before = state_of(model)
    with pytest.raises(LoadError, match=rf"size mismatch for {wrong}: .*\(9, 9\), the model \(2, 4\)"):
        set_peft_model_state_dict(model, state)
    assert state_of(model) == before
    with pytest.warns(UserWarning, match="size mismatch"):
        report = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    assert len(report.applied) == 9
    assert wrong in report.mismatched[0]


@pytest.mark.parametrize("bad", [{"x": [1.0]}, {1: np.zeros(1)}, {"x": None}])
def test_what_is_no_state_dict_is_refused(bad: dict):
    model = blocks()
    with pytest.raises(TypeError, match="a state dict holds Tensors, Parameters or numpy arrays by their names"):
        set_peft_model_state_dict(model, bad)


def test_unknown_adapters_and_models_without_any():
    for model in (blocks(), nets.Blocks()):
        with pytest.raises(AdapterNameError, match="Adapter nope not found"):
            get_peft_model_state_dict(model, adapter_name="nope")
        with pytest.raises(AdapterNameError, match="Adapter nope not found"):
            set_peft_model_state_dict(model, {}, adapter_name="nope")
    with pytest.raises(TypeError, match=r"a model is a mindspore\.nn\.Cell, got str"):
        get_peft_model_state_dict("model")


def test_two_names_for_one_tensor_are_refused():
    model = blocks()
    state = get_peft_model_state_dict(model)
    key = next(iter(state))
    with pytest.raises(LoadError, match="has two tensors for"):
        set_peft_model_state_dict(model, state | {key.removeprefix(P): state[key]})


def test_merged_weights_are_not_written_under_the_merge():
    model, other = blocks(modules_to_save=None), blocks(seed=9, modules_to_save=None)
    base = array(model.get_base_model().layers[0].attn.q.weight)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter default cannot be overwritten when the model is merged. Unmerging"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert_same(model.get_base_model().layers[0].attn.q.weight, base, "unmerge")
    assert_same(output(model), output(other))


# --- the report on files --------------------------------------------------------------------------------------------


def test_loading_returns_the_report(tmp_path: Path):
    model = blocks()
    assert model.load_report is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nets.Blocks(), tmp_path)
    assert loaded.load_report.applied == tuple(sorted(get_peft_model_state_dict(model)))
    assert loaded.load_report.does_something is True
    report = loaded.load_adapter(tmp_path, "other")
    assert report is loaded.load_report
    assert (report.adapter_name, report.missing_keys, report.unexpected_keys) == ("other", (), ())
    assert report.origin == str(tmp_path / "adapter_model.safetensors")
    assert "Everything fitted." in str(report)


@pytest.mark.parametrize("trained", ["nothing", "lora", "head", "bias"])
def test_an_adapter_that_does_nothing_is_told(trained: str, tmp_path: Path):
    bias = {"bias": "all"} if trained == "bias" else {}
    ms.set_seed(3)
    model = get_peft_model(nets.Blocks(), config(**bias))
    ends = {"lora": "lora_B.default.weight", "head": "modules_to_save.default.weight", "bias": "norm.beta"}
    if trained != "nothing":
        shake([p for p in model.trainable_params() if p.name.endswith(ends[trained])])
    model.save_pretrained(tmp_path)
    ms.set_seed(3)
    report = PeftModel.from_pretrained(nets.Blocks(), tmp_path).load_report
    assert report.does_something is (trained != "nothing")
    assert ("does nothing" in str(report)) == (trained == "nothing")


@pytest.mark.parametrize("net", [lambda: nets.Conv(1), lambda: nets.Conv(2), nets.Embedding, nets.Gpt2])
def test_the_report_knows_every_kind_of_layer(net: Any, tmp_path: Path):
    ms.set_seed(3)
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["conv", "emb", "c_attn"]))
    state = get_peft_model_state_dict(model)
    assert set_peft_model_state_dict(model, state).does_something is False
    shake(model.trainable_params())
    assert set_peft_model_state_dict(model, get_peft_model_state_dict(model)).does_something is True


# --- the base model's tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [blocks, injected], ids=["PeftModel", "injected"])
def test_54_base_weights_have_the_names_that_they_had(wrap: Any):
    model = wrap(bias="lora_only")
    plain = nets.Blocks()
    state = get_base_model_state_dict(model)
    assert set(state) == set(plain.parameters_dict())
    new = {name: array(p) + 0.5 for name, p in state.items()}
    before = output(model)
    report = set_base_model_state_dict(model, new)
    assert report.applied == tuple(sorted(state))
    for name, p in get_base_model_state_dict(model).items():
        assert_same(p, new[name], "exact")
    assert differ(output(model), before)


def test_base_weights_that_do_not_fit_change_nothing():
    model = blocks()
    before = state_of(model)
    state = {name: array(p) + 1 for name, p in get_base_model_state_dict(model).items()}
    del state["head.bias"]
    with pytest.raises(LoadError, match=r"missing .*'head.bias'.*unexpected .*'x'.*size mismatch for layers.0.mlp"):
        set_base_model_state_dict(model, state | {"x": np.zeros(1), "layers.0.mlp.weight": np.zeros((1, 1))})
    assert state_of(model) == before
    with pytest.warns(UserWarning, match="head.bias"):
        report = set_base_model_state_dict(model, state, strict=False)
    assert report.missing_keys == ("head.bias",)


class Pair(nets.nn.Cell):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nets.nn.Dense(4, 4)
        self.pair = nets.nn.SequentialCell(nets.nn.Dense(4, 4, has_bias=False), nets.nn.Dense(4, 4, has_bias=False))
        self.pair[1].weight = self.pair[0].weight

    def construct(self, x: Tensor) -> Tensor:
        return self.pair(self.lin(x))

    def sample(self) -> Tensor:
        return nets.floats(2, 4)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.ckpt"])
def test_50_tied_weights_are_saved_under_each_of_their_names(file: str, tmp_path: Path):
    ms.set_seed(3)
    model = get_peft_model(Pair(), LoraConfig(target_modules=["lin"], modules_to_save=["pair"]))
    shake(model.trainable_params())
    state = get_peft_model_state_dict(model)
    assert {f"{P}pair.0.weight", f"{P}pair.1.weight"} <= state.keys()
    model.save_pretrained(tmp_path)
    assert set(load_peft_weights(tmp_path)) == set(state)
    (tmp_path / ({"adapter_model.safetensors", "adapter_model.ckpt"} - {file}).pop()).unlink()
    ms.set_seed(3)
    assert_same(output(PeftModel.from_pretrained(Pair(), tmp_path)), output(model), "exact")
    del state[f"{P}pair.0.weight"]
    assert set_peft_model_state_dict(model, state).missing_keys == ()
    snapshot = {p.name: array(p) for p in model.get_parameters()}
    assert set(get_peft_model_state_dict(model, snapshot)) == {*state, f"{P}pair.0.weight"}


def test_54_tied_base_weights_may_come_under_any_of_their_names():
    model = get_peft_model(nets.Tied(), LoraConfig(target_modules=["lin"]))
    state = {name: array(p) + 1 for name, p in get_base_model_state_dict(model).items()}
    (table,) = (name for name in state if name.startswith("emb"))
    both = state | {"head.weight": state[table]}
    assert set_base_model_state_dict(model, both).applied == tuple(sorted(both))
    del both[table]
    assert set_base_model_state_dict(model, both).missing_keys == ()
    del both["head.weight"]
    with pytest.raises(LoadError, match="missing"):
        set_base_model_state_dict(model, both)


def test_base_weights_of_unwrapped_models_and_tied_ones():
    assert set(get_base_model_state_dict(nets.Tied())) == set(nets.Tied().parameters_dict())
    model = get_peft_model(nets.Tied(), LoraConfig(target_modules=["lin"]))
    assert set(get_base_model_state_dict(model)) == set(nets.Tied().parameters_dict())


# --- key_mapping ----------------------------------------------------------------------------------------------------


def renamed(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({key.replace(old, new): value for key, value in tensors.items()}, path)


def test_53_key_mapping_renames_what_a_file_holds(tmp_path: Path):
    model = blocks()
    model.save_pretrained(tmp_path)
    renamed(tmp_path, "layers.", "encoder.blocks.")
    with pytest.raises(LoadError, match=r"encoder\.blocks"):
        PeftModel.from_pretrained(nets.Blocks(), tmp_path)
    mapping = {r"^encoder\.blocks\.(\d+)": r"layers.\1", "layers": "never, since only the first match counts"}
    ms.set_seed(3)
    loaded = PeftModel.from_pretrained(nets.Blocks(), tmp_path, key_mapping=mapping)
    assert_same(output(loaded), output(model), "exact")
    other = blocks(seed=8)
    other.load_adapter(tmp_path, "default", key_mapping=mapping)
    assert_same(output(other), output(model), "exact")
    assert set(load_peft_weights(tmp_path, key_mapping=mapping)) == set(get_peft_model_state_dict(model))


@pytest.mark.parametrize(
    ("mapping", "text"), [({"(": "x"}, r"'\(' -> 'x' is no valid"), ({r".*": "same"}, "names two tensors of .* alike")]
)
def test_a_bad_key_mapping_changes_nothing(mapping: dict, text: str, tmp_path: Path):
    blocks().save_pretrained(tmp_path)
    net = nets.Blocks()
    before = state_of(net)
    with pytest.raises(LoadError, match=text):
        PeftModel.from_pretrained(net, tmp_path, key_mapping=mapping)
    assert state_of(net) == before


# --- without drawing random numbers ---------------------------------------------------------------------------------


def nan(model: Any) -> set[bool]:
    return {bool(np.isnan(array(p)).all()) for p in model.get_parameters() if "lora_" in p.name}


def test_52_no_weights_are_drawn_and_none_can_pass_unnoticed():
    model = get_peft_model(nets.Blocks(), config(target_modules=["mlp"]), low_cpu_mem_usage=True)
    assert nan(model) == {True}
    assert np.isnan(output(model)).all()
    ms.set_seed(3)
    source = blocks()
    ms.set_seed(3)
    model = get_peft_model(nets.Blocks(), config(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert_same(output(model), output(source), "exact")
    model.add_adapter("two", config(), low_cpu_mem_usage=True)
    assert nan(model) == {True, False}
    assert nan(inject_adapter_in_model(config(), nets.Blocks(), low_cpu_mem_usage=True)) == {True}


def test_52_files_load_alike(tmp_path: Path):
    model = blocks()
    model.save_pretrained(tmp_path)
    ms.set_seed(3)
    loaded = PeftModel.from_pretrained(nets.Blocks(), tmp_path, low_cpu_mem_usage=True)
    assert_same(output(loaded), output(model), "exact")
    loaded.load_adapter(tmp_path, "two", low_cpu_mem_usage=True)
    loaded.set_adapter("two")
    assert_same(output(loaded), output(model), "exact")


def test_52_what_is_missing_is_an_error_even_if_not_strict(tmp_path: Path):
    model = blocks()
    state = get_peft_model_state_dict(model)
    state.pop(f"{P}layers.0.attn.q.lora_B.weight")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    safetensors.numpy.save_file({key: array(value) for key, value in state.items()}, path)
    net = nets.Blocks()
    before = state_of(net)
    with pytest.raises(LoadError, match="no initial values were drawn"):
        PeftModel.from_pretrained(net, tmp_path, low_cpu_mem_usage=True, strict=False)
    assert state_of(net) == before
    undrawn = get_peft_model(nets.Blocks(), config(), low_cpu_mem_usage=True)
    with pytest.raises(LoadError, match="no initial values were drawn"):
        set_peft_model_state_dict(undrawn, state, low_cpu_mem_usage=True)
    assert nan(undrawn) == {True}


# --- targets from a state dict --------------------------------------------------------------------------------------


def adapted(net: Any) -> set[str]:
    return {key.split(".lora_")[0] for key in get_peft_model_state_dict(net) if "lora_" in key}


def test_the_keys_decide_where_adapters_go():
    source = injected(target_modules=["layers.0.attn.q", "mlp"])
    state = get_peft_model_state_dict(source)
    wanted = {"layers.0.attn.q", "layers.0.mlp", "layers.1.mlp"}
    for keys in (state, {P + key: value for key, value in state.items()}):
        for targets in (["q", "v"], ["nothing"], None, "all-linear"):
            with pytest.warns(UserWarning, match="inconsistency was discovered between the PEFT config and the prov"):
                net = inject_adapter_in_model(config(target_modules=targets), nets.Blocks(), state_dict=keys)
            assert adapted(net) == wanted
    set_peft_model_state_dict(net, state)
    # The config says so too: the adapter can be made again from it.
    again = inject_adapter_in_model(net.peft_config["default"], nets.Blocks())
    assert adapted(again) == wanted


def test_keys_that_agree_with_the_config_say_nothing(recwarn: pytest.WarningsRecorder):
    state = get_peft_model_state_dict(injected())
    net = inject_adapter_in_model(config(), nets.Blocks(), state_dict=state)
    assert adapted(net) == adapted(injected())
    assert net.peft_config["default"].target_modules == ["q", "v"]
    assert not [w for w in recwarn if "inconsistency" in str(w.message)]


def test_a_path_that_ends_another_is_meant_alone():
    class Two(nets.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.inner = nets.nn.Dense(2, 2), nets.nn.SequentialCell()
            self.inner._cells["lin"] = nets.nn.Dense(2, 2)

    with pytest.warns(UserWarning, match="inconsistency"):
        net = inject_adapter_in_model(
            config(target_modules=["lin"], modules_to_save=None), Two(), state_dict={"lin.lora_A.weight": 0}
        )
    assert adapted(net) == {"lin"}


@pytest.mark.parametrize("keys", [{}, {"nope.lora_A.weight": 0}, {"head.weight": 0}])
def test_keys_that_name_no_layer_change_nothing(keys: dict):
    net = nets.Blocks()
    before = state_of(net)
    with pytest.raises(NoMatchingPeftModuleError, match=r"None of the \d keys in the given state_dict"):
        inject_adapter_in_model(config(modules_to_save=None), net, state_dict=keys)
    assert state_of(net) == before


@pytest.mark.parametrize("place", [-1, 5])
def test_places_that_a_weight_does_not_have(place: int):
    """Of SHiRA: the kernel that writes there would fail later, with the adapter in the model already."""
    model = get_peft_model(nets.Dense(), ShiraConfig(target_modules=["lin1"], r=1))
    state = get_peft_model_state_dict(model)
    key = "base_model.model.lin1.shira_indices"
    places = array(state[key]).copy()
    places[0, 0] = place
    before = state_of(model)
    with pytest.raises(
        LoadError, match=r"lin1\.shira_indices: there are places that a weight of shape \(5, .\) does not"
    ):
        set_peft_model_state_dict(model, state | {key: Tensor(places)})
    assert state_of(model) == before
