"""State dicts, key mappings and targets from keys, against HF peft."""

import warnings

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

import msft_peft
from msft_peft import LoraConfig

from . import ours, theirs
from .cases import CASES, compare

BLOCKS = "blocks_modules_to_save"
each_case = pytest.mark.parametrize("name", [BLOCKS, *[name for name in CASES if "conv" in name][:2]])


def both(name: str, seed: int = 1):
    """The case's model with the same base weights here and there, each with random adapter weights of its own."""
    weights, x, target = theirs.data(CASES[name], seed)
    return ours.create(CASES[name], weights, 5), theirs.create(CASES[name], weights, seed), x, target


@pytest.mark.parametrize("name", list(CASES))
def test_hf_state_dicts_go_in_and_come_out(name):
    mine, hf, x, target = both(name)
    state = {key: value.numpy() for key, value in peft.get_peft_model_state_dict(hf).items()}
    report = msft_peft.set_peft_model_state_dict(mine, state)
    assert (report.missing_keys, report.unexpected_keys) == ((), ())
    compare(ours.record(mine, x, target, merge=False), theirs.record(hf, x, target, merge=False))
    back = msft_peft.get_peft_model_state_dict(mine)
    assert back.keys() == state.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value.asnumpy(), state[key])


@each_case
def test_base_state_dicts_have_the_same_names(name):
    mine, hf, _, _ = both(name)
    names = {ours.torch_key(key) for key in msft_peft.get_base_model_state_dict(mine)}
    assert names == set(peft.get_base_model_state_dict(hf))


MAPPINGS = [
    {r"^enc\.(\w+)": r"layers.\1"},
    {"enc": "layers", "layers": "twice"},
    {"nothing": "x", "enc": "layers"},
    {"base_model": "never there", "enc": "layers"},
]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
def test_key_mappings_rename_alike(mapping, tmp_path):
    mine, _, _, _ = both(BLOCKS)
    mine.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace("layers", "enc"): value for key, value in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path)
    here = msft_peft.load_peft_weights(tmp_path, key_mapping=mapping)
    assert set(here) == set(peft.load_peft_weights(str(tmp_path), device="cpu", key_mapping=mapping))


@pytest.mark.parametrize("targets", [["q_proj"], ["up", "down"], ["nothing"]])
def test_keys_choose_the_same_layers(targets):
    weights, _, _ = theirs.data(CASES[BLOCKS], 1)
    state = {
        "layers.0.attn.q_proj.lora_A.weight": np.zeros((2, 4), np.float32),
        "layers.0.attn.q_proj.lora_B.weight": np.zeros((4, 2), np.float32),
        "layers.1.up.lora_A.weight": np.zeros((2, 4), np.float32),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = msft_peft.inject_adapter_in_model(
            LoraConfig(r=2, target_modules=targets), ours.build("blocks", weights), state_dict=state
        )
    paths = {path for path, cell in mine.cells_and_names() if hasattr(cell, "lora_A") and "adapters" not in path}
    expected = {"layers.0.attn.q_proj", "layers.1.up"}
    assert paths == expected
    if targets == ["nothing"]:
        return  # HF finds nothing there, although the keys are to decide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=targets),
            theirs.build("blocks", weights),
            state_dict={key: torch.tensor(value) for key, value in state.items()},
        )
    assert {name.split(".lora_")[0] for name, _ in hf.named_parameters() if "lora_" in name} == expected


def test_low_cpu_mem_usage_loads_the_same_numbers(tmp_path):
    weights, x, target, hf = theirs.write(CASES[BLOCKS], tmp_path, 1)
    mine = ours.load(CASES[BLOCKS], weights, tmp_path, low_cpu_mem_usage=True)
    compare(ours.record(mine, x, target), hf)
    assert not any(np.isnan(p.asnumpy()).any() for p in mine.get_parameters())
