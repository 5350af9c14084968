"""LoRA+ and LoRA-FA: which parameter gets what, and what a step does. HF's numbers: tests/parity."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.experimental import optim

from msft_peft import ConfigError, LoraConfig, PeftModel, get_peft_model
from msft_peft.optimizers import Pair, Projection, create_lorafa_optimizer, create_loraplus_optimizer
from tests import nets
from tests.cases import shake, weights_of
from tests.tolerances import array, assert_same, differ

LR = 0.01


def adapted(net: nn.Cell | None = None, *targets: str, **settings: Any) -> PeftModel:
    targets = targets or ("lin0", "lin1")
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(targets)} | settings)
    model = get_peft_model(net or nets.Dense(), config)
    shake(weights_of(model, "default"))
    return model


plus = partial(create_loraplus_optimizer, lr=LR, loraplus_lr_ratio=4)


class Everything(nn.Cell):
    """One layer for each of LoRA+'s groups."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(10, 6), nn.Dense(6, 4)
        self.norm, self.head = nn.LayerNorm((4,)), nn.Dense(4, 3)

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lin(self.emb(x))))

    def sample(self) -> Tensor:
        return nets.ids(2, 5)


def everything() -> PeftModel:
    return adapted(Everything(), "emb", "lin", bias="all", modules_to_save=["norm", "head"])


# Rate and decay of every parameter that trains there, with a decay of 0.1 asked for.
GROUPS = {
    "emb.lora_embedding_A.default": (5e-6, 0.1),
    "emb.lora_embedding_B.default": (5e-6, 0.1),
    "lin.lora_A.default.weight": (LR, 0.1),
    "lin.lora_B.default.weight": (4 * LR, 0.1),
    "lin.base_layer.bias": (4 * LR, 0.0),
    "norm.modules_to_save.default.gamma": (4 * LR, 0.0),
    "norm.modules_to_save.default.beta": (4 * LR, 0.0),
    "head.modules_to_save.default.weight": (LR, 0.1),
    "head.modules_to_save.default.bias": (4 * LR, 0.0),
}


@pytest.mark.parametrize("decay", [{"weight_decay": 0.1}, {"loraplus_weight_decay": 0.1, "weight_decay": 0.7}])
def test_the_groups_of_experimental_optimizers(decay: dict[str, float]):
    model = everything()
    optimizer = plus(model, optim.AdamW, loraplus_lr_embedding=5e-6, **decay)
    found = {
        p.name.removeprefix("base_model.model."): (round(float(group["lr"]), 7), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == GROUPS
    assert {id(p) for p in optimizer.parameters} == {id(p) for p in model.trainable_params()}


def test_the_groups_of_nn_optimizers():
    """Plain descent, p ← p - rate·(g + decay·p), shows each parameter's rate and decay."""
    model = everything()
    optimizer = plus(model, nn.SGD, loraplus_lr_embedding=5e-6, weight_decay=0.1)
    params = model.trainable_params()
    assert [p.name for p in optimizer.parameters] == [p.name for p in params]  # the order of value_and_grad's
    before = [array(p) for p in params]
    gradients = [nets.floats(*p.shape, seed=i) for i, p in enumerate(params)]
    optimizer(tuple(gradients))
    for p, start, gradient in zip(params, before, gradients, strict=True):
        rate, decay = GROUPS[p.name.removeprefix("base_model.model.")]
        assert_same(p, start - np.float32(rate) * (array(gradient) + np.float32(decay) * start))


def test_rates_and_decay_by_default():
    optimizer = plus(everything(), optim.AdamW)
    assert {(round(float(g["lr"]), 7), g["weight_decay"]) for g in optimizer.param_groups} == {
        (1e-6, 0.0),
        (LR, 0.0),
        (4 * LR, 0.0),
    }


def fa(model: PeftModel) -> Any:
    return create_lorafa_optimizer(model, 2, 3, LR, weight_decay=0.1)


MAKERS: dict[str, Callable[[PeftModel], Any]] = {
    "LoRA-FA": fa,
    "LoRA+ nn": partial(plus, optimizer_cls=nn.Adam, weight_decay=0.1),
    "LoRA+ experimental": partial(plus, optimizer_cls=optim.AdamW, weight_decay=0.1),
}


def by_hand(loss: nn.Cell, optimizer: Any, compiled: bool = False) -> Callable:
    grad = ms.value_and_grad(loss, None, optimizer.parameters)

    def step(x, target):
        value, gradients = grad(x, target)
        optimizer(gradients)
        return value

    return ms.jit(step) if compiled else step


def train_one_step_cell(loss: nn.Cell, optimizer: Any) -> Callable:
    return nn.TrainOneStepCell(loss, optimizer).set_train()


def trained(make: Callable, how: Callable) -> dict[str, np.ndarray]:
    """All weights after three steps."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(5)
    model = adapted()
    optimizer = make(model)
    ms.set_context(mode=mode)
    step = how(nets.Loss(model), optimizer)
    x, target = model.sample(), nets.floats(3, 5, seed=3)
    losses = [float(array(step(x, target))) for _ in range(3)]
    assert losses[0] > losses[2]
    return {p.name: array(p) for p in model.get_parameters()}


@pytest.mark.parametrize("name", MAKERS)
def test_every_way_to_train(name: str, mode: str):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    expected = trained(MAKERS[name], by_hand)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    for how in (by_hand, partial(by_hand, compiled=True), train_one_step_cell):
        for key, value in trained(MAKERS[name], how).items():
            assert_same(value, expected[key])


def test_lorafa_freezes_a():
    model = adapted()
    before = {p.name: array(p) for p in model.get_parameters()}
    optimizer = fa(model)
    names = [p.name for p in optimizer.parameters]
    assert names == [f"base_model.model.{lin}.lora_B.default.weight" for lin in ("lin0", "lin1")]
    assert [p.name for p in model.trainable_params()] == names
    states = {p.name for p in optimizer.get_parameters()}
    assert not any("lora_A" in name or "base_layer" in name for name in states)
    step = by_hand(nets.Loss(model), optimizer)
    step(model.sample(), nets.floats(3, 5, seed=3))
    for p in model.get_parameters():
        assert differ(p, before[p.name]) == (p.name in names)


def reference(b: np.ndarray, gradients: list[np.ndarray], a: np.ndarray, scaling: float, groups: int) -> np.ndarray:
    """The published formula in float64, for convolutions group by group."""
    p, m, v = b.astype(np.float64), 0.0, 0.0
    rows = a.reshape(groups, a.shape[0] // groups, -1).astype(np.float64)
    inverses = np.linalg.inv(rows @ rows.transpose(0, 2, 1))
    for t, gradient in enumerate(gradients, 1):
        flat = gradient.reshape(groups, b.shape[0] // groups, -1).astype(np.float64)
        g = (flat @ inverses / scaling**2).reshape(b.shape)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - LR * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
        p = p - LR * 0.1 * p
    return p.astype(np.float32)


LAYERS = {
    "dense": (nets.Dense, ("lin0", "lin1"), 1),
    "conv": (partial(nets.Conv, 2), ("conv",), 1),
    "grouped": (partial(nets.Conv, 1, channels=(4, 4), group=2), ("conv",), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_lorafa_projects_the_gradient(name: str):
    net, targets, groups = LAYERS[name]
    model = adapted(net(), *targets, r=4, lora_alpha=3)
    optimizer = fa_of_rank_4(model)
    layers = [cell for _, cell in model.cells_and_names() if hasattr(cell, "adapters")]
    starts = [array(layer.lora_B["default"].weight) for layer in layers]
    gradients = [[nets.floats(*start.shape, seed=10 * i + t) for i, start in enumerate(starts)] for t in range(3)]
    for step in gradients:
        optimizer(tuple(step))
    for i, layer in enumerate(layers):
        history = [array(step[i]) for step in gradients]
        expected = reference(starts[i], history, array(layer.lora_A["default"].weight), 3 / 4, groups)
        assert_same(layer.lora_B["default"].weight, expected)


def fa_of_rank_4(model: PeftModel) -> Any:
    return create_lorafa_optimizer(model, 4, 3, LR, weight_decay=0.1)


def test_a_projected_step_is_that_of_the_whole_weight_within_as_rows():
    a, whole, scaling = nets.floats(2, 6, seed=1), array(nets.floats(4, 6, seed=2)), 1.5
    gradient = scaling * whole @ array(a).T
    step = array(Projection(Pair(Parameter(a), scaling, 1))(Tensor(gradient)))
    rows = array(a)
    onto = rows.T @ np.linalg.inv(rows @ rows.T) @ rows
    assert_same(scaling * step @ rows, (whole @ onto).astype(np.float32))


def test_lorafa_takes_a_new_a_and_a_new_rate():
    """Compiled code reads both anew at each step."""

    def last_step(change: str) -> np.ndarray:
        ms.set_seed(5)
        model = adapted()
        optimizer = fa(model)

        @ms.jit
        def step(gradients):
            return optimizer(gradients)

        gradients = tuple(nets.floats(*p.shape) for p in optimizer.parameters)
        step(gradients)
        if change == "rate":
            ops.assign(optimizer.learning_rate, Tensor(0.0, ms.float32))
        if change == "A":
            shake([p for p in model.get_parameters() if "lora_A" in p.name], seed=9)
        before = array(optimizer.parameters[0])
        step(gradients)
        return array(optimizer.parameters[0]) - before

    plain = last_step("nothing")
    assert np.abs(plain).max() > LR / 10
    assert not last_step("rate").any()
    assert differ(last_step("A"), plain)


BAD: dict[str, tuple[Callable[[PeftModel], Any], type[Exception], str]] = {
    "no class": (lambda m: plus(m, "AdamW"), TypeError, "optimizer class of mindspore.nn"),
    "another class": (lambda m: plus(m, nn.Dense), TypeError, "optimizer class of mindspore.nn"),
    "no rate": (lambda m: plus(m, nn.Adam, lr=0), ConfigError, "`lr` must be a positive number"),
    "a schedule": (lambda m: plus(m, nn.Adam, lr=[0.1, 0.2]), ConfigError, "`lr` must be a positive number"),
    "no ratio": (lambda m: plus(m, nn.Adam, loraplus_lr_ratio=-1), ConfigError, "`loraplus_lr_ratio`"),
    "embedding": (lambda m: plus(m, nn.Adam, loraplus_lr_embedding=np.inf), ConfigError, "`loraplus_lr_embedding`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str):
    call, error, says = BAD[name]
    with pytest.raises(error, match=says):
        call(adapted())


def test_nothing_to_train():
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ConfigError, match="Nothing in this model is trainable"):
        plus(model, nn.Adam)
    with pytest.raises(ConfigError, match="No LoRA adapter of this model is trainable"):
        fa(model)
    with pytest.raises(ConfigError, match="No LoRA adapter of this model is trainable"):
        fa(nets.Dense())


def test_an_a_of_zeros_is_refused():
    model = get_peft_model(nets.Embedding(), LoraConfig(r=2, lora_alpha=3, target_modules=["lin", "emb"]))
    trainable = [p.name for p in model.trainable_params()]
    with pytest.raises(ConfigError, match="at emb is zero"):
        fa(model)
    assert [p.name for p in model.trainable_params()] == trainable


def test_stacks_of_matrices_are_refused():
    model = get_peft_model(nets.Dense(), LoraConfig(r=2, target_modules=["lin1"], target_parameters=["lin0.weight"]))
    with pytest.raises(ConfigError, match=r"target_parameters \(lin0.weight\)"):
        fa(model)


def test_lorafa_says_whose_scaling_counts():
    with pytest.warns(UserWarning, match="each layer's own scaling is used"):
        create_lorafa_optimizer(adapted(), 4, 3, LR)
    with pytest.warns(UserWarning, match="use_rslora"):
        create_lorafa_optimizer(adapted(), 2, 3, LR, use_rslora=True)
