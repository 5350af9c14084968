"""Ten steps of training in both libraries from the same start: the same losses, and the same adapter at the end.

MindSpore's optimizers and their twins on torch:

- MindSpore's `nn` optimizers decay no parameter called gamma or beta, which are those of the norms; so torch is told
  not to decay these either. `mindspore.experimental.optim` decays what it is given.
- `nn.SGD` and `torch.optim.SGD` are the same, momentum and weight decay (added to the gradient) included.
- `nn.Adam` and `torch.optim.Adam` both correct the bias and add weight decay to the gradient. They differ in where ε
  stands: nn.Adam divides by √v + ε before the correction, torch by √v̂ + ε after it. At ε = 1e-8 that is not seen.
- `nn.AdamWeightDecay` decays the weights apart from the gradient, as AdamW does, but it has no bias correction, so
  that its first steps are other ones (and ε = 1e-6 by default): no twin of `torch.optim.AdamW`.
- `mindspore.experimental.optim.AdamW` is that twin: decoupled decay, bias correction, ε after it.
"""

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import nn, ops
from mindspore.experimental import optim

from . import ours, theirs
from .cases import ALL_CASES, Case, make_input, same, same_dicts

STEPS = 10


@dataclass(frozen=True)
class Twins:
    """The same optimizer in both libraries; HF's is given the parameters of norms as a group of their own."""

    hf: Any
    ours: Any
    decays_norms: bool = False


OPTIMIZERS = {
    "sgd": Twins(lambda ps: torch.optim.SGD(ps, lr=0.05), lambda ps: nn.SGD(ps, learning_rate=0.05)),
    "sgd_momentum": Twins(
        lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, weight_decay=0.01),
        lambda ps: nn.SGD(ps, learning_rate=0.02, momentum=0.9, weight_decay=0.01),
    ),
    "adam": Twins(
        lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01),
        lambda ps: nn.Adam(ps, learning_rate=0.01, weight_decay=0.01),
    ),
    "adamw": Twins(
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
        lambda ps: optim.AdamW(ps, lr=0.01, weight_decay=0.1),
        decays_norms=True,
    ),
}


class Loss(nn.Cell):
    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x, target):
        return ops.mean(ops.square(self.model(x) - target))


def batches(case: Case, target: np.ndarray):
    rng = case.rng(7)
    return [(make_input(case.net, rng), target + 0.1 * i) for i in range(STEPS)]


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["conv2d", "embedding", "blocks_modules_to_save"])
def test_the_same_trajectory(name, optimizer, tmp_path):
    check_trajectory(name, optimizer, tmp_path)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_same_trajectory_in_both_modes(optimizer, mode, tmp_path):
    check_trajectory("linear_bias_all", optimizer, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adam"])
def test_constrained_rotations_take_the_same_steps(optimizer, mode, tmp_path):
    """Each step begins from angles that were shortened to the bound, and may lead out again."""
    check_trajectory("oft_constrained", optimizer, tmp_path)


def check_trajectory(name, optimizer, tmp_path):
    case, twins = ALL_CASES[name], OPTIMIZERS[optimizer]
    weights, _, target = theirs.data(case, 3)
    hf = theirs.create(case, weights, 3).train()
    hf.save_pretrained(tmp_path / "start")
    mine = ours.load(case, weights, tmp_path / "start").set_train(True)

    groups = [{"params": []}, {"params": []} if twins.decays_norms else {"params": [], "weight_decay": 0.0}]
    for key, p in hf.named_parameters():
        if p.requires_grad:
            groups["norm" in key]["params"].append(p)
    hf_optimizer = twins.hf(groups)
    params = mine.trainable_params()
    our_optimizer = twins.ours(params)
    step = ms.value_and_grad(Loss(mine), None, params)
    losses, hf_losses = [], []
    for x, t in batches(case, target.astype(np.float32)):
        hf_optimizer.zero_grad()
        loss = ((theirs.forward(hf, x) - torch.tensor(t)) ** 2).mean()
        loss.backward()
        hf_optimizer.step()
        hf_losses.append(loss.item())
        loss, grads = step(ms.Tensor(x), ms.Tensor(t))
        our_optimizer(grads)
        losses.append(float(loss.asnumpy()))
    same("trajectory", losses, hf_losses, "losses")

    hf.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    ends = [ours.arrays_of(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    same_dicts("trajectory", *ends)
    start = ours.arrays_of(tmp_path / "start" / "adapter_model.safetensors")
    assert all(np.abs(ends[0][key] - start[key]).max() > 1e-3 for key in start), "everything that trains has moved"
