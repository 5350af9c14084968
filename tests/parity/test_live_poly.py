"""Poly against HF peft where there are several tasks: the routing, and what it draws while it trains."""

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import ops

import msft_peft
from msft_peft import models
from msft_peft.tuners.poly import PolyPatch
from tests.cases import layers_of

from . import ours, theirs
from .cases import make_weight, other, same, same_dicts
from .test_live_models import DECODER

TASKS = np.array([2, 0])
CASE = other("Poly", "tasks", "blocks", "q_proj", "down", r=3, n_tasks=3, n_skills=2, n_splits=2)


class Loss(ms.nn.Cell):
    def __init__(self, model, target):
        super().__init__(auto_prefix=False)
        self.model, self.target = model, ms.Tensor(target)

    def construct(self, x, tasks):
        y = self.model(x, task_ids=tasks)
        return ops.mean(ops.square(y - self.target)), y


def fixed_noise(self, shape):
    return self.fixed


def numbers(model, x, target):
    params = model.trainable_params()
    step = ms.value_and_grad(Loss(model, target), None, params, has_aux=True)

    def call(x, tasks):
        return step(x, tasks)

    run = ms.jit(call) if ms.get_context("mode") == ms.GRAPH_MODE else call
    (_, y), grads = run(ms.Tensor(x), ms.Tensor(TASKS, ms.int32))
    return y.asnumpy(), {p.name: g.asnumpy() for p, g in zip(params, grads)}


def hf_numbers(model, x, target):
    y = model.base_model(torch.tensor(x), task_ids=torch.tensor(TASKS))
    ((y - torch.tensor(target)) ** 2).mean().backward()
    return y.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [False, True], ids=["evaluated", "trained"])
def test_the_numbers_of_several_tasks(training, mode, tmp_path, monkeypatch):
    """While it trains, with the same random numbers on either side."""
    weights, x, target = theirs.data(CASE)
    hf = theirs.create(CASE, weights)
    hf.save_pretrained(tmp_path)
    mine = ours.load(CASE, weights, tmp_path)
    if training:
        uniform = np.random.default_rng(3).uniform(0.1, 0.9, (2, 4)).astype(np.float32)
        drawn = np.log(uniform) - np.log1p(-uniform)
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform).reshape(2, 2, 2))
        monkeypatch.setattr(PolyPatch, "noise", fixed_noise)
        for layer in layers_of(mine):
            layer.adapters["default"].fixed = ms.Tensor(drawn)
        hf.train(), mine.set_train()
    hf_y, hf_grads = hf_numbers(hf, x, target)
    y, grads = numbers(mine, x, target)
    same("output", y, hf_y)
    same_dicts("gradient", grads, hf_grads)
    assert all(np.abs(g).max() > 1e-5 for g in hf_grads.values())


def test_what_is_drawn_is_distributed_as_in_hf():
    hf = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=torch.zeros(100_000)).rsample().numpy()
    mine = ops.sigmoid(PolyPatch.noise(type("Patch", (), {"dtype": ms.float32}), (1, 100_000))).asnumpy()
    for q in (0.02, 0.3, 0.5, 0.9):
        assert abs(np.quantile(mine, q) - np.quantile(hf, q)) < 0.01


@pytest.mark.parametrize("init", [True, False])
def test_how_it_begins(init):
    """Where HF's weights lie, and how far they are spread."""
    fields = {"target_modules": ["up"], "r": 5, "n_tasks": 40, "n_skills": 60, "n_splits": 2, "init_weights": init}
    weights, _, _ = theirs.data(CASE)
    hf = peft.get_peft_model(theirs.build("blocks", weights), peft.PolyConfig(**fields))
    mine = msft_peft.get_peft_model(ours.build("blocks", weights), msft_peft.PolyConfig(**fields))
    wanted = {name: p.detach().numpy() for name, p in hf.named_parameters() if p.requires_grad}
    assert sorted(wanted) == sorted(p.name for p in mine.trainable_params())
    for p in mine.trainable_params():
        theirs_, value = wanted[p.name], p.asnumpy()
        assert value.shape == theirs_.shape
        np.testing.assert_allclose([value.std(), value.max()], [theirs_.std(), theirs_.max()], rtol=0.1)
        assert abs(value.mean()) <= 0.1 * value.std()


def test_the_same_tokens(tmp_path):
    """Beams fail in HF, which does not repeat the tasks: there each row gives what it does alone."""
    kind = transformers.LlamaForCausalLM
    module, rng = kind(kind.config_class(**DECODER)), np.random.default_rng(0)
    with torch.no_grad():
        for key, p in module.named_parameters():
            p.copy_(torch.tensor(make_weight(key, tuple(p.shape), rng)))
    module.save_pretrained(tmp_path / "base")
    fields = {"task_type": "CAUSAL_LM", "r": 4, "n_tasks": 3, "target_modules": ["q_proj", "v_proj"]}
    hf = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.PolyConfig(**fields)).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.requires_grad:
                p.copy_(torch.tensor(2 * make_weight(name, tuple(p.shape), rng)))
    hf.save_pretrained(tmp_path / "adapter")
    base = models.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    mine = msft_peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert msft_peft.PeftConfig.from_pretrained(tmp_path / "adapter").n_tasks == 3
    ids = rng.integers(3, 30, (2, 6))
    more, found = {"max_new_tokens": 6, "do_sample": False}, []
    for tasks in (TASKS, TASKS[::-1].copy()):
        with torch.no_grad():
            told = {"attention_mask": torch.ones(2, 6).long(), "eos_token_id": None, "task_ids": torch.tensor(tasks)}
            wanted = hf.generate(input_ids=torch.tensor(ids), **told, **more).numpy()
        tokens = mine.generate(ids.astype(np.int32), eos_token_id=[], task_ids=tasks, **more).asnumpy()
        assert tokens.tolist() == wanted.tolist()
        found.append(wanted.tolist())
    assert found[0] != found[1]
    more, ids = {"max_new_tokens": 6, "eos_token_id": [], "num_beams": 2}, ids.astype(np.int32)
    alone = [mine.generate(ids[i : i + 1], task_ids=TASKS[i : i + 1], **more).asnumpy()[0] for i in range(2)]
    assert mine.generate(ids, task_ids=TASKS, **more).asnumpy().tolist() == [row.tolist() for row in alone]


@pytest.mark.parametrize(
    "call",
    [
        lambda library, m, x: m(x),
        lambda library, m, x: (m if library is msft_peft else m.base_model)(x, task_ids=x[:, 0] * 0 + 3),
        lambda library, m, x: m.merge_adapter(),
        lambda library, m, x: library.PolyConfig(r=0) and library.get_peft_model(m.unload(), library.PolyConfig(r=0)),
    ],
    ids=["no tasks", "unknown task", "merge", "r"],
)
def test_what_hf_refuses(call):
    """Some kind of error in either library, ours the same or told beforehand."""
    weights, x, _ = theirs.data(CASE)
    with pytest.raises((ValueError, AttributeError, NotImplementedError)):
        call(peft, theirs.create(CASE, weights), torch.tensor(x))
    with pytest.raises(ValueError):  # noqa: PT011
        call(msft_peft, ours.create(CASE, weights), ms.Tensor(x))
