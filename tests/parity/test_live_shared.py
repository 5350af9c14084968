"""Methods whose layers share weights: what HF draws, to the bit, and where HF loses them."""

import numpy as np
import peft
import pytest
import torch

from msft_peft import PeftModel, PveraConfig, RandLoraConfig, TinyLoraConfig, VeraConfig, get_peft_model
from tests.cases import layers_of

from . import ours, theirs
from .cases import other, same


@pytest.mark.parametrize("seed", [0, 2**33 + 5, -3])
def test_vera_s_projections_are_torch_s(seed):
    settings = {"r": 7, "target_modules": ["lin0", "lin1", "out"], "projection_prng_key": seed}
    weights, _, _ = theirs.data(other("Vera", "bits", "mlp", "lin0"), 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.VeraConfig(**settings))
    mine = get_peft_model(ours.build("mlp", weights), VeraConfig(**settings))
    for name in ("vera_A", "vera_B"):
        wanted = getattr(hf.base_model, name)["default"].numpy()
        np.testing.assert_array_equal(getattr(mine.base_model.model.lin0, name)["default"].asnumpy(), wanted)


@pytest.mark.parametrize("seed", [0, 2**33 + 5])
def test_pvera_s_projections_are_torch_s(seed):
    settings = {"r": 7, "target_modules": ["lin0", "lin1", "out"], "projection_prng_key": seed}
    weights, _, _ = theirs.data(other("Pvera", "bits", "mlp", "lin0"), 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.PveraConfig(**settings))
    mine = get_peft_model(ours.build("mlp", weights), PveraConfig(**settings))
    shared = next(layer.adapters["default"].shared for layer in layers_of(mine))
    for name in ("pvera_A", "pvera_B"):
        wanted = getattr(hf.base_model, name)["default"].numpy()
        np.testing.assert_array_equal(getattr(shared, name).asnumpy(), wanted)


def test_two_vera_adapters_have_projections_of_their_own(tmp_path):
    """In HF the second one gets the first one's, and cannot run with them unless the ranks are equal."""
    cases = [other("Vera", f"of_{r}", "mlp", "lin0", "out", r=r) for r in (5, 3)]
    weights, x, _ = theirs.data(cases[0], 1)
    outputs = []
    for case in cases:
        model = theirs.create(case, weights)
        model.save_pretrained(tmp_path / case.name)
        outputs.append(theirs.forward(model, x).detach().numpy())
    hf = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / cases[0].name)
    with pytest.raises(RuntimeError, match="size"):
        hf.load_adapter(tmp_path / cases[1].name, "second")
    mine = ours.load(cases[0], weights, tmp_path / cases[0].name)
    mine.load_adapter(tmp_path / cases[1].name, "second")
    for name, wanted in zip(("default", "second"), outputs):
        mine.set_adapter(name)
        with torch.no_grad():
            same("output", mine(ours.ms.Tensor(x)).asnumpy(), wanted)


def test_vblora_s_highest_logits_alone(tmp_path):
    """With `save_only_topk_weights` either library reads what the other wrote, and writes the same."""
    case = other("VBLoRA", "highest", "mlp", "lin0", "lin1", r=3, num_vectors=7, vector_length=2, topk=3)
    case.config["save_only_topk_weights"] = True
    weights, x, _ = theirs.data(case, 1)
    hf = theirs.create(case, weights, 1)
    hf.save_pretrained(tmp_path / "theirs")
    mine = PeftModel.from_pretrained(ours.build("mlp", weights), tmp_path / "theirs")
    ours.create(case, weights, 1).save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        same("output", mine(ours.ms.Tensor(x)).asnumpy(), theirs.forward(hf, x))
    again = peft.PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / "ours").eval()
    full = ours.create(case, weights, 1)
    with torch.no_grad():
        same("output", full(ours.ms.Tensor(x)).asnumpy(), theirs.forward(again, x))
    again.save_pretrained(tmp_path / "again")
    one, two = (ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "again"))
    assert {key: value[:2] for key, value in one.items()} == {key: value[:2] for key, value in two.items()}
    assert {k: v for k, v in one.items() if "indices" in k} == {k: v for k, v in two.items() if "indices" in k}
    assert full.base_model.get_nb_savable_parameters() == again.base_model.get_nb_savable_parameters()


@pytest.mark.parametrize("settings", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
@pytest.mark.parametrize("net", ["mlp", "blocks"])
def test_randlora_s_bases_are_torch_s(net, settings):
    layers = ["lin0", "lin1", "out"] if net == "mlp" else ["q_proj", "up"]
    settings = {"r": 3, "target_modules": layers, "projection_prng_key": 11} | settings
    weights, _, _ = theirs.data(other("RandLora", f"bits_{net}", net, *layers), 1)
    hf = peft.get_peft_model(theirs.build(net, weights), peft.RandLoraConfig(**settings))
    mine = get_peft_model(ours.build(net, weights), RandLoraConfig(**settings))
    shared = next(layer.adapters["default"].shared for layer in layers_of(mine))
    for name in ("randlora_A", "randlora_B"):
        np.testing.assert_array_equal(getattr(shared, name).asnumpy(), getattr(hf.base_model, name)["default"].numpy())


@pytest.mark.parametrize("tying", [0.0, 0.5])
def test_tinylora_s_frozen_factors_are_hf_s(tying):
    """Of each singular vector either sign is right, and a mixture of some may be fine too: B·P·A counts."""
    settings = {"r": 3, "u": 6, "target_modules": ["lin0", "lin1", "out"], "weight_tying": tying}
    weights, _, _ = theirs.data(other("TinyLora", "bits", "mlp", "lin0"), 1)
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.TinyLoraConfig(**settings))
    mine = get_peft_model(ours.build("mlp", weights), TinyLoraConfig(**settings))
    for name in ("lin0", "lin1", "out"):
        layer, patch = getattr(hf.base_model.model, name), getattr(mine.base_model.model, name).adapters["default"]
        a, b, p = (getattr(layer, f"tinylora_{which}")["default"].numpy() for which in "ABP")
        np.testing.assert_allclose(np.abs(patch.tinylora_A.asnumpy()), np.abs(a), atol=2e-5)
        np.testing.assert_allclose(patch.tinylora_B.asnumpy() @ patch.tinylora_A.asnumpy(), b @ a, atol=2e-5)
        np.testing.assert_allclose(patch.tinylora_P.asnumpy(), p, atol=1.5e-6)
