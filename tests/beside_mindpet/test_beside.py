"""Ours beside MindPet's own package: signatures, numbers, gradients, checkpoints, freezing, errors."""

import inspect
import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.train import CheckpointConfig

from msft_peft import delta, graph
from tests.beside_mindpet.real import load, revived
from tests.delta.formulas import FORMULAS, Formula
from tests.delta.refusals import REFUSALS
from tests.graph.nets import Mixed, trained
from tests.graph.test_checkpoint import train
from tests.tolerances import array, assert_same, differ

theirs, their_graph = load("mindpet.delta"), load("mindpet.graph")


class Net(nn.Cell):
    """Delta Cells have the names of checkpoints only inside a network."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.inner = cell

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


@pytest.fixture(params=FORMULAS.values(), ids=FORMULAS)
def formula(request: pytest.FixtureRequest) -> Formula:
    return request.param


def exchanged(source: nn.Cell, target: nn.Cell, path: Path) -> None:
    """Save one network and load the file into the other: every parameter must find its place."""
    ms.save_checkpoint(source, str(path))
    assert ms.load_param_into_net(target, ms.load_checkpoint(str(path)), strict_load=True) == ([], [])


def gradients(net: nn.Cell, x: Tensor, goal: Tensor) -> tuple[Tensor, ...]:
    def loss(x: Tensor) -> Tensor:
        return ops.reduce_sum(net(x) * goal)

    return ms.grad(loss, None, list(net.get_parameters()))(x)


@pytest.mark.parametrize("name", [*delta.__all__, *graph.__all__])
def test_signatures(name: str):
    package, other = (delta, theirs) if name in delta.__all__ else (graph, their_graph)
    calls = [(getattr(package, name), getattr(other, name))]
    calls += [(a.construct, b.construct) for a, b in calls if name.startswith("RDrop")]
    if name not in ("RDropLoss", "PrefixLayer") and hasattr(calls[0][1], "shard"):
        calls.append((calls[0][0].shard, calls[0][1].shard))
    for ours, real in calls:
        mine, wanted = inspect.signature(ours).parameters, inspect.signature(real).parameters
        assert list(mine)[: len(wanted) - ("kwargs" in wanted)] == [key for key in wanted if key != "kwargs"]
        for key in wanted.keys() - {"kwargs", "lora_a_init"}:
            assert mine[key].default == wanted[key].default


@pytest.mark.parametrize(
    ("mode", "dtype"), [("pynative", ms.float32), ("pynative", ms.float16), ("graph", ms.float32)], indirect=["mode"]
)
def test_equal_outputs_and_gradients_with_exchanged_checkpoints(formula: Formula, mode: str, dtype, tmp_path: Path):
    real, ours = Net(revived(formula.make(theirs, compute_dtype=dtype))), Net(formula.make(delta, compute_dtype=dtype))
    for p in ours.get_parameters():
        p.set_data(Tensor(np.zeros(p.shape), p.dtype))
    exchanged(real, ours, tmp_path / "theirs.ckpt")
    x, what = formula.x(), "merge" if dtype == ms.float32 else "half"
    goal = Tensor(np.random.default_rng(5).standard_normal(ours(x).shape), ms.float32)
    results = [(net(x), *gradients(net, x, goal)) for net in (ours, real)]
    for mine, wanted in zip(*results):
        assert_same(mine, wanted, what)
    for p in ours.get_parameters():
        p.set_data(p * 0.5)
    exchanged(ours, real, tmp_path / "ours.ckpt")
    assert_same(real(x), ours(x), what)
    assert differ(ours(x), results[0][0])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_prefix_encoder(projection: bool, nested: bool, tmp_path: Path):
    arguments = (3, 2, 2, 4, projection, 5, 0.0)
    real, ours = theirs.PrefixEncoder(*arguments), delta.PrefixEncoder(*arguments)
    if nested:  # the MLP has another name then
        real, ours = Net(real), Net(ours)
    exchanged(real, ours, tmp_path / "theirs.ckpt")
    for dtype in (ms.float16, ms.float32):
        results = [net(2, dtype) for net in (ours, real)]
        for mine, wanted in zip(*results):
            assert_same(mine, wanted)
    exchanged(ours, real, tmp_path / "ours.ckpt")


def test_the_prefix_layers_key_is_theirs_and_its_value_its_own():
    real, ours = (package.PrefixLayer(4, 2, 2, 6, 5, 7, 0.0) for package in (theirs, delta))
    own = dict(ours.parameters_and_names())
    for path, p in real.parameters_and_names():
        value = array(p)
        if value.shape != tuple(own[path].shape):  # one half for both of key and value
            value = np.concatenate([value, 2 * value])
        own[path].set_data(Tensor(value))
    key, value = ours()
    assert_same(key, real.past_key_reparam)
    assert_same(real.past_value_reparam, real.past_key_reparam, "exact")
    assert_same(value, 2 * array(key))


def test_r_drop():
    z = Tensor(np.random.default_rng(1).standard_normal((6, 4)), ms.float32)
    labels = Tensor([0, 0, 3, 3, 1, 1], ms.int32)
    for alpha in (4, 0.5):
        assert_same(delta.RDropLoss()(z, labels, alpha), theirs.RDropLoss()(z, labels, alpha))


FREEZES = [
    ("freeze_delta", {"mode": "lora"}),
    ("freeze_delta", {"mode": "adapter", "exclude": ["*head*"]}),
    ("freeze_delta", {"mode": "low_rank_adapter", "include": ["*left*"]}),
    ("freeze_delta", {"mode": "prefixtuning"}),
    ("freeze_delta", {"mode": "ptuning2"}),
    ("freeze_delta", {"mode": "bitfit"}),
    ("freeze_delta", {"mode": "lora", "include": ["*lora*"], "exclude": ["*lora*"]}),
    ("freeze_modules", {"include": ["*"], "exclude": ["head*"]}),
    ("freeze_modules", {"include": ["lora*", "head*"], "exclude": ["head*", "low*"]}),
    ("freeze_modules", {"include": ["*.bias"]}),
    ("freeze_modules", {"exclude": ["head*"]}),
]


@pytest.mark.parametrize(("name", "arguments"), FREEZES)
def test_freezing(name: str, arguments: dict):
    nets = Mixed(delta), Mixed(theirs)
    for net, package in zip(nets, (graph, their_graph)):
        getattr(package, name)(net, **arguments)
    assert trained(nets[0]) == trained(nets[1])


def test_their_checkpoints_of_trainable_parameters_are_ours(tmp_path: Path):
    names = []
    for package, other, folder in ((delta, graph, "ours"), (theirs, their_graph, "theirs")):
        net = Mixed(package)
        revived(net)
        other.freeze_delta(net, "lora", exclude=["*head*"])
        callback = other.TrainableParamsCheckPoint(str(tmp_path / folder), config=CheckpointConfig(2, 0, 5))
        train(net, callback)
        names.append({path.name: set(ms.load_checkpoint(str(path))) for path in (tmp_path / folder).glob("*.ckpt")})
    assert names[0].keys() == names[1].keys()
    for name in names[0]:
        assert names[0][name] <= names[1][name]


def test_errors_are_of_their_kinds():
    """What MindPet refuses we refuse too, as an error of the same kind or a narrower one."""
    checked = 0
    for name, arguments, kind in REFUSALS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(theirs, name)(**arguments)
        except Exception as error:
            wanted = type(error)
        else:
            continue
        with pytest.raises(kind) as caught:
            getattr(delta, name)(**arguments)
        if wanted in (TypeError, ValueError, KeyError):
            assert isinstance(caught.value, wanted), (name, arguments, wanted)
            checked += 1
    assert checked > 150
