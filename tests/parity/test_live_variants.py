"""LoRA's variants beside HF peft on torch: what is no forward, merge or file, which test_live.py compares."""

import mindspore as ms
import numpy as np
import pytest
import torch

from . import ours, theirs
from .cases import CASES, same


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
    case = CASES["kasa"]
    from peft import LoraConfig as HfLoraConfig

    from msft_peft import LoraConfig

    for model, kind in ((hf, HfLoraConfig), (mine, LoraConfig)):
        model.add_adapter("more", kind(**case.config | {"r": 3}))
    with torch.no_grad():
        same("output", mine(ms.Tensor(x)).asnumpy(), theirs.forward(hf, x))
