"""AdaLoRA's schedule, its files, and its penalty, step by step against HF peft."""

import json
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import nn, ops

import msft_peft
from msft_peft import PeftModel

from . import ours, theirs
from .cases import case, file_key, same, same_dicts

SETTINGS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, "deltaT": 2, "lora_alpha": 6}
CASE = case("adalora", "mlp", "lin0", "lin1", "out")
RATE = 0.3


def pair(weights, targets, **settings):
    """The same net with the same adapter in both libraries."""
    config = SETTINGS | settings | {"target_modules": targets}
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.AdaLoraConfig(**config))
    mine = msft_peft.get_peft_model(ours.build("mlp", weights), msft_peft.AdaLoraConfig(**config))
    rng = CASE.rng(7)
    values = {}
    for name, p in hf.named_parameters():
        if p.requires_grad:
            p.data = torch.tensor(rng.normal(size=tuple(p.shape)).astype(np.float32) * 0.4)
            values[name] = p.detach().numpy().copy()
    for p in mine.trainable_params():
        p.copy_(ms.Tensor(values[p.name]))
    return hf.eval(), mine.set_train(False)


def descend(hf, mine, x, target):
    """A step of plain gradient descent on both sides; our gradients."""
    theirs.gradients(hf, x, target)
    with torch.no_grad():
        for p in hf.parameters():
            if p.requires_grad:
                p -= RATE * p.grad
    params = mine.trainable_params()
    _, grads = ms.value_and_grad(ours.Loss(mine, target), None, params, has_aux=True)(ms.Tensor(x))
    for p, g in zip(params, grads):
        p.copy_(p - RATE * g)
    return grads


def tensors(hf, mine):
    a = {file_key(p.name): p.asnumpy().copy() for p in mine.trainable_params()}
    b = {file_key(n): p.detach().numpy().copy() for n, p in hf.named_parameters() if p.requires_grad}
    return a, b


@pytest.mark.parametrize("settings", [{}, {"tfinal": 0, "tinit": 0, "deltaT": 1, "target_r": 1}], ids=["", "hard"])
def test_every_step_of_the_schedule(settings, tmp_path):
    weights, x, target = theirs.data(CASE, 1)
    hf, mine = pair(weights, ["lin0", "lin1", "out"], **settings)
    pruned = 0
    for step in range(10):
        grads = descend(hf, mine, x, target)
        hf.base_model.update_and_allocate(step)
        mine.base_model.update_and_allocate(step, grads)
        same_dicts("trajectory", *tensors(hf, mine), f"step {step}")
        pattern = hf.peft_config["default"].rank_pattern
        plain = pattern and {key.replace(".default", ""): value for key, value in pattern.items()}
        assert mine.peft_config["default"].rank_pattern == plain
        pruned += bool(pattern)
    assert pruned > 3
    assert sum(map(sum, plain.values())) == mine.peft_config["default"].target_r * 3
    hf.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    assert ours.config_in(tmp_path / "theirs") == ours.config_in(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["rank_pattern"] == plain
    read = [ours.arrays_of(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    same_dicts("trajectory", *read)
    expected = theirs.forward(hf, x).detach().numpy()
    for folder in ("ours", "theirs"):
        again = PeftModel.from_pretrained(ours.build("mlp", weights), tmp_path / folder)
        same("trajectory", again(ms.Tensor(x)).asnumpy(), expected)
        other = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / folder).eval()
        same("trajectory", theirs.forward(other, x).detach().numpy(), expected)
    again.save_pretrained(tmp_path / "again")
    same_dicts("trajectory", ours.arrays_of(tmp_path / "again" / "adapter_model.safetensors"), read[1])


def test_hf_reads_what_a_training_that_went_on_left(tmp_path):
    weights, x, target = theirs.data(CASE, 1)
    hf, mine = pair(weights, ["lin0", "lin1", "out"])
    for start in (1, 5):
        for step in range(start, start + 4):
            mine.base_model.update_and_allocate(step, descend(hf, mine, x, target))
        mine.save_pretrained(tmp_path)
        expected = mine(ms.Tensor(x)).asnumpy()
        mine = PeftModel.from_pretrained(ours.build("mlp", weights), tmp_path, is_trainable=True).set_train(False)
    hf = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path, is_trainable=True).eval()
    same("trajectory", theirs.forward(hf, x).detach().numpy(), expected)
    assert hf.get_nb_trainable_parameters() == mine.get_nb_trainable_parameters()


class TorchLoss(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, target):
        y = self.net(x)
        return SimpleNamespace(loss=((y - target) ** 2).mean(), logits=y)


class OurLoss(nn.Cell):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def construct(self, x, target):
        y = self.net(x)
        return {"loss": ops.square(y - target).mean(), "logits": y}


class Only(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x, target):
        return self.model(x, target)["loss"]


def test_the_penalty_and_its_gradients(mode):
    weights, x, target = theirs.data(CASE, 2)
    config = SETTINGS | {"target_modules": ["lin0", "lin1"], "orth_reg_weight": 0.7}
    hf = peft.get_peft_model(TorchLoss(theirs.build("mlp", weights)), peft.AdaLoraConfig(**config)).eval()
    mine = msft_peft.get_peft_model(OurLoss(ours.build("mlp", weights)), msft_peft.AdaLoraConfig(**config))
    mine.set_train(False)
    rng = CASE.rng(8)
    trained = {name: p for name, p in hf.named_parameters() if p.requires_grad}
    values = {name: 0.4 * rng.normal(size=tuple(p.shape)).astype(np.float32) for name, p in trained.items()}
    for name, p in trained.items():
        p.data = torch.tensor(values[name])
    for p in mine.trainable_params():
        p.copy_(ms.Tensor(values[p.name]))
    # Past HF's PeftModel, which without a task type forgets the penalty.
    loss = hf.base_model(torch.tensor(x), torch.tensor(target)).loss
    loss.backward()
    expected = {file_key(n): p.grad.numpy() for n, p in trained.items()}
    params = mine.trainable_params()
    step = ms.value_and_grad(Only(mine), None, params)
    got, grads = step(ms.Tensor(x), ms.Tensor(target))
    same("loss", got.asnumpy(), loss.item())
    same_dicts("gradient", {file_key(p.name): g.asnumpy() for p, g in zip(params, grads)}, expected)
    with mine.disable_adapter():
        plain = mine(ms.Tensor(x), ms.Tensor(target))
    same("loss", plain["loss"].asnumpy(), ((plain["logits"].asnumpy() - target) ** 2).mean())
