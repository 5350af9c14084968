"""Where other methods than LoRA part from HF peft, and who is right."""

import contextlib

import numpy as np
import peft
import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
from peft.tuners.loha import layer as hf_loha
from transformers.activations import ACT2FN

from msft_peft import (
    DeftConfig,
    HiraConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftModel,
    PeftWarning,
    TrainableTokensConfig,
    WaveFTConfig,
    get_peft_model,
)
from msft_peft.backend.wavelets import FAMILIES

from . import ours, theirs
from .cases import compare, make_weight, other, same, same_dicts

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


def test_hira_s_rank_pattern_counts_for_the_first_adapter_too(tmp_path):
    """HF ignores it there, and writes it; such a file loads, with a warning."""
    settings = {"r": 3, "target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}
    weights, x, _ = theirs.data(other("Hira", "pattern", "mlp", "lin0"), 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.HiraConfig(**settings))
    hf.add_adapter("second", peft.HiraConfig(**settings))
    ranks = {name: hf.base_model.model.lin1.hira_A[name].shape[0] for name in ("default", "second")}
    assert ranks == {"default": 3, "second": 2}
    mine = get_peft_model(ours.build("mlp", weights), HiraConfig(**settings))
    assert mine.base_model.model.lin1.hira_A["default"].shape[0] == 2
    # Both adapters as HF writes them, and what each makes of a batch.
    rng = np.random.default_rng(3)
    for name, p in hf.named_parameters():
        if "hira_" in name:
            p.data = torch.tensor(make_weight(name, tuple(p.shape), rng))
    hf.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        hf.set_adapter(name)
        warned = pytest.warns(PeftWarning, match="is left out") if name == "default" else contextlib.nullcontext()
        with warned:
            mine = PeftModel.from_pretrained(ours.build("mlp", weights), folder)
        with torch.no_grad():
            same("output", mine(ours.ms.Tensor(x)).asnumpy(), theirs.forward(hf, x).numpy(), name)
        assert mine.peft_config["default"].rank_pattern == ({} if name == "default" else settings["rank_pattern"])


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


def test_beft_of_a_layer_without_a_bias(tmp_path):
    """It gains one, and cannot be merged."""
    case = other("Beft", "gained", "mlp", "lin0", "lin1")
    weights, x, target = theirs.data(case, 1)
    hf = theirs.create(case, weights, 1)
    hf.save_pretrained(tmp_path)
    mine = ours.load(case, weights, tmp_path)
    _, output, gradients = theirs.gradients(hf, x, target)
    _, y, grads = ours.gradients(mine, x, target)
    same("output", y, output)
    same_dicts("gradient", grads, gradients)
    for model in (hf, mine):
        with pytest.raises(ValueError, match="Base layer has no bias, cannot merge bias adapter"):
            model.merge_adapter()


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_peanut_with_each_activation(name, tmp_path):
    case = other("Peanut", name, "mlp", "lin0", "out", r=3, depth=1, act_fn=name)
    weights, x, target = theirs.data(case, 1)
    hf = theirs.create(case, weights, 1)
    hf.save_pretrained(tmp_path)
    mine = ours.load(case, weights, tmp_path)
    _, output, gradients = theirs.gradients(hf, x, target)
    _, y, grads = ours.gradients(mine, x, target)
    same("output", y, output)
    same_dicts("gradient", grads, gradients)


def test_peanut_s_layers_are_named_as_in_hf():
    case = other("Peanut", "names", "mlp", "lin0", depth=2)
    weights, _, _ = theirs.data(case, 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.PeanutConfig(**case.config))
    mine = get_peft_model(ours.build("mlp", weights), PeanutConfig(**case.config))
    assert [p.name for p in mine.trainable_params()] == [n for n, p in hf.named_parameters() if p.requires_grad]
    encoder = mine.base_model.model.lin0.peanut_encoders["default"][1]
    assert tuple(encoder.weight.shape) == tuple(hf.base_model.model.lin0.peanut_encoders["default"][1].weight.shape)


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_deft_begins_with_the_r_of_hf(method, tmp_path):
    """It puts in what P takes out."""
    case = other("Deft", "fresh", "mlp", "lin0", "lin1", r=3, alpha=5, decomposition_method=method)
    weights, _, _ = theirs.data(case, 1)
    mine = get_peft_model(ours.build("mlp", weights), DeftConfig(**case.config))
    mine.save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path)
    for name in ("lin0", "lin1"):
        layer = getattr(hf.base_model.model, name)
        p, r = layer.deft_P["default"].detach().clone(), layer.deft_R["default"].detach().numpy().copy()
        with torch.no_grad():
            q = torch.linalg.qr(p)[0] if method == "qr" else torch.relu(p)
        same("weight", r, (q.T @ torch.tensor(weights[f"{name}.weight"])).numpy() * 3 / 5)
        assert np.abs(layer.get_delta_weight("default").detach().numpy()).max() < 1e-6


def test_glora_serves_rows_as_hf_does(tmp_path):
    case = other("Glora", "rows", "mlp", "lin0", "lin1", r=2)
    weights, x, _ = theirs.data(case, 1)
    for seed, name in enumerate(("one", "two")):
        theirs.create(case, weights, seed, name).save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / "one", adapter_name="one").eval()
    mine = PeftModel.from_pretrained(ours.build("mlp", weights), tmp_path / "one", adapter_name="one")
    for model in (hf, mine):
        model.load_adapter(tmp_path / "two", "two")
    rows = ["two", "__base__", "one"]
    with torch.no_grad():
        expected = hf(torch.tensor(x), adapter_names=rows).numpy()
    same("output", mine.set_train(False)(ours.ms.Tensor(x), adapter_names=rows).asnumpy(), expected)


@pytest.mark.parametrize("settings", [{}, {"select_top": False}, {"r": 2}], ids=["largest", "smallest", "supra"])
def test_super_tuning_finds_the_places_of_hf(settings, tmp_path):
    """In their order: files without places serve both ways."""
    case = other("Supertuning", "places", "mlp", "lin0", sparsity=0.6, save_precomputed_indices=False, **settings)
    weights, x, _ = theirs.data(case, 1)
    with pytest.warns(UserWarning, match="save_precomputed_indices=False"):
        hf = theirs.create(case, weights, 1)
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs.forward(hf, x).numpy()
    with pytest.warns(UserWarning, match="save_precomputed_indices=False"):
        mine = ours.load(case, weights, tmp_path)
    places = [model.base_model.model.lin0.supertuning_indices["default"] for model in (hf, mine)]
    np.testing.assert_array_equal(places[1].asnumpy(), places[0].numpy())
    same("output", mine(ours.ms.Tensor(x)).asnumpy(), expected)
    mine.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / "ours").eval()
    with torch.no_grad():
        same("output", theirs.forward(again, x).numpy(), expected)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_waveft_transforms_as_hf_does(family):
    """Each family, on sizes that are even and odd, and smaller than the filter too."""
    settings = {"n_frequency": 20, "wavelet_family": family, "init_weights": False, "target_modules": ["lin0", "out"]}
    weights, _, _ = theirs.data(other("WaveFT", "family", "mlp", "lin0"), 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.WaveFTConfig(**settings))
    mine = get_peft_model(ours.build("mlp", weights), WaveFTConfig(**settings))
    for name in settings["target_modules"]:
        layer, own = (getattr(model.base_model.model, name) for model in (hf, mine))
        own.waveft_spectrum["default"].copy_(ours.ms.Tensor(layer.waveft_spectrum["default"].detach().numpy()))
        with torch.no_grad():
            same("weight", own.get_delta_weight("default").asnumpy(), layer.get_delta_weight("default").numpy())


def test_osf_begins_with_hf_s_directions():
    """Their signs may differ; and HF leaves an embedding as it is, silently, which is refused here."""
    weights, _, _ = theirs.data(other("OSF", "fresh", "mlp", "lin0"), 1)
    settings = {"target_modules": ["lin0", "lin1", "out"], "effective_rank": 0.4}
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.OSFConfig(**settings))
    mine = get_peft_model(ours.build("mlp", weights), OSFConfig(**settings))
    for name in settings["target_modules"]:
        parts = [getattr(model.base_model.model, name).osf_svd_params["default"] for model in (hf, mine)]
        (u0, s0, v0), (u1, s1, v1) = (
            [
                np.asarray(getattr(part, key).detach() if part is parts[0] else getattr(part, key).asnumpy())
                for key in keys
            ]
            for part, keys in ((part, ("U_low", "S_low", "V_low")) for part in parts)
        )
        same("weight", s1, s0)
        same("weight", (u1 * s1) @ v1, (u0 * s0) @ v0)
    weights, _, _ = theirs.data(other("OSF", "table", "embedding", "emb"), 1)
    table = {"target_modules": ["emb"]}
    assert (
        peft.get_peft_model(theirs.build("embedding", weights), peft.OSFConfig(**table)).get_nb_trainable_parameters()[
            0
        ]
        == 0
    )
    with pytest.raises(ValueError, match=r"emb .* is not supported"):
        get_peft_model(ours.build("embedding", weights), OSFConfig(**table))
