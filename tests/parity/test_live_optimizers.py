"""LoRA+ and LoRA-FA against HF peft, live: the same adapters after the same steps."""

import contextlib
from pathlib import Path

import mindspore as ms
import numpy as np
import peft.optimizers
import pytest
import torch
from mindspore import nn
from mindspore.experimental import optim

import msft_peft.optimizers

from . import ours, theirs
from .cases import CASES, make_input, same_dicts
from .test_live_training import Loss

STEPS = 6


def check(name: str, make_hf, make_ours, tmp_path: Path) -> None:
    """Train in both libraries from the same start; the adapters at the end are equal, and have moved."""
    case = CASES[name]
    weights, _, target = theirs.data(case, 3)
    target = target.astype(np.float32)
    hf = theirs.create(case, weights, 3)
    hf.save_pretrained(tmp_path / "start")
    mine = ours.load(case, weights, tmp_path / "start")
    hf_optimizer, optimizer = make_hf(hf), make_ours(mine)
    step = ms.value_and_grad(Loss(mine), None, optimizer.parameters)
    rng = case.rng(7)
    for _ in range(STEPS):
        x = make_input(case.net, rng)
        hf_optimizer.zero_grad()
        ((theirs.forward(hf, x) - torch.tensor(target)) ** 2).mean().backward()
        hf_optimizer.step()
        _, grads = step(ms.Tensor(x), ms.Tensor(target))
        optimizer(grads)
    ends = []
    for who, model in (("ours", mine), ("theirs", hf)):
        model.save_pretrained(tmp_path / who)
        ends.append(ours.arrays_of(tmp_path / who / "adapter_model.safetensors"))
    same_dicts("trajectory", *ends)
    start = ours.arrays_of(tmp_path / "start" / "adapter_model.safetensors")
    trained = {theirs.file_key(key) for key, p in hf.named_parameters() if p.requires_grad}
    moved = {key for key in start if np.abs(ends[0][key] - start[key]).max() > 1e-4}
    assert moved == trained & set(start)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, nn.SGD, {}),
    "adam": (torch.optim.Adam, nn.Adam, {}),
    "adamw": (torch.optim.AdamW, optim.AdamW, {"loraplus_weight_decay": 0.1}),
}


NAMES = ("linear_bias_all", "embedding", "blocks_modules_to_save")
# In the blocks some gradients are so small that it counts where nn.Adam adds its ε.
PLUS = [(name, optimizer) for name in NAMES for optimizer in OPTIMIZERS if (name, optimizer) != (NAMES[2], "adam")]


@pytest.mark.parametrize(("name", "optimizer"), PLUS)
def test_loraplus(name: str, optimizer: str, tmp_path: Path):
    hf_class, our_class, settings = OPTIMIZERS[optimizer]
    settings = settings | {"lr": 0.01, "loraplus_lr_ratio": 3, "loraplus_lr_embedding": 0.02}
    check(
        name,
        lambda model: peft.optimizers.create_loraplus_optimizer(model, hf_class, **settings),
        lambda model: msft_peft.optimizers.create_loraplus_optimizer(model, our_class, **settings),
        tmp_path,
    )


@pytest.mark.parametrize("name", ["linear", "linear_patterns", "linear_rslora", "linear_bias_all", "hf_conv1d"])
def test_lorafa(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # HF rounds the projected gradients to bfloat16, by autocast.
    monkeypatch.setattr(peft.optimizers.lorafa, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    config = CASES[name].config
    arguments = (config["r"], config["lora_alpha"], 0.01, 0.1)
    check(
        name,
        lambda model: peft.optimizers.create_lorafa_optimizer(model, *arguments),
        lambda model: msft_peft.optimizers.create_lorafa_optimizer(model, *arguments),
        tmp_path,
    )
