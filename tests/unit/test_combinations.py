"""Variants, extras and switches together: what is left over from one must not meet the next."""

import copy
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from msft_peft import ConfigError, LoraConfig, MergeError, PeftModel, get_peft_model
from msft_peft.functional import cast_adapter_dtype
from tests import nets
from tests.cases import output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ
from tests.unit.test_variants import IDS, Mixture, Q, llama

ALORA = LoraConfig(**Q, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
LIN0 = LoraConfig(r=2, target_modules=["lin0"])


@pytest.mark.parametrize("ranges", [None, [[0, 3], [0, 2]]])
def test_repeated_blocks_outlive_their_adapters_until_the_unload(ranges: list | None):
    net = llama()
    model = get_peft_model(net, LoraConfig(**Q, layer_replication=[[0, 2], [1, 2]]))
    model.delete_adapter("default")
    before = state_of(net)
    with pytest.raises(ConfigError, match="unload"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], layer_replication=ranges))
    assert state_of(net) == before
    assert len(net.model.layers) == net.config.num_hidden_layers == 3
    assert len(model.unload().model.layers) == net.config.num_hidden_layers == 2


def test_a_mixed_batch_that_fails_leaves_the_next_call_alone():
    model = get_peft_model(llama(), ALORA).set_train(False)
    shake(weights_of(model, "default"))
    expected = array(model(IDS)["logits"])
    with pytest.raises(ValueError, match="shape"):  # no token ids to look for invocations in
        model(inputs_embeds=nets.floats(3, 4, 8), adapter_names=["default", "__base__", "__base__"])
    assert_same(model(IDS)["logits"], expected, "exact")


def test_patterns_tell_the_parameters_of_a_module_apart(recwarn: pytest.WarningsRecorder):
    config = LoraConfig(
        r=2,
        target_modules=["lin"],
        target_parameters=["pool.first", "pool.second"],
        rank_pattern={"pool.first": 4, "pool": 3},
        alpha_pattern={"second": 6},
    )
    model = get_peft_model(Mixture(), config)
    assert [str(w.message) for w in recwarn if "first" in str(w.message)] == []
    outer = model.get_base_model().pool
    first, second = outer.base_layer.adapters["default"], outer.adapters["default"]
    assert (first.r, first.lora_alpha, first.lora_A.shape) == (4, 8, (12, 5))
    assert (second.r, second.lora_alpha, second.lora_A.shape) == (2, 6, (6, 4))


def test_a_parameter_cannot_wait_for_tokens():
    net = llama()
    before = state_of(net)
    config = LoraConfig(**Q, target_parameters=["up_proj.weight"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="does not work with alora_invocation_tokens"):
        get_peft_model(net, config)
    assert state_of(net) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"kasa_config": {}},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"]}},
        {"velora_config": {}},
        {"monteclora_config": {}},
        {"arrow_config": {}},
        {"init_lora_weights": "mica"},
        {"use_dora": True},
        {"lora_dropout": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_parameter_has_plain_lora(settings: dict):
    net = llama()
    before = state_of(net)
    (name,) = settings
    with pytest.raises(ConfigError, match=f"target_parameters does not work with {name}="):
        get_peft_model(net, LoraConfig(target_modules=[], target_parameters=["up_proj.weight"], **settings))
    assert state_of(net) == before


def test_a_parameter_beneath_adapters_can_be_trained_too():
    model = get_peft_model(Mixture(), LoraConfig(r=2, target_modules=[], target_parameters=["first"]))
    shake(weights_of(model, "default"))
    (base,) = [p for p in model.get_parameters() if p.name.endswith("base_layer.first")]
    base.requires_grad = True

    def loss(x: Tensor) -> Tensor:
        return ops.reduce_sum(ops.square(model(x)))

    (expected,) = ms.value_and_grad(loss, None, [base])(model.sample())[1]
    (compiled,) = ms.jit(ms.value_and_grad(loss, None, [base]))(model.sample())[1]
    assert array(expected).any()
    assert_same(compiled, expected, "gradient")


def test_a_copy_can_be_compiled_beside_the_original():
    model = get_peft_model(llama(), ALORA).set_train(False)
    shake(weights_of(model, "default"))
    twin = copy.deepcopy(model)
    shake(weights_of(twin, "default"), 9)
    twin.update_parameters_name("twin.")

    def both(ids: Tensor) -> tuple[Tensor, Tensor]:
        return model(ids)["logits"], twin(ids)["logits"]

    expected = [array(logits) for logits in both(IDS)]
    assert differ(*expected)
    for logits, wanted in zip(ms.jit(both)(IDS), expected):
        assert_same(logits, wanted)


def test_trainable_tokens_can_be_cast(mode: str):
    config = LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"emb": [3, 1]})
    net = nets.Embedding(ms.float16)
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    shake(weights_of(model, "default"))
    expected = output(model)
    cast_adapter_dtype(model, "default")
    assert {p.dtype for p in weights_of(model, "default")} == {ms.float32}
    assert_same(model(net.sample()), expected, "merge")


def test_an_adapter_that_takes_a_deleted_ones_name_is_not_active():
    model = get_peft_model(nets.Dense(), LIN0, "one")
    model.add_adapter("two", LIN0)
    model.base_model.set_adapter(["one", "two"])
    for name, left in (("two", ["one"]), ("one", [])):
        model.delete_adapter(name)
        model.add_adapter(name, LIN0)
        assert model.active_adapters == list(model.get_base_model().lin0.active) == left
        model.delete_adapter(name)


def test_a_deleted_adapter_no_longer_looks_for_its_tokens():
    model = get_peft_model(llama(), ALORA).set_train(False)
    embeds = nets.floats(1, 2, 8)
    expected = array(llama()(inputs_embeds=embeds)["logits"])
    model.delete_adapter("default")
    assert_same(model(inputs_embeds=embeds)["logits"], expected)


def test_layers_adapted_inside_a_disabled_block_are_enabled_after_it():
    model = get_peft_model(nets.Dense(), LIN0)
    with model.disable_adapter():
        model.add_adapter("two", LoraConfig(r=2, target_modules=["lin1"]))
        fresh = output(model)
    shake(weights_of(model, "two"))
    model.set_adapter("two")
    assert differ(output(model), fresh)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        model.add_adapter("three", LoraConfig(r=2, target_modules=["lin1"]))
    assert not model.has_active_enabled_adapter


def test_disabled_adapters_are_not_merged_for_good():
    model = get_peft_model(nets.Dense(), LIN0)
    shake(weights_of(model, "default"))
    model.base_model.disable_adapter_layers()
    before = state_of(model)
    with pytest.raises(MergeError, match="The adapters are disabled"):
        model.merge_and_unload()
    assert state_of(model) == before


class Gated(nn.Cell):
    """A module with a parameter and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Parameter(nets.floats(4, 4))
        self.gate = nn.Dense(4, 4)

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(self.gate(x), self.first)


class Outer(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Gated()

    def construct(self, x: Tensor) -> Tensor:
        return self.pool(x)


@pytest.mark.parametrize(
    ("make", "settings", "text"),
    [
        (Outer, {"target_modules": ["gate"], "target_parameters": ["first"]}, "also holds .*pool.gate"),
        (
            Outer,
            {"target_modules": [], "modules_to_save": ["gate"], "target_parameters": ["first"]},
            "also holds .*pool.gate",
        ),
        (Outer, {"target_modules": [], "target_parameters": ["first", "gate.weight"]}, "also holds .*pool.gate"),
        (
            llama,
            {"modules_to_save": ["model"], "target_modules": ["lm_head"], "trainable_token_indices": [1]},
            "twice",
        ),
    ],
    ids=["layer", "whole", "parameter", "tokens"],
)
def test_what_lies_inside_what_is_wrapped_is_refused(make: type, settings: dict, text: str):
    net = make()
    before = state_of(net)
    with pytest.raises(ConfigError, match=text):
        get_peft_model(net, LoraConfig(r=2, **settings))
    assert state_of(net) == before


def test_the_wrapper_of_a_parameter_is_not_taken_for_anothers():
    net = Mixture()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["lin"], target_parameters=["first", "second"]), "a")
    model.delete_adapter("a")
    first = LoraConfig(r=2, target_modules=["lin"], target_parameters=["first"])
    before = state_of(net)
    with pytest.raises(ConfigError, match="so far were for second"):
        model.add_adapter("b", first)
    assert state_of(net) == before
    again = get_peft_model(model.unload(), first)
    assert output(again).shape == output(net).shape


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["emb"], "use_dora": True},
        {"target_modules": ["lin"], "trainable_token_indices": {"emb": [3]}},
    ],
    ids=["dora", "tokens"],
)
def test_what_starts_from_the_base_starts_from_the_unmerged_one(settings: dict):
    net = nets.Embedding()
    rows = array(net.emb.embedding_table)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["emb"]), "one")
    shake(weights_of(model, "one"))
    model.merge_adapter()
    merged = output(model)
    model.add_adapter("two", LoraConfig(r=2, **settings))
    assert_same(output(model), merged, "exact")
    start = array(weights_of(net.emb, "two")[-1])
    assert_same(start, np.linalg.norm(rows, axis=0) if "use_dora" in settings else rows[[3]])
    model.unmerge_adapter()
    assert_same(net.emb.base_layer.embedding_table, rows, "unmerge")


def test_an_unloaded_model_is_adapted_again(mode: str):
    net = llama()
    model = get_peft_model(net, ALORA).set_train(False)
    model.unload()
    plain = array(model(IDS)["logits"])
    model.add_adapter("again", ALORA)
    shake(weights_of(model, "again"))
    model.set_adapter("again")
    assert differ(model(IDS)["logits"], plain)


@pytest.mark.parametrize("tokens", [5, "ab", [1.5], [True], ["a"]])
def test_invocation_tokens_are_token_ids(tokens: object):
    with pytest.raises(ConfigError, match=r"must be (a list of token ids|list\[int\])"):
        LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")


def test_names_that_are_no_strings_are_named():
    model = get_peft_model(nets.Dense(), LIN0).set_train(False)
    with pytest.raises(TypeError, match=r"`adapter_names` must be a list of strings, got \[1, None, 'default'\]"):
        model(model.sample(), adapter_names=[1, None, "default"])


class Biased(nn.Cell):
    """Two parameters and a bias in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Parameter(nets.floats(4, 4)), Parameter(nets.floats(4, 4, seed=8))
        self.bias = Parameter(nets.floats(4, seed=9))

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(ops.matmul(x, self.first), self.second) + self.bias


class BiasedOuter(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Biased()

    def construct(self, x: Tensor) -> Tensor:
        return self.pool(x)

    def sample(self) -> Tensor:
        return nets.floats(2, 4)


def test_a_bias_beneath_several_wrappers_loads_again(tmp_path: Path):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["first", "second"], bias="all")
    model = get_peft_model(BiasedOuter(), config)
    shake(model.trainable_params())
    assert "base_model.model.pool.base_layer.base_layer.bias" in [p.name for p in model.trainable_params()]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BiasedOuter(), tmp_path)
    assert_same(output(loaded), output(model))
    loaded.load_adapter(tmp_path, "default")
    assert_same(output(loaded), output(model))


def test_a_disabled_adapter_waits_for_no_tokens(mode: str):
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).set_train(False)
    with pytest.raises(ValueError, match="looks for them in input_ids"):
        model(inputs_embeds=nets.floats(1, 2, 8))
    with model.disable_adapter():
        assert model(inputs_embeds=nets.floats(1, 2, 8))["logits"].shape == (1, 2, 20)
    with pytest.raises(ValueError, match="looks for them in input_ids"):
        model(inputs_embeds=nets.floats(1, 2, 8))


def test_the_only_adapter_may_be_replaced_by_one_of_other_parameters(tmp_path: Path):
    get_peft_model(Mixture(), LoraConfig(target_modules=[], target_parameters=["first"])).save_pretrained(tmp_path)
    model = get_peft_model(Mixture(), LoraConfig(target_modules=["lin"]))
    model.load_adapter(tmp_path, "default")
    assert model.peft_config["default"].target_parameters == ["first"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lora_alpha": "8"}, "`lora_alpha` must be float, got '8'"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` should be a finite number"),
        ({"alpha_pattern": {"q": "b"}}, r"`alpha_pattern` must be dict\[str, float\], got"),
        ({"lora_dropout": None}, r"`lora_dropout` is a probability in \[0, 1\), got None"),
    ],
)
def test_numbers_must_be_numbers(settings: dict, text: str):
    with pytest.raises(ConfigError, match=text):
        LoraConfig(**settings)


def test_indices_of_tokens_must_be_whole_numbers():
    for indices in ({"embed_tokens": 3}, {"embed_tokens": [1.5]}, {"embed_tokens": [True]}):
        with pytest.raises(ConfigError, match=r"must be (a list of int|list\[int\])"):
            get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices))
