"""Lily: which layers share what, slim files, and what is refused."""

import copy

import mindspore as ms
import pytest
import safetensors.numpy

from msft_peft import ConfigError, LilyConfig, LoadError, MergeError, PeftModel, get_peft_model
from tests import nets
from tests.cases import layers_of, output, shake, weights_of
from tests.tolerances import assert_same, differ

FILE = "adapter_model.safetensors"


def lily(targets=("q", "v"), depth=4, **settings) -> PeftModel:
    ms.set_seed(5)
    targets = targets if isinstance(targets, str) else list(targets)
    model = get_peft_model(
        nets.Blocks(depth=depth).set_train(False), LilyConfig(target_modules=targets, r=2, **settings)
    )
    shake(weights_of(model, "default"))
    return model


def sharing(model, weight) -> list[int]:
    """For each layer, in network order, the first one that has the same weight."""
    weights = [layer.adapters["default"]._params[weight] for layer in layers_of(model)]
    return [next(i for i, p in enumerate(weights) if p is own) for own in weights]


@pytest.mark.parametrize(
    ("targets", "stride", "a", "b"),
    [
        (("q", "v"), 1, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1] * 4),
        (("q", "v"), 3, [0, 1, 0, 1, 0, 1, 6, 7], [0, 1] * 4),
        # One regex: all layers of a shape are alike.
        (r".*\.attn\.(q|v)", 2, [0, 0, 2, 2, 4, 4, 6, 6], [0] * 8),
        # The longer name counts.
        (("v", "0.attn.q", "q"), 4, [0, 1, 2, 1, 2, 1, 2, 1], [0, 1, 2, 1, 2, 1, 2, 1]),
    ],
)
def test_which_layers_share(targets, stride, a, b):
    model = lily(targets, stride_A=stride)
    assert sharing(model, "lily_A") == a
    assert sharing(model, "lily_B") == b
    assert sharing(model, "lily_router") == list(range(8))
    assert len(model.trainable_params()) == len(set(a)) + len(set(b)) + 8
    twin = copy.deepcopy(model)
    assert sharing(twin, "lily_A") == a
    assert not {id(p) for p in twin.get_parameters()} & {id(p) for p in model.get_parameters()}


def test_files_hold_each_factor_once(tmp_path):
    model = lily(stride_A=2)
    expected = output(model)
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert len(tensors) == 4 + 2 + 8
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert_same(output(loaded), expected, "exact")
    assert sharing(loaded, "lily_A") == [0, 1, 0, 1, 4, 5, 4, 5]


def test_copies_in_files_must_be_equal(tmp_path):
    """HF's files have them at each layer."""
    model = lily(stride_A=2)
    expected = output(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.ckpt").unlink()
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    first, again = (f"base_model.model.layers.{i}.attn.q.lily_A.weight" for i in (0, 1))
    safetensors.numpy.save_file(tensors | {again: tensors[first]}, tmp_path / FILE)
    base = model.unload()
    assert_same(output(PeftModel.from_pretrained(base, tmp_path)), expected, "exact")
    base = lily().unload()
    safetensors.numpy.save_file(tensors | {again: tensors[first] + 1}, tmp_path / FILE)
    with pytest.raises(LoadError, match=r"is another tensor than .* which is the same weight"):
        PeftModel.from_pretrained(base, tmp_path)


def test_the_mixture_is_that_of_the_whole_batch():
    model = lily(num_B=3, scaling=50.0)
    x = model.sample()
    assert differ(output(model, x)[:1], output(model, x[:1]))


def test_it_cannot_be_merged():
    with pytest.raises(MergeError, match="cannot be merged"):
        lily().merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [{"r": 0}, {"stride_A": 0}, {"num_B": 1}, {"num_B": 2.5}, {"scaling": float("nan")}],
    ids=str,
)
def test_what_it_refuses(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LilyConfig(**settings)
