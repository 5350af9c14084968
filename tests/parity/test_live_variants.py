"""LoRA's variants beside HF peft on torch: what is no forward, merge or file, which test_live.py compares."""

from functools import partial, partialmethod

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn, ops
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from msft_peft import ArrowConfig, LoraConfig, create_arrow_model
from msft_peft.tuners.lora.monteclora import MontecloraPatch
from tests.cases import layers_of

from . import ours, theirs
from .cases import CASES, MONTE, case, file_key, make_input, same, same_dicts


def pair(name: str, folder):
    """(HF's model, ours) with the same weights."""
    case = CASES[name]
    weights, x, target = theirs.data(case)
    hf = theirs.create(case, weights)
    hf.save_pretrained(folder)
    return hf, ours.load(case, weights, folder), x, target


def penalties(hf, mine, theirs_of) -> None:
    """The penalty and its gradients are those of HF."""
    hf.zero_grad()
    expected = theirs_of(hf.base_model)
    expected.backward()
    params = mine.trainable_params()
    value, gradients = ms.value_and_grad(mine.base_model.penalty(), None, params)()
    same("loss", value.asnumpy(), expected.detach().numpy())
    wanted = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    for p, g in zip(params, gradients, strict=True):
        grad = wanted[p.name]
        same("gradient", g.asnumpy(), np.zeros(g.shape, np.float32) if grad is None else grad.numpy(), p.name)


@pytest.mark.parametrize("name", ["kasa", "kasa_patterns"])
def test_kasas_penalty(name, tmp_path, mode):
    hf, mine, _, _ = pair(name, tmp_path)
    penalties(hf, mine, lambda model: model._get_kasa_loss())
    same("loss", float(mine.base_model._get_kasa_loss()), hf.base_model._get_kasa_loss().item())


def test_a_second_kasa_adapter_cuts_the_base_alike(tmp_path):
    hf, mine, x, _ = pair("kasa", tmp_path)
    settings = CASES["kasa"].config | {"r": 3}
    hf.add_adapter("more", peft.LoraConfig(**settings))
    mine.add_adapter("more", LoraConfig(**settings))
    with torch.no_grad():
        same("output", mine(Tensor(x)).asnumpy(), theirs.forward(hf, x))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("groups", [1, 4, 6, 10])
@pytest.mark.parametrize("init", ["batch_average", "batch_average_once"])
def test_velora_trains_as_in_hf(init, groups, scale, tmp_path):
    """Three batches: outputs, gradients of the weights, and the direction on which the inputs are projected."""
    velora = {"num_groups": groups, "scale": scale, "init_type": init}
    the_case = case("velora", "mlp", "lin0", "out", velora_config=velora)
    compare_velora(the_case, tmp_path)


def test_velora_trains_as_in_hf_in_both_modes(mode, tmp_path):
    compare_velora(CASES["velora_once"], tmp_path)


def compare_velora(the_case, folder):
    weights, x, target = theirs.data(the_case)
    hf = theirs.create(the_case, weights)
    hf.save_pretrained(folder)
    mine = ours.load(the_case, weights, folder)
    plain = ours.gradients(mine, x, target)
    hf.train()
    mine.set_train()
    for seed in range(3):
        x = make_input(the_case.net, the_case.rng(seed + 5))
        expected, found = theirs.gradients(hf, x, target), ours.gradients(mine, x, target)
        same("loss", found[0], expected[0])
        same("output", found[1], expected[1])
        same_dicts("gradient", found[2], expected[2])
        embeds = {n.replace(".default", ""): b.numpy() for n, b in hf.named_buffers() if "velora" in n}
        mine_now = {p.name.replace(".default", ""): p.asnumpy() for p in mine.get_parameters() if "velora" in p.name}
        same_dicts("output", mine_now, embeds)
    assert any(not np.allclose(found[2][key], plain[2][key]) for key in plain[2] if "lora_A" in key)


class Noise:
    """What a pass is to draw."""

    def __init__(self, patch, rng) -> None:
        (r, into), n = patch.lora_A.shape, patch.expert_weights.shape[0]
        self.z = rng.standard_normal((n, into, r)).astype(np.float32)
        chol = np.tril(rng.standard_normal((r, r))).astype(np.float32)
        self.wishart, self.normal = chol @ chol.T + 0.1 * np.eye(r, dtype=np.float32), rng.standard_normal(n)

    def theirs(self):
        arrays = {"z_mvn": self.z, "z_wishart": self.wishart, "z_dirichlet": self.normal}
        return {key: torch.tensor(value, dtype=torch.float32) for key, value in arrays.items()}


class Given:
    """The same for compiled code."""

    def __init__(self, noise: Noise, number: int) -> None:
        chi, normal = np.diag(noise.wishart).copy(), noise.normal.astype(np.float32)
        self.z, self.chi, self.normal = (
            ms.Parameter(Tensor(value), name=f"given_{number}_{i}", requires_grad=False)
            for i, value in enumerate((noise.z, chi, normal))
        )


def given_noise(self):
    return self.given.z, self.given.chi, self.given.normal


class Penalised(nn.Cell):
    """The loss and the penalty of one pass, and its output."""

    def __init__(self, model, target) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.target, self.penalty = model, Tensor(target), model.base_model.penalty()

    def construct(self, x):
        y = self.model(x)
        return ops.mean(ops.square(y - self.target)) + self.penalty(), y


@pytest.mark.parametrize("name", ["monteclora_blocks", "monteclora_mlp"])
def test_monteclora_trains_as_in_hf(name, mode, tmp_path, monkeypatch):
    """With the same noise, and with HF's divergence of Dirichlet distributions put right: see docs/differences.md."""
    mlp = case("monteclora_mlp", "mlp", "lin0", "lin1", r=3, monteclora_config=MONTE | {"num_samples": 4})
    the_case = mlp if name == mlp.name else CASES[name]
    weights, x, target = theirs.data(the_case)
    hf = theirs.create(the_case, weights)
    hf.save_pretrained(tmp_path)
    mine = ours.load(the_case, weights, tmp_path)
    monkeypatch.setattr(MontecloraPatch, "noise", given_noise)
    rng = the_case.rng(7)
    patches = [layer.adapters["default"] for layer in layers_of(mine)]
    samplers = [m for _, m in hf.named_modules() if type(m).__name__ == "MontecloraSampler"]
    for number, (patch, sampler) in enumerate(zip(patches, samplers, strict=True)):
        noise = Noise(patch, rng)
        patch.given = Given(noise, number)
        monkeypatch.setattr(sampler.sampler, "get", noise.theirs)
        monkeypatch.setattr(sampler, "dirichlet_kl", partial(divergence, sampler))
    plain = mine(Tensor(x)).asnumpy()
    hf.train()
    y = theirs.forward(hf, x)
    loss = ((y - torch.tensor(target)) ** 2).mean() + hf.base_model._get_monteclora_loss()
    loss.backward()
    wanted = {file_key(n): theirs.gradient(p) for n, p in hf.named_parameters() if p.requires_grad}
    mine.set_train()
    params = mine.trainable_params()
    (value, out), gradients = ms.value_and_grad(Penalised(mine, target), None, params, has_aux=True)(Tensor(x))
    same("output", out.asnumpy(), y.detach().numpy())
    assert not np.allclose(out.asnumpy(), plain, atol=1e-3)
    same("loss", value.asnumpy(), loss.detach().numpy())
    found = {ours.torch_key(file_key(p.name)): g.asnumpy() for p, g in zip(params, gradients, strict=True)}
    same_dicts("gradient", found, wanted)
    assert all(np.abs(g).max() > 1e-6 for g in found.values())
    for patch, sampler in zip(patches, samplers, strict=True):
        same("output", patch.gaussian_var_prior.asnumpy(), sampler.gaussian_var_prior.detach().numpy())
        same("output", patch.expert_weights.asnumpy(), sampler.expert_weights.detach().numpy())
    same("loss", float(mine.base_model._get_monteclora_loss()), hf.base_model._get_monteclora_loss().item())
    mine.set_train(False)
    assert float(mine.base_model._get_monteclora_loss()) == 0


def divergence(sampler, alpha: torch.Tensor) -> torch.Tensor:
    prior = torch.full_like(alpha, sampler.dirichlet_prior)
    return torch.distributions.kl_divergence(*map(torch.distributions.Dirichlet, (alpha, prior)))


def adapters_for_arrow(folder, count: int, seed: int) -> list[str]:
    """Paths of HF's adapters."""
    paths = []
    for i in range(count):
        the_case = case(f"arrow{seed}{i}", "mlp", "lin0", "out", lora_alpha=3 + i)
        model = theirs.create(the_case, theirs.data(MLP)[0])
        paths.append(str(folder / f"{seed}-{i}"))
        model.save_pretrained(paths[-1])
    return paths


MLP = case("arrow", "mlp", "lin0", "out")


@pytest.mark.parametrize("general", [0, 2])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_arrow_routes_as_in_hf(top_k, general, tmp_path, monkeypatch):
    """Outputs and the gradient of the input, and what either library saves of the router."""
    iterate = ArrowLoraLinearLayer.top_right_singular_vec_from_BA
    monkeypatch.setattr(ArrowLoraLinearLayer, iterate.__name__, partialmethod(iterate, iters=1000))  # HF's 15 are few
    paths, others = adapters_for_arrow(tmp_path, 4, 1), adapters_for_arrow(tmp_path, general, 2)
    weights, x, _ = theirs.data(MLP)
    settings = {"top_k": top_k, "router_temperature": 0.7, "use_gks": general > 0, "rng_seed": 3}
    hf = peft.create_arrow_model(theirs.build("mlp", weights), paths, peft.ArrowConfig(**settings), others).eval()
    mine = create_arrow_model(ours.build("mlp", weights), paths, ArrowConfig(**settings), others).set_train(False)

    def loss(x):
        return ops.reduce_sum(ops.square(mine.base_model(x)))

    inputs = torch.tensor(x, requires_grad=True)
    y = hf.base_model(inputs)
    y.square().sum().backward()
    same("model output", mine.base_model(Tensor(x)).asnumpy(), y.detach().numpy())
    same("model gradient", ms.grad(loss)(Tensor(x)).asnumpy(), inputs.grad.numpy())
    for model, folder in ((hf, "theirs"), (mine, "ours")):
        model.save_pretrained(tmp_path / folder)
    a, b = (
        ours.tensors_of(tmp_path / who / "arrow_router/adapter_model.safetensors")[0] for who in ("ours", "theirs")
    )
    assert {key: value[:2] for key, value in a.items()} == {key: value[:2] for key, value in b.items()}
    a, b = (ours.config_in(tmp_path / who / "arrow_router") for who in ("ours", "theirs"))
    assert a == b
