"""BOFT with several factors, which HF can compute on CUDA only: here with a stand-in for its kernel."""

import mindspore as ms
import peft
import pytest
import torch
from peft.tuners.boft import layer as hf_boft

from msft_peft import PeftWarning

from . import ours, theirs
from .cases import compare, other, same


class Kernel:
    """What HF's CUDA code does: blocks (m, n, h, h) -> block-diagonal matrices (m, n·h, n·h), and back."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*some) for some in blocks])]

    @staticmethod
    def backward(gradient, blocks):
        m, n, h, _ = blocks.shape
        parts = gradient.reshape(m, n, h, n, h)
        return [torch.stack([parts[:, i, :, i] for i in range(n)], 1).contiguous()]


@pytest.mark.parametrize("factors", [2, 3])
def test_several_factors(factors, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_boft, "get_fbd_cuda", lambda: Kernel)
    settings = {"boft_block_size": 2, "boft_n_butterfly_factor": factors}
    case = other("BOFT", f"butterfly_{factors}", "mlp", "lin1", **settings)
    weights, x, target, hf = theirs.write(case, tmp_path, 1)
    compare(ours.record(ours.load(case, weights, tmp_path), x, target), hf)
    ours.create(case, weights, 1).save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / "ours", is_trainable=True).eval()
    mine = ours.load(case, weights, tmp_path / "ours")
    compare(ours.record(mine, x, target), theirs.record(again, x, target))


def test_a_convolution_with_several_factors(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_boft, "get_fbd_cuda", lambda: Kernel)
    case = other("BOFT", "butterfly_conv", "conv2d_square", "conv1", boft_block_size=2, boft_n_butterfly_factor=2)
    weights, x, target, hf = theirs.write(case, tmp_path, 1)
    compare(ours.record(ours.load(case, weights, tmp_path), x, target), hf)


def test_a_file_with_fewer_factors_than_its_config_says(tmp_path):
    """As HF writes it without its CUDA kernel."""
    case = other("BOFT", "cpu", "mlp", "lin1", boft_block_size=2, boft_n_butterfly_factor=2)
    weights, x, _, hf = theirs.write(case, tmp_path, 1)
    with pytest.warns(PeftWarning, match="boft_n_butterfly_factor=2, and the file has 1"):
        mine = ours.load(case, weights, tmp_path)
    same("output", mine(ms.Tensor(x)).asnumpy(), hf.output)
    assert mine.base_model.model.lin1.boft_R["default"].shape[0] == 2
