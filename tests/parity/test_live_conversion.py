"""`convert_to_lora` and `save_as_lora` against HF peft, live."""

import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import msft_peft

from . import ours, theirs
from .cases import CASES, same

# HF converts dense layers only.
NAMES = ["linear", "linear_patterns", "hf_conv1d", "blocks_layers", "blocks_modules_to_save"]


def updates(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """B·A of each layer, since an SVD's factors may differ in their signs; and the tensors that are no factors."""
    found = {}
    for key, value in state.items():
        if key.endswith("lora_A.weight"):
            found[key] = state[key.replace("lora_A", "lora_B")] @ value
        elif "lora_B" not in key:
            found[key] = value
    return found


@pytest.mark.parametrize("rank", [1, 2, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_conversion(name: str, rank: float, tmp_path: Path):
    case = CASES[name]
    weights, _, _ = theirs.data(case)
    hf = theirs.create(case, weights)
    hf.save_pretrained(tmp_path / "lora")
    mine = ours.load(case, weights, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is LoRA already
        hf_config, hf_state = peft.convert_to_lora(hf, rank)
        config, state = msft_peft.convert_to_lora(mine, rank)
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save"):
        assert getattr(config, field) == getattr(hf_config, field), field
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        key: tuple(value.shape) for key, value in hf_state.items()
    }
    mine_updates = updates({key: value.asnumpy() for key, value in state.items()})
    for key, value in updates({key: value.detach().numpy() for key, value in hf_state.items()}).items():
        same("output", mine_updates[key], value, key)


@pytest.mark.parametrize("name", ["linear", "linear_patterns", "embedding", "conv1d", "conv2d", "conv3d", "hf_conv1d"])
def test_hf_opens_the_result(name: str, tmp_path: Path):
    case = CASES[name]
    weights, x, _ = theirs.data(case)
    mine = ours.create(case, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        msft_peft.save_as_lora(tmp_path, mine, 0.9)
    loaded = msft_peft.PeftModel.from_pretrained(ours.build(case.net, weights), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf = peft.PeftModel.from_pretrained(theirs.build(case.net, weights), tmp_path).eval()
    with torch.no_grad():
        same("output", loaded(ours.ms.Tensor(x)).asnumpy(), theirs.forward(hf, x).numpy())
