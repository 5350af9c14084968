"""Status against HF peft, in the same situations."""

import dataclasses
import warnings

import peft
import pytest

import msft_peft

from . import ours, theirs
from .cases import CASES

FIELDS = [f.name for f in dataclasses.fields(peft.peft_model.TunerModelStatus)]


def nothing(model, config):
    pass


def second(model, config):
    model.add_adapter("other", config(r=2, target_modules=["q_proj", "up"]))


def second_active(model, config):
    second(model, config)
    model.set_adapter("other")


def both_active(model, config):
    second(model, config)
    model.base_model.set_adapter(["default", "other"])


def merged(model, config):
    second(model, config)
    model.merge_adapter()


def one_merged(model, config):
    second(model, config)
    model.merge_adapter(["other"])


def unmerged(model, config):
    merged(model, config)
    model.unmerge_adapter()


def frozen(model, config):
    second(model, config)
    model.set_requires_grad("default", False)
    model.set_requires_grad("other", True)


def deleted(model, config):
    second(model, config)
    model.delete_adapter("default")


def disabled(model, config):
    model.base_model.disable_adapter_layers()


SITUATIONS = [
    nothing,
    second,
    second_active,
    both_active,
    merged,
    one_merged,
    unmerged,
    frozen,
    deleted,
    disabled,
]


CASES_HERE = [(name, each) for name in ("blocks_all_linear", "blocks_modules_to_save") for each in SITUATIONS]
CASES_HERE += [(name, each) for name in ("conv2d", "conv3d", "hf_conv1d") for each in (nothing, disabled)]


@pytest.mark.parametrize(("name", "situation"), CASES_HERE)
def test_status(name, situation):
    weights, _, _ = theirs.data(CASES[name])
    models = ours.create(CASES[name], weights), theirs.create(CASES[name], weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, library in zip(models, (msft_peft, peft), strict=True):
            situation(model, library.LoraConfig)
    # The nets' classes have names of their own, and HF changes requires_grad when it disables.
    free = {"base_model_type"} | ({"requires_grad", "trainable_params"} if situation is disabled else set())
    # HF calls it irregular that an active adapter has nothing in a layer that is trained whole, that such layers do
    # not merge, and that it leaves layers behind which the heir of a deleted adapter does not have.
    whole = "modules_to_save" in name
    free |= {"merged_adapters"} if whole and situation in (merged, unmerged) else set()
    free |= (
        {"active_adapters"} if situation is deleted or (whole and situation in (second_active, both_active)) else set()
    )
    mine, hf = (model.get_model_status() for model in models)
    for field in FIELDS:
        if field not in free:
            assert getattr(mine, field) == getattr(hf, field), field
    layers, expected = (model.get_layer_status() for model in models)
    for layer, wanted in zip(layers, expected, strict=True):
        for field in dataclasses.fields(wanted):
            if field.name not in free:
                assert getattr(layer, field.name) == getattr(wanted, field.name), (wanted.name, field.name)


def test_fields_are_hfs():
    for name in ("TunerLayerStatus", "TunerModelStatus"):
        fields = [f.name for f in dataclasses.fields(getattr(msft_peft, name))]
        assert fields == [f.name for f in dataclasses.fields(getattr(peft.peft_model, name))]


def test_injected():
    weights, _, _ = theirs.data(CASES["blocks_all_linear"])
    mine = msft_peft.inject_adapter_in_model(
        msft_peft.LoraConfig(target_modules=["up"]), ours.build("blocks", weights)
    )
    hf = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), theirs.build("blocks", weights))
    for call in ("get_model_status", "get_layer_status"):
        assert repr(getattr(msft_peft, call)(mine)) == repr(getattr(peft, call)(hf))
