"""LoRA's variants and extras: what the parity tests cannot say, and what is refused."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from msft_peft import (
    ConfigError,
    LoraConfig,
    MergeError,
    NoMatchingPeftModuleError,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    rescale_adapter_scale,
)
from msft_peft.models import LlamaConfig, LlamaForCausalLM
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ


class Experts(nn.Cell):
    """Two stacks of matrices, read as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Parameter(nets.floats(3, 4, 5))
        self.second = Parameter(nets.floats(3, 5, 4, seed=8))
        self.experts = 3

    def construct(self, x: Tensor) -> Tensor:
        return ops.bmm(ops.bmm(x, self.first), self.second)


class Mixture(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Dense(4, 4)
        self.pool = Experts()
        self.top = Parameter(nets.floats(4, 4))

    def construct(self, x: Tensor) -> Tensor:
        return self.pool(ops.tile(self.lin(x), (self.pool.experts, 1, 1)))

    def sample(self) -> Tensor:
        return nets.floats(1, 2, 4)


def llama(tied: bool = False) -> LlamaForCausalLM:
    ms.set_seed(4)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    net = LlamaForCausalLM(config).set_train(False)
    shake(net.get_parameters(), 6)
    return net


IDS = Tensor(np.array([[3, 5, 6, 9], [5, 6, 5, 6], [1, 2, 3, 4]], np.int32))
Q = {"target_modules": ["q_proj"], "r": 2}

REFUSED = {
    "dora and alora": (llama, {"use_dora": True, "alora_invocation_tokens": [1]}, ConfigError, "variant combination"),
    "dora and mica": (
        llama,
        {"use_dora": True, "init_lora_weights": "mica"},
        ConfigError,
        "combination: dora and mica",
    ),
    "mica: no such layer": (
        lambda: nets.Conv(2),
        {"init_lora_weights": "mica", "target_modules": ["conv"]},
        ConfigError,
        r"supported by LORA \(mica\): \['dense', 'embedding'\]",
    ),
    "mica: rank": (llama, {"init_lora_weights": "mica", "r": 9}, ConfigError, "at most min.*r=9"),
    "mica: a parameter": (
        Mixture,
        {"init_lora_weights": "mica", "target_parameters": ["first"], "target_modules": []},
        ConfigError,
        "does not work with init_lora_weights='mica'",
    ),
    "alora: no tokens": (llama, {"alora_invocation_tokens": []}, ConfigError, "an empty list"),
    "alora: no dense layer": (
        llama,
        {"alora_invocation_tokens": [1], "target_modules": ["embed_tokens"]},
        ConfigError,
        r"supported by LORA \(alora\): \['dense'\]",
    ),
    "bias: embedding": (
        llama,
        {"lora_bias": True, "target_modules": ["embed_tokens"]},
        ConfigError,
        "lora_bias=True is not supported for Embedding",
    ),
    "tokens: no such layer": (
        llama,
        {"trainable_token_indices": {"x": [1]}},
        NoMatchingPeftModuleError,
        "'x' matches",
    ),
    "tokens: out of range": (llama, {"trainable_token_indices": [3, 20]}, ConfigError, r"\[20\] are none of its 20"),
    "tokens: negative": (llama, {"trainable_token_indices": [-1]}, ConfigError, r"\[-1\] are none"),
    "tokens: twice": (llama, {"trainable_token_indices": [1, 1]}, ConfigError, "no row, or one twice"),
    "tokens: two names for a layer": (
        llama,
        {"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}},
        ConfigError,
        "several names match model.embed_tokens",
    ),
    "tokens: none": (llama, {"trainable_token_indices": []}, ConfigError, "no row, or one twice"),
    "tokens: a target too": (
        llama,
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        ConfigError,
        "embed_tokens is to be adapted twice",
    ),
    "tokens: a whole copy too": (
        llama,
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        ConfigError,
        "embed_tokens is to be adapted twice",
    ),
    "tokens: a norm": (
        llama,
        {"trainable_token_indices": {"norm": [1]}},
        ConfigError,
        "cannot be applied to model.norm",
    ),
    "tied: another rank": (
        lambda: llama(tied=True),
        {"ensure_weight_tying": True, "target_modules": ["lm_head"], "rank_pattern": {"lm_head": 4}},
        ConfigError,
        "lm_head has the rank 4",
    ),
    "tied: dora": (
        lambda: llama(tied=True),
        {"ensure_weight_tying": True, "target_modules": ["lm_head"], "use_dora": True},
        ConfigError,
        "ties plain LoRA only",
    ),
    "tied: other tokens": (
        lambda: llama(tied=True),
        {"ensure_weight_tying": True, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
        ConfigError,
        "Cannot ensure weight tying",
    ),
    "blocks: none known": (nets.Dense, {"layer_replication": [[0, 1]]}, ConfigError, "Could not locate the layers"),
    "blocks: out of range": (
        llama,
        {"layer_replication": [[0, 2], [1, 3]]},
        ConfigError,
        r"\[\[1, 3\]\] are no ranges",
    ),
    "blocks: biases": (
        llama,
        {"layer_replication": [[0, 2], [1, 2]], "bias": "all"},
        ConfigError,
        "share their biases",
    ),
    "parameter: no such one": (
        Mixture,
        {"target_parameters": ["third"], "target_modules": []},
        NoMatchingPeftModuleError,
        "'third'.* match",
    ),
    "parameter: at the top": (
        Mixture,
        {"target_parameters": ["top"], "target_modules": []},
        ConfigError,
        "top-level module",
    ),
    "parameter: a vector": (
        Mixture,
        {"target_parameters": ["lin.bias"], "target_modules": []},
        ConfigError,
        "only matrices and stacks",
    ),
    "parameter: a target too": (
        Mixture,
        {"target_parameters": ["lin.weight"], "target_modules": ["lin"]},
        ConfigError,
        "lin is to be adapted twice",
    ),
}
for _name in ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out"):
    REFUSED[f"parameter: {_name}"] = (
        Mixture,
        {"target_parameters": ["first"], "target_modules": [], _name: 0.5 if _name == "lora_dropout" else True},
        ConfigError,
        f"does not work with {_name}=",
    )


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_alone(case: tuple):
    make, settings, kind, text = case
    net = make()
    before = state_of(net)
    with pytest.raises(kind, match=text):
        get_peft_model(net, LoraConfig(**Q | settings, task_type="CAUSAL_LM"))
    assert state_of(net) == before


# --- DoRA ---------------------------------------------------------------------------------------------------------


def test_doras_norm_is_that_of_the_sum():
    model = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"], use_dora=True, r=3, lora_alpha=7))
    shake(weights_of(model, "default"))
    patch = model.get_base_model().lin0.adapters["default"]
    whole = array(patch.site.weight) + array(patch.delta_weight())
    assert_same(patch.norm(), np.linalg.norm(whole, axis=1))


def test_bias_of_b_merges_only_into_a_bias(mode: str):
    net = nets.Dense()
    model = get_peft_model(net, LoraConfig(target_modules=["lin0"], lora_bias=True))
    shake(weights_of(model, "default"))
    x, expected, bias = net.sample(), output(model), array(net.lin0.bias)
    model.merge_adapter()
    assert differ(net.lin0.bias, bias)
    assert_same(model(x), expected, "merge")
    model.unmerge_adapter()
    assert_same(net.lin0.bias, bias, "exact")
    other = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin1"], lora_bias=True))
    with pytest.raises(MergeError, match="base layer lin1 has no bias"):
        other.merge_adapter()


# --- activated LoRA -----------------------------------------------------------------------------------------------


def test_alora_acts_from_the_last_invocation_on_inside_a_users_step():
    model = get_peft_model(llama(), LoraConfig(**Q, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"))
    shake(weights_of(model.set_train(False), "default"))
    with model.disable_adapter():
        base = array(model(IDS)["logits"])
    changed = np.abs(array(model(IDS)["logits"]) - base).max(-1) > 0
    np.testing.assert_array_equal(changed, [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])

    params = model.trainable_params()

    def loss(ids: Tensor) -> Tensor:
        return ops.reduce_sum(ops.square(model(ids)["logits"]))

    plain, compiled = ms.value_and_grad(loss, None, params), ms.jit(ms.value_and_grad(loss, None, params))
    for ids in (IDS, Tensor(IDS.asnumpy()[::-1].copy())):  # the second time compiled code sees other places
        (value, grads), (value2, grads2) = plain(ids), compiled(ids)
        assert_same(value2, value)
        for one, two in zip(grads, grads2):
            assert_same(two, one, "gradient")


def test_alora_needs_the_tokens_and_does_not_merge():
    config = LoraConfig(**Q, alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="alora_invocation_tokens needs get_peft_model"):
        inject_adapter_in_model(config, llama())
    model = get_peft_model(llama(), config).set_train(False)
    with pytest.raises(ValueError, match="looks for them in input_ids"):
        model(inputs_embeds=nets.floats(1, 2, 8))
    with pytest.raises(MergeError, match="aLoRA does not support merging"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="only supported for CAUSAL_LM"):
        LoraConfig(alora_invocation_tokens=[5])


def test_two_that_wait_for_other_tokens_are_not_active_together():
    model = get_peft_model(llama(), LoraConfig(**Q, alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "one")
    model.add_adapter("two", LoraConfig(**Q, alora_invocation_tokens=[6], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="wait for different tokens"):
        model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one"]
    model.set_adapter("two")
    assert model.get_base_model().peft_routing.invocation == (6,)


# --- trainable tokens ---------------------------------------------------------------------------------------------


def test_only_the_named_rows_change_and_a_tied_head_follows(mode: str):
    net = llama(tied=True)
    before, fresh = array(net.get_input_embeddings().weight), array(net(IDS)["logits"])
    model = get_peft_model(net, LoraConfig(**Q, trainable_token_indices=[9, 4])).set_train(False)
    assert_same(model(IDS)["logits"], fresh)
    shake([p for p in weights_of(model, "default") if "token_adapter" in p.name])
    assert [p.shape for p in weights_of(model, "default") if "token" in p.name] == [(2, 8)]
    adapted = array(model(IDS)["logits"])
    assert differ(adapted[..., 4], fresh[..., 4])
    np.testing.assert_array_equal(adapted[1][:, [1, 2, 3]], fresh[1][:, [1, 2, 3]])  # neither row is in or out there
    model.merge_adapter()
    merged = array(net.get_input_embeddings().weight)
    assert sorted(np.nonzero(np.abs(merged - before).max(1))[0]) == [4, 9]
    assert_same(model(IDS)["logits"], adapted, "merge")
    model.unmerge_adapter()
    assert_same(net.get_input_embeddings().weight, before, "unmerge")
    plain = model.merge_and_unload()
    assert type(plain.get_input_embeddings()).__name__ == "Embedding"
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert_same(plain(IDS)["logits"], adapted, "merge")


def test_rows_of_a_tied_head_of_its_own():
    indices = {"embed_tokens": [1], "lm_head": [2]}
    model = get_peft_model(llama(tied=True), LoraConfig(**Q, trainable_token_indices=indices))
    assert len([p for p in weights_of(model, "default") if "token" in p.name]) == 2
    with pytest.raises(MergeError, match="is tied"):
        model.merge_adapter()


# --- blocks that run twice ----------------------------------------------------------------------------------------


def test_replicated_blocks_share_their_weights_and_go_away_again(mode: str):
    net = llama()
    before, expected = state_of(net), array(net(IDS)["logits"])
    model = get_peft_model(net, LoraConfig(**Q, layer_replication=[[0, 2], [1, 2]]))
    assert net.config.num_hidden_layers == len(net.model.layers) == 3
    assert net.model.layers[2].mlp.up_proj.weight is net.model.layers[1].mlp.up_proj.weight
    assert len({p.name for p in weights_of(model, "default")}) == 6
    twice = array(model(IDS)["logits"])
    assert differ(twice, expected)
    shake([p for p in weights_of(model, "default") if ".2." in p.name])
    assert differ(model(IDS)["logits"], twice)
    with pytest.raises(MergeError, match="tied"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="the adapters in the model were made for"):
        model.add_adapter("two", LoraConfig(**Q))
    model.add_adapter("two", LoraConfig(**Q, layer_replication=[[0, 2], [1, 2]]))
    assert len(net.model.layers) == 3
    model.unload()
    assert net.config.num_hidden_layers == len(net.model.layers) == 2
    assert state_of(net)["cells"] == before["cells"]
    assert_same(net(IDS)["logits"], expected)


# --- parameters ---------------------------------------------------------------------------------------------------


def test_parameters_are_adapted_where_they_are_read(mode: str):
    net = Mixture()
    x, fresh, kinds = net.sample(), output(net), [type(cell) for _, cell in net.cells_and_names()]
    names = [p.name for p in net.get_parameters()]
    config = LoraConfig(r=2, target_modules=["lin"], target_parameters=["second", "pool.first"])
    model = get_peft_model(net, config, "one")
    assert_same(model(x), fresh)
    shake(weights_of(model, "one"))
    adapted = output(model)
    assert differ(adapted, fresh)
    assert_same(model(x), adapted)
    assert model.get_base_model().pool.experts == 3
    with model.disable_adapter():
        assert_same(model(x), fresh)
    model.add_adapter("two", config)
    shake(weights_of(model, "two"), 5)
    model.set_adapter("two")
    assert differ(output(model), adapted)
    assert_same(model(x), output(model))
    model.set_adapter("one")
    model.merge_adapter()
    assert_same(model(x), adapted, "merge")
    with pytest.raises(ConfigError, match="all adapters must target the same set"):
        model.add_adapter("three", LoraConfig(target_modules=["lin"], target_parameters=["first"]))
    model.unload()
    assert_same(net(x), fresh, "merge")
    assert [type(cell) for _, cell in net.cells_and_names()] == kinds
    assert [p.name for p in net.get_parameters()] == names
    assert not hasattr(net.pool, "peft_slots")


def test_parameters_serve_all_rows():
    model = get_peft_model(Mixture(), LoraConfig(target_modules=[], target_parameters=["first"])).set_train(False)
    with pytest.raises(ConfigError, match="a parameter serves all rows at once"):
        model(nets.floats(1, 2, 4), adapter_names=["default"])


# --- tied embeddings ----------------------------------------------------------------------------------------------


def test_copies_of_tied_embeddings_are_tied(mode: str):
    config = LoraConfig(**Q, modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config)
    base = model.get_base_model()
    copies = [wrapper.modules_to_save["default"] for wrapper in (base.model.embed_tokens, base.lm_head)]
    assert copies[0].weight is copies[1].weight
    assert copies[0].weight.requires_grad
    assert copies[0].weight is not base.lm_head.original_module.weight
    shake([copies[0].weight])
    expected = array(model(IDS)["logits"])
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert_same(merged(IDS)["logits"], expected, "merge")


def test_ties_that_are_not_there_or_not_asked_for_are_said():
    with pytest.warns(UserWarning, match="but no tied modules were found"):
        get_peft_model(llama(), LoraConfig(**Q, ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="embed_tokens and lm_head share a weight, and only one is adapted"):
        get_peft_model(llama(tied=True), LoraConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("live", [False, True])
def test_a_tied_update_has_one_scaling(live: bool):
    model = get_peft_model(
        llama(tied=True), LoraConfig(target_modules=["lm_head"], lora_alpha=8, r=4, ensure_weight_tying=True)
    )
    if live:
        prepare_model_for_compiled_hotswap(model)
    twin = copy.deepcopy(model)
    layers = layers_of(twin)
    assert len(layers) == 2

    def scalings() -> list[float]:
        return [float(array(layer.scaling["default"]).reshape(())) for layer in layers]

    for call, expected in (("scale_layer", 6), ("unscale_layer", 2)):
        for layer in layers:
            getattr(layer, call)(3.0)
        assert scalings() == [expected, expected]
    for layer in layers:
        layer.set_scale("default", 2.0)
    assert scalings() == [4, 4]
    with rescale_adapter_scale(twin, 0.5):
        assert scalings() == [2, 2]
    for layer in layers:
        layer.unscale_layer()
    assert scalings() == [2, 2]
    layers[0].scale_layer(5.0)
    assert {float(array(layer.scaling["default"]).reshape(())) for layer in layers_of(model)} == {2}


def test_a_tied_update_is_neither_combined_nor_lost():
    config = LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config, "one")
    model.add_adapter("two", config)
    with pytest.raises(NotImplementedError, match="more than a product of two factors"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "three", "cat")
    shake(weights_of(model, "two"))
    model.set_adapter("two")
    two = array(model(IDS)["logits"])
    model.delete_adapter("one")
    assert_same(model(IDS)["logits"], two)
    model.unload()
    assert_same(llama(tied=True)(IDS)["logits"], array(model.get_base_model()(IDS)["logits"]))
