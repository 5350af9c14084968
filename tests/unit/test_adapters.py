"""Bottleneck adapters, low-rank adapters, BitFit and R-Drop under the HF API: what the contract does not ask."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    ConfigError,
    LoraConfig,
    LowRankAdapterConfig,
    WithRDropLoss,
    delta,
    get_peft_model,
)
from msft_peft.models import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from tests import nets
from tests.cases import layers_of, shake, weights_of
from tests.tolerances import array, assert_same, differ


def adapted(config: Any) -> Any:
    ms.set_seed(5)
    model = get_peft_model(nets.Dense().set_train(False), config)
    shake(weights_of(model, "default"))
    return model


def as_delta(model: Any, cell: nn.Cell, names: dict[str, str], transposed: bool = False) -> nn.Cell:
    """MindPet's Cell with the weights of the first adapted layer; `names`: part of its name -> weight of the Patch."""
    layer = layers_of(model)[0]
    cell.weight.set_data(layer.base_layer.weight)
    cell.bias.set_data(layer.base_layer.bias)
    for path, p in cell.parameters_and_names():
        for part, attribute in names.items():
            if path.endswith(part):
                p.set_data(getattr(layer.adapters["default"], attribute))
    return cell


def test_a_bottleneck_adapter_is_mindpets(mode: str):
    model = adapted(BottleneckAdapterConfig(target_modules=["lin0"], bottleneck_size=3, non_linearity="leakyrelu"))
    cell = delta.AdapterDense(6, 8, bottleneck_size=3, non_linearity="leakyrelu", compute_dtype=ms.float32)
    names = {f"{a}_sampler.{b}": f"adapter_{a}{end}" for a in ("down", "up") for b, end in WEIGHTS}
    x = model.sample()
    assert_same(layers_of(model)[0](x), as_delta(model, cell, names)(x))


WEIGHTS = (("weight", ""), ("bias", "_bias"))


def test_a_low_rank_adapter_is_mindpets(mode: str):
    model = adapted(LowRankAdapterConfig(target_modules=["lin0"], reduction_factor=2, low_rank_size=2))
    cell = delta.LowRankAdapterDense(6, 8, reduction_factor=2, low_rank_size=2, compute_dtype=ms.float32)
    names = {f"{a}_sampler.bias": f"adapter_{a}_bias" for a in ("down", "up")}
    for part in ("down", "up"):
        for side in ("left", "right"):
            names[f"{part}_sampler.mindpet_delta_low_rank_adapter_weight_{side}"] = f"adapter_{part}_{side}"
    x = model.sample()
    assert_same(layers_of(model)[0](x), as_delta(model, cell, names)(x))


def test_mindpets_initialisation_is_near_the_identity():
    base = nets.Dense().set_train(False)
    x, before = base.sample(), array(base(base.sample()))
    config = BottleneckAdapterConfig(target_modules=["lin0"], bottleneck_size=3, init_weights=False)
    model = get_peft_model(base, config)
    assert all((array(p) != 0).any() for p in model.trainable_params() if not p.name.endswith("bias"))
    after = array(model(x))
    assert (after != before).any()
    assert np.abs(after - before).max() < 1e-2


def test_adapters_drop_what_they_are_given_while_training(mode: str):
    model = adapted(BottleneckAdapterConfig(target_modules=["lin0"], adapter_dropout=0.5))
    x = model.sample()
    assert_same(model(x), model(x), "exact")
    model.set_train(True)
    assert differ(model(x), model(x))


BERT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**BERT)).set_train(False)


@pytest.mark.parametrize("config", [BottleneckAdapterConfig, LowRankAdapterConfig])
@pytest.mark.parametrize(
    ("placement", "ends"),
    [("houlsby", ("attention.output.dense", "output.dense")), ("pfeiffer", ("output.dense",))],
)
def test_placements_in_bert(config: type, placement: str, ends: tuple):
    settings = {"reduction_factor": 4} if config is LowRankAdapterConfig else {}
    model = get_peft_model(bert(), config(placement=placement, task_type="SEQ_CLS", **settings))
    places = [f"bert.encoder.layer.{n}.{end}" for n in range(2) for end in ends]
    assert [layer.site.path for layer in layers_of(model)] == places


def test_placements_in_llama():
    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    for placement, ends in (("houlsby", ["self_attn.o_proj", "mlp.down_proj"]), ("pfeiffer", ["mlp.down_proj"])):
        base = LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=2))
        model = get_peft_model(base, BottleneckAdapterConfig(placement=placement, task_type="CAUSAL_LM"))
        assert [layer.site.path for layer in layers_of(model)] == [f"model.layers.0.{end}" for end in ends]


def test_bitfit_finds_every_bias_and_norm(mode: str):
    base = bert()
    biases = {p.name for p in base.get_parameters() if p.name.endswith(("bias", "beta"))}
    model = get_peft_model(base, BitFitConfig(task_type="SEQ_CLS"))
    assert len(layers_of(model)) == len(biases - {"classifier.bias"})
    ids = Tensor(np.random.default_rng(1).integers(0, 40, (2, 5)), ms.int32)
    shake(weights_of(model, "default"))
    before = model(ids)["logits"]
    model.merge_adapter()
    assert_same(model(ids)["logits"], before, "merge")


def test_bitfit_on_channels(mode: str):
    model = get_peft_model(nets.Norms().set_train(False), BitFitConfig(target_modules=["conv", "bn"]))
    conv, bn = layers_of(model)
    x = model.sample()
    shake(weights_of(model, "default"))
    for layer, inputs in ((conv, x), (bn, nets.floats(2, 4, 3, 3))):
        gained = array(layer.adapters["default"].bitfit_bias)
        assert_same(layer(inputs), array(layer.base_layer(inputs)) + gained.reshape(1, -1, 1, 1))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: BottleneckAdapterConfig(bottleneck_size=0), "bottleneck_size must be a positive int"),
        (lambda: BottleneckAdapterConfig(placement="both"), "placement must be 'houlsby' or 'pfeiffer'"),
        (lambda: BottleneckAdapterConfig(non_linearity="xx"), "'xx' is no activation"),
        (lambda: BottleneckAdapterConfig(non_linearity=3), "`non_linearity` must be str, got 3"),
        (lambda: BottleneckAdapterConfig(adapter_dropout=1.0), r"must lie in \[0, 1\)"),
        (lambda: BottleneckAdapterConfig(bias="lora_only"), "bias must be 'none' or 'all'"),
        (lambda: LowRankAdapterConfig(low_rank_size=1.5), "low_rank_size must be a positive int"),
        (lambda: LowRankAdapterConfig(low_rank_w_init="xx"), "no initializer"),
    ],
)
def test_configs_refuse(make: Any, text: str):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    ("net", "config", "text"),
    [
        (nets.FusedDense, BottleneckAdapterConfig(target_modules=["lin0"]), "lin0 applies ReLU within the layer"),
        (nets.Dense, LowRankAdapterConfig(target_modules=["lin0"]), "reduction_factor=32 leaves nothing of lin0"),
        (nets.Dense, BitFitConfig(target_modules=["lin1"]), "lin1 has no bias for BitFit to train"),
        (nets.Dense, BottleneckAdapterConfig(), "Please specify `target_modules`.*can adapt: lin0, lin1"),
        (nets.MintEmbedding, BitFitConfig(), "BitFit trains biases, and none of the model"),
    ],
)
def test_layers_are_refused(net: Any, config: Any, text: str):
    base = net()
    with pytest.raises(ConfigError, match=text):
        get_peft_model(base, config)
    assert not hasattr(base, "peft_config")


def test_bitfit_beside_another_method(mode: str):
    model = get_peft_model(nets.Dense().set_train(False), BitFitConfig(), adapter_name="bias", mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["lin0", "lin1"], r=2))
    model.add_adapter("small", BottleneckAdapterConfig(target_modules=["lin1"], bottleneck_size=2))
    model.set_adapter(["lora", "bias", "small"])
    assert len(model.trainable_params()) == 2 * 2 + 1 + 4
    x, before = model.sample(), array(model(model.sample()))
    for name in ("lora", "bias", "small"):
        shake(weights_of(model, name))
        now = array(model(x))
        assert differ(now, before)
        before = now


# --- R-Drop ----------------------------------------------------------------------------------------------------------


class Noisy(nn.Cell):
    """Logits, with a dropout before them."""

    def __init__(self, p: float, result: str = "tensor") -> None:
        super().__init__()
        self.lin, self.dropout, self.result = nn.Dense(6, 4), nn.Dropout(p=p) if p else nn.Identity(), result

    def construct(self, x: Tensor, scale: Tensor | None = None) -> Any:
        z = self.lin(self.dropout(x))
        if scale is not None:
            z = z * scale
        if self.result == "dict":
            return {"logits": z}
        return (z, x) if self.result == "tuple" else z


def test_without_dropout_r_drop_is_the_cross_entropy(mode: str):
    net, x = Noisy(0.0).set_train(True), nets.floats(3, 6)
    labels = Tensor([1, 3, 0], ms.int32)
    expected = ops.cross_entropy(net(x), labels)
    assert_same(WithRDropLoss(net)(x, labels), expected)


@pytest.mark.parametrize("result", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("columns", [None, ("x", "scale")])
def test_r_drop_equals_mindpets_loss_on_the_doubled_batch(mode: str, result: str, columns: tuple | None):
    """With doubled rows that differ: the scale is per row, and not the same for both of a pair."""
    net = Noisy(0.0, result)
    x, labels = nets.floats(3, 6), Tensor([1, 3, 0], ms.int32)
    loss = WithRDropLoss(net, 2.5, columns)
    scale = nets.floats(3, 1, seed=4)
    z = net(*delta.rdrop_repeat(x, scale))
    z = z["logits"] if result == "dict" else z[0] if result == "tuple" else z
    assert_same(loss(x, scale, labels), delta.RDropLoss()(z, delta.rdrop_repeat(labels)[0], 2.5))


def test_r_drop_with_dropout_trains_a_peft_model(mode: str):
    model = get_peft_model(Noisy(0.3), LoraConfig(target_modules=["lin"], r=2))
    model.set_train(True)
    x, labels = nets.floats(8, 6), Tensor(np.arange(8) % 4, ms.int32)
    loss = WithRDropLoss(model, alpha=1)
    assert {p.name for p in loss.trainable_params()} == {p.name for p in model.trainable_params()}
    optimizer = nn.Adam(loss.trainable_params(), 0.05)
    step = nn.TrainOneStepCell(loss, optimizer)
    losses = [float(step(x, labels)) for _ in range(40)]
    assert np.mean(losses[-8:]) < 0.95 * np.mean(losses[:8])
    plain = float(ops.cross_entropy(model.set_train(False)(x), labels))
    model.set_train(True)
    assert float(WithRDropLoss(model, alpha=50)(x, labels)) > 2 * plain  # the two passes differ


def test_r_drop_on_tokens_counts_only_labels(mode: str):
    z = nets.floats(2, 5, 4)
    labels = Tensor([[-100, 1, 2, -100, 3], [0, -100, -100, 2, 1]], ms.int32)

    class Tokens(nn.Cell):
        """Gives the first of a pair other logits than the second."""

        def construct(self, z: Tensor) -> Tensor:
            return z * Tensor(np.array([1.0, 0.5, 1.0, 0.5]).reshape(4, 1, 1), ms.float32)

    log = array(ops.log_softmax(ops.stack((z, z * 0.5), 1), -1)).astype(np.float64)[:, :, :-1]  # (B, 2, T, V)
    kept = array(labels)[:, 1:]
    counted = kept != -100
    picked = np.take_along_axis(log, np.where(counted, kept, 0)[:, None, :, None], -1)[..., 0]
    cross_entropy = -(picked * counted[:, None]).sum() / (2 * counted.sum())
    apart = ((np.exp(log[:, 0]) - np.exp(log[:, 1])) * (log[:, 0] - log[:, 1])).sum(-1) * counted
    for divergence, kl in (("sum", apart.sum()), ("mean", apart.sum() / counted.sum())):
        loss = WithRDropLoss(Tokens(), 3, shift=True, divergence=divergence)
        assert_same(loss(z, labels), np.float32(cross_entropy + 3 / 4 * kl), "merge")


def test_r_drop_refuses():
    with pytest.raises(ConfigError, match="divergence must be 'sum' or 'mean'"):
        WithRDropLoss(Noisy(0.1), divergence="max")
    with pytest.raises(ConfigError, match="alpha must be a number"):
        WithRDropLoss(Noisy(0.1), alpha="4")
