"""Gradient checkpointing: the same gradients whenever it is switched on, and activations that are not kept."""

import importlib
import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from msft_peft import (
    LoraConfig,
    get_peft_model,
    models,
    prepare_model_for_gradient_checkpointing,
    prepare_model_for_kbit_training,
)
from msft_peft.backend.graphs import compiled_count
from msft_peft.backend.recompute import is_recomputed, set_recompute
from msft_peft.errors import ConfigError, PeftWarning
from tests import nets
from tests.cases import shake, weights_of
from tests.models import tiny
from tests.tolerances import array, assert_same

seeds = importlib.import_module("mindspore.common.seed")

VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "replicated": {"layer_replication": [[0, 2], [1, 3]]},
}


class Counting(nets.Block):
    """A block that counts how often it is computed, in PyNative."""

    runs = 0

    def construct(self, x):
        Counting.runs += 1
        return super().construct(x)


def base(block: type = nets.Block) -> nets.Blocks:
    ms.set_seed(1)
    model = nets.Blocks(depth=3)
    if block is not nets.Block:
        model.layers = nn.CellList([block() for _ in range(3)])
    shake(model.get_parameters(), 3)
    return model.set_train()


def adapted(model: nn.Cell, **settings):
    ms.set_seed(2)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v", "mlp"], **settings)).set_train()
    shake(weights_of(model, "default"), 5)
    return model


def gradients(model, mode: str, x: Tensor | None = None) -> list[np.ndarray]:
    """Loss and gradients of all that is trainable, of one step with the same dropout each time."""
    weights = model.trainable_params()
    x = model.sample() if x is None else x

    def loss(x):
        return ops.reduce_sum(ops.square(model(x)))

    step = ms.value_and_grad(loss, None, weights)
    ms.set_seed(4)
    value, grads = (ms.jit(step) if mode == "graph" else step)(x)
    assert all(np.abs(array(g)).max() > 0 for g in grads)
    return [array(value), *map(array, grads)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ["before", "after", "MindSpore's own, before"])
def test_gradients_are_the_same_in_pynative(variant, order):
    gradients_are_the_same(variant, order, "pynative")


@pytest.mark.graph
@pytest.mark.parametrize(("variant", "order"), [("lora", "before"), ("dora", "after")])
def test_gradients_are_the_same_compiled(variant, order):
    gradients_are_the_same(variant, order, "graph")


def gradients_are_the_same(variant, order, mode):
    settings = VARIANTS[variant]
    expected = gradients(adapted(base(), **settings), mode)
    model = base()
    if order == "before":
        assert prepare_model_for_gradient_checkpointing(model) is model
    elif order != "after":
        for block in model.layers:
            block.recompute()  # notes the parameters that are trainable now: without our care LoRA's get zeros
    model = adapted(model, **settings)
    if order == "after":
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for actual, wanted in zip(gradients(model, mode), expected, strict=True):
        assert_same(actual, wanted, "gradient")


class Dropping(nn.Cell):
    """y = z²·σ(z) for z = dropout(x·w): where y is zero its gradient must be, and nowhere else."""

    def __init__(self, kind):
        super().__init__()
        self.w = Parameter(Tensor(np.ones(64, np.float32)), name="w")
        self.kind, self.drop = kind, nn.Dropout(p=0.5)

    def construct(self, x):
        z = x * self.w * 1.0
        z = self.drop(z) if self.kind == "nn" else ops.dropout(z, 0.5)
        return ops.sigmoid(z) * z * z


class Pair(nn.Cell):
    def __init__(self, kind):
        super().__init__()
        self.layers = nn.CellList([Dropping(kind), Dropping(kind)])

    def construct(self, x):
        return self.layers[0](x), self.layers[1](x)


@pytest.mark.parametrize("kind", ["nn", "ops"])
@pytest.mark.parametrize("seed", [3, None], ids=["seed", "no seed"])
def test_what_was_dropped_is_dropped_again(kind, seed, mode, monkeypatch):
    monkeypatch.setattr(seeds, "_GLOBAL_SEED", seed)
    if seed is None and (mode, kind) == ("graph", "ops"):
        with pytest.warns(PeftWarning, match="No seed is set"):
            prepare_model_for_gradient_checkpointing(Pair(kind))
        return
    with warnings.catch_warnings(record=True):
        model = prepare_model_for_gradient_checkpointing(Pair(kind)).set_train()
    weights = model.trainable_params()
    x = Tensor(np.ones(64, np.float32))

    def loss(x):
        first, second = model(x)
        return ops.reduce_sum(first + second), first, second

    step = ms.value_and_grad(loss, None, weights, has_aux=True)
    step = ms.jit(step) if mode == "graph" else step
    masks = set()
    for _ in range(3):
        (_, *outputs), grads = step(x)
        for y, g in zip(outputs, grads, strict=True):
            assert ((array(y) == 0) == (array(g) == 0)).all()
            assert 10 < (array(y) == 0).sum() < 54
            masks.add(array(y).tobytes())
        model(x)  # a forward pass without a backward one in between
    assert len(masks) == 6


def test_dropout_inside_attention_is_the_same_again():
    def llama(checkpointing):
        ms.set_seed(0)
        model = tiny.decoder("llama", attention_dropout=0.5)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        shake(weights_of(model, "default"))
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = tiny.tokens()
        ms.set_seed(7)
        return tiny.loss_logits_gradients(model.set_train(), {"input_ids": ids, "labels": ids})

    (loss, logits, grads), (loss2, logits2, grads2) = llama(False), llama(True)
    assert_same(loss2, loss)
    assert_same(logits2, logits)
    for name, wanted in grads.items():
        assert_same(grads2[name], wanted, "gradient")


def test_blocks_are_computed_twice_where_it_is_on_and_once_where_it_is_off():
    model = adapted(base(Counting))
    for on, runs in ((False, 3), (True, 6), (True, 6), (False, 3)):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing == on
        Counting.runs = 0
        gradients(model, "pynative")
        assert Counting.runs == runs
    model.gradient_checkpointing_enable({"use_reentrant": False})
    Counting.runs = 0
    model(model.sample())
    assert Counting.runs == 3  # nothing is computed twice without a gradient


def test_later_changes_are_followed(mode):
    plain, model = adapted(base()), adapted(base())
    model.gradient_checkpointing_enable()
    for one in (plain, model):
        ms.set_seed(3)
        one.add_adapter("two", LoraConfig(r=3, target_modules=["v"]))
        shake(weights_of(one, "two"), 6)
        one.set_adapter("two")
    for actual, wanted in zip(gradients(model, mode), gradients(plain, mode), strict=True):
        assert_same(actual, wanted, "gradient")
    for one in (plain, model):
        one.merge_adapter()
        one.unmerge_adapter()
        one.set_adapter("default")
    for actual, wanted in zip(gradients(model, mode), gradients(plain, mode), strict=True):
        assert_same(actual, wanted, "gradient")


@pytest.mark.graph
def test_compiled_code_is_dropped_at_each_switch():
    model = adapted(base())
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        gradients(model, "graph")
        assert compiled_count()
        switch()
        assert not compiled_count()


def test_names_and_children_stay(mode):
    plain, model = adapted(base()), adapted(base())
    model.gradient_checkpointing_enable()
    gradients(model, mode)
    assert [p.name for p in model.get_parameters()] == [p.name for p in plain.get_parameters()]
    assert [path for path, _ in model.cells_and_names()] == [path for path, _ in plain.cells_and_names()]
    model.gradient_checkpointing_disable()
    assert {cell._scope for _, cell in model.cells_and_names()} == {c._scope for _, c in plain.cells_and_names()}


class Nested(nn.Cell):
    """A block that takes and gives more than one tensor."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Dense(4, 4)

    def construct(self, x, past=None, extra=None, scale=2.0):
        y = self.lin(x) * scale
        if past is not None:
            y = y + past[0] * past[1]
        if extra is not None:
            y = y * extra["mask"]
        return y, y + 1.0


def test_tensors_in_tuples_dicts_and_keywords_get_their_gradients():
    ms.set_seed(0)
    block = Nested()
    x, a, b, mask = (nets.floats(2, 4, seed=seed) for seed in range(4))

    def loss(x, a, b, mask):
        first, second = block(x, (a, b), extra={"mask": mask}, scale=3.0)
        return ops.reduce_sum(first * second)

    step = ms.value_and_grad(loss, (0, 1, 2, 3), block.trainable_params())
    expected = step(x, a, b, mask)
    set_recompute(block, True)
    actual = step(x, a, b, mask)
    for one, other in zip(actual[1][0] + actual[1][1], expected[1][0] + expected[1][1], strict=True):
        assert np.abs(array(other)).max() > 0
        assert_same(one, other, "gradient")


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "roberta"])
def test_the_blocks_of_every_model_are_found(name):
    settings = tiny.ENCODERS[name] if name in tiny.ENCODERS else tiny.DECODERS[name][1]
    config = models.AutoConfig.for_model(name, **settings)
    for model in (models.AutoModel.from_config(config), models.AutoModelForQuestionAnswering.from_config(config)):
        prepare_model_for_gradient_checkpointing(model)
        assert sum(is_recomputed(cell) for _, cell in model.cells_and_names()) == config.num_hidden_layers


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_both_stacks_of_an_encoder_decoder_are_found_and_learn_the_same(name):
    ms.set_seed(0)
    base = tiny.seq2seq(name, dropout_rate=0.0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"])).set_train()
    shake(model.trainable_params())
    ids = Tensor(np.arange(8).reshape(2, 4) + 3, ms.int32)

    def loss(ids):
        return model(input_ids=ids, labels=ids)["loss"]

    step = ms.value_and_grad(loss, None, model.trainable_params())
    expected = step(ids)
    model.gradient_checkpointing_enable()
    blocks = base.config.num_layers + base.config.num_decoder_layers
    assert sum(is_recomputed(cell) for _, cell in model.cells_and_names()) == blocks
    actual = step(ids)
    assert_same(actual[0], expected[0], "gradient")
    for one, other in zip(actual[1], expected[1], strict=True):
        assert np.abs(array(other)).max() > 0
        assert_same(one, other, "gradient")
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_lists_of_blocks_can_be_named():
    model = tiny.seq2seq()
    prepare_model_for_gradient_checkpointing(model, blocks=["decoder.block"])
    assert not is_recomputed(model.encoder.block[0])
    assert is_recomputed(model.decoder.block[0])
    with pytest.raises(ConfigError, match=r"no CellList at 'encoder.blocks'"):
        prepare_model_for_gradient_checkpointing(model, blocks=["encoder.blocks", "decoder.block"])


def test_what_cannot_be_done_is_refused():
    model = nets.Containers()
    with pytest.raises(ConfigError, match=r"no CellList at none of.*blocks=.*\['stack'\]"):
        prepare_model_for_gradient_checkpointing(model)
    with pytest.raises(ConfigError, match=r"no CellList at 'named'"):
        prepare_model_for_gradient_checkpointing(model, blocks="named")
    with pytest.raises(ConfigError, match="no CellList at all"):
        prepare_model_for_gradient_checkpointing(nets.Dense())
    model.stack.append(nn.Dropout2d(p=0.5))
    with pytest.raises(ConfigError, match="Dropout2d"):
        prepare_model_for_gradient_checkpointing(model, blocks="stack")
    model = nets.Containers()
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="determinism"):
        lora.gradient_checkpointing_enable({"determinism_check": "none"}, blocks="stack")
    assert not lora.is_gradient_checkpointing
    lora.gradient_checkpointing_enable(blocks="stack")
    assert lora.is_gradient_checkpointing


def test_kbit_training_freezes_widens_and_checkpoints():
    model = nets.Blocks()
    model.head.weight.set_dtype(ms.float16)
    model.layers[0].mlp.weight.set_dtype(ms.bfloat16)
    before = array(model.head.weight).astype(np.float32)
    assert prepare_model_for_kbit_training(model) is model
    assert {p.dtype for p in model.get_parameters()} == {ms.float32}
    assert_same(model.head.weight, before, "exact")
    assert not model.trainable_params()
    lora = adapted(model)
    assert lora.is_gradient_checkpointing
    gradients(lora, "pynative")
    assert not adapted(prepare_model_for_kbit_training(nets.Blocks(), False)).is_gradient_checkpointing


def test_kbit_training_refuses_before_it_changes_anything():
    lora = adapted(base())
    trainable = {p.name for p in lora.trainable_params()}
    with pytest.raises(ConfigError, match="before get_peft_model"):
        prepare_model_for_kbit_training(lora)
    assert {p.name for p in lora.trainable_params()} == trainable
    model = nets.Dense(ms.float16)
    for wrong in ({}, {"use_gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        with pytest.raises(ConfigError):
            prepare_model_for_kbit_training(model, **wrong)
    assert {p.dtype for p in model.get_parameters()} == {ms.float16}
    assert len(model.trainable_params()) == 3
