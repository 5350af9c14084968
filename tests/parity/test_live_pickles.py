"""Files that torch itself wrote, in both of its formats, read without it."""

import numpy as np
import peft
import pytest
import torch
import transformers

from msft_peft import models
from msft_peft.backend.arrays import as_float32
from msft_peft.backend.torch_pickle import read_torch

from . import ours, theirs
from .cases import CASES, compare

formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@formats
def test_every_dtype_and_every_view(zipped, tmp_path):
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = {str(dtype): (torch.randn(3, 4) * 10).abs().to(dtype) for dtype in DTYPES}
    state |= {
        "shared": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "columns": base[:, 1::3],
        "number": base[3, 3],
        "empty": torch.zeros(0, 5),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
    }
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = read_torch(tmp_path / "x.bin")
    assert list(found) == list(state)
    for key, value in state.items():
        array = found[key].numpy()
        assert str(value.dtype) == f"torch.{array.dtype}"
        assert found[key].shape == array.shape == tuple(value.shape)
        if value.dtype == torch.bfloat16:
            array, value = as_float32(array), value.float()
        np.testing.assert_array_equal(array, value.detach().numpy())


@formats
def test_a_module_s_own_state_dict(zipped, tmp_path):
    """An OrderedDict with an attribute, as `state_dict()` returns it."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(net.state_dict(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = read_torch(tmp_path / "x.bin")
    assert list(found) == list(net.state_dict())


@formats
@pytest.mark.parametrize("name", ["blocks_modules_to_save", "conv2d"])
def test_an_adapter_of_old(name, zipped, tmp_path):
    weights, x, target = theirs.data(CASES[name], 1)
    hf = theirs.create(CASES[name], weights, 2)
    hf.save_pretrained(tmp_path, safe_serialization=False)
    if not zipped:
        state = torch.load(tmp_path / "adapter_model.bin")
        torch.save(state, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    mine = ours.load(CASES[name], weights, tmp_path)
    compare(ours.record(mine, x, target, merge=False), theirs.record(hf, x, target, merge=False))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickled_base_model(sharded, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    hf = transformers.LlamaForCausalLM(config).eval()
    hf.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="5KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.bin"))) > 1 if sharded else (tmp_path / "pytorch_model.bin").exists()
    mine = models.AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in hf.state_dict().items():
        np.testing.assert_array_equal(dict(mine.parameters_and_names())[key].asnumpy(), value.numpy())


def test_files_with_more_than_tensors_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"it names torch.nn.modules.linear.Linear"):
        read_torch(tmp_path / "x.bin")
    torch.save({"peft": peft.LoraConfig()}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"it names peft.tuners.lora.config.LoraConfig"):
        read_torch(tmp_path / "x.bin")
