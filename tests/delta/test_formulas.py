"""Each delta Cell computes its formula, and its gradients are that formula's."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import ConfigError, LoraConfig, delta, get_peft_model
from msft_peft.core.layer import TunerLayer
from msft_peft.delta.adapter import AdapterLayer
from tests.delta.formulas import FORMULAS, Formula
from tests.tolerances import array, assert_same, differ


@pytest.fixture(params=FORMULAS.values(), ids=FORMULAS)
def formula(request: pytest.FixtureRequest) -> Formula:
    return request.param


def weights(cell: nn.Cell) -> dict[str, np.ndarray]:
    return {path: array(p).astype(np.float64) for path, p in cell.parameters_and_names()}


def slopes(formula: Formula, w: dict[str, np.ndarray], x: np.ndarray, target: np.ndarray, name: str) -> np.ndarray:
    """d Σ target·formula / d w[name], by central differences."""
    found, step = np.zeros_like(w[name]), 1e-6
    for place in np.ndindex(w[name].shape):
        sides = []
        for sign in (1, -1):
            moved = w[name].copy()
            moved[place] += sign * step
            sides.append((formula.compute(w | {name: moved}, x) * target).sum())
        found[place] = (sides[0] - sides[1]) / (2 * step)
    return found


def test_output_and_gradients_are_the_formulas(formula: Formula, mode: str):
    cell, x = formula.make(delta, compute_dtype=ms.float32), formula.x()
    w, wide = weights(cell), array(x).astype(np.float64)
    expected = formula.compute(w, wide)
    y = cell(x)
    assert_same(y, expected.astype(np.float32), "gradient")
    assert differ(y, formula.compute({k: 0 * v if "delta" in k else v for k, v in w.items()}, wide).astype("float32"))
    target = np.random.default_rng(5).standard_normal(expected.shape)
    goal = Tensor(target, ms.float32)

    def loss(x: Tensor) -> Tensor:
        return ops.reduce_sum(cell(x) * goal)

    _, gradients = ms.value_and_grad(loss, None, list(cell.get_parameters()))(x)
    for name, gradient in zip(w, gradients):
        assert_same(gradient, slopes(formula, w, wide, target, name).astype(np.float32), "gradient")


def test_half_precision(formula: Formula, mode: str):
    x = formula.x()
    cell = formula.make(delta, param_init_type=ms.float16)  # computes in float16, as MindPet does by default
    assert {p.dtype for n, p in cell.parameters_and_names() if "delta" in n} == {ms.float16}
    expected = formula.compute(weights(cell), array(x).astype(np.float64)).astype(np.float32)
    for dtype in (ms.float32, ms.float16):
        y = cell(ops.cast(x, dtype))
        assert y.dtype == dtype
        assert_same(ops.cast(y, ms.float32), expected, "half")


def test_a_user_s_own_compiled_step_trains_them():
    cell = FORMULAS["adapter"].make(delta, compute_dtype=ms.float32)
    x, optimizer = FORMULAS["adapter"].x(), nn.SGD(cell.trainable_params(), 0.03)

    def loss_of(x: Tensor) -> Tensor:
        return ops.reduce_mean(ops.square(cell(x)))

    grad = ms.value_and_grad(loss_of, None, optimizer.parameters)

    @ms.jit
    def step(x: Tensor) -> Tensor:
        loss, gradients = grad(x)
        optimizer(gradients)
        return loss

    losses = [float(step(x)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.05 * losses[-1]


def test_lora_dropout_acts_on_the_low_rank_way_alone(mode: str):
    arguments = {"in_channels": 6, "out_channels": 5, "lora_rank": 2, "lora_alpha": 2, "lora_dropout": 0.5}
    cell = delta.LoRADense(**arguments, lora_b_init="ones", compute_dtype=ms.float32).set_train(True)
    x = Tensor(np.ones((400, 6)), ms.float32)
    plain = array(nn.Dense(6, 5, cell.weight, cell.bias)(x))
    full = array(x) @ array(cell.mindpet_delta_lora_a).T @ array(cell.mindpet_delta_lora_b).T
    low_rank = array(cell(x)) - plain
    assert differ(low_rank, full)
    assert np.abs(low_rank.mean(0) - full.mean(0)).max() < 0.1  # what is left is doubled
    cell.set_train(False)
    assert_same(cell(x), plain + full, "merge")


def test_a_fresh_lora_is_the_identity_and_an_adapter_nearly():
    x = FORMULAS["lora"].x()
    lora = delta.LoRADense(6, 6, 2, 4, compute_dtype=ms.float32)
    assert_same(lora(x), nn.Dense(6, 6, lora.weight, lora.bias)(x))
    assert np.abs(array(AdapterLayer(6, 4, compute_dtype=ms.float32)(x) - x)).max() < 0.05


def prefix_encoder(**changes: object) -> delta.PrefixEncoder:
    arguments = {"pre_seq_len": 3, "num_layers": 2, "num_heads": 2, "kv_channels": 4, "prefix_projection": False}
    cell = delta.PrefixEncoder(**arguments | {"projection_dim": 5, "dropout_prob": 0.1} | changes)
    rng = np.random.default_rng(4)
    for p in cell.trainable_params():
        p.set_data(Tensor(0.3 * rng.standard_normal(p.shape), ms.float32))
    return cell.set_train(False)


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_encoder(mode: str, projection: bool):
    cell = prefix_encoder(prefix_projection=projection)
    table = array(cell.mindpet_delta_ptuning2_embedding.embedding_table).astype(np.float64)
    if projection:
        first, last = cell.mindpet_delta_ptuning2_dense_in, cell.mindpet_delta_ptuning2_dense_out
        h = np.tanh(table @ array(first.weight).T + array(first.bias))
        table = h @ array(last.weight).T + array(last.bias)
    layers = cell(5, ms.float32)
    assert len(layers) == 2
    for layer, prefix in enumerate(layers):
        assert prefix.shape == (2, 5, 2, 3, 4)  # key and value, batch, heads, positions, channels
        for kind in range(2):
            for head in range(2):
                begin = ((2 * layer + kind) * 2 + head) * 4
                expected = np.broadcast_to(table[:, begin : begin + 4], (5, 3, 4)).astype(np.float32)
                assert_same(prefix[kind, :, head], expected, "merge")
    assert cell(1)[0].dtype == ms.float16


def test_prefix_encoder_splits_as_its_parallel_config_says():
    config = SimpleNamespace(data_parallel=2, model_parallel=4)
    cell = prefix_encoder(prefix_projection=True, parallel_config=config)
    assert cell.mindpet_delta_ptuning2_dense_in.matmul.in_strategy == ((2, 1), (4, 1))
    assert cell.split_layers.in_strategy == ((1, 2, 1, 1, 1),)


class Attention(nn.Cell):
    """Reads its prefix in construct, in one of the ways there are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.prefix = delta.PrefixLayer(4, 2, 2, 6, embed_dim=5, mid_dim=7, dropout_rate=0.0)
        self.way = way

    def construct(self, goal: Tensor) -> Tensor:
        if self.way == "call":
            key, value = self.prefix()
        else:
            key, value = self.prefix.past_key_reparam, self.prefix.past_value_reparam
        return ops.reduce_mean(ops.square(key - goal)) + ops.reduce_mean(ops.square(value + goal))


@pytest.mark.parametrize("way", ["call", "properties"])
def test_the_prefix_layer_learns_a_key_and_another_value(mode: str, way: str):
    net, goal = Attention(way), Tensor(np.ones((4, 6)), ms.float32)
    key, value = net.prefix()
    assert key.shape == value.shape == (4, 6)
    w = {path: array(p).astype(np.float64) for path, p in net.prefix.parameters_and_names()}
    mlp = "mindpet_delta_prefixtuning_control_trans"
    h = np.tanh(w["mindpet_delta_prefixtuning_wte.embedding_table"] @ w[f"{mlp}.0.weight"].T + w[f"{mlp}.0.bias"])
    expected = (h @ w[f"{mlp}.2.weight"].T + w[f"{mlp}.2.bias"]).astype(np.float32)
    assert_same(key, expected[:, :6], "merge")
    assert_same(value, expected[:, 6:], "merge")

    optimizer = nn.Adam(net.trainable_params(), 0.05)
    grad = ms.value_and_grad(net, None, optimizer.parameters)
    losses = []
    for _ in range(30):
        loss, gradients = grad(goal)
        assert all(np.abs(array(gradient)).max() > 0 for gradient in gradients)
        optimizer(gradients)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    key, value = net.prefix()
    assert np.abs(array(key) - 1).max() < 0.7
    assert np.abs(array(value) + 1).max() < 0.7


def test_a_prefix_read_too_early_is_refused():
    class Frozen(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.prefix = delta.PrefixLayer(4, 2, 2, 6, embed_dim=5)
            self.past_key = self.prefix.past_key_reparam

    with pytest.raises(RuntimeError, match=r"never learn .* key, value = self.prefix\(\)"):
        Frozen()


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("alpha", [4, 0.5])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_r_drop(mode: str, kind: str, alpha: float):
    rng = np.random.default_rng(8)
    z, classes = rng.standard_normal((6, 4)), np.repeat(rng.integers(0, 4, 3), 2)
    one_hot = np.eye(4)[classes]
    labels = Tensor(classes, ms.int32) if kind == "classes" else Tensor(0.8 * one_hot + 0.05, ms.float32)
    soft = one_hot if kind == "classes" else 0.8 * one_hot + 0.05
    log = log_softmax(z)
    kl = sum((np.exp(a) * (a - b)).sum() for a, b in ((log[::2], log[1::2]), (log[1::2], log[::2])))
    expected = -(soft * log).sum(-1).mean() + alpha * kl / 4
    assert_same(delta.RDropLoss()(Tensor(z, ms.float32), labels, alpha), np.float32(expected), "merge")


def test_r_drop_takes_half_precision_and_gives_gradients(mode: str):
    loss, z = delta.RDropLoss(), Tensor(np.random.default_rng(8).standard_normal((6, 4)), ms.float16)
    labels = Tensor([0, 0, 1, 1, 3, 3], ms.int32)

    def run(z: Tensor) -> Tensor:
        return loss(z, labels)

    value, gradient = ms.value_and_grad(run)(z)
    wide = ms.value_and_grad(run)(ops.cast(z, ms.float32))
    assert (value.dtype, gradient.dtype) == (ms.float16, ms.float16)
    assert_same(ops.cast(value, ms.float32), wide[0], "half")
    assert_same(ops.cast(gradient, ms.float32), wide[1], "half")


def test_rdrop_repeat_doubles_rows_where_they_stand(mode: str):
    ids, mask = delta.rdrop_repeat(Tensor([[1, 2], [3, 4]], ms.int32), Tensor([True, False]))
    assert array(ids).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert array(mask).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["lora", "adapter", "low-rank"])
def test_an_adapter_cannot_be_put_on_a_delta_cell(name: str):
    net = nn.SequentialCell(FORMULAS[name].make(delta), nn.Dense(4, 4))
    with pytest.raises(ConfigError, match=r"Target module 0 \(.*\) is not supported"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))
    assert isinstance(net[0], nn.Dense)  # for code that initialises those
    assert not isinstance(net[0], TunerLayer)
