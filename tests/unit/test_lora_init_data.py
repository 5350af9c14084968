"""LoRA's initialisations from data: what they collect, what they leave behind, and what they refuse."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, dataset, nn, ops

from msft_peft import (
    ConfigError,
    CordaConfig,
    EvaConfig,
    LoadError,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    PeftWarning,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from msft_peft.tuners.lora.eva import IncrementalPca, prepare_model_inputs_fn_language_modeling
from tests import nets
from tests.cases import in_pynative, layers_of, output, shake, state_of, weights_of
from tests.tolerances import array

TARGETS = ["lin0", "lin1"]
MODES = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}


def dense() -> nn.Cell:
    ms.set_seed(5)
    return nets.Dense().set_train(False)


def batches(count: int = 3, rows: int = 40) -> list[Tensor]:
    spread = np.array([3, 1.5, 0.8, 0.4, 0.2, 0.1])
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    return [Tensor((rng.standard_normal((rows, 6)) * spread @ turn).astype(np.float32)) for _ in range(count)]


def corda(**settings: object) -> LoraConfig:
    config = CordaConfig(**settings)
    return LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda", corda_config=config)


def loraga(**settings: object) -> LoraConfig:
    config = LoraGAConfig(**settings)
    return LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=config)


def eva(targets: object = None, r: int = 2, **settings: object) -> LoraConfig:
    config = EvaConfig(**settings)
    return LoraConfig(r=r, lora_alpha=6, target_modules=targets or TARGETS, init_lora_weights="eva", eva_config=config)


def run(net: nn.Cell) -> None:
    for x in batches():
        net(x)


def train_step(net: nn.Cell) -> None:
    def loss(x: Tensor) -> Tensor:
        return ops.reduce_sum(ops.square(net(x)))

    step = ms.value_and_grad(loss, None, net.trainable_params())
    for x in batches():
        step(x)


# What the two preparations have in common: config, call, the name of a file, the attribute that they leave.
PREPARED = {
    "corda": (corda, lambda net, config, **k: preprocess_corda(net, config, lambda: run(net), **k), "eigens"),
    "lora_ga": (
        loraga,
        lambda net, config, **k: preprocess_loraga(net, config, lambda: train_step(net), **k),
        "_peft_loraga_grad",
    ),
}


@pytest.mark.parametrize("init", PREPARED)
def test_the_output_stays_and_it_trains_saves_and_comes_back(init, tmp_path, mode):
    config, prepare, left = PREPARED[init]
    base = dense()
    before = output(base)
    base_weight = array(base.lin0.weight).copy()
    prepare(base, config())
    assert ms.get_context("mode") == MODES[mode]
    model = get_peft_model(base, config()).set_train(False)
    assert not any(hasattr(layer.base_layer, left) for layer in layers_of(model))
    np.testing.assert_allclose(array(model(base.sample())), before, atol=2e-5)
    assert np.abs(array(model.base_model.model.lin0.base_layer.weight) - base_weight).max() > 1e-3
    model.save_pretrained(tmp_path / "initial")
    shake(weights_of(model, "default"))
    wanted = array(model(base.sample()))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    again = PeftModel.from_pretrained(dense(), tmp_path / "plain")
    np.testing.assert_allclose(array(again(base.sample())), wanted, atol=1e-4)
    model.save_pretrained(tmp_path / "residual")
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(dense(), tmp_path / "residual")


@pytest.mark.parametrize("init", PREPARED)
def test_preparing_changes_nothing_but_what_it_leaves(init):
    config, prepare, name = PREPARED[init]
    base = dense()
    base.lin0.weight.requires_grad = False
    before = state_of(base)
    prepare(base, config())
    assert state_of(base) == before
    assert hasattr(base.lin0, name)
    assert hasattr(base.lin1, name)
    assert not hasattr(base.lin0, "covariance_matrix")
    assert not list(base.lin0._forward_hook)


def test_the_gradient_is_the_mean_over_the_passes():
    base = dense()
    preprocess_loraga(base, loraga(), lambda: train_step(base))
    total = np.zeros((8, 6))
    with in_pynative():
        for x in batches():
            grad = ms.value_and_grad(lambda x: ops.reduce_sum(ops.square(base(x))), None, [base.lin0.weight])
            total += grad(x)[1][0].asnumpy()
    np.testing.assert_allclose(base.lin0._peft_loraga_grad, total / 3, rtol=1e-4, atol=1e-4)


def test_files_take_the_place_of_the_data(tmp_path):
    first, cache, covariance = dense(), str(tmp_path / "cache"), str(tmp_path / "covariance")
    config = corda(cache_file=cache, covariance_file=covariance)
    preprocess_corda(first, config, lambda: run(first))
    for config in (corda(cache_file=cache), corda(covariance_file=covariance)):
        second = dense()
        preprocess_corda(second, config)
        for name in ("S_WC", "U_WC", "V_WC"):
            np.testing.assert_array_equal(getattr(second.lin1.eigens, name), getattr(first.lin1.eigens, name))
    gradients = str(tmp_path / "gradients")
    preprocess_loraga(first, loraga(), lambda: train_step(first), cache_file=gradients)
    preprocess_loraga(second, loraga(), lambda: pytest.fail("the cache is there"), cache_file=gradients)
    np.testing.assert_array_equal(second.lin1._peft_loraga_grad, first.lin1._peft_loraga_grad)


@pytest.mark.parametrize("where", ["cache_file", "covariance_file"])
def test_files_of_other_models_and_broken_ones(where, tmp_path):
    path = str(tmp_path / "file")
    other = nets.Dense()
    config = corda(**{where: path})
    config.target_modules = ["lin0"]
    preprocess_corda(other, config, lambda: run(other))
    with pytest.raises(ConfigError, match="is it another model's"):
        preprocess_corda(dense(), corda(**{where: path}))
    with pytest.raises(ConfigError, match="is it another model's"):
        preprocess_loraga(dense(), loraga(), lambda: None, cache_file=path)
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="no valid safetensors file"):
        preprocess_corda(dense(), corda(**{where: path}))


def test_corda_refuses():
    base = dense()
    before = state_of(base)
    with pytest.raises(ConfigError, match="CorDA needs"):
        preprocess_corda(base, LoraConfig(target_modules=TARGETS), lambda: run(base))
    with pytest.raises(ConfigError, match="run_model must be specified when covariance file and cache file"):
        preprocess_corda(base, corda())
    with pytest.raises(ConfigError, match="it should be 'ipm' or 'kpm'"):
        preprocess_corda(base, corda(corda_method="x"), lambda: run(base))
    with pytest.raises(ConfigError, match=r"these layers saw nothing: \['lin0', 'lin1'\]"):
        preprocess_corda(base, corda(), lambda: None)
    with pytest.raises(ConfigError, match="NaN or infinity at lin0"):
        preprocess_corda(base, corda(), lambda: base(batches()[0] * float("nan")))
    with pytest.raises(ZeroDivisionError):
        preprocess_corda(base, corda(), lambda: 1 / 0)
    assert state_of(base) == before
    assert not list(base.lin0._forward_hook)
    assert not hasattr(base.lin0, "eigens")


def test_corda_of_another_rank_is_refused():
    base = dense()
    preprocess_corda(base, corda(), lambda: run(base))
    config = corda()
    config.r = 3
    with pytest.raises(ConfigError, match="is consistent with `get_peft_model`"):
        get_peft_model(base, config)


def test_loraga_refuses():
    base = dense()
    base.lin0.weight.requires_grad = False
    before = state_of(base)
    with pytest.raises(ConfigError, match="init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig"):
        preprocess_loraga(base, LoraConfig(target_modules=TARGETS, init_lora_weights="lora_ga"), lambda: None)
    with pytest.raises(ConfigError, match="these layers saw nothing"):
        preprocess_loraga(base, loraga(), lambda: run(base))
    with pytest.raises(ZeroDivisionError):
        preprocess_loraga(base, loraga(), lambda: 1 / 0)
    assert state_of(base) == before


# --- EVA -----------------------------------------------------------------------------------------------------------


def test_incremental_pca_is_the_pca_of_all_rows():
    rows = np.concatenate([array(x) for x in batches(4)]) + 0.7
    pca = IncrementalPca(6)
    for part in np.split(rows, [30, 37, 100]):
        pca.update(part)
    centred = rows - rows.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs((pca.components * vt).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(pca.singular, s, rtol=1e-5)
    np.testing.assert_allclose(pca.ratio, s**2 / (s**2).sum(), rtol=1e-5)


def initialised(model: PeftModel, data: object = None, **settings: object) -> PeftModel:
    return initialize_lora_eva_weights(
        model,
        data or batches(),
        forward_fn=lambda net, x: net(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
        **settings,
    )


def test_eva_leaves_the_output_and_finds_the_components(mode):
    base = dense()
    before = output(base)
    model = initialised(get_peft_model(base, eva(rho=1.0)).set_train(False))
    np.testing.assert_allclose(array(model(base.sample())), before, atol=2e-6)
    assert ms.get_context("mode") == MODES[mode]
    rows = np.concatenate([array(x) for x in batches()])
    vt = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2]
    a = array(model.base_model.model.lin0.lora_A["default"].weight)
    np.testing.assert_allclose(np.abs((a * vt[:2]).sum(1)), 1, atol=0.02)
    assert not array(model.base_model.model.lin0.lora_B["default"].weight).any()
    assert {p.name.split(".")[-3] for p in model.trainable_params()} == {"lora_A", "lora_B"}
    assert not model.training


class Wide(nn.Cell):
    """Two layers side by side whose inputs spread differently."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Dense(6, 4), nn.Dense(6, 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.narrow(x[:, :6]) + self.wide(x[:, 6:])


def spread(narrow: tuple[float, ...], wide: tuple[float, ...]) -> list[Tensor]:
    rng = np.random.default_rng(2)
    return [Tensor((rng.standard_normal((300, 12)) * [*narrow, *wide]).astype(np.float32)) for _ in range(3)]


@pytest.mark.parametrize("adjust", [True, False])
def test_eva_gives_the_ranks_to_where_they_explain_most(adjust, tmp_path):
    data = spread((9, 0.5, 0.4, 0.3, 0.2, 0.1), (5, 4, 3, 2, 0.5, 0.1))
    config = eva(["narrow", "wide"], adjust_scaling_factors=adjust)
    model = initialised(get_peft_model(Wide(), config), data).set_train(False)
    after = model.peft_config["default"]
    assert after.rank_pattern == {"narrow": 1, "wide": 3}
    assert after.alpha_pattern == ({"narrow": 3.0, "wide": 9.0} if adjust else {})
    layer = model.base_model.model.wide
    assert layer.r == {"default": 3}
    assert layer.scaling == {"default": 3.0 if adjust else 2.0}
    shake(weights_of(model, "default"))
    model.save_pretrained(tmp_path)
    base = Wide().set_train(False)
    for mine, theirs in zip(base.get_parameters(), (model.get_base_model().narrow, model.get_base_model().wide) * 2):
        mine.set_data(Tensor(array(getattr(theirs.base_layer, mine.name.split(".")[-1]))))
    assert PeftModel.from_pretrained(base, tmp_path).base_model.model.wide.scaling == layer.scaling


def test_eva_leaves_out_layers_that_explain_little():
    data = spread((6, 5, 0.3, 0.2, 0.1, 0.1), (1, 0.99, 0.98, 0.97, 0.96, 0.95))
    model = initialised(get_peft_model(Wide(), eva(["narrow", "wide"], r=1, tau=0.0)), data)
    assert model.peft_config["default"].target_modules == ["narrow"]
    assert model.peft_config["default"].rank_pattern == {"narrow": 2}
    assert all("narrow" in p.name for p in model.trainable_params())
    assert not model.base_model.model.wide.held()


def test_eva_from_components_and_whitened():
    base = dense()
    found = {
        whiten: get_eva_state_dict(
            base,
            batches(),
            eva(rho=1.0, whiten=whiten),
            forward_fn=lambda net, x: net(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        for whiten in (True, False)
    }
    plain, whitened = array(found[False]["lin0"]), array(found[True]["lin0"])
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.abs((plain * whitened).sum(1)), np.linalg.norm(whitened, axis=1), rtol=1e-5)
    assert np.linalg.norm(whitened[0]) < np.linalg.norm(whitened[1]) < 1
    model = get_peft_model(base, eva())
    with pytest.warns(PeftWarning, match=r"not found in the eva state_dict: \['lin1'\]"):
        initialize_lora_eva_weights(model, eva_state_dict={"lin0": found[False]["lin0"]})
    np.testing.assert_array_equal(array(model.base_model.model.lin0.lora_A["default"].weight), plain)


class Tokens(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(20, 6, embedding_table="normal"), nn.Dense(6, 4)

    def construct(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.lin(self.emb(input_ids))


def test_eva_on_a_dataset_of_tokens_sees_what_counts():
    """Tokens from 10 on are padding or have no label: what they would add must not be in the components."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 20, (32, 12)).astype(np.int32)
    attention = (ids < 15).astype(np.int32)
    labels = np.where(ids < 10, ids, -100).astype(np.int32)
    columns = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    net = Tokens()
    table = np.zeros((20, 6), np.float32)
    table[:10, :2], table[10:, 2:] = rng.standard_normal((10, 2)), 9 * rng.standard_normal((10, 4))
    net.emb.embedding_table.set_data(Tensor(table))
    data = dataset.NumpySlicesDataset(columns, shuffle=False).batch(16)
    found = get_eva_state_dict(net, data, eva(["lin"], tau=0.5), show_progress_bar=False)
    assert found["lin"].shape == (2, 6)
    assert np.abs(array(found["lin"])[:, 2:]).max() < 1e-5
    mask = prepare_model_inputs_fn_language_modeling(
        {key: Tensor(value) for key, value in columns.items()}, eva(use_label_mask=False)
    )
    np.testing.assert_array_equal(mask, ids < 15)
    with pytest.raises(ConfigError, match="dicts with 'input_ids'"):
        prepare_model_inputs_fn_language_modeling([1], eva())


def test_eva_refuses():
    model = get_peft_model(dense(), eva())
    before = state_of(model)
    with pytest.raises(ConfigError, match="dataloader is required if eva_state_dict is not provided"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="dataloader is empty"):
        initialize_lora_eva_weights(model, iter([]))
    with pytest.raises(ConfigError, match="looks for 4 components, but no batch had that many positions"):
        initialised(model, batches(rows=3))
    with pytest.raises(ConfigError, match=r"does not adapt \['zz'\]"):
        initialize_lora_eva_weights(model, eva_state_dict={"zz": np.zeros((2, 6))})
    with pytest.raises(ConfigError, match=r"lin0: \(2, 5\), wanted \(rank, 6\)"):
        initialize_lora_eva_weights(model, eva_state_dict={"lin0": np.zeros((2, 5))})
    with pytest.raises(ConfigError, match="can only be used with `init_lora_weights='eva'`"):
        initialised(get_peft_model(dense(), LoraConfig(target_modules=TARGETS)))
    with pytest.raises(ConfigError, match="peft_config is required if model is not a PeftModel"):
        get_eva_state_dict(dense(), batches())
    with pytest.raises(ConfigError, match="must be a PeftModel, got Dense"):
        initialised(dense())
    assert state_of(model) == before
