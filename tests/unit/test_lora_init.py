"""LoRA's initialisations from the base weight: their formulas, and what becomes of the base."""

import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    AdapterNameError,
    ConfigError,
    LoadError,
    LoraConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
)
from msft_peft.tuners.lora import init as inits
from msft_peft.tuners.lora.init_config import DIRECTIONS, SCALES, EvaConfig, LoftQConfig, LoraGAConfig
from tests import nets
from tests.cases import output, shake, state_of, weights_of
from tests.tolerances import array

TARGETS = ["lin0", "lin1"]
CLOSED = {
    "olora": {},
    "pissa": {},
    "pissa_niter_3": {},
    "loftq": {"loftq_config": {"loftq_bits": 8, "loftq_iter": 2}},
    "orthogonal": {},
}
RESIDUAL = ("olora", "pissa", "pissa_niter_3")
SHAPES = ((12, 8), (8, 12), (9, 9))


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def best(w: np.ndarray, r: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


def dense(dtype=ms.float32) -> nn.Cell:
    ms.set_seed(5)
    return nets.Dense(dtype).set_train(False)


def adapted(init: object, base: nn.Cell | None = None, **settings: object) -> PeftModel:
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | CLOSED.get(str(init), {}) | settings
    return get_peft_model(base or dense(), LoraConfig(init_lora_weights=init, **settings)).set_train(False)


# --- formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_factors_are_not_zero_and_their_product_is(shape):
    start = inits.orthogonal(shape, 4, np.random.default_rng(1))
    assert start.a.shape == (4, shape[1])
    assert start.b.shape == (shape[0], 4)
    assert np.abs(start.b @ start.a).max() < 1e-6
    assert np.abs(start.a).mean() > 0.01
    assert np.abs(start.b).mean() > 0.01
    assert not start.residual


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ConfigError, match="requires the LoRA rank to be even, got 3 instead"):
        inits.orthogonal((8, 8), 3, np.random.default_rng(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_first_part_of_a_qr(shape):
    w = weight(*shape)
    start = inits.olora(w, 3)
    np.testing.assert_allclose(start.b.T @ start.b, np.eye(3), atol=1e-6)
    # The first r columns of W need no more of Q and R than these.
    np.testing.assert_allclose(start.b @ start.a[:, :3], w[:, :3], atol=1e-5)
    assert np.abs(np.tril(start.a, -1)).max() == 0


@pytest.mark.parametrize("scaling", [0.5, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_is_the_best_approximation(shape, scaling):
    w = weight(*shape)
    start = inits.pissa(w, 3, scaling)
    np.testing.assert_allclose(scaling * (start.b @ start.a), best(w, 3), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(start.a, axis=1), np.linalg.norm(start.b, axis=0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_randomised_pissa_nears_the_best_approximation_with_its_iterations(shape):
    w = weight(*shape)
    errors = [np.linalg.norm(2.0 * (s.b @ s.a) - best(w, 4)) for s in (inits.pissa(w, 4, 2.0, n) for n in (0, 4, 60))]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-2 * np.linalg.norm(best(w, 4))
    again = inits.pissa(w, 4, 2.0, 4)
    assert np.array_equal(again.a, inits.pissa(w, 4, 2.0, 4).a)


def test_mica_writes_where_the_weight_does_least():
    w = weight(12, 8)
    start = inits.mica(w, 3)
    np.testing.assert_allclose(start.b.T @ start.b, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(w.T @ start.b, axis=0), np.linalg.svd(w)[1][-3:], rtol=1e-5)
    assert not start.a.any()
    assert not start.residual


def test_mica_decomposes_nothing_where_its_factors_are_about_to_be_loaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("an SVD for nothing")

    monkeypatch.setattr(inits, "mica", refuse)
    model = get_peft_model(
        dense(), LoraConfig(target_modules=TARGETS, init_lora_weights="mica"), low_cpu_mem_usage=True
    )
    assert all(np.isnan(array(p)).all() for p in weights_of(model, "default"))


def test_subtracting_an_initial_adapter_keeps_the_rest_and_lists_what_is_missing():
    ms.set_seed(5)
    config = LoraConfig(r=2, target_modules=["emb", "lin"], modules_to_save=None)
    model = get_peft_model(nets.Embedding(), config)
    model.add_adapter("initial", config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["emb"]))
    for seed, name in enumerate(("default", "initial")):
        shake(weights_of(model, name), seed=seed)
    now = get_peft_model_state_dict(model) | {"base_model.model.head.weight": Tensor(weight(2, 2))}
    found = model.base_model.subtract_mutated_init(now, "initial")
    assert found["base_model.model.head.weight"] is now["base_model.model.head.weight"]
    layer = model.get_base_model().emb
    a, b = (array(found[f"base_model.model.emb.lora_embedding_{factor}"]) for factor in "AB")
    expected = array(layer.adapters["default"].delta_weight()) - array(layer.adapters["initial"].delta_weight())
    np.testing.assert_allclose(4 * (b @ a).T, expected, atol=1e-5)
    with pytest.raises(LoadError, match=r"lin\.lora_A\.weight is missing; base_model\.model\.lin\.lora_B"):
        model.base_model.subtract_mutated_init(now, "other")
    with pytest.raises(AdapterNameError, match="nothing"):
        model.base_model.subtract_mutated_init(now, "nothing")
    wrong = now | {"base_model.model.lin.lora_A.weight": Tensor(weight(2, 3))}
    with pytest.raises(LoadError, match=r"lin\.lora_A\.weight has the shape .* beside \(2, 3\)"):
        model.base_model.subtract_mutated_init(wrong, "initial")


def test_svd_lowrank_is_exact_where_the_rank_is_low():
    w = weight(20, 3) @ weight(3, 15, seed=1)
    u, s, vt = inits.svd_lowrank(w, 3, 1)
    np.testing.assert_allclose((u * s) @ vt, w, atol=1e-4)
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-5)


def test_nf4_keeps_its_own_levels_and_rounds_to_the_nearest():
    w = weight(6, 50)  # 300 numbers: the last block is short
    q = inits.nf4(w)
    np.testing.assert_allclose(inits.nf4(q), q, rtol=1e-6)
    for block, rounded in zip(np.split(w.ravel(), range(64, 300, 64)), np.split(q.ravel(), range(64, 300, 64))):
        levels = inits._NF4 * np.abs(block).max()
        nearest = levels[np.abs(block[:, None] - levels).argmin(1)]
        np.testing.assert_allclose(rounded, nearest, rtol=1e-6)
    assert not inits.nf4(np.zeros((3, 5), np.float32)).any()


def test_int8_is_half_a_step_off_at_most_and_keeps_zero_rows():
    w = weight(6, 20)
    w[2] = 0
    q, step = inits.int8(w), np.abs(w).max(1, keepdims=True) / 127
    assert (np.abs(q - w) <= 0.5 * step + np.abs(w) * 2e-3).all()  # and the rounding to half precision
    assert not q[2].any()


def test_quantisation_is_that_of_bitsandbytes():
    """As tests/parity/make_quantised.py kept it."""
    kept = np.load(Path(__file__).parents[1] / "parity" / "quantised.npz")
    np.testing.assert_allclose(inits.nf4(kept["weight"]), kept["nf4"], atol=1e-6)
    np.testing.assert_allclose(inits.int8(kept["weight"]), kept["int8"], atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_comes_nearer_to_the_weight_than_quantisation(bits):
    w, scaling = weight(16, 32), 3.0
    errors = []
    for rounds in (1, 5):
        start = inits.loftq(w, 4, scaling, LoftQConfig(bits, rounds))
        errors.append(np.linalg.norm(start.kept + scaling * (start.b @ start.a) - w))
    plain = np.linalg.norm((inits.nf4 if bits == 4 else inits.int8)(w) - w)
    assert errors[1] < errors[0] < plain


@pytest.mark.parametrize(
    ("config", "says"),
    [(LoftQConfig(3), "Only nf4 and int8"), (LoftQConfig(2), "Only nf4 and int8"), (LoftQConfig(4, 0), "iterations")],
)
def test_loftq_refuses(config, says):
    with pytest.raises(ConfigError, match=says):
        inits.loftq(weight(4, 4), 2, 1.0, config)


def test_corda_components_of_white_inputs_are_those_of_the_weight():
    w = weight(10, 8)
    start = inits.corda(inits.corda_eigens(w, np.eye(8, dtype=np.float32), 3, "ipm"), 2.0)
    np.testing.assert_allclose(2.0 * (start.b @ start.a), best(w, 3), atol=1e-4)


def test_corda_kpm_leaves_what_the_inputs_use():
    """Inputs that lie in few directions: the components that matter least give nothing for them."""
    w, x = weight(10, 8), weight(200, 2) @ weight(2, 8, seed=1)
    covariance = x.T @ x / 200
    kpm, ipm = (inits.corda(inits.corda_eigens(w, covariance, 2, m), 1.0) for m in ("kpm", "ipm"))
    used = np.linalg.norm(x @ w.T)
    assert np.linalg.norm(x @ (kpm.b @ kpm.a).T) < 0.05 * used
    assert np.linalg.norm(x @ (w - ipm.b @ ipm.a).T) < 0.05 * used


def test_corda_refuses():
    with pytest.raises(ConfigError, match="Invalid corda_method found: x, it should be 'ipm' or 'kpm'"):
        inits.corda_eigens(weight(4, 4), np.eye(4), 2, "x")
    with pytest.raises(ConfigError, match="no inverse"):
        inits.corda_eigens(weight(4, 4), np.zeros((4, 4)), 2, "ipm")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_takes_singular_vectors_of_the_gradient(direction, scale):
    w, g, r, s = weight(10, 12), weight(10, 12, seed=1), 3, 2.0
    start = inits.lora_ga(w, g, r, s, LoraGAConfig(direction, scale))
    u, sv, vt = np.linalg.svd(g)
    a, b = np.abs(start.a @ vt.T), np.abs(u.T @ start.b)
    of_a, of_b = a.argmax(1).tolist(), b.argmax(0).tolist()
    wanted = {"ArBr": ([1, 3, 5], [0, 2, 4]), "A2rBr": ([3, 4, 5], [0, 1, 2]), "ArB2r": ([0, 1, 2], [3, 4, 5])}
    assert (of_a, of_b) == wanted.get(direction, (of_a, of_a))
    assert len(set(of_a)) == 3
    factor = {"stable": 10**0.25 / 4, "weight_svd": np.linalg.norm(w, 2) / sv[of_b[0]], "gd_scale": 1 / s, "unit": 1}
    np.testing.assert_allclose(b.max(0), sv[of_b] * factor[scale], rtol=1e-3)
    np.testing.assert_allclose(a.max(1), 1 / s if scale == "gd_scale" else 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "r", "says"),
    [
        (LoraGAConfig("x"), 2, "direction 'x'"),
        (LoraGAConfig(scale="x"), 2, "scale 'x'"),
        (LoraGAConfig(), 5, "r=5 is too large"),
    ],
)
def test_lora_ga_refuses(config, r, says):
    with pytest.raises(ConfigError, match=says):
        inits.lora_ga(weight(8, 12), weight(8, 12), r, 1.0, config)


# --- in a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
@pytest.mark.parametrize("init", CLOSED)
def test_the_output_stays_and_unload_gives_the_base_back(init, dtype, mode):
    base = dense(dtype)
    before, state = output(base), {p.name: array(p).copy() for p in base.get_parameters()}
    model = adapted(init, base)
    weight_now = array(model.base_model.model.lin0.base_layer.weight)
    assert np.array_equal(weight_now, state["lin0.weight"]) == (init == "orthogonal")
    room = 2e-2 if init == "loftq" else 2e-3 if dtype == ms.float16 else 2e-6
    np.testing.assert_allclose(array(model(base.sample())), before, atol=room)
    shake(weights_of(model, "default"))
    assert np.abs(output(model, base.sample()) - before).max() > 0.1
    after = model.unload()
    for p in after.get_parameters():
        # Within one rounding of what stood there in the meantime.
        np.testing.assert_allclose(array(p), state[p.name], rtol=0, atol=3e-4 if dtype == ms.float16 else 3e-7)
    if init in ("loftq", "orthogonal"):
        assert all(np.array_equal(array(p), state[p.name]) for p in after.get_parameters())


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_dora_measures_the_base_and_the_update_together(init):
    base = dense()
    before = output(base)
    room = 2e-2 if init == "loftq" else 2e-6
    np.testing.assert_allclose(output(adapted(init, base, use_dora=True), base.sample()), before, atol=room)


@pytest.mark.parametrize("init", [*RESIDUAL, "loftq"])
def test_saved_without_conversion_it_comes_back(init, tmp_path, mode):
    model = adapted(init)
    shake(weights_of(model, "default"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(dense(), tmp_path)
    np.testing.assert_array_equal(array(again(dense().sample())), array(model(dense().sample())))
    # As a second adapter's name, into a model that has the base as it was.
    other = get_peft_model(dense(), LoraConfig(target_modules=["lin0"]))
    with pytest.warns(PeftWarning, match="changes the base weights of the model and should thus not be used with"):
        other.load_adapter(tmp_path, "late")
    other.set_adapter("late")
    np.testing.assert_array_equal(array(other.set_train(False)(dense().sample())), array(model(dense().sample())))


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 4}}]
)
@pytest.mark.parametrize("init", RESIDUAL)
def test_conversion_to_a_plain_lora_of_the_untouched_base(init, settings, tmp_path):
    model = adapted(init, **settings)
    model.save_pretrained(tmp_path / "initial")
    shake(weights_of(model, "default"))
    wanted = output(model, dense().sample())
    config = str(model.peft_config["default"].to_dict())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert str(model.peft_config["default"].to_dict()) == config
    base = dense()
    again = PeftModel.from_pretrained(base, tmp_path / "plain")
    assert again.peft_config["default"].init_lora_weights is True
    assert again.peft_config["default"].r == 4
    np.testing.assert_array_equal(array(again.base_model.model.lin0.base_layer.weight), array(dense().lin0.weight))
    np.testing.assert_allclose(output(again, base.sample()), wanted, atol=2e-5)


def test_conversion_from_a_checkpoint_and_of_a_named_adapter(tmp_path):
    model = get_peft_model(dense(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"), "mine")
    model.save_pretrained(tmp_path / "initial")
    (tmp_path / "initial" / "mine" / "adapter_model.safetensors").unlink()
    shake(weights_of(model, "mine"))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    again = PeftModel.from_pretrained(dense(), tmp_path / "plain" / "mine")
    np.testing.assert_allclose(
        output(again, dense().sample()), output(model.set_train(False), dense().sample()), atol=2e-5
    )


def test_conversion_refuses_and_writes_nothing(tmp_path):
    out, initial = tmp_path / "out", tmp_path / "initial"
    plain = adapted(True)
    plain.save_pretrained(initial)
    with pytest.raises(ConfigError, match="did not change the base weights"):
        plain.save_pretrained(out, path_initial_model_for_weight_conversion=initial)
    with pytest.raises(ConfigError, match="LoftQ quantises"):
        adapted("loftq").save_pretrained(out, path_initial_model_for_weight_conversion=initial)
    with pytest.raises(LoadError, match=r"lin0\.lora_A\.weight: the file has shape \(2, 6\), the adapter \(3, 6\)"):
        adapted("pissa", r=3).save_pretrained(out, path_initial_model_for_weight_conversion=initial)
    adapted(True, target_modules=["lin0"]).save_pretrained(tmp_path / "less")
    with pytest.raises(LoadError, match=r"lin1\.lora_A\.weight is missing"):
        adapted("pissa").save_pretrained(out, path_initial_model_for_weight_conversion=tmp_path / "less")
    with pytest.raises(FileNotFoundError):
        adapted("pissa").save_pretrained(out, path_initial_model_for_weight_conversion=tmp_path / "nowhere")
    assert not out.exists()


@pytest.mark.parametrize("init", [*RESIDUAL, "loftq"])
def test_files_load_over_an_adapter_that_changed_the_base(init, tmp_path):
    model = adapted(init)
    shake(weights_of(model, "default"))
    wanted = output(model, dense().sample())
    model.save_pretrained(tmp_path)
    base = array(model.base_model.model.lin0.base_layer.weight).copy()
    shake(weights_of(model, "default"), seed=2)
    assert np.abs(output(model, dense().sample()) - wanted).max() > 0.1
    model.load_adapter(tmp_path, "default")
    np.testing.assert_array_equal(array(model.base_model.model.lin0.base_layer.weight), base)
    np.testing.assert_allclose(output(model, dense().sample()), wanted, atol=1e-6)
    other = adapted(init, r=3)  # other settings: the adapter is replaced whole, and its base with it
    other.load_adapter(tmp_path, "default")
    np.testing.assert_allclose(output(other, dense().sample()), wanted, atol=1e-5)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LoadError):
        other.load_adapter(tmp_path, "default")
    np.testing.assert_allclose(output(other, dense().sample()), wanted, atol=1e-5)


def test_two_of_them_and_either_can_go():
    base = dense()
    before = {p.name: array(p).copy() for p in base.get_parameters()}
    model = adapted("pissa", base)
    with pytest.warns(PeftWarning, match="OLoRA changes the base weights"):
        model.add_adapter("two", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="olora"))
    shake(weights_of(model, "default"))
    model.delete_adapter("two")
    model.unload()
    for p in base.get_parameters():
        np.testing.assert_allclose(array(p), before[p.name], atol=5e-7)


def test_merging_gives_the_adapted_weight():
    model = adapted("pissa")
    shake(weights_of(model, "default"))
    wanted = output(model, dense().sample())
    np.testing.assert_allclose(output(model.merge_and_unload(), dense().sample()), wanted, atol=2e-6)


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_layers_that_store_their_weight_transposed(init):
    ms.set_seed(3)
    base = nets.Gpt2().set_train(False)
    before = output(base)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=init)
    np.testing.assert_allclose(output(get_peft_model(base, config).set_train(False), base.sample()), before, atol=2e-5)


REFUSED = {
    "convolution": (
        lambda: nets.Conv(2),
        {"target_modules": ["conv"], "init_lora_weights": "pissa"},
        "conv is a conv2d",
    ),
    "rank": (dense, {"r": 6, "init_lora_weights": "olora"}, "has at most .* components, but r=6 for lin1"),
    "odd": (dense, {"r": 3, "init_lora_weights": "orthogonal"}, "rank to be even, got 3 instead"),
    "eigens": (dense, {"init_lora_weights": "corda", "corda_config": {}}, "please run `preprocess_corda` first"),
    "gradient": (dense, {"init_lora_weights": "lora_ga"}, "Please run `preprocess_loraga`"),
    "bits": (dense, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "Only nf4 and int8"),
    "tied": (nets.Tied, {"target_modules": ["head"], "init_lora_weights": "pissa"}, "is tied: emb and head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case):
    net, settings, says = REFUSED[case]
    base = net()
    before = state_of(base)
    with pytest.raises(ConfigError, match=says):
        get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": TARGETS} | settings))
    assert state_of(base) == before


def test_a_weight_that_is_not_finite_is_refused():
    base = dense()
    values = array(base.lin1.weight).copy()
    values[0, 0] = np.nan
    base.lin1.weight.set_data(Tensor(values))
    before = array(base.lin0.weight).copy()
    with pytest.raises(ConfigError, match="weight of lin1 holds NaN"):
        adapted("pissa", base)
    assert np.array_equal(array(base.lin0.weight), before)


def test_embeddings_start_as_usual_and_it_is_said():
    base = nets.Embedding().set_train(False)
    before = output(base)
    with pytest.warns(PeftWarning, match="emb is an embedding, for which there is no init_lora_weights='pissa'"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["emb", "lin"], init_lora_weights="pissa"))
    np.testing.assert_allclose(output(model.set_train(False), base.sample()), before, atol=2e-6)


def test_a_second_adapter_is_warned_of():
    model = adapted("pissa")
    with pytest.warns(PeftWarning, match="PiSSA changes the base weights of the model"):
        model.add_adapter("two", LoraConfig(r=2, target_modules=["lin0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted("orthogonal").add_adapter("two", LoraConfig(r=2, target_modules=["lin0"]))


@pytest.mark.parametrize("name", ["pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "pissa_niter_2.5"])
def test_bad_numbers_of_iterations(name):
    with pytest.raises(ConfigError, match="number of iterations"):
        LoraConfig(init_lora_weights=name)


def test_sub_configs_as_objects_dicts_and_defaults():
    assert LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(8)).loftq_config == {
        "loftq_bits": 8,
        "loftq_iter": 1,
    }
    config = LoraConfig(init_lora_weights="eva", eva_config={"rho": 3.0})
    assert config.eva_config == EvaConfig(rho=3.0)
    assert LoraConfig.from_dict(config.to_dict()).eva_config == config.eva_config
    with pytest.warns(PeftWarning, match="`init_lora_weights` is 'eva' but `eva_config` is not specified"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.warns(PeftWarning, match="Using default CorDA config"):
        LoraConfig(init_lora_weights="corda")
    with pytest.raises(ConfigError, match="must be a LoraGAConfig or a dict, got int"):
        LoraConfig(init_lora_weights="lora_ga", lora_ga_config=3)
    for bad in ({"rho": 0.5}, {"tau": 1.5}, {"tau": -0.5}):
        with pytest.raises(ConfigError, match=f"`{next(iter(bad))}` must be"):
            EvaConfig(**bad)


def test_training_moves_from_there(mode):
    model = adapted("pissa").set_train()
    x = dense().sample()
    before = array(model(x)).copy()
    optimizer = nn.SGD(model.trainable_params(), 0.1)

    def loss_of(x: Tensor) -> Tensor:
        return ops.reduce_mean(ops.square(model(x)))

    step = ms.value_and_grad(loss_of, None, optimizer.parameters)
    losses = []
    for _ in range(3):
        loss, grads = step(x)
        optimizer(grads)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    assert all(np.abs(g.asnumpy()).max() > 0 for g in grads)
    assert np.abs(array(model(x)) - before).max() > 1e-4
