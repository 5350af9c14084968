"""Hot swapping and rescaling against HF peft."""

import numpy as np
import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale as hf_rescale
from peft.utils import hotswap as hf_hotswap

import msft_peft
from msft_peft import LoraConfig

from . import ours, theirs
from .cases import CASES, compare

ADAPTERS = [{"r": 2, "lora_alpha": 5}, {"r": 6, "lora_alpha": 3}]


@pytest.mark.parametrize("name", ["linear_regex", "blocks_all_linear", "conv2d", "conv2d_groups"])
def test_hf_swaps_the_same(name, tmp_path):
    the_case = CASES[name]
    weights, x, target = theirs.data(the_case)
    mine, hf = ours.create(the_case, weights), theirs.create(the_case, weights)
    msft_peft.prepare_model_for_compiled_hotswap(mine, target_rank=8)
    hf_hotswap.prepare_model_for_compiled_hotswap(hf, target_rank=8)
    for number, changes in enumerate(ADAPTERS):
        config = the_case.config | changes
        other = peft.get_peft_model(theirs.build(the_case.net, weights), peft.LoraConfig(**config))
        rng = np.random.default_rng(number)
        for p in other.parameters():
            if p.requires_grad:
                p.data = torch.tensor(rng.normal(size=tuple(p.shape)).astype(np.float32) * 0.4)
        other.save_pretrained(tmp_path / str(number))
        msft_peft.hotswap_adapter(mine, tmp_path / str(number), "default")
        hf_hotswap.hotswap_adapter(hf, str(tmp_path / str(number)), "default")
        y = ours.record(mine, x, target, merge=False).output
        np.testing.assert_allclose(y, theirs.forward(hf, x).detach().numpy(), atol=2e-5, rtol=2e-4)
        np.testing.assert_allclose(y, theirs.forward(other.eval(), x).detach().numpy(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    "changes", [{"r": 3}, {"lora_dropout": 0.1}, {"use_rslora": True}, {"alpha_pattern": {"x": 1}}, {"use_dora": True}]
)
def test_the_same_configs_are_compatible(changes):
    found = []
    for library, check in ((msft_peft, msft_peft), (peft, hf_hotswap)):
        try:
            check.check_hotswap_configs_compatible(library.LoraConfig(), library.LoraConfig(**changes))
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert (found[0] is None) == ("r" in changes)


@pytest.mark.parametrize("multiplier", [0, 0.25, 3])
def test_rescaling(multiplier):
    the_case = CASES["blocks_all_linear"]
    weights, x, target = theirs.data(the_case)
    mine, hf = ours.create(the_case, weights), theirs.create(the_case, weights)
    msft_peft.set_peft_model_state_dict(
        mine, {key: value.numpy() for key, value in peft.get_peft_model_state_dict(hf).items()}
    )
    with msft_peft.rescale_adapter_scale(mine, multiplier), hf_rescale(hf, multiplier):
        compare(ours.record(mine, x, target, merge=False), theirs.record(hf, x, target, merge=False))
    compare(ours.record(mine, x, target, merge=False), theirs.record(hf, x, target, merge=False))


def test_scales_of_a_layer():
    the_case = CASES["linear_regex"]
    weights, _, _ = theirs.data(the_case)
    mine, hf = ours.create(the_case, weights), theirs.create(the_case, weights)
    layers = mine.get_base_model().lin0, hf.base_model.model.lin0
    for call in (
        lambda layer: layer.set_scale("default", 3),
        lambda layer: layer.scale_layer(2),
        lambda layer: layer.set_scale("nowhere", 7),
        lambda layer: layer.unscale_layer(4),
        lambda layer: layer.unscale_layer(),
    ):
        for layer in layers:
            call(layer)
        assert layers[0].scaling == layers[1].scaling


def test_is_it_an_adapter(tmp_path):
    msft_peft.get_peft_model(
        ours.build("mlp", theirs.data(CASES["linear_regex"])[0]), LoraConfig(target_modules=["lin0"])
    ).save_pretrained(tmp_path)
    assert msft_peft.check_if_peft_model(tmp_path) is peft.helpers.check_if_peft_model(str(tmp_path)) is True
