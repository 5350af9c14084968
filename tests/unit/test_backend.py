"""The quirks of MindSpore that the library knows: each of these was a silent fault somewhere."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from msft_peft import LoraConfig, get_peft_model
from msft_peft.backend import graphs
from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.backend.graphs import compiled_count, drop_compiled
from msft_peft.backend.ops import ConvOp, DenseOp, EmbeddingOp
from msft_peft.backend.tree import get_child, named_parameters, refresh_names, replace_cells
from msft_peft.hosts import describe
from tests import nets
from tests.cases import layers_of, output, shake, weights_of
from tests.tolerances import array, assert_same, differ


@pytest.mark.graph
def test_compiled_code_sees_what_is_written():
    net = nets.Dense()
    x = net.sample()

    @ms.jit
    def predict(x):
        return net(x)

    before = array(predict(x))
    count = compiled_count()
    write(net.lin0.weight, np.ones((8, 6), np.float32))
    after = output(net, x)
    assert differ(after, before)
    assert_same(predict(x), after)
    assert compiled_count() == count


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [np.array, Tensor, Parameter], ids=lambda kind: kind.__name__)
def test_a_write_copies_and_keeps_the_dtype(dtype: ms.Type, kind: type):
    p = Parameter(Tensor(np.zeros((2, 3)), dtype), name="p")
    own = p.asnumpy()
    value = kind(np.arange(6, dtype=np.float32).reshape(2, 3))
    write(p, value)
    assert p.dtype == dtype
    assert np.shares_memory(own, p.asnumpy())
    assert (as_float32(to_numpy(p)) == np.arange(6).reshape(2, 3)).all()
    write(p, np.zeros((2, 3), np.float32))
    assert (array(value) == np.arange(6).reshape(2, 3)).all()


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), ()])
def test_a_write_of_another_shape_is_refused(shape: tuple[int, ...]):
    p = Parameter(Tensor(np.ones((2, 3), np.float32)), name="some.weight")
    with pytest.raises(ValueError, match=r"into some.weight: it is \(2, 3\)"):
        write(p, np.zeros(shape, np.float32))
    assert p.shape == (2, 3)
    assert (array(p) == 1).all()


def test_bfloat16_widens_bit_by_bit():
    exact = np.array([1.5, -2.0, 0.0, 3.25e30, -1.1754944e-38], np.float32)
    wide = as_float32(to_numpy(Tensor(exact, ms.bfloat16)))
    assert wide.dtype == np.float32
    assert (np.abs(wide - exact) <= np.abs(exact) / 256).all()
    assert (as_float32(exact.astype(np.float64)) == exact).all()


@pytest.mark.parametrize(
    ("net", "path"),
    [(nets.Sequential, "0"), (nets.Sequential, "2.up"), (nets.Containers, "stack.0"), (nets.Containers, "named.left")],
)
def test_a_cell_is_replaced_in_any_container(net: type, path: str):
    model = net()
    x, before = model.sample(), output(model)
    old = get_child(model, path)
    new = nn.Dense(old.in_channels, old.out_channels)
    replace_cells(model, {id(old): new})
    refresh_names(model)
    assert get_child(model, path) is new
    assert differ(model(x), before)
    assert [p.name for p in model.get_parameters()] == [name for name, _ in model.parameters_and_names()]
    replace_cells(model, {id(new): old})
    assert_same(model(x), before, "exact")


def test_a_layer_that_stands_twice_is_adapted_twice(mode: str):
    class Shared(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Dense(4, 4)
            self.second = self.first

        def construct(self, x):
            return self.second(self.first(x))

    net = Shared()
    x = nets.floats(2, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["first"]))
    shake(weights_of(model, "default"))
    assert model.first is model.second
    assert len(layers_of(model)) == 1
    expected = output(model, x)
    assert_same(model(x), expected)
    model.merge_adapter()
    assert_same(model(x), expected, "merge")
    assert model.unload() is net
    assert net.first is net.second
    assert isinstance(net.second, nn.Dense)


def test_keys_are_torchs():
    keys = {named.key: named.shape for named in named_parameters(nets.Norms())}
    assert keys == {
        "conv.weight": (4, 2, 3, 3),
        "conv.bias": (4,),
        "bn.weight": (4,),
        "bn.bias": (4,),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "norm.weight": (5,),
        "norm.bias": (5,),
        "lin.weight": (5, 5),
        "lin.bias": (5,),
        "scale": (5,),
    }
    assert {n.key: n.shape for n in named_parameters(nets.Conv(1), "net")} == {"net.conv.weight": (4, 2, 3)}
    assert [n.key for n in named_parameters(nets.Tied())].count("head.weight") == 0


@pytest.mark.graph
def test_dropping_spares_what_lives():
    net = nets.Dense()
    x = net.sample()

    @ms.jit
    def predict(x):
        return net(x)

    first = predict(x)
    drop_compiled()
    assert compiled_count() in (0, None)
    assert_same(first, output(net, x))
    assert_same(predict(x), first, "exact")


# --- ops ------------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "1d": (1, {"stride": 2, "pad_mode": "pad", "padding": 2}),
    "1d dilated": (1, {"dilation": 2, "pad_mode": "valid"}),
    "1d same": (1, {"stride": 2}),
    "2d": (2, {"stride": (1, 2), "pad_mode": "pad", "padding": (1, 0, 2, 1)}),
    "2d dilated": (2, {"dilation": (1, 2), "pad_mode": "valid", "kernel": (3, 2)}),
    "2d same": (2, {"stride": (2, 1)}),
    "2d grouped": (2, {"channels": (4, 4), "group": 2}),
    "2d depthwise": (2, {"channels": (4, 4), "group": 4, "pad_mode": "pad", "padding": 1}),
    "3d": (3, {"stride": (1, 2, 1), "pad_mode": "pad", "padding": (1, 0, 2, 1, 0, 1)}),
    "3d symmetric": (3, {"pad_mode": "pad", "padding": 1, "stride": 2}),
    "3d same": (3, {}),
    "3d valid": (3, {"pad_mode": "valid"}),
}


@pytest.mark.parametrize(("dims", "settings"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_applies_a_weight_as_the_layer_does(dims: int, settings: dict):

    conv = nets.Conv(dims, **settings).conv
    x = nets.Conv(dims, **settings).sample()
    site = describe(conv, "conv")
    assert isinstance(site.op, ConvOp)
    assert site.kind == f"conv{dims}d"
    assert_same(site.op(x, site.from_storage(conv.weight)), conv(x))
    assert_same(site.to_storage(site.from_storage(conv.weight), conv.weight.shape), conv.weight, "exact")


def test_dense_and_embedding_ops():
    x, w = nets.floats(2, 3, 4), nets.floats(5, 4, seed=1)
    assert_same(DenseOp()(x, w), x.asnumpy() @ w.asnumpy().T)
    assert_same(DenseOp()(nets.floats(4), w), w.asnumpy() @ nets.floats(4).asnumpy())
    ids = nets.ids(2, 3, below=5)
    assert_same(EmbeddingOp()(ids, w), w.asnumpy()[ids.asnumpy()], "exact")
    assert_same(EmbeddingOp().mix(x, w), x.asnumpy() @ w.asnumpy().T)


def test_dropping_graphs_goes_on_when_the_collector_interferes(monkeypatch):
    calls = []

    def recycle():
        calls.append(None)
        if len(calls) < 3:
            raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(graphs, "compiled_count", lambda: 1)
    monkeypatch.setattr(graphs.ms, "ms_memory_recycle", recycle)
    graphs.drop_compiled()
    assert len(calls) == 3


def test_dropping_graphs_hides_no_other_error(monkeypatch):
    def recycle():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(graphs, "compiled_count", lambda: 1)
    monkeypatch.setattr(graphs.ms, "ms_memory_recycle", recycle)
    with pytest.raises(RuntimeError, match="the device is gone"):
        graphs.drop_compiled()
