"""Methods whose layers share weights: what HF draws, to the bit, and where HF loses them."""

import numpy as np
import peft
import pytest
import torch

from msft_peft import VeraConfig, get_peft_model

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
