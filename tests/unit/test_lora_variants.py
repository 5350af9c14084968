"""KaSA, BD-LoRA, VeLoRA, MonteCLoRA: what the contract and the parity tests cannot say, and what is refused."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    AdapterNameError,
    ConfigError,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_compiled_hotswap,
)
from msft_peft.tuners.lora.hotswap import hotswap_adapter_from_state_dict
from tests import nets
from tests.cases import output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

BOTH = {"target_modules": ["lin0", "lin1"], "r": 2, "lora_alpha": 6}


def dense() -> nn.Cell:
    ms.set_seed(5)
    return nets.Dense().set_train(False)


def adapted(**settings: object) -> PeftModel:
    model = get_peft_model(dense(), LoraConfig(**BOTH | settings)).set_train(False)
    shake(weights_of(model, "default"))
    return model


def bd(a: list[str] | None = None, b: list[str] | None = None, n: int = 2) -> dict:
    return {"use_bdlora": {"target_modules_bd_a": a, "target_modules_bd_b": b, "nblocks": n}}


REFUSED = {
    "kasa and dora": (nets.Dense, {"kasa_config": {}, "use_dora": True}, "variant combination: dora and kasa"),
    "kasa: negative": (nets.Dense, {"kasa_config": {"beta": -1.0}}, "`beta` must be non-negative, got -1.0"),
    "kasa: not a number": (nets.Dense, {"kasa_config": {"gamma": float("nan")}}, "`gamma` should be a finite number"),
    "kasa: misspelt": (
        nets.Dense,
        {"kasa_config": {"betta": 1}},
        r"`kasa_config` has no field betta; the fields of KasaC",
    ),
    "kasa: no sub-config": (nets.Dense, {"kasa_config": True}, "`kasa_config` must be a KasaConfig or a dict"),
    "kasa: another start": (nets.Dense, {"kasa_config": {}, "init_lora_weights": "pissa"}, "does not go with.*pissa"),
    "kasa: all components": (nets.Dense, {"kasa_config": {}, "r": 5}, "KaSA requires `r` to be smaller.*r=5"),
    "kasa: more": (nets.Dense, {"kasa_config": {}, "r": 7}, "kasa_config has at most min.*r=7"),
    "kasa: no dense layer": (
        lambda: nets.Conv(2),
        {"kasa_config": {}, "target_modules": ["conv"]},
        r"supported by LORA \(kasa\): \['dense'\]",
    ),
    "bdlora: neither": (nets.Dense, bd(a=["lin0"]), "lin1 matches neither A nor B"),
    "bdlora: both": (nets.Dense, bd(a=["lin"], b=["in1"]), "lin1 matches both A and B"),
    "bdlora: in both lists": (nets.Dense, bd(a=["x", "y"], b=["y"]), r"overlapping modules.*\['y'\]"),
    "bdlora: no list": (nets.Dense, bd(a="lin"), "`target_modules_bd_a` must be a list of strings"),
    "bdlora: no blocks": (nets.Dense, bd(a=["lin"], n=0), "`nblocks` should be a positive integer"),
    "bdlora: inputs": (
        nets.Dense,
        bd(a=["lin"], n=4) | {"r": 4},
        "in_features=6 of lin0 is not divisible by nblocks=4",
    ),
    "bdlora: outputs": (nets.Dense, bd(b=["lin"]), "out_features=5 of lin1 is not divisible by nblocks=2"),
    "bdlora: rank": (nets.Dense, bd(a=["lin"]) | {"r": 3}, "r=3 of lin0 is not divisible by nblocks=2"),
    "bdlora: bias of B": (nets.Dense, bd(b=["lin"]) | {"lora_bias": True}, "block-diagonal B: lin0"),
    "bdlora: another start": (nets.Dense, bd(a=["lin"]) | {"init_lora_weights": "olora"}, "does not go with.*olora"),
    "bdlora: no dense layer": (
        lambda: nets.Conv(2),
        bd(a=["conv"]) | {"target_modules": ["conv"]},
        r"supported by LORA \(bdlora\): \['dense'\]",
    ),
    "velora: groups": (nets.Dense, {"velora_config": {"num_groups": 0}}, "`num_groups` should be positive, got 0"),
    "velora: scale": (nets.Dense, {"velora_config": {"scale": 0.0}}, "`scale` should be positive, got 0.0"),
    "velora: start": (nets.Dense, {"velora_config": {"init_type": "pca"}}, "Unsupported `init_type` 'pca'"),
    "velora: no dense layer": (
        nets.Embedding,
        {"velora_config": {}, "target_modules": ["emb"]},
        r"supported by LORA \(velora\): \['dense'\]",
    ),
    "monteclora: samples": (
        nets.Dense,
        {"monteclora_config": {"num_samples": 0}},
        "`num_samples` must be greater than",
    ),
    "monteclora: half": (
        nets.Dense,
        {"monteclora_config": {"num_samples": 1.5}},
        "`num_samples` should be a positive",
    ),
    "monteclora: prior": (nets.Dense, {"monteclora_config": {"dirichlet_prior": -1}}, "`dirichlet_prior` must be"),
    "monteclora: weight": (nets.Dense, {"monteclora_config": {"kl_loss_weight": "x"}}, "`kl_loss_weight` should be"),
    "monteclora and velora": (
        nets.Dense,
        {"monteclora_config": {}, "velora_config": {}},
        "combination: velora and monteclora",
    ),
    "monteclora: no dense layer": (
        lambda: nets.Conv(2),
        {"monteclora_config": {}, "target_modules": ["conv"]},
        r"supported by LORA \(monteclora\): \['dense'\]",
    ),
    "kasa: tied": (nets.Tied, {"kasa_config": {}, "target_modules": ["head"]}, "KaSA changes the weight of head"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_alone(case: tuple):
    make, settings, text = case
    net = make()
    before = state_of(net)
    with pytest.raises(ConfigError, match=text):
        get_peft_model(net, LoraConfig(**BOTH | settings))
    assert state_of(net) == before


# --- KaSA ----------------------------------------------------------------------------------------------------------


def weights(model: nn.Cell) -> list[np.ndarray]:
    """The base weights of the two layers, adapted or not."""
    return [array(getattr(model, name).weight) for name in ("lin0", "lin1")]


def cut(w: np.ndarray, r: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :-r] * s[:-r]) @ vt[:-r]


def test_kasa_cuts_the_base_weight_and_gives_it_back():
    whole = weights(dense())
    model = adapted(kasa_config={})
    for w, before in zip(weights(model.get_base_model()), whole, strict=True):
        np.testing.assert_allclose(w, cut(before, 2), atol=1e-6)
    for w, before in zip(weights(model.unload()), whole, strict=True):
        np.testing.assert_allclose(w, before, atol=1e-6)


@pytest.mark.parametrize("first", ["wide", "narrow"])
@pytest.mark.parametrize("gone", ["wide", "narrow"])
def test_of_two_kasa_adapters_either_can_go(first: str, gone: str, recwarn):
    """The base lacks what the one of the higher rank takes, whoever came first and whoever is left."""
    ranks = {"wide": 2, "narrow": 1}
    left = next(name for name in ranks if name != gone)
    other = next(name for name in ranks if name != first)
    base = dense()
    whole = weights(base)
    model = get_peft_model(base, LoraConfig(**BOTH | {"r": ranks[first]}, kasa_config={}), first)
    model.add_adapter(other, LoraConfig(**BOTH | {"r": ranks[other]}, kasa_config={}))
    assert not [w for w in recwarn if "changes the base weights" in str(w.message)]
    for w, before in zip(weights(base), whole, strict=True):
        np.testing.assert_allclose(w, cut(before, 2), atol=1e-6)
    model.set_adapter(left)
    model.delete_adapter(gone)
    for w, before in zip(weights(base), whole, strict=True):
        np.testing.assert_allclose(w, cut(before, ranks[left]), atol=1e-6)
    for w, before in zip(weights(model.unload()), whole, strict=True):
        np.testing.assert_allclose(w, before, atol=1e-6)


@pytest.mark.parametrize(("here", "new"), [({"kasa_config": {}}, {}), ({}, {"kasa_config": {}})])
def test_kasa_keeps_no_other_company(here: dict, new: dict):
    model = adapted(**here)
    before = state_of(model)
    with pytest.raises(ConfigError, match="KaSA cannot be combined with adapters that don't use KaSA"):
        model.add_adapter("other", LoraConfig(**BOTH | new))
    assert state_of(model) == before


def test_a_kasa_adapter_is_no_product_of_two_factors(tmp_path):
    model = adapted(kasa_config={})
    with pytest.raises(NotImplementedError, match="more than a product of two factors"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "new")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 2)
    with pytest.raises(ConfigError, match="KaSA cuts the base weights"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)
    with pytest.raises(AdapterNameError, match="has changed the base weights"):
        hotswap_adapter_from_state_dict(model, {}, "default", model.peft_config["default"])
    plain = adapted()
    with pytest.raises(ConfigError, match="for kasa_config, None !="):
        hotswap_adapter_from_state_dict(plain, {}, "default", model.peft_config["default"])


def test_several_kasa_adapters_serve_one_batch(mode: str):
    model = adapted(kasa_config={})
    model.add_adapter("other", LoraConfig(**BOTH | {"r": 1}, kasa_config={}))
    shake(weights_of(model, "other"), seed=2)
    x = model.get_base_model().sample()
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(output(model))
    names = ["default", "other", *["default"] * (len(x) - 2)]
    mixed = array(model(x, adapter_names=names))
    for row, name in enumerate(names):
        assert_same(mixed[row], expected[name == "other"][row])


class Penalised(nn.Cell):
    """A loss with the penalty in it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.penalty = model, model.base_model.penalty()

    def construct(self, x: Tensor) -> Tensor:
        return ops.reduce_mean(ops.square(self.model(x))) + self.penalty()


def test_the_penalty_trains_in_a_users_compiled_step():
    model = adapted(kasa_config={"beta": 0.5, "gamma": 0.25})
    x, params = model.get_base_model().sample(), model.trainable_params()
    step = ms.value_and_grad(Penalised(model), None, params)
    value, gradients = step(x)
    compiled, others = ms.jit(step)(x)
    assert_same(compiled, value)
    for p, g, other in zip(params, gradients, others, strict=True):
        assert_same(other, g)
        assert differ(g, np.zeros(p.shape, np.float32))
    alone = ms.value_and_grad(model.base_model.penalty(), None, params)()[1]
    assert all(differ(g, np.zeros(g.shape, np.float32)) for g in alone)


def test_there_is_no_penalty_where_no_variant_asks_for_one():
    model = adapted()
    assert model.base_model.penalty()() == 0.0
    assert model.base_model._get_kasa_loss() == 0.0
    with pytest.raises(AdapterNameError, match="nothing not found"):
        model.base_model.penalty("nothing")


# --- BD-LoRA -------------------------------------------------------------------------------------------------------


def test_a_device_needs_its_own_block_alone():
    """Each half of the inputs goes to its own half of the hidden values, and each half of these to its outputs."""
    model = get_peft_model(dense(), LoraConfig(r=4, target_modules=["lin0"], **bd(a=["lin0"])))
    shake(weights_of(model, "default"))
    patch = model.get_base_model().lin0.adapters["default"]
    full = array(patch.full(patch.lora_A))
    assert full.shape == (4, 6)
    assert not full[:2, 3:].any()
    assert not full[2:, :3].any()
    assert np.array_equal(full[:2, :3], array(patch.lora_A)[:2])
    assert np.array_equal(full[2:, 3:], array(patch.lora_A)[2:])
    assert_same(patch.delta_weight(), 2 * array(patch.lora_B) @ full)


def test_a_block_diagonal_adapter_in_company(mode: str):
    """Beside a plain one in a divided batch; converted; and not combined or padded."""
    model = adapted(**bd(a=["lin0"]) | {"target_modules": ["lin0"]})
    model.add_adapter("plain", LoraConfig(**BOTH))
    shake(weights_of(model, "plain"), seed=2)
    x = model.get_base_model().sample()
    expected = []
    for name in ("default", "plain"):
        model.set_adapter(name)
        expected.append(output(model))
    names = ["default", "plain", *["plain"] * (len(x) - 2)]
    mixed = array(model(x, adapter_names=names))
    for row, name in enumerate(names):
        assert_same(mixed[row], expected[name == "plain"][row])
    with pytest.raises(NotImplementedError, match="more than a product of two factors"):
        model.base_model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "new", "cat")
    with pytest.raises(ConfigError, match=r"cannot be padded \(lin0"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    _, tensors = convert_to_lora(model, 2)
    patch = model.get_base_model().lin0.adapters["default"]
    a, b = (tensors[f"base_model.model.lin0.lora_{factor}.weight"] for factor in "AB")
    assert_same(array(b) @ array(a), patch.delta_weight())


def test_hot_swapping_a_block_diagonal_adapter():
    settings = bd(b=["lin0"]) | {"target_modules": ["lin0"]}
    model, other = adapted(**settings), adapted(**settings)
    shake(weights_of(other, "default"), seed=3)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    assert_same(output(model), output(other))


# --- VeLoRA --------------------------------------------------------------------------------------------------------


def direction(model: PeftModel) -> np.ndarray:
    return array(model.get_base_model().lin0.adapters["default"].lora_velora_embed)


def test_a_random_direction_has_length_one_and_stays():
    model = adapted(velora_config={"num_groups": 4, "init_type": "random"}).set_train()
    before = direction(model)
    assert np.linalg.norm(before) == pytest.approx(1, rel=1e-6)
    output(model)
    assert np.array_equal(direction(model), before)


@pytest.mark.parametrize("init", ["batch_average", "batch_average_once"])
def test_the_direction_is_of_each_batch_or_of_the_first(init: str, mode: str, tmp_path):
    """Also after saving and loading; evaluation leaves it alone, and so does a batch of zeros where it is known."""
    model = adapted(velora_config={"num_groups": 4, "init_type": init})
    x = model.get_base_model().sample()
    output(model)
    assert not direction(model).any()
    model.set_train()
    array(model(x))
    first = direction(model)
    parts = np.pad(array(x), ((0, 0), (0, 2))).reshape(-1, 2)
    np.testing.assert_allclose(first, parts.mean(0) / np.linalg.norm(parts.mean(0)), rtol=1e-5)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(dense(), tmp_path, is_trainable=True).set_train()
    array(model(ops.zeros_like(x)))
    expected = first if init == "batch_average_once" else np.full(2, 0.5**0.5)
    np.testing.assert_allclose(direction(model), expected, rtol=1e-6)


def test_velora_in_a_users_compiled_step():
    model = adapted(velora_config={"num_groups": 4}).set_train()
    x, params = model.get_base_model().sample(), model.trainable_params()
    step = ms.value_and_grad(nets.Loss(model), None, params)
    target = nets.floats(*model(x).shape, seed=3)
    value, gradients = step(x, target)
    compiled, others = ms.jit(step)(x, target)
    assert_same(compiled, value, "gradient")
    for g, other in zip(gradients, others, strict=True):
        assert_same(other, g, "gradient")


# --- MonteCLoRA ----------------------------------------------------------------------------------------------------

NOISY = {"num_samples": 4, "sample_scaler": 0.5}


def test_training_draws_anew_and_evaluation_does_not(mode: str):
    model = adapted(monteclora_config=NOISY, target_modules=["lin0"])
    x = model.get_base_model().sample()
    plain = array(model(x))
    assert_same(model(x), plain, "exact")
    model.set_train()
    one, other = array(model(x)), array(model(x))
    assert differ(one, plain)
    assert differ(one, other)
    model.set_train(False)
    assert_same(model(x), plain, "exact")


def test_a_users_compiled_step_draws_anew():
    model = adapted(monteclora_config=NOISY, target_modules=["lin0"]).set_train()
    x = model.get_base_model().sample()

    @ms.jit
    def step(x):
        return model(x)

    assert differ(array(step(x)), array(step(x)))


def test_the_seed_decides_what_is_drawn():
    outputs = []
    for seed in (3, 3, 4):
        model = adapted(monteclora_config=NOISY, target_modules=["lin0"]).set_train()
        ms.set_seed(seed)
        outputs.append(output(model))
    assert np.array_equal(outputs[0], outputs[1])
    assert differ(outputs[0], outputs[2])


def test_the_samples_have_the_spread_of_the_formula():
    """The variances' mean is e^(2p) times r, and A's mean is A."""
    model = adapted(monteclora_config=NOISY | {"sample_scaler": 1.0}, target_modules=["lin0"]).set_train()
    patch = model.get_base_model().lin0.adapters["default"]
    a, v, w = (np.stack(some) for some in zip(*(drawn(patch) for _ in range(2000)), strict=True))
    expected = 2 * np.exp(2 * array(patch.std_prior))
    np.testing.assert_allclose(v.mean(0), expected, rtol=0.1)
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-5)
    deviations = (a - array(patch.lora_A)) / np.sqrt(np.square(w).sum(1) * v.T).T[:, :, None]
    assert abs(deviations.mean()) < 0.05
    assert deviations.std() == pytest.approx(1, rel=0.03)


def drawn(patch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a = array(patch.sampled())
    return a, np.diag(array(patch.gaussian_var_prior)), array(patch.expert_weights)


def monteclora(dtype: Any) -> PeftModel:
    ms.set_seed(3)
    config = LoraConfig(r=2, target_modules=["lin0"], monteclora_config=NOISY | {"use_entropy": True})
    model = get_peft_model(nets.Dense(dtype), config, autocast_adapter_dtype=False).set_train()
    shake(model.trainable_params())
    return model


def test_half_precision_trains(mode: str):
    model = monteclora(ms.float16)
    penalty = model.base_model.penalty()

    def loss(x: Tensor) -> Tensor:
        return ops.reduce_mean(ops.square(ops.cast(model(x), ms.float32))) + penalty()

    value, gradients = ms.value_and_grad(loss, None, model.trainable_params())(model.get_base_model().sample())
    assert np.isfinite(float(value))
    assert [p.name.split(".")[3] for p in model.trainable_params()].count("lora_monteclora_sampler") == 2
    assert all(g.dtype == ms.float16 and np.abs(array(g)).max() > 0 for g in gradients)


def test_half_precision_draws_in_float32():
    noise = nets.floats(4, 6, 2, seed=3), ops.square(nets.floats(2, seed=4)), nets.floats(4, seed=5)
    sampled = []
    for dtype in (ms.float16, ms.float32):
        patch = monteclora(dtype).get_base_model().lin0.adapters["default"]
        patch.__dict__["noise"] = lambda: noise
        sampled.append(array(patch.sampled()))
        assert array(patch.expert_weights).sum() == pytest.approx(1, rel=1e-2)
    assert sampled[0].dtype == np.float16
    assert_same(sampled[0], sampled[1].astype(np.float16))


def test_the_dirichlet_divergence_is_zero_at_the_prior():
    """And so are the other two where p = 0 and v = 1."""
    config = {"num_samples": 3, "dirichlet_prior": 0.7, "kl_loss_weight": 1.0}
    model = adapted(monteclora_config=config, target_modules=["lin0"]).set_train()
    patch = model.get_base_model().lin0.adapters["default"]
    patch.expert_weights_prior.copy_(Tensor(np.full(3, np.log(0.7), np.float32)))
    patch.std_prior.copy_(ops.zeros_like(patch.std_prior))
    patch.drawn.chi.copy_(ops.ones_like(patch.drawn.chi))
    assert float(patch.penalty()) == pytest.approx(0, abs=1e-5)
    patch.expert_weights_prior.copy_(Tensor(np.array([0.1, -0.5, 0.3], np.float32)))
    assert float(patch.penalty()) > 0.1


def test_a_monteclora_adapter_is_swapped_but_not_padded():
    model, other = (adapted(monteclora_config=NOISY) for _ in range(2))
    shake(weights_of(other, "default"), seed=3)
    with pytest.raises(ConfigError, match=r"cannot be padded \(lin0"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    assert_same(output(model), output(other))
