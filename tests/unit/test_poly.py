"""Poly: rows of several tasks in one batch, in both modes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import ConfigError, MergeError, PeftModel, PolyConfig, get_peft_model
from msft_peft.backend.graphs import compiled_count
from tests import nets
from tests.cases import shake, weights_of
from tests.tolerances import array, assert_same, differ

SETTINGS = {"target_modules": ["q", "mlp"], "r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2}


def routed(**changes: object) -> PeftModel:
    ms.set_seed(3)
    model = get_peft_model(nets.Blocks().set_train(False), PolyConfig(**SETTINGS | changes))
    shake(weights_of(model, "default"))
    return model


def test_each_row_is_what_its_task_makes_of_it(mode: str):
    """With no recompilation when the tasks change, nor anything that is left over from the call before."""
    model = routed()
    x = model.sample()
    each = [array(model(x, task_ids=Tensor([task] * len(x), ms.int32))) for task in range(3)]
    assert differ(each[0], each[1])
    count = compiled_count()
    for tasks in ([2, 0], [1, 1], [0, 2]):
        y = array(model(x, task_ids=Tensor(tasks, ms.int32)))
        for row, task in enumerate(tasks):
            assert_same(y[row], each[task][row])
    assert compiled_count() == count
    assert_same(model(x=x, task_ids=Tensor([0, 2], ms.int32)), y)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(x)
    for wrong in ([3, 0], [-1, 0]):
        with pytest.raises(ValueError, match=f"Only 3 tasks available. Found task id = {wrong[0]}"):
            model(x, task_ids=Tensor(wrong, ms.int32))
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        model(x, task_ids=Tensor([[1, 0]], ms.int32))
    with pytest.raises(ValueError, match="one for each of the 2 rows, got 3"):
        model(x, task_ids=Tensor([1, 0, 2], ms.int32))
    base = array(nets_base(x))
    with model.disable_adapter():
        assert_same(model(x), base)
        assert_same(model(x, task_ids=Tensor([2, 0], ms.int32)), base)


def nets_base(x: Tensor) -> Tensor:
    ms.set_seed(3)
    return nets.Blocks().set_train(False)(x)


class Squares(nn.Cell):
    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x: Tensor, tasks: Tensor) -> Tensor:
        return ops.square(self.model(x, task_ids=tasks)).mean()


def test_a_compiled_step_knows_the_tasks(mode: str):
    """Only logits of tasks that are there get gradients; a task that is not there makes the loss NaN."""
    model = routed()
    step = ms.value_and_grad(Squares(model), None, model.trainable_params())

    def call(x: Tensor, tasks: Tensor) -> tuple:
        return step(x, tasks)

    run = ms.jit(call) if mode == "graph" else call
    x = model.sample()
    for tasks in ([2, 0], [1, 1]):
        _, grads = run(x, Tensor(tasks, ms.int32))
        for p, g in zip(model.trainable_params(), grads):
            if p.name.endswith("module_logits"):
                assert (np.abs(array(g)).max(1) > 0).tolist() == [task in tasks for task in range(3)]
    if mode == "graph":  # in PyNative it is a ValueError, as above
        loss, _ = run(x, Tensor([0, 3], ms.int32))
        assert np.isnan(array(loss))
    drawn = {float(array(run(x, Tensor([2, 0], ms.int32))[0])) for _ in range(2)}
    assert len(drawn) == 1
    model.set_train()

    def trained(x: Tensor, tasks: Tensor) -> tuple:
        return step(x, tasks)

    run = ms.jit(trained) if mode == "graph" else trained
    drawn = {float(array(run(x, Tensor([2, 0], ms.int32))[0])) for _ in range(3)}
    assert len(drawn) == 3


def test_two_adapters_and_rows_of_each():
    """One of three tasks, one of one: a mixed batch routes rows among adapters and tasks."""
    model = routed()
    model.add_adapter("other", PolyConfig(**SETTINGS | {"n_tasks": 1}))
    shake(weights_of(model, "other"), seed=5)
    x, tasks = model.sample(), Tensor([2, 0], ms.int32)
    mine = array(model(x, task_ids=tasks))
    both = array(model(x, task_ids=tasks, adapter_names=["default", "other"]))
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(x, adapter_names=["default", "other"])
    model.set_adapter("other")
    theirs = array(model(x))
    assert_same(model(x, task_ids=Tensor([0, 0], ms.int32)), theirs)
    assert_same(both[0], mine[0])
    assert_same(both[1], theirs[1])


def test_what_it_refuses():
    for name in ("r", "n_tasks", "n_skills", "n_splits"):
        with pytest.raises(ConfigError, match=f"`{name}` should be a positive integer"):
            PolyConfig(**{name: 0})
    with pytest.raises(ConfigError, match="poly_type"):
        PolyConfig(poly_type="mono")
    with pytest.raises(ConfigError, match=r"n_splits=3 should be a factor of the input size 4: at layers.0.attn.q"):
        get_peft_model(nets.Blocks(), PolyConfig(target_modules=["q"], n_splits=3))
    model = routed()
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(MergeError, match="another one for each task"):
        model.base_model.model.layers[0].attn.q.merge(["default"])
