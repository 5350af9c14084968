"""The random places of SHiRA are torch's."""

import numpy as np
import peft
import pytest

from msft_peft import ShiraConfig, get_peft_model

from . import ours, theirs
from .cases import case


@pytest.mark.parametrize("seed", [None, 42])
def test_the_places(seed):
    weights, _, _ = theirs.data(case("shira", "mlp", "lin0"), 1)
    settings = {"target_modules": ["lin0", "lin1"], "r": 2, "random_seed": seed}
    hf = peft.get_peft_model(theirs.build("mlp", weights), peft.ShiraConfig(**settings))
    mine = get_peft_model(ours.build("mlp", weights), ShiraConfig(**settings))
    for name in ("lin0", "lin1"):
        a = getattr(mine.base_model.model, name).shira_indices["default"].asnumpy()
        np.testing.assert_array_equal(a, getattr(hf.base_model.model, name).shira_indices["default"].numpy())
