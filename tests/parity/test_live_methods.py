"""Where other methods than LoRA part from HF peft, and who is right."""

import numpy as np
import peft
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
from peft.tuners.loha import layer as hf_loha

from msft_peft import HiraConfig, OFTConfig, TrainableTokensConfig, get_peft_model

from . import ours, theirs
from .cases import compare, other, same, same_dicts

EFFECTIVE = other("LoHa", "effective", "conv2d", "conv0", r=2, use_effective_conv2d=True)


def plain(t1, w1a, w1b, t2, w2a, w2b, scale):
    """The delta of LoHa's effective convolution, left to torch to differentiate."""
    one, two = (torch.einsum("ijkl,jr,ip->prkl", *factors) for factors in ((t1, w1b, w1a), (t2, w2b, w2a)))
    return one * two * scale


def test_loha_s_effective_convolution_has_the_right_gradient(tmp_path, monkeypatch):
    """HF's own backward pass mixes up the factors of the two halves."""
    weights, x, target = theirs.data(EFFECTIVE, 1)
    hf = theirs.create(EFFECTIVE, weights, 1)
    hf.save_pretrained(tmp_path)
    _, output, wrong = theirs.gradients(hf, x, target)
    monkeypatch.setattr(hf_loha, "make_weight_cp", plain)
    _, again, right = theirs.gradients(hf, x, target)
    same("output", output, again)
    mine = ours.load(EFFECTIVE, weights, tmp_path)
    _, y, grads = ours.gradients(mine, x, target)
    same("output", y, output)
    same_dicts("gradient", grads, right)
    off = {key for key, value in wrong.items() if not np.allclose(value, right[key], atol=1e-3)}
    assert off == {f"base_model.model.conv0.hada_w{i}_a" for i in (1, 2)}


def test_hira_s_rank_pattern_counts_for_the_first_adapter_too():
    settings = {"r": 3, "target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}
    weights, _, _ = theirs.data(other("Hira", "pattern", "mlp", "lin0"), 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.HiraConfig(**settings))
    hf.add_adapter("second", peft.HiraConfig(**settings))
    ranks = {name: hf.base_model.model.lin1.hira_A[name].shape[0] for name in ("default", "second")}
    assert ranks == {"default": 3, "second": 2}
    mine = get_peft_model(ours.build("mlp", weights), HiraConfig(**settings))
    assert mine.base_model.model.lin1.hira_A["default"].shape[0] == 2


def test_oft_on_a_convolution_is_what_it_is_merged_to():
    """HF's forward sums overlapping patches where the kernel is larger than one; its merge is right, and is ours."""
    case = other("OFT", "kernel", "conv2d_square", "conv0", oft_block_size=3)
    weights, x, _ = theirs.data(case, 1)
    with torch.no_grad():
        fresh = peft.get_peft_model(theirs.build(case.net, weights), peft.OFTConfig(**case.config)).eval()
        base = theirs.build(case.net, weights).eval()(torch.tensor(x)).numpy()
        assert not np.allclose(theirs.forward(fresh, x).numpy(), base, atol=1e-2)
        hf = theirs.create(case, weights, 1)
        before = theirs.forward(hf, x).numpy()
        hf.merge_adapter()
        merged = theirs.forward(hf, x).numpy()
    assert not np.allclose(before, merged, atol=1e-2)
    mine = get_peft_model(ours.build(case.net, weights), OFTConfig(**case.config)).set_train(False)
    same("output", mine(ours.ms.Tensor(x)).asnumpy(), base)
    angles = hf.base_model.model.conv0.oft_R["default"].weight.detach().numpy()
    mine.base_model.model.conv0.adapters["default"].angles.copy_(ours.ms.Tensor(angles))
    same("output", mine(ours.ms.Tensor(x)).asnumpy(), merged)


def both_ways(case, tmp_path):
    """What HF makes of its own adapter, and of ours; what we make of its."""
    weights, x, target, hf = theirs.write(case, tmp_path / "theirs", 2)
    compare(ours.record(ours.load(case, weights, tmp_path / "theirs"), x, target), hf)
    mine = ours.create(case, weights, 2)
    mine.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs.build(case.net, weights), tmp_path / "ours", is_trainable=True)
    compare(ours.record(mine, x, target), theirs.record(again.eval(), x, target))


def test_ln_tuning_of_conv1d_has_hf_s_files(tmp_path):
    """A copy of the layer, which stores (in, out); here its weight has torch's layout."""
    case = other("LNTuning", "hf_conv1d", "gpt2", "c_attn", "c_proj")
    weights, x, _, hf = theirs.write(case, tmp_path / "theirs", 2)
    mine = ours.load(case, weights, tmp_path / "theirs")
    same("output", mine(ours.ms.Tensor(x)).asnumpy(), hf.output)
    mine.save_pretrained(tmp_path / "ours")
    files = [ours.arrays_of(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    same_dicts("weight", *files)
    same_dicts("weight", ours.weights_of(mine.merge_and_unload()), hf.merged)


def test_vblora_with_one_vector_each(tmp_path):
    """Its logits have no gradient. Those of later adapters are right all the same, see `VBLoRAPatch.mixed`."""
    settings = {"r": 2, "num_vectors": 5, "vector_length": 2}
    both_ways(other("VBLoRA", "one", "mlp", "lin0", "lin1", topk=1, **settings), tmp_path / "one")
    both_ways(other("VBLoRA", "two", "mlp", "lin0", "lin1", topk=2, **settings), tmp_path / "two")


def test_trained_tokens_of_a_head_with_a_bias():
    """HF's layer loses its bias."""
    case = other("TrainableTokens", "bias", "mlp", "out", token_indices=[2, 0])
    weights, x, _ = theirs.data(case, 1)
    base = theirs.build(case.net, weights)
    plain = base(torch.tensor(x)).detach().numpy()
    fresh = theirs.forward(peft.get_peft_model(base, peft.TrainableTokensConfig(**case.config)), x).detach().numpy()
    same("output", fresh, plain - weights["out.bias"])
    mine = get_peft_model(ours.build(case.net, weights), TrainableTokensConfig(**case.config)).set_train(False)
    same("output", mine(ours.ms.Tensor(x)).asnumpy(), plain)


def test_the_gradient_before_c3a_is_its_transpose_s():
    """HF's backward pass takes another product wherever blocks are larger than two."""
    torch.manual_seed(0)
    for block, right in ((2, True), (4, False)):
        kernel, x, g = (
            torch.randn(8 // block, 8 // block, block),
            torch.randn(3, 8, requires_grad=True),
            torch.randn(3, 8),
        )
        w = get_circulant_fast(kernel)
        y = BlockCircularConvolution.apply(x, kernel)
        same("output", y.detach().numpy(), (x @ w.T).detach().numpy())
        y.backward(g)
        assert np.allclose(x.grad.numpy(), (g @ w).numpy(), atol=1e-2) == right
