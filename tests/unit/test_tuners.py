"""What is peculiar to single methods beside LoRA; what they have in common is in tests/contract."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import msft_peft
from msft_peft import (
    C3AConfig,
    DeloraConfig,
    GloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoadError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MergeError,
    MissConfig,
    OFTConfig,
    OSFConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TrainableTokensConfig,
    WaveFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from msft_peft.backend.wavelets import FAMILIES, high_pass, low_pass
from msft_peft.models import LlamaConfig, LlamaForCausalLM
from msft_peft.tuners.lokr import factors
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

BOTH = {"target_modules": ["lin0", "lin1"]}

# What a config refuses by itself.
BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "ia3: a stranger": (
        "IA3",
        {"target_modules": ["q"], "feedforward_modules": ["w"]},
        ValueError,
        "`feedforward_modules` should be a subset of `target_modules`",
    ),
    "ia3: a broken regex": ("IA3", {"feedforward_modules": "("}, ValueError, "no valid regular expression"),
    "loha: rank": ("LoHa", {"r": 0}, ValueError, "`r` should be a positive integer"),
    "loha: dropout": ("LoHa", {"module_dropout": 1.0}, ValueError, r"`module_dropout` is a probability in \[0, 1\)"),
    "lokr: init": ("LoKr", {"init_weights": "lycori"}, ValueError, "True, False or 'lycoris'"),
    "lokr: pattern": ("LoKr", {"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]"),
    "hira: init": ("Hira", {"init_weights": "uniform"}, ValueError, "Unknown initialization init_weights='uniform'"),
    "oft: nothing": ("OFT", {"r": 0, "oft_block_size": 0}, ValueError, "Either `r` or `oft_block_size` must be non-z"),
    "oft: both": ("OFT", {"r": 2}, ValueError, r"You can only specify either r \(2\) or oft_block_size \(32\)"),
    "oft: bias": ("OFT", {"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only, is not implemented"),
    "oft: eps": ("OFT", {"coft": True, "eps": 0.0}, ValueError, "`eps`, which must be above 0"),
    "hra: rank": ("HRA", {"r": -2}, ValueError, "`r` should be a positive integer"),
    "tokens: no numbers": ("TrainableTokens", {"token_indices": ["a"]}, ValueError, r"must be list\[int\], got"),
    "road: variant": ("Road", {"variant": "road_3"}, ValueError, "Invalid variant road_3 specified"),
    "road: odd": ("Road", {"group_size": 3}, ValueError, "The group_size must be divisible by 2"),
    "c3a: size": ("C3A", {"block_size": 0}, ValueError, "`block_size` should be a positive integer"),
    "c3a: init": ("C3A", {"init_weights": "zeros"}, ValueError, "Unknown init_weights: 'zeros'"),
    "c3a: bias": ("C3A", {"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only"),
    "miss: init": ("Miss", {"init_weights": "bats"}, ValueError, "must be True, False, 'bat' or 'mini'"),
    "gralora: blocks": ("Gralora", {"r": 5}, ValueError, "r should be divisible by gralora_k, but got 5 and 2"),
    "peanut: rank": ("Peanut", {"r": 0}, ValueError, "`r` should be a positive integer"),
    "peanut: depth": ("Peanut", {"depth": -1}, ValueError, "`depth` can only be a non-negative integer"),
    "peanut: activation": ("Peanut", {"act_fn": "x"}, ValueError, r"Unsupported `act_fn`: x. Must be one of \['gelu'"),
    "deft: method": ("Deft", {"decomposition_method": "svd"}, ValueError, "Unknown decomposition_method 'svd', must"),
    "deft: rank": ("Deft", {"r": 0}, ValueError, "`r` should be a positive integer"),
    "deft: scale": ("Deft", {"init_scale": -1.0}, ValueError, "`init_scale` is the factor of a deviation"),
    "deft: dropout": ("Deft", {"deft_dropout": 1.0}, ValueError, r"`deft_dropout` is a probability in \[0, 1\)"),
    "deft: bias": ("Deft", {"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only"),
    "glora: rank": ("Glora", {"r": 0}, ValueError, "`r` should be a positive integer"),
    "glora: weight": (
        "Glora",
        {"config_A_B": "x"},
        ValueError,
        "Invalid config_A_B value: 'x'. Valid values are: ",
    ),
    "glora: across": (
        "Glora",
        {"config_C": "constant"},
        ValueError,
        "Invalid config_C value: 'constant'. Valid",
    ),
    "glora: bias": ("Glora", {"config_D_E": "lora"}, ValueError, "Invalid config_D_E value: 'lora'. Valid values"),
    "supertuning: sparsity": (
        "Supertuning",
        {"sparsity": 1.0},
        ValueError,
        r"sparsity must be in \[0.0, 1.0\), got 1",
    ),
    "supertuning: rank": ("Supertuning", {"r": 0}, ValueError, "r must be a positive integer or None, got 0"),
    "supertuning: alpha": ("Supertuning", {"lora_alpha": 2.0}, ValueError, "lora_alpha is set but r is None"),
    "supertuning: dropout": ("Supertuning", {"lora_dropout": 1}, ValueError, r"lora_dropout must be in \[0.0, 1.0\)"),
    "waveft: number": ("WaveFT", {"n_frequency": 0}, ValueError, "`n_frequency` should be a positive integer"),
    "waveft: patterns": ("WaveFT", {"n_frequency_pattern": {"a": -1}}, ValueError, r"n_frequency_pattern\['a'\]"),
    "waveft: factor": ("WaveFT", {"scaling": float("inf")}, ValueError, "`scaling` should be a finite number"),
    "waveft: seed": ("WaveFT", {"random_loc_seed": 2**64}, ValueError, "`random_loc_seed` should be an integer"),
    "waveft: bias": ("WaveFT", {"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only"),
    "waveft: family": ("WaveFT", {"wavelet_family": "haar"}, ValueError, "Wavelet family haar not supported. Sup"),
    "osf: rank": ("OSF", {"effective_rank": 0}, ValueError, "`effective_rank` should be a positive integer value but"),
    "osf: share": ("OSF", {"effective_rank": -0.5}, ValueError, "but the value passed is -0.5"),
    "osf: patterns": ("OSF", {"rank_pattern": {"a": 0}}, ValueError, r"`rank_pattern\['a'\]` should be a positive"),
    "osf: regex": ("OSF", {"rank_pattern": {"(": 2}}, ValueError, "is no valid regular expression"),
    "delora: lambda": ("Delora", {"delora_lambda": float("nan")}, ValueError, "`delora_lambda` should be a finite"),
}
# What a model makes impossible.
MISFITS: dict[str, tuple[type[nn.Cell], str, dict[str, Any], type[Exception], str]] = {
    "ia3: feed-forward?": (nets.Dense, "IA3", BOTH, ValueError, "Please specify `feedforward_modules`"),
    "ia3: embedding": (
        nets.Embedding,
        "IA3",
        {"target_modules": ["emb"], "feedforward_modules": []},
        ValueError,
        "Target module emb .* is not supported",
    ),
    "ln tuning: averages": (
        nets.Norms,
        "LNTuning",
        {"target_modules": ["bn"]},
        NotImplementedError,
        "bn is a BatchNorm2d. Its averages",
    ),
    "tokens: none": (nets.Embedding, "TrainableTokens", {"target_modules": ["emb"]}, ValueError, "it names no row"),
    "tokens: out of range": (
        nets.Embedding,
        "TrainableTokens",
        {"target_modules": ["emb"], "token_indices": [3, 10]},
        ValueError,
        r"\[10\] are none of its 10 rows",
    ),
    "tokens: no embedding": (
        nets.Blocks,
        "TrainableTokens",
        {"token_indices": [1]},
        ValueError,
        "Please specify `target_modules`",
    ),
    "shira: rank": (nets.Dense, "Shira", BOTH, ValueError, "The set rank 32 results in more shira params"),
    "shira: whose mask?": (nets.Dense, "Shira", BOTH | {"r": 1, "mask_type": "x"}, ValueError, "set config.mask_fn"),
    "supertuning: nothing": (nets.Dense, "Supertuning", BOTH, ValueError, "leaves no trainable entries for a weight"),
    "waveft: too many": (nets.Dense, "WaveFT", BOTH, ValueError, "passed is 2592 and the product is 48: at lin0"),
    "waveft: no filter": (
        nets.Dense,
        "WaveFT",
        BOTH | {"n_frequency": 5, "wavelet_family": "coif5"},
        ValueError,
        "There are no filters of the wavelet family coif5",
    ),
    "osf: all": (
        nets.Dense,
        "OSF",
        BOTH | {"effective_rank": 6},
        ValueError,
        r"effective_rank=6 leaves nothing to train of lin0, whose weight \(8, 6\) has the rank 6",
    ),
    "osf: none": (
        nets.Dense,
        "OSF",
        BOTH | {"effective_rank": 0.1},
        ValueError,
        "`effective_rank` should be a positive integer value but the value passed is 0: at lin0",
    ),
    "osf: embedding": (nets.Embedding, "OSF", {"target_modules": ["emb"]}, ValueError, "emb .* is not supported"),
    "road: groups": (nets.Dense, "Road", BOTH, ValueError, "must be divisible by group_size"),
    "c3a: inputs": (nets.Dense, "C3A", BOTH | {"block_size": 4}, ValueError, "a factor of the input size"),
    "c3a: outputs": (
        nets.Dense,
        "C3A",
        {"target_modules": ["lin1"], "block_size": 4},
        ValueError,
        "a factor of the output size. However, the output size is 5 and the block size is 4: at lin1",
    ),
    "hra: pairs": (nets.Dense, "HRA", BOTH | {"apply_GS": True}, ValueError, "needs init_weights=False"),
    "miss: high": (nets.Dense, "Miss", BOTH | {"r": 7}, ValueError, r"`r` \(7\) must be less than or equal to the 6"),
    "miss: mini": (
        nets.Dense,
        "Miss",
        BOTH | {"r": 2, "mini_r": 3, "init_weights": "mini"},
        ValueError,
        r"`mini_r` \(3\) must divide the 8 outputs of lin0",
    ),
    "miss: bat": (
        nets.Dense,
        "Miss",
        BOTH | {"r": 4, "init_weights": "bat"},
        ValueError,
        "must be fully divisible",
    ),
    "oft: blocks of one": (
        nets.Dense,
        "OFT",
        BOTH | {"r": 6, "oft_block_size": 0},
        ValueError,
        "nothing to rotate in blocks of one",
    ),
    "gralora: outputs": (
        nets.Dense,
        "Gralora",
        {"target_modules": ["lin1"], "r": 2},
        ValueError,
        "out_features should be divisible by gralora_k, but got 5 and 2 at lin1",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_values_are_refused_at_once(case: tuple):
    method, settings, kind, text = case
    with pytest.raises(kind, match=text):
        getattr(msft_peft, f"{method}Config")(**settings)


@pytest.mark.parametrize("case", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_leaves_the_model_alone(case: tuple):
    make, method, settings, kind, text = case
    net = make()
    before = state_of(net)
    with pytest.raises(kind, match=text):
        get_peft_model(net, getattr(msft_peft, f"{method}Config")(**settings))
    assert state_of(net) == before


def llama(**settings: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes | settings))


def test_ia3_knows_the_feed_forward_layers_of_an_architecture():
    model = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM"))
    config = model.peft_config["default"]
    assert config.target_modules == ["down_proj", "k_proj", "v_proj"]
    assert config.feedforward_modules == ["down_proj"]
    shapes = {layer.site.name: tuple(layer.ia3_l["default"].shape) for layer in layers_of(model)}
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 24)}


def test_ia3_names_are_whole_parts_of_paths():
    """HF takes "p" for the end of any path: `up` would be feed-forward too."""
    model = get_peft_model(nets.Dense(), IA3Config(**BOTH, feedforward_modules=["lin1"]))
    assert [layer.adapters["default"].feedforward for layer in layers_of(model)] == [False, True]
    regex = IA3Config(target_modules="lin.", feedforward_modules="lin0")
    assert [p.adapters["default"].feedforward for p in layers_of(get_peft_model(nets.Dense(), regex))] == [True, False]


def test_fields_that_hf_lacks_are_written_only_if_used():
    assert "layers_to_transform" not in IA3Config(**BOTH, feedforward_modules=[]).to_dict()
    used = IA3Config(target_modules=["q"], feedforward_modules=[], layers_to_transform=[1], layers_pattern="layers")
    assert used.to_dict()["layers_to_transform"] == [1]
    model = get_peft_model(nets.Blocks(), used)
    assert [layer.site.path for layer in layers_of(model)] == ["layers.1.attn.q"]


def test_factors():
    assert [factors(n) for n in (1, 12, 16, 127, 128, 4096)] == [(1, 1), (3, 4), (4, 4), (1, 127), (8, 16), (64, 64)]
    assert [factors(128, n) for n in (4, 6, 100)] == [(4, 32), (4, 32), (8, 16)]
    assert factors(12, 6) == (6, 2)


def test_lokr_never_builds_the_product_for_a_dense_layer(monkeypatch: pytest.MonkeyPatch):
    model = get_peft_model(nets.Dense(), LoKrConfig(**BOTH, r=1))
    shake(weights_of(model, "default"))
    expected = output(model)
    patch = layers_of(model)[0].adapters["default"]
    monkeypatch.setattr(type(patch), "delta_weight", lambda self: pytest.fail("built"))
    assert_same(output(model), expected)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_a_dropped_module_adds_nothing(config: type, mode: str):
    model = get_peft_model(nets.Dense(), config(target_modules=["lin0"], r=2, module_dropout=0.5))
    shake(weights_of(model, "default"))
    x, full = model.sample(), output(model)
    with model.disable_adapter():
        base = output(model)
    model.set_train()
    ms.set_seed(0)
    drawn = [array(model(x)) for _ in range(20)]
    whole = [not differ(y, full) for y in drawn]
    none = [not differ(y, base) for y in drawn]
    assert all(a != b for a, b in zip(whole, none))
    assert any(whole)
    assert any(none)


@pytest.mark.parametrize(("config", "scaled"), [(LoHaConfig, True), (LoKrConfig, False)])
def test_dropped_rows_of_the_delta(config: type, scaled: bool):
    model = get_peft_model(nets.Dense(), config(target_modules=["lin0"], r=2, rank_dropout=0.5))
    shake(weights_of(model, "default"))
    patch = layers_of(model)[0].adapters["default"]
    whole = array(patch.delta_weight())
    ms.set_seed(1)
    patch.set_train()
    seen = set()
    for _ in range(20):
        ratio = array(patch.thinned(patch.delta_weight())) / whole
        rows = ratio[:, 0]
        assert_same(ratio, np.tile(rows[:, None], (1, ratio.shape[1])))
        left = np.count_nonzero(rows)
        seen.add(left)
        # LoHa's rows make up for those that are gone.
        assert_same(rows[rows != 0], np.full(left, len(rows) / left if scaled else 1.0, np.float32))
    assert len(seen) > 2


def test_hira_follows_its_rank_pattern():
    """HF does so only for a second adapter."""
    model = get_peft_model(nets.Dense(), HiraConfig(**BOTH, r=3, rank_pattern={"lin1": 2}))
    assert [layer.hira_A["default"].shape[0] for layer in layers_of(model)] == [3, 2]


def test_ln_tuning_finds_the_norms_of_a_llama():
    model = get_peft_model(llama(), LNTuningConfig(task_type="CAUSAL_LM"))
    paths = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"]
    assert [layer.site.path for layer in layers_of(model)] == paths
    assert model.get_nb_trainable_parameters()[0] == 3 * 16


def test_norms_tuned_by_two_adapters_gain_what_both_do():
    """HF refuses to have both active."""
    model = get_peft_model(nets.Rms(), LNTuningConfig(target_modules=["norm"]), adapter_name="one")
    model.add_adapter("two", LNTuningConfig(target_modules=["norm"]))
    for name, number in (("one", 0.5), ("two", 0.1)):
        (p,) = weights_of(model, name)
        p.copy_(Tensor(np.full(6, number, np.float32)))
    model.base_model.set_adapter(["one", "two"])
    both, layer = output(model), layers_of(model)[0]
    model.merge_adapter()
    assert_same(layer.weight, np.full(6, 0.3 + 0.2 - 0.2, np.float32))
    assert_same(output(model), both)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_of_a_language_model_and_its_tied_head(tied: bool, mode: str):
    net = llama(tie_word_embeddings=tied)
    tokens = Tensor([[1, 4, 2]], ms.int32)
    fresh = array(net(tokens)["logits"])
    model = get_peft_model(net, TrainableTokensConfig(token_indices=[4, 9], task_type="CAUSAL_LM")).set_train(False)
    assert model.peft_config["default"].target_modules == "model.embed_tokens"
    assert model.get_nb_trainable_parameters()[0] == 2 * 16
    assert_same(model(input_ids=tokens)["logits"], fresh)
    shake(weights_of(model, "default"))
    adapted = array(model(input_ids=tokens)["logits"])
    assert not differ(adapted[:, 0, 5], fresh[:, 0, 5])
    assert differ(adapted[:, 0, 9], fresh[:, 0, 9]) == tied
    model.merge_adapter()
    assert_same(model(input_ids=tokens)["logits"], adapted, "merge")


def test_rows_stay_what_they_are_when_the_table_is_loaded_anew(mode: str):
    net = nets.Embedding()
    model = get_peft_model(net, TrainableTokensConfig(target_modules=["emb"], token_indices=[8, 6]))
    layer = layers_of(model)[0]
    layer.weight.copy_(layer.weight + 1)
    rows = layer.trainable_tokens_delta["default"]
    assert_same(layer(Tensor([8, 6], ms.int32)), rows)
    model.merge_adapter()
    assert_same(array(layer.weight)[[8, 6]], rows)


def test_tokens_merge_one_after_another_where_they_do_not_overlap():
    model = get_peft_model(nets.Embedding(), TrainableTokensConfig(target_modules=["emb"], token_indices=[8, 6]))
    for name, indices in (("apart", [5]), ("over", [6])):
        model.add_adapter(name, TrainableTokensConfig(target_modules=["emb"], token_indices=indices))
    model.delete_adapter("over")
    for name in ("default", "apart"):
        model.merge_adapter([name])
    model.unmerge_adapter()
    model.add_adapter("over", TrainableTokensConfig(target_modules=["emb"], token_indices=[6]))
    model.merge_adapter(["default"])
    with pytest.raises(MergeError, match="over depends on the base weight of emb"):
        model.merge_adapter(["over"])


def test_tokens_may_begin_at_random():
    config = TrainableTokensConfig(target_modules=["emb"], token_indices=[1], init_weights=False)
    (p,) = weights_of(get_peft_model(nets.Embedding(), config), "default")
    assert differ(p, array(nets.Embedding().emb.embedding_table)[[1]])


@pytest.mark.parametrize("settings", [{"mask_type": "last"}, {"mask_type": "random", "random_seed": 4}])
def test_shira_takes_a_mask_of_your_own(settings: dict[str, Any]):
    """It is told the seed where HF tells it."""
    told: list[dict[str, Any]] = []

    def mask(base_layer: nn.Cell, r: int, **kwargs: Any) -> np.ndarray:
        told.append(kwargs)
        found = np.zeros(base_layer.weight.shape)
        found.flat[-r * sum(found.shape) :] = 1
        return found

    config = ShiraConfig(target_modules=["lin0"], r=1, **settings)
    config.mask_fn = mask
    model = get_peft_model(nets.Dense(), config)
    shake(weights_of(model, "default"))
    delta = array(layers_of(model)[0].adapters["default"].delta_weight()).ravel()
    assert np.flatnonzero(delta).tolist() == list(range(48 - 14, 48))
    assert told == [{key: value for key, value in settings.items() if key == "random_seed"}]
    config.mask_fn = lambda base_layer, r, **kwargs: np.ones((8, 6))
    with pytest.raises(ValueError, match=r"a mask of shape \(8, 6\) with 48 ones"):
        get_peft_model(nets.Dense(), config)


@pytest.mark.parametrize(("init", "largest"), [(True, 0), (False, 0.68), ("kaiming_uniform", 0.41), ("gaussian", 9)])
def test_c3a_begins_as_it_is_told(init: Any, largest: float):
    model = get_peft_model(nets.Dense(), C3AConfig(target_modules=["lin0"], block_size=2, init_weights=init))
    (p,) = weights_of(model, "default")
    assert np.abs(array(p)).max() <= largest
    assert bool(np.any(array(p))) == bool(largest)


def test_road_keeps_lengths_but_for_alpha():
    model = get_peft_model(nets.Dense(), RoadConfig(target_modules=["lin0"], group_size=4))
    patch = layers_of(model)[0].adapters["default"]
    shake([patch.road_theta])
    x = nets.floats(5, 8)
    turned = array(patch.after(x, x))
    assert differ(turned, array(x))
    assert_same(np.linalg.norm(turned, axis=1), np.linalg.norm(array(x), axis=1))


def test_hra_of_an_odd_rank_is_no_identity():
    with pytest.warns(UserWarning, match="r=3 is odd"):
        model = get_peft_model(nets.Dense(), HRAConfig(target_modules=["lin0"], r=3))
    fresh = output(model)
    with model.disable_adapter():
        assert differ(output(model), fresh)


def test_hra_keeps_lengths():
    model = get_peft_model(nets.Dense(), HRAConfig(target_modules=["lin0"], r=4))
    shake(weights_of(model, "default"))
    x = nets.floats(5, 6)
    turned = array(layers_of(model)[0].adapters["default"].before(x))
    assert differ(turned, array(x))
    assert_same(np.linalg.norm(turned, axis=1), np.linalg.norm(array(x), axis=1))


@pytest.mark.parametrize(("r", "size", "blocks"), [(0, 4, (3, 2)), (0, 5, (6, 1)), (0, 32, (6, 1)), (4, 0, (2, 3))])
def test_oft_takes_the_nearest_division(r: int, size: int, blocks: tuple[int, int]):
    with pytest.warns(UserWarning, match=r"Invalid `(r|oft_block_size)` .*! Adjusted"):
        model = get_peft_model(nets.Dense(), OFTConfig(target_modules=["lin0"], r=r, oft_block_size=size))
    patch = layers_of(model)[0].adapters["default"]
    assert (patch.block, patch.blocks) == blocks


def test_oft_exactly_is_a_rotation():
    config = OFTConfig(target_modules=["lin0"], oft_block_size=3, use_cayley_neumann=False)
    model = get_peft_model(nets.Dense(), config)
    shake(weights_of(model, "default"))
    r = array(layers_of(model)[0].adapters["default"].rotations())
    assert_same(r @ r.transpose(0, 2, 1), np.tile(np.eye(3, dtype=np.float32), (2, 1, 1)))
    assert_same(np.linalg.det(r), np.ones(2, np.float32))


def test_oft_drops_rotations_while_training():
    """In HF the setting has no effect."""
    model = get_peft_model(nets.Dense(), OFTConfig(target_modules=["lin0"], oft_block_size=2, module_dropout=0.5))
    patch = layers_of(model)[0].adapters["default"]
    shake([patch.angles])
    whole = array(patch.rotations())
    patch.set_train()
    ms.set_seed(2)
    seen = set()
    for _ in range(20):
        r = array(patch.rotations())
        kept = [not differ(one, other) for one, other in zip(r, whole)]
        assert all(k or not differ(one, np.eye(2, dtype=np.float32)) for k, one in zip(kept, r))
        seen.add(sum(kept))
    assert len(seen) > 1


def test_constrained_oft_stays_near_the_identity(mode: str):
    config = OFTConfig(target_modules=["lin0"], oft_block_size=3, coft=True, eps=0.02, use_cayley_neumann=False)
    model = get_peft_model(nets.Dense(), config)
    with model.disable_adapter():
        base = output(model)
    patch = layers_of(model)[0].adapters["default"]
    shake([patch.angles])
    assert np.linalg.norm(array(patch.rotations()) - np.eye(3), axis=(1, 2)).max() <= 2 * 0.02 / np.sqrt(2) + 1e-5
    adapted = array(model(model.sample()))
    assert 1e-4 < np.abs(adapted - base).max() < 0.2
    patch.angles.copy_(Tensor(np.full((2, 3), 1e-4, np.float32)))
    assert_same(patch.bounded(), np.full((2, 3), 1e-4, np.float32))


def test_delora_s_gradient_of_a_zero_vector_is_finite():
    model = get_peft_model(nets.Dense(), DeloraConfig(target_modules=["lin0"], r=2))
    loss = nets.Loss(model)
    target = nets.floats(*output(model).shape, seed=3)
    grads = ms.grad(loss, None, model.trainable_params())(model.sample(), target)
    assert all(np.isfinite(array(g)).all() for g in grads)
    assert any(array(g).any() for g in grads)


def test_what_delora_remembers_is_not_trained_nor_counted():
    model = get_peft_model(nets.Dense(), DeloraConfig(target_modules=["lin0"], r=2))
    lin0 = layers_of(model)[0]
    assert not lin0.delora_w_norm["default"].requires_grad
    assert_same(lin0.delora_w_norm["default"], np.linalg.norm(array(lin0.weight), axis=0))
    assert model.get_nb_trainable_parameters()[0] == 2 * 6 + 8 * 2 + 1
    model.set_requires_grad("default", True)
    assert not lin0.delora_w_norm["default"].requires_grad


def test_miss_adds_one_block_to_every_shard():
    model = get_peft_model(nets.Dense(), MissConfig(target_modules=["lin0"], r=4))
    shake(weights_of(model, "default"))
    patch = layers_of(model)[0].adapters["default"]
    block = array(patch.miss_block)
    assert_same(patch.delta_weight(), np.concatenate([block, block], 0)[:6].T)


@pytest.mark.parametrize("first", [True, False])
def test_a_mixed_model_of_ia3_and_lora(first: bool, mode: str):
    configs = [IA3Config(**BOTH, feedforward_modules=["lin1"]), LoraConfig(**BOTH, r=2)]
    names = ["ia3", "lora"] if first else ["lora", "ia3"]
    one, other = configs if first else configs[::-1]
    model = get_peft_model(nets.Dense(), one, adapter_name=names[0], mixed=True)
    model.add_adapter(names[1], other)
    for name in names:
        shake(weights_of(model, name))
    model.set_adapter(names)
    x = model.sample()
    both = array(model(x))
    assert_same(both, output(model))
    model.merge_adapter()
    assert_same(model(x), both)
    model.unmerge_adapter()
    assert_same(output(model), both)


def test_a_tensor_may_have_any_number_of_axes():
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32))
    for config in (
        IA3Config(target_modules=["lin0"], feedforward_modules=["lin0"]),
        LoKrConfig(target_modules=["lin0"], r=1),
        OFTConfig(target_modules=["lin0"], oft_block_size=2),
        HRAConfig(target_modules=["lin0"], r=2),
        MissConfig(target_modules=["lin0"], r=4),
    ):
        model = get_peft_model(nets.Dense(), config)
        shake(weights_of(model, "default"))
        flat = array(model(x.reshape((-1, 6))))
        assert_same(model(x), flat.reshape(2, 3, 4, -1))


def test_glora_s_nothing_stays_nothing():
    config = GloraConfig(target_modules=["lin0"], config_A_B="none", config_C="none", config_D_E="constant")
    model = get_peft_model(nets.Dense(), config)
    state, key = get_peft_model_state_dict(model), "base_model.model.lin0.glora_A.zeros"
    before = state_of(model)
    with pytest.raises(LoadError, match=r"lin0\.glora_A\.zeros: by the adapter's config there are only zeros here"):
        set_peft_model_state_dict(model, state | {key: np.ones((8, 6), np.float32)})
    assert state_of(model) == before


def test_super_tuning_takes_the_first_of_equals():
    net = nets.Dense()
    weight = np.ones((8, 6), np.float32)
    weight[2, 1], weight[7, 5] = -3, 2
    net.lin0.weight.set_data(Tensor(weight))
    model = get_peft_model(net, SupertuningConfig(target_modules=["lin0"], sparsity=0.9))
    (layer,) = layers_of(model)
    assert array(layer.supertuning_indices["default"]).tolist() == [2 * 6 + 1, 7 * 6 + 5, 0, 1]


def test_super_tuning_knows_the_places_of_its_layer():
    model = get_peft_model(nets.Dense(), SupertuningConfig(target_modules=["lin0"], sparsity=0.9))
    state, key = get_peft_model_state_dict(model), "base_model.model.lin0.supertuning_indices"
    before = state_of(model)
    with pytest.raises(LoadError, match=r"there are places that a weight of shape \(8, 6\) does not have"):
        set_peft_model_state_dict(model, state | {key: np.array([0, 1, 2, 48], np.int32)})
    assert state_of(model) == before


def test_wavelets_are_orthonormal():
    """Their shifts by two are, and those of the details; the sum of the squares of what comes apart is that before."""
    assert len(FAMILIES) == 10 + 9 + 4
    for family in FAMILIES[:-1]:
        h = low_pass(family)
        bank = np.zeros((len(h), 2 * len(h)))
        for k in range(len(h) // 2):
            bank[2 * k : 2 * k + 2, 2 * k : 2 * k + len(h)] = h, high_pass(h)
        np.testing.assert_allclose(bank @ bank.T, np.eye(len(h)), atol=1e-10, err_msg=family)
        assert abs(h.sum() - 2**0.5) < 1e-10, family


def test_waveft_shares_out_its_numbers_by_size():
    config = WaveFTConfig(**BOTH, n_frequency=10, proportional_parameters=True, n_frequency_pattern={"lin0": 3})
    model = get_peft_model(nets.Dense(), config)
    counts = [layer.adapters["default"].waveft_spectrum.shape for layer in layers_of(model)]
    # Of 20 in all, 48 parts in 88 and 40 in 88.
    assert counts == [(11,), (9,)]


def test_haar_waves_are_plus_and_minus():
    """Each trained number acts on two by two numbers of the weight, all of one size."""
    model = get_peft_model(nets.Dense(), WaveFTConfig(target_modules=["lin0"], n_frequency=48, scaling=3.0))
    (layer,) = layers_of(model)
    patch = layer.adapters["default"]
    waves = array(patch.waves)
    np.testing.assert_allclose(np.abs(waves), 1.5, rtol=1e-6)
    whole = np.zeros((48, 48))
    np.add.at(whole, (np.repeat(np.arange(48), 4), array(patch.places)[:, 0]), waves.ravel())
    np.testing.assert_allclose(whole @ whole.T, 9 * np.eye(48), atol=1e-5)


@pytest.mark.parametrize("layer", ["lin0", "lin1"], ids=["tall", "wide"])
def test_osf_s_gradients_are_orthogonal_to_what_is_kept(layer, mode):
    """In compiled code too, and where the weights are no longer what they began with."""
    model = get_peft_model(nets.Dense(), OSFConfig(target_modules=[layer], effective_rank=2))
    patch, x = layers_of(model)[0].adapters["default"], model.sample()
    u, _, v = np.linalg.svd(array(patch.base_weight()), full_matrices=False)
    shake(weights_of(model, "default"))
    weights = model.trainable_params()

    def loss(x):
        return ops.reduce_sum(ops.square(model(x)))

    found = dict(zip([p.name.rpartition(".")[2] for p in weights], ms.grad(loss, None, weights)(x), strict=True))
    assert min(np.abs(array(found[name])).max() for name in ("U_low", "V_low")) > 1e-2
    assert np.abs(u[:, :2].T @ array(found["U_low"])).max() < 1e-5
    assert np.abs(array(found["V_low"]) @ v[:2].T).max() < 1e-5


def test_osf_s_ranks():
    """The first pattern that is found anywhere in a path counts; shares are of the smaller side."""
    ranks = {"x": 1, "n0": 0.5, "lin0": 1}
    model = get_peft_model(nets.Dense(), OSFConfig(**BOTH, effective_rank=3.0, rank_pattern=ranks))
    assert [layer.adapters["default"].S_low.shape for layer in layers_of(model)] == [(6 - 3,), (5 - 3,)]


def test_osf_adapts_all_dense_layers_where_none_are_usual():
    model = get_peft_model(nets.Dense(), OSFConfig())
    assert [layer.site.path for layer in layers_of(model)] == ["lin0", "lin1"]
