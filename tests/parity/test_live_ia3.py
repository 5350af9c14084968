"""`add_weighted_adapter` of (IA)³ against HF peft, and where HF is wrong."""

import numpy as np
import peft
import pytest
import torch

from msft_peft import AdapterNameError, ConfigError, IA3Config, PeftModel, get_peft_model

from . import ours, theirs
from .cases import METHOD_CASES, other, same

CASE = METHOD_CASES["ia3_linear"]


def test_a_weighted_sum_of_two(tmp_path):
    weights, x, _ = theirs.data(CASE, 5)
    for seed, name in enumerate(("one", "two")):
        theirs.create(CASE, weights, seed, name).save_pretrained(tmp_path)
    hf = peft.PeftModel.from_pretrained(theirs.build(CASE.net, weights), tmp_path / "one", adapter_name="one").eval()
    mine = PeftModel.from_pretrained(ours.build(CASE.net, weights), tmp_path / "one", adapter_name="one")
    for model in (hf, mine):
        model.load_adapter(tmp_path / "two", "two")
        model.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum")
    assert not any(p.requires_grad for p in mine.get_parameters() if "sum" in p.name)
    for model in (hf, mine):
        model.set_adapter("sum")
    with torch.no_grad():
        same("output", mine(ours.ms.Tensor(x)).asnumpy(), theirs.forward(hf, x).numpy())
    for name in ("target_modules", "feedforward_modules"):
        assert sorted(getattr(mine.peft_config["sum"], name)) == sorted(getattr(hf.peft_config["sum"], name))


def pair(one, two):
    weights, _, _ = theirs.data(CASE, 6)
    model = get_peft_model(ours.build("mlp", weights), IA3Config(**one), adapter_name="one")
    model.add_adapter("two", IA3Config(**two))
    return model


def test_a_layer_that_one_of_them_lacks_counts_as_it_acts():
    """HF takes factors of zero for it."""
    one = other("IA3", "", "mlp", "lin0", feedforward_modules=[]).config
    model = pair(one, one | {"target_modules": ["lin0", "lin1"]})
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    factors = model.base_model.model.lin1.ia3_l["sum"].asnumpy()
    np.testing.assert_array_equal(factors, np.ones((8, 1), np.float32))


def test_what_cannot_be_combined_leaves_the_model_alone():
    one = {"target_modules": ["lin0", "lin1"], "feedforward_modules": []}
    model = pair(one, one | {"feedforward_modules": ["lin1"]})
    combine = model.base_model.add_weighted_adapter
    names = [p.name for p in model.get_parameters()]
    for kind, text, arguments in (
        (AdapterNameError, "already exists", (["one"], [1], "two")),
        (AdapterNameError, "Adapter nope does not exist", (["nope"], [1], "sum")),
        (ConfigError, "a weight for each", (["one"], [1, 2], "sum")),
        (ConfigError, "scale inputs and outputs of one layer", (["one", "two"], [1, 2], "sum")),
    ):
        with pytest.raises(kind, match=text):
            combine(*arguments)
    assert [p.name for p in model.get_parameters()] == names
    assert sorted(model.peft_config) == ["one", "two"]
