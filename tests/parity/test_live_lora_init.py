"""LoRA's initialisations beside HF peft on torch: the same weights, the same data, files both ways."""

import dataclasses
import warnings

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn, ops
from peft.tuners.lora.config import CordaConfig as HfCordaConfig
from peft.tuners.lora.corda import preprocess_corda as hf_preprocess_corda

import msft_peft
from tests.cases import in_pynative

TARGETS = ["q", "l0", "l1"]
SIZES = {"q": (12, 12), "l0": (10, 12), "l1": (8, 10)}


class Theirs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (out, into) in SIZES.items():
            setattr(self, name, torch.nn.Linear(into, out))

    def forward(self, x):
        return self.l1(torch.relu(self.l0(torch.sigmoid(self.q(x)) + x)))


class Ours(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        for name, (out, into) in SIZES.items():
            setattr(self, name, nn.Dense(into, out))

    def construct(self, x: Tensor) -> Tensor:
        return self.l1(ops.relu(self.l0(ops.sigmoid(self.q(x)) + x)))


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"{n}.weight": s for n, s in SIZES.items()} | {f"{n}.bias": s[:1] for n, s in SIZES.items()}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def theirs() -> torch.nn.Module:
    model = Theirs().eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights().items()})
    return model


def ours() -> nn.Cell:
    model = Ours().set_train(False)
    for p in model.get_parameters():
        p.set_data(Tensor(weights()[p.name]))
    return model


def data(count: int = 3, rows: int = 300) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    spread = np.array([6, 4, 2.6, 1.7, 1.1, 0.7, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    return [(rng.standard_normal((rows, 12)) * spread @ turn).astype(np.float32) for _ in range(count)]


X = np.random.default_rng(2).standard_normal((5, 12)).astype(np.float32)


def run(model) -> np.ndarray:
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model.eval()(torch.tensor(X)).numpy()
    with in_pynative():
        return model.set_train(False)(Tensor(X)).asnumpy()


def layers(model):
    """(name, A, B, base weight, scaling) of each adapted layer, as numpy."""
    base = model.base_model.model
    for name in TARGETS:
        layer = getattr(base, name)
        tensors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight)
        arrays = [t.detach().numpy() if isinstance(t, torch.Tensor) else t.asnumpy() for t in tensors]
        yield name, *arrays, layer.scaling["default"]


def both(init: str, **settings):
    fields = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": init} | settings
    hf = peft.get_peft_model(theirs(), peft.LoraConfig(**fields))
    return hf, msft_peft.get_peft_model(ours(), msft_peft.LoraConfig(**fields))


def train(hf, mine) -> None:
    """The same steps away from the beginning for both."""
    rng = np.random.default_rng(3)
    for name in TARGETS:
        for kind in ("lora_A", "lora_B"):
            p = getattr(getattr(hf.base_model.model, name), kind)["default"].weight
            q = getattr(getattr(mine.base_model.model, name), kind)["default"].weight
            step = (0.2 * rng.standard_normal(p.shape)).astype(np.float32)
            p.data += torch.tensor(step)
            q.copy_(Tensor(q.asnumpy() + step))


CLOSED = {
    "pissa": {},
    "pissa rslora": {"use_rslora": True},
    "pissa patterns": {"rank_pattern": {"q": 5}, "alpha_pattern": {"l1": 3}},
    "olora": {},
    "olora patterns": {"rank_pattern": {"l0": 2}, "alpha_pattern": {"l0": 5}},
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_forms_give_the_same_product_and_the_same_base(case):
    hf, mine = both(case.split()[0], **CLOSED[case])
    for (_, a, b, base, s), (name, a2, b2, base2, s2) in zip(layers(hf), layers(mine), strict=True):
        assert s2 == pytest.approx(s)
        np.testing.assert_allclose(b2 @ a2, b @ a, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(base2, base, atol=2e-6, err_msg=name)
        if case.startswith("olora"):
            np.testing.assert_allclose(a2, a, atol=2e-6)


def test_randomised_pissa_finds_the_same_subspace():
    hf, mine = both("pissa_niter_40")
    for (_, a, b, *_), (name, a2, b2, *_) in zip(layers(hf), layers(mine), strict=True):
        np.testing.assert_allclose(b2 @ a2, b @ a, atol=1e-3, err_msg=name)


def test_mica_begins_with_the_same_outputs_and_trains_the_same_weights():
    hf, mine = both("mica")
    for (_, a, b, base, _), (name, a2, b2, base2, _) in zip(layers(hf), layers(mine), strict=True):
        # Singular vectors are unique up to their signs.
        np.testing.assert_allclose(b2 @ b2.T, b @ b.T, atol=2e-5, err_msg=name)
        assert not a.any()
        assert not a2.any()
        np.testing.assert_array_equal(base2, base)
    assert {p.name for p in mine.trainable_params()} == {n for n, p in hf.named_parameters() if p.requires_grad}


def test_orthogonal_has_the_same_statistics():
    a, b = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        ms.set_seed(seed)
        for sizes, model in zip((a, b), both("orthogonal", r=4), strict=True):
            sizes.append([(np.std(x[1]), np.std(x[2])) for x in layers(model)])
            assert max(np.abs(x[2] @ x[1]).max() for x in layers(model)) < 1e-6
    np.testing.assert_allclose(np.mean(b, 0), np.mean(a, 0), rtol=0.12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_without_conversion_go_both_ways(init, tmp_path):
    hf, mine = both(init)
    train(hf, mine)
    hf.save_pretrained(tmp_path / "hf")
    mine.save_pretrained(tmp_path / "mine")
    here = msft_peft.PeftModel.from_pretrained(ours(), tmp_path / "hf")
    np.testing.assert_allclose(run(here), run(hf), atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = peft.PeftModel.from_pretrained(theirs(), tmp_path / "mine")
    np.testing.assert_allclose(run(there), run(mine), atol=2e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q": 2}, "alpha_pattern": {"l1": 3}}]
)
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_hf_opens_the_converted_adapter_on_the_untouched_base(init, settings, tmp_path):
    hf, mine = both(init, **settings)
    mine.save_pretrained(tmp_path / "initial")
    train(hf, mine)
    mine.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    there = peft.PeftModel.from_pretrained(theirs(), tmp_path / "plain")
    np.testing.assert_allclose(run(there), run(mine), atol=2e-5)
    # What HF itself writes says the same of itself.
    hf.peft_config["default"].init_lora_weights = True
    fresh = peft.get_peft_model(theirs(), peft.LoraConfig(r=3, target_modules=TARGETS, **settings))
    fresh.save_pretrained(tmp_path / "hf-initial")
    hf.save_pretrained(tmp_path / "hf", path_initial_model_for_weight_conversion=str(tmp_path / "hf-initial"))
    written = [peft.PeftConfig.from_pretrained(tmp_path / who).to_dict() for who in ("plain", "hf")]
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"):
        assert written[0][name] == pytest.approx(written[1][name]), name
    here = msft_peft.PeftModel.from_pretrained(ours(), tmp_path / "hf")
    np.testing.assert_allclose(run(here), run(peft.PeftModel.from_pretrained(theirs(), tmp_path / "hf")), atol=2e-5)


def test_hf_and_we_convert_the_same_model_alike(tmp_path):
    hf, mine = both("pissa")
    hf.peft_config["default"].init_lora_weights = True
    hf.save_pretrained(tmp_path / "initial")
    hf.peft_config["default"].init_lora_weights = "pissa"
    train(hf, mine)
    hf.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    here = msft_peft.PeftModel.from_pretrained(ours(), tmp_path / "plain")
    np.testing.assert_allclose(run(here), run(hf), atol=2e-5)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "corda"}
    base = theirs()
    config = peft.LoraConfig(**settings, corda_config=HfCordaConfig(corda_method=method))
    hf_preprocess_corda(base, config, lambda: [base(torch.tensor(x)) for x in data()])
    hf = peft.get_peft_model(base, config)
    cell = ours()
    config = msft_peft.LoraConfig(**settings, corda_config=msft_peft.CordaConfig(corda_method=method))
    msft_peft.preprocess_corda(cell, config, lambda: [cell(Tensor(x)) for x in data()])
    mine = msft_peft.get_peft_model(cell, config)
    for (_, a, b, base, _), (name, a2, b2, base2, _) in zip(layers(hf), layers(mine), strict=True):
        np.testing.assert_allclose(b2 @ a2, b @ a, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(base2, base, atol=4e-4, err_msg=name)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga(direction, scale):
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "lora_ga"}
    batches = [x / 10 for x in data(2, 20)]
    base = theirs()

    def their_step() -> None:
        for x in batches:
            base(torch.tensor(x)).square().sum().backward()

    config = peft.LoraConfig(**settings, lora_ga_config=peft.LoraGAConfig(direction, scale))
    peft.preprocess_loraga(base, config, their_step)
    gradients = {name: getattr(base, name)._peft_loraga_grad.numpy().copy() for name in TARGETS}
    torch.manual_seed(0)
    hf = peft.get_peft_model(base, config)
    cell = ours()

    def our_step() -> None:
        step = ms.value_and_grad(lambda x: ops.reduce_sum(ops.square(cell(x))), None, cell.trainable_params())
        for x in batches:
            step(Tensor(x))

    config = msft_peft.LoraConfig(**settings, lora_ga_config=msft_peft.LoraGAConfig(direction, scale))
    msft_peft.preprocess_loraga(cell, config, our_step)
    for name, g in gradients.items():
        np.testing.assert_allclose(getattr(cell, name)._peft_loraga_grad, g, atol=1e-5 * np.abs(g).max())
    mine = msft_peft.get_peft_model(cell, config)
    for (_, a, b, *_), (name, a2, b2, *_) in zip(layers(hf), layers(mine), strict=True):
        sign_a, sign_b = np.sign((a * a2).sum(1)), np.sign((b * b2).sum(0))
        np.testing.assert_allclose(a2 * sign_a[:, None], a, atol=1e-3, err_msg=name)
        # HF's own estimate of the largest singular value of W is random.
        room = 0.15 if scale == "weight_svd" else 1e-3
        np.testing.assert_allclose(b2 * sign_b, b, atol=room * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("r", "rho"), [(2, 1.0), (2, 2.0), (4, 1.5)])
def test_eva(r, rho, whiten):
    settings = {"r": r, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "eva"}
    sub = {"rho": rho, "whiten": whiten}
    hf = peft.get_peft_model(theirs(), peft.LoraConfig(**settings, eva_config=peft.EvaConfig(**sub)))
    calls = {"forward_fn": lambda m, x: m(x), "prepare_model_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(
        hf,
        [torch.tensor(x) for x in data()],
        prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
        **calls,
    )
    config = msft_peft.LoraConfig(**settings, eva_config=msft_peft.EvaConfig(**sub))
    mine = msft_peft.get_peft_model(ours(), config)
    msft_peft.initialize_lora_eva_weights(mine, [Tensor(x) for x in data()], prepare_layer_inputs_fn=None, **calls)
    same(hf, mine)
    for (_, a, *_), (name, a2, *_) in zip(layers(hf), layers(mine), strict=True):
        np.testing.assert_allclose(a2, a, atol=1e-3, err_msg=name)


def same(hf, mine) -> None:
    """The same ranks, scalings and patterns."""
    one, other = hf.peft_config["default"], mine.peft_config["default"]
    assert other.rank_pattern == one.rank_pattern
    assert other.alpha_pattern == pytest.approx(one.alpha_pattern)
    assert sorted(other.target_modules) == sorted(one.target_modules)


class TheirPair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.narrow(x[:, :6].contiguous()) + self.wide(x[:, 6:].contiguous())


class OurPair(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Dense(6, 4), nn.Dense(6, 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.narrow(x[:, :6]) + self.wide(x[:, 6:])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("case", ["moved", "emptied"])
def test_eva_moves_ranks_alike(case, adjust, rslora):
    spread, r = {
        "moved": ((9, 0.5, 0.4, 0.3, 0.2, 0.1, 5, 4, 3, 2, 0.5, 0.1), 2),
        "emptied": ((6, 5, 0.3, 0.2, 0.1, 0.1, 1.3, 1.2, 1.1, 1, 0.9, 0.8), 1),
    }[case]
    rng = np.random.default_rng(4)
    batches = [(rng.standard_normal((600, 12)) * spread).astype(np.float32) for _ in range(3)]
    settings = {"r": r, "lora_alpha": 6, "target_modules": ["narrow", "wide"], "init_lora_weights": "eva"}
    settings["use_rslora"] = rslora
    sub = {"adjust_scaling_factors": adjust, "tau": 0.9}
    calls = {"forward_fn": lambda m, x: m(x), "prepare_model_inputs_fn": None, "show_progress_bar": False}
    hf = peft.get_peft_model(TheirPair(), peft.LoraConfig(**settings, eva_config=peft.EvaConfig(**sub)))
    peft.initialize_lora_eva_weights(
        hf,
        [torch.tensor(x) for x in batches],
        prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
        **calls,
    )
    config = msft_peft.LoraConfig(**settings, eva_config=msft_peft.EvaConfig(**sub))
    mine = msft_peft.get_peft_model(OurPair(), config)
    msft_peft.initialize_lora_eva_weights(mine, [Tensor(x) for x in batches], prepare_layer_inputs_fn=None, **calls)
    same(hf, mine)
    for name in config.target_modules:
        one, other = (getattr(model.base_model.model, name) for model in (hf, mine))
        if hasattr(one, "lora_A"):
            assert other.r == dict(one.r)
            assert other.scaling["default"] == pytest.approx(one.scaling["default"])
        else:
            assert not other.held()


SUBS = {
    "LoftQConfig": ({"loftq_bits": 8, "loftq_iter": 3}, "loftq_config", "loftq"),
    "EvaConfig": ({"rho": 3.0, "tau": 0.5, "whiten": True}, "eva_config", "eva"),
    "LoraGAConfig": ({"direction": "ArBr", "scale": "unit", "stable_gamma": 4}, "lora_ga_config", "lora_ga"),
    "CordaConfig": ({"corda_method": "kpm", "cache_file": "x"}, "corda_config", "corda"),
}


@pytest.mark.parametrize("name", SUBS)
def test_sub_configs_and_their_files(name, tmp_path):

    fields, field, init = SUBS[name]
    hf_class = HfCordaConfig if name == "CordaConfig" else getattr(peft, name)
    mine_class = getattr(msft_peft, name)
    assert dataclasses.asdict(mine_class()) == dataclasses.asdict(hf_class())
    hf = peft.LoraConfig(init_lora_weights=init, target_modules=["a"], **{field: hf_class(**fields)})
    mine = msft_peft.LoraConfig(init_lora_weights=init, target_modules=["a"], **{field: mine_class(**fields)})
    assert mine.to_dict()[field] == hf.to_dict()[field]
    hf.save_pretrained(tmp_path / "hf")
    mine.save_pretrained(tmp_path / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert msft_peft.PeftConfig.from_pretrained(tmp_path / "hf").to_dict()[field] == hf.to_dict()[field]
        again = peft.PeftConfig.from_pretrained(tmp_path / "mine")
    assert again.to_dict()[field] == hf.to_dict()[field]


ERRORS = {
    "odd": {"init_lora_weights": "orthogonal", "r": 3},
    "pissa_niter": {"init_lora_weights": "pissa_niter_x"},
    "corda": {"init_lora_weights": "corda", "corda_config": "default"},
    "niter unknown": {"init_lora_weights": "pissa_x"},
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_same_kind(case):
    for library, tree, sub in ((peft, theirs, HfCordaConfig), (msft_peft, ours, msft_peft.CordaConfig)):
        fields = {key: sub() if value == "default" else value for key, value in ERRORS[case].items()}
        with pytest.raises(ValueError):  # noqa: PT011 - what it says differs
            library.get_peft_model(tree(), library.LoraConfig(target_modules=TARGETS, **fields))


def test_an_adapter_less_what_it_began_with():
    """By `subtract_mutated_init`, for tensors at hand."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}
    hf, mine = both(True)
    hf.add_adapter("initial", peft.LoraConfig(**settings))
    mine.add_adapter("initial", msft_peft.LoraConfig(**settings))
    rng = np.random.default_rng(6)
    for name in TARGETS:
        for kind in ("lora_A", "lora_B"):
            for adapter in ("default", "initial"):
                p = getattr(getattr(hf.base_model.model, name), kind)[adapter].weight
                q = getattr(getattr(mine.base_model.model, name), kind)[adapter].weight
                p.data = torch.tensor(rng.standard_normal(p.shape).astype(np.float32))
                q.copy_(Tensor(p.detach().numpy()))
    theirs_now, now = peft.get_peft_model_state_dict(hf), msft_peft.get_peft_model_state_dict(mine)
    expected = hf.base_model.subtract_mutated_init(theirs_now, "initial", {})
    found = mine.base_model.subtract_mutated_init(now, "initial")
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key].asnumpy(), value.numpy(), err_msg=key)
