"""Half-precision bases: what is cast, what trains, and what float16 and bfloat16 can do on CPU."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from msft_peft import (
    LoraConfig,
    PeftModel,
    ShiraConfig,
    cast_mixed_precision_params,
    disable_input_dtype_casting,
    get_peft_model,
)
from msft_peft.backend.arrays import as_float32, write
from msft_peft.errors import ConfigError, MergeError
from msft_peft.models import LossOnly
from tests import nets
from tests.cases import layers_of, weights_of
from tests.models import tiny
from tests.tolerances import array, assert_same, differ

LORA = {"r": 2, "target_modules": ["lin0", "lin1"]}


def adapted(base: nn.Cell, **changes) -> PeftModel:
    autocast = changes.pop("autocast_adapter_dtype", True)
    model = get_peft_model(base, LoraConfig(**{**LORA, **changes}), autocast_adapter_dtype=autocast)
    for p in weights_of(model, "default"):
        noise = 0.3 * np.random.default_rng(p.size).standard_normal(p.shape)
        write(p, Tensor(as_float32(array(p)) + noise.astype(np.float32), p.dtype))
    return model


def half(model: nn.Cell) -> nn.Cell:
    for p in model.get_parameters():
        p.set_dtype(ms.float16)
    return model


def test_what_is_frozen_is_cast_and_what_trains_is_float32(mode):
    model = adapted(nets.Dense())
    before = {p.name: (p, array(p)) for p in model.get_parameters()}
    x = model.sample()
    wide = array(model(x))
    cast_mixed_precision_params(model, ms.float16)
    for p in model.get_parameters():
        same, value = before[p.name]
        assert p is same
        assert p.dtype == (ms.float32 if p.requires_grad else ms.float16)
        assert_same(p, value.astype(np.float32 if p.requires_grad else np.float16), "exact")
    y = model(Tensor(x, ms.float16))
    assert y.dtype == ms.float16
    assert_same(y, wide.astype(np.float16))
    cast_mixed_precision_params(model, ms.float32)
    assert_same(ops.cast(model(x), ms.float16), wide.astype(np.float16))  # the base has lost bits for good


def test_half_precision_adapters_that_train_are_widened(mode):
    model = adapted(nets.Dense(ms.float16), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.get_parameters()} == {ms.float16}
    x = model.sample()
    narrow = array(model(x))
    cast_mixed_precision_params(model, ms.float16)
    assert {p.dtype for p in model.trainable_params()} == {ms.float32}
    assert_same(model(x), narrow)
    # A second adapter, frozen, is cast with the base, as in HF, and still runs.
    model.add_adapter("two", LoraConfig(**LORA))
    cast_mixed_precision_params(model, ms.float16)
    assert {p.dtype for p in weights_of(model, "two")} == {ms.float16}
    model.set_adapter("two")
    assert differ(model(x), narrow)


def test_merging_after_the_cast_gives_the_bits_back():
    model = adapted(nets.Dense())
    cast_mixed_precision_params(model, ms.float16)
    x = Tensor(model.sample(), ms.float16)
    before, weights = array(model(x)), {p.name: array(p) for p in model.get_parameters()}
    model.merge_adapter()
    assert_same(model(x), before, "merge")
    with pytest.raises(MergeError, match="unmerge_adapter"):
        cast_mixed_precision_params(model, ms.float32)
    model.unmerge_adapter()
    for p in model.get_parameters():
        assert_same(p, weights[p.name], "exact")


@pytest.mark.parametrize("dtype", [ms.int8, "float16", None], ids=str)
def test_other_types_are_refused(dtype):
    model = nets.Dense()
    with pytest.raises(ConfigError, match=r"ms\.float16"):
        cast_mixed_precision_params(model, dtype)
    assert {p.dtype for p in model.get_parameters()} == {ms.float32}


def test_whole_numbers_stay():
    model = nets.Dense()
    model.places = Parameter(Tensor([1, 2], ms.int32), name="places", requires_grad=False)
    cast_mixed_precision_params(model, ms.float16)
    assert model.places.dtype == ms.int32


def trained(mode: str) -> tuple[PeftModel, list[float]]:
    """A float16 Llama with float32 adapters, after eight steps."""
    ms.set_seed(0)
    model = get_peft_model(half(tiny.decoder("llama")), LoraConfig(r=4, target_modules="all-linear"))
    loss_only = LossOnly(model, ("input_ids", "labels")).set_train()
    optimizer = nn.Adam(loss_only.trainable_params(), 0.01)
    grad = ms.value_and_grad(loss_only, None, optimizer.parameters)

    def step(ids):
        loss, gradients = grad(ids, ids)
        optimizer(gradients)
        return loss

    run = ms.jit(step) if mode == "graph" else step
    ids = Tensor(tiny.tokens())
    return model, [float(array(run(ids))) for _ in range(8)]


def test_float32_adapters_on_a_float16_base_learn(mode):
    model, losses = trained(mode)
    assert {p.dtype for p in model.trainable_params()} == {ms.float32}
    assert {p.dtype for p in model.get_parameters() if not p.requires_grad} == {ms.float16}
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3
    assert all(np.isfinite(array(p)).all() for p in model.trainable_params())


def test_to_float_on_the_base(mode):
    """`to_float` computes in float16 on float32 weights; adapters come after it or before it."""
    wide = adapted(nets.Dense())
    x = wide.sample()
    expected = array(wide(x))
    before = adapted(nets.Dense().to_float(ms.float16))
    after = adapted(nets.Dense())
    after.to_float(ms.float16)
    for model in (before, after):
        for p, q in zip(model.get_parameters(), wide.get_parameters(), strict=True):
            p.set_data(q.copy())
        y = model(x)
        assert y.dtype == ms.float16
        assert_same(array(y).astype(np.float32), array(expected.astype(np.float16)).astype(np.float32), "half")
        weights = model.trainable_params()

        step = ms.value_and_grad(nets.Loss(model), None, weights)
        target = nets.floats(*y.shape, seed=3)
        _, gradients = (ms.jit(step) if mode == "graph" else step)(x, target)
        for g in gradients:
            assert g.dtype == ms.float32
            assert np.isfinite(array(g)).all()
            assert np.abs(array(g)).max() > 0


def test_bfloat16_is_kept_saved_and_merged(tmp_path: Path):
    """MindSpore has no bfloat16 product on CPU, so nothing is called here; all that needs none works, bit for bit."""

    def base():
        ms.set_seed(0)
        return nets.Dense(ms.bfloat16)

    for autocast in (True, False):
        model = adapted(base(), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.trainable_params()} == {ms.float32 if autocast else ms.bfloat16}
        folder = tmp_path / str(autocast)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=autocast)
        for p, q in zip(model.get_parameters(), again.get_parameters(), strict=True):
            assert (p.name, p.dtype) == (q.name, q.dtype)
            assert array(p).tobytes() == array(q).tobytes()
    model = adapted(base())
    before = {p.name: array(p) for p in model.get_parameters()}
    model.merge_adapter()
    layer = model.get_base_model().lin0
    patch = layer.adapters["default"]
    delta = array(patch.lora_B) @ array(patch.lora_A) * 4
    name = "base_model.model.lin0.base_layer.weight"
    merged, wanted = as_float32(array(layer.weight)), as_float32(before[name]) + delta
    np.testing.assert_allclose(merged, wanted, rtol=2**-8, atol=1e-6)  # one rounding to 8 bits
    model.unmerge_adapter()
    for p in model.get_parameters():
        assert array(p).tobytes() == before[p.name].tobytes()


@pytest.mark.parametrize("caller", ["call", "jit"])
def test_inputs_are_not_cast_where_that_is_disabled(caller, mode):
    model = adapted(nets.Dense(ms.float16))
    x = model.sample()

    def predict(x):
        return model(x)

    run = ms.jit(predict) if caller == "jit" else model
    before = array(run(x))
    with disable_input_dtype_casting(model, active=False):
        assert_same(run(x), before)
    # float16 inputs now meet float32 weights, which MindSpore refuses: the way to see that nothing is cast.
    with disable_input_dtype_casting(model), pytest.raises((TypeError, RuntimeError, ValueError)):
        array(run(x))
    assert_same(run(x), before)
    with pytest.raises(KeyError), disable_input_dtype_casting(model):
        raise KeyError
    assert_same(run(x), before)


def test_where_nothing_is_cast_there_is_nothing_to_disable():
    with pytest.raises(ConfigError, match="no adapted layers"), disable_input_dtype_casting(nets.Dense()):
        pass


def test_a_method_that_reweighs_in_a_mixed_batch(mode: str):
    """There, and beside other methods, SHiRA adds its update to the output: with inputs in half precision, too."""
    config = ShiraConfig(r=1, target_modules=["lin0", "lin1"])
    model = get_peft_model(half(nets.Dense()), LoraConfig(**LORA), adapter_name="lora", mixed=True)
    model.add_adapter("shira", config)
    model.set_adapter(["lora", "shira"])
    x = Tensor(array(model.sample()), ms.float16)
    assert model(x).dtype == ms.float16
    model = get_peft_model(half(nets.Dense()), config).set_train(False)
    for layer in layers_of(model):
        write(layer.shira_weight["default"], np.ones(layer.shira_weight["default"].shape, np.float32))
    assert_same(model(x, adapter_names=["default"] * len(array(x))), model(x), "merge")
