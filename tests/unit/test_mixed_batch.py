"""`adapter_names`: one batch, several adapters; what goes wrong leaves the next call as it was."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from msft_peft import (
    AdapterNameError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    get_peft_model,
    prepare_model_for_compiled_hotswap,
    rescale_adapter_scale,
)
from msft_peft.backend.arrays import write
from msft_peft.backend.graphs import compiled_count
from tests import nets
from tests.cases import output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

CONFIGS = {
    "one": LoraConfig(r=2, target_modules=["q", "mlp"]),
    "two": LoraConfig(r=3, target_modules=["q"], use_dora=True),
    "three": LoraConfig(r=2, target_modules=["v"], modules_to_save=["head"]),
}


def model_of(**changes) -> PeftModel:
    ms.set_seed(3)
    net = nets.Blocks(1).set_train(False)
    configs = iter((CONFIGS | changes).items())
    name, config = next(configs)
    model = get_peft_model(net, config, adapter_name=name)
    for name, config in configs:
        model.add_adapter(name, config)
    for seed, name in enumerate(model.peft_config):
        shake(weights_of(model, name), seed)
    return model.set_train(False)


def batch(rows: int = 4) -> Tensor:
    return nets.floats(rows, 3, 4)


def alone(model: PeftModel, x: Tensor) -> dict[str, np.ndarray]:
    """The whole batch through each adapter, and through none."""
    found = {}
    for name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
        found[name] = output(model, x)
    with model.disable_adapter():
        found["__base__"] = output(model, x)
    return found


def test_each_row_goes_through_its_own_adapter(mode: str):
    model, x = model_of(), batch()
    wanted = alone(model, x)
    assert all(differ(wanted[name], wanted["__base__"]) for name in CONFIGS)
    for names in (["one", "two", "three", "__base__"], ["two", "two", "one", "three"], ["__base__"] * 4):
        rows = np.stack([wanted[name][i] for i, name in enumerate(names)])
        assert_same(model(x, adapter_names=names), rows)
    model.set_adapter("two")
    assert_same(model(x), wanted["two"])


def test_other_names_need_no_new_graph():
    model, x = model_of(), batch()
    wanted = alone(model, x)
    ms.set_context(mode=ms.GRAPH_MODE)
    model(x)
    model(x, adapter_names=["one", "two", "three", "__base__"])
    before = compiled_count()
    assert_same(model(x, adapter_names=["three", "one", "two", "one"])[1], wanted["one"][1])
    assert_same(model(x), wanted["three"])
    assert compiled_count() == before


LOW_RANK = {
    "one": LoraConfig(r=2, lora_alpha=3, target_modules=["q", "mlp"]),
    "two": LoraConfig(r=3, target_modules=["q", "v"]),
    "three": LoraConfig(r=4, use_rslora=True, target_modules=["q"]),
    "four": LoraConfig(r=2, target_modules=["q"], use_dora=True),
    "five": LoraConfig(r=2, target_modules=["q"], lora_bias=True),
}


def test_low_rank_updates_of_different_ranks_act_at_once(mode: str):
    names = [*LOW_RANK, "__base__", "two", "one"]
    model, x = model_of(**LOW_RANK), batch(len(names))
    wanted = alone(model, x)
    for turned in (names, names[::-1]):
        assert_same(model(x, adapter_names=turned), np.stack([wanted[name][i] for i, name in enumerate(turned)]))
    assert [len(cell.together) for path, cell in model.cells_and_names() if path.endswith(".q")] == [3]


def test_an_adapter_that_is_broken_spoils_its_own_rows_alone(mode: str):
    model, x = model_of(**LOW_RANK), batch()
    wanted = alone(model, x)
    for p in weights_of(model, "two"):
        write(p, np.full(p.shape, np.nan, np.float32))
    found = array(model(x, adapter_names=["one", "two", "three", "__base__"]))
    for row, name in ((0, "one"), (2, "three"), (3, "__base__")):
        assert_same(found[row], wanted[name][row])
    assert differ(found[1], wanted["two"][1])


def test_live_scalings_reach_a_divided_batch(mode: str):
    model, x = model_of(**LOW_RANK), batch()
    names = ["one", "two", "one", "__base__"]
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = array(model(x, adapter_names=names))
    count = compiled_count()
    with rescale_adapter_scale(model, 0.0):
        found = array(model(x, adapter_names=names))
    assert_same(found, np.stack([array(model(x, adapter_names=["__base__"] * 4))[i] for i in range(4)]))
    assert differ(found, before)
    assert compiled_count() == count


def test_pynative_runs_the_named_adapters_alone(monkeypatch):
    model, x = model_of(), batch(2)
    ran = []
    for name in model.peft_config:
        for patch in [layer.adapters[name] for layer in layers_with(model, name)]:
            monkeypatch.setattr(patch, "after", lambda x, y, name=name: ran.append(name) or y)
    model(x, adapter_names=["two", "__base__"])
    assert set(ran) == {"two"}


def layers_with(model: PeftModel, name: str) -> list:
    return [cell for _, cell in model.cells_and_names() if name in getattr(cell, "adapters", {})]


BAD = {
    "too few": ({"adapter_names": ["one"]}, ValueError, "but got 1 and 4 respectively"),
    "unknown": ({"adapter_names": ["one", "x", "one", "y"]}, AdapterNameError, "non-existing adapter.*: x, y"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_names_that_do_not_fit(case: tuple, mode: str):
    arguments, kind, text = case
    model, x = model_of(), batch()
    before, expected = state_of(model), output(model, x)
    with pytest.raises(kind, match=text):
        model(x, **arguments)
    assert state_of(model) == before
    assert_same(model(x), expected)


def test_it_is_for_inference_with_unmerged_adapters():
    model, x = model_of(), batch()
    with pytest.raises(ValueError, match="in training mode"):
        model.set_train()(x, adapter_names=["one"] * 4)
    model.set_train(False).merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        model(x, adapter_names=["one"] * 4)


def test_biases_serve_all_rows():
    model = get_peft_model(nets.Blocks(1), LoraConfig(target_modules=["q"], bias="all")).set_train(False)
    with pytest.raises(ConfigError, match=r"\['default'\] train the base model's biases"):
        model(batch(), adapter_names=["default"] * 4)


def test_an_error_inside_leaves_no_trace(mode: str):
    """HF's hooks would stay, and the next call fail."""
    model, x = model_of(), batch()
    expected = output(model, x)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r".+"):  # one of MindSpore's own
        model(nets.floats(4, 9, 9), adapter_names=["one"] * 4)
    assert_same(model(x), expected)


def test_a_disabled_model_serves_the_base(mode: str):
    model, x = model_of(), batch()
    base = alone(model, x)["__base__"]
    with model.disable_adapter():
        assert_same(model(x, adapter_names=["one", "two", "three", "__base__"]), base)


def test_a_batch_that_is_too_large():
    model = model_of()
    with pytest.raises(ValueError, match="at most 1024 rows"):
        model(batch(1025), adapter_names=["one"] * 1025)


def test_layers_that_lose_the_batch_say_so():
    class Flat(nets.Dense):
        def construct(self, x):
            return self.lin0(x.reshape((-1, x.shape[-1])))

    model = get_peft_model(Flat(), LoraConfig(target_modules=["lin0"])).set_train(False)
    with pytest.raises(ValueError, match="keep the batch as their first axis"):
        model(nets.floats(2, 3, 6), adapter_names=["default"] * 2)


def test_a_layer_trained_whole_that_returns_a_tuple_says_so(mode: str):
    class Pair(nn.Cell):
        def __init__(self):
            super().__init__()
            self.lin = nn.Dense(4, 3)

        def construct(self, x):
            return self.lin(x), x

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.first, self.pair = nn.Dense(4, 4), Pair()

        def construct(self, x):
            return self.pair(self.first(x))[0]

    model = get_peft_model(Net(), LoraConfig(target_modules=["first"], modules_to_save=["pair"])).set_train(False)
    with pytest.raises(TypeError, match="returns something else, such as a tuple"):
        model(nets.floats(2, 4), adapter_names=["default", "__base__"])


def test_the_numbers_of_the_rows_are_no_parameters():
    model = model_of()
    names = {p.name for p in model.get_parameters()}
    model(batch(), adapter_names=["one"] * 4)
    assert {p.name for p in model.get_parameters()} == names
    assert not any("peft_" in name for name in names)
    assert array(model.get_base_model().peft_routing._choice).shape == (1024,)
