"""`shard` sets each strategy on the primitive that it names."""

from collections.abc import Iterator

import mindspore as ms
import pytest
from mindspore import nn, ops

from msft_peft import delta

ADAPTER = "mindpet_delta_adapter."
BLOCK = "mindpet_delta_adapter_block.mindpet_delta_adapter_"
LOW = "mindpet_delta_low_rank_adapter_"
# Different for each operator, so that none can be mistaken for another. (device counts are not checked here)
S = [((n, 1), (n, 1)) for n in range(2, 14)]
U = [((n, 1),) for n in range(2, 14)]

CASES = {
    "lora": (
        lambda: delta.LoRADense(6, 8, 2, 4, activation="relu"),
        {
            "strategy_org_dense_matmul": (S[0], "", "matmul"),
            "strategy_org_bias_add": (S[1], "", "bias_add"),
            "strategy_lora_dropout": (U[2], "lora_dropout", "dropout"),
            "strategy_lora_a_matmul": (S[3], "", "lora_a_matmul"),
            "strategy_lora_b_matmul": (S[4], "", "lora_b_matmul"),
            "strategy_lora_mul": (S[5], "", "mul"),
            "strategy_lora_add": (S[6], "", "add"),
            "strategy_activation": (U[7], "activation", "relu"),
        },
    ),
    "adapter": (
        lambda: delta.AdapterDense(6, 8, bottleneck_size=2, activation="sigmoid"),
        {
            "strategy_matmul_org": (S[0], "", "matmul"),
            "strategy_bias_org": (S[1], "", "bias_add"),
            "strategy_activation_org": (U[2], "activation", "sigmoid"),
            "strategy_matmul_down_sampler": (S[3], f"{ADAPTER}{BLOCK}down_sampler", "matmul"),
            "strategy_bias_down_sampler": (S[4], f"{ADAPTER}{BLOCK}down_sampler", "bias_add"),
            "strategy_non_linearity": (U[5], f"{ADAPTER}{BLOCK}non_linear", "gelu"),
            "strategy_matmul_up_sampler": (S[6], f"{ADAPTER}{BLOCK}up_sampler", "matmul"),
            "strategy_bias_up_sampler": (S[7], f"{ADAPTER}{BLOCK}up_sampler", "bias_add"),
            "strategy_residual_add": (S[8], "mindpet_delta_adapter", "residual_add"),
        },
    ),
    "low-rank": (
        lambda: delta.LowRankAdapterDense(6, 8, reduction_factor=4, activation=ops.ReLU()),
        {
            "strategy_matmul_org": (S[0], "", "matmul"),
            "strategy_bias_org": (S[1], "", "bias_add"),
            "strategy_activation_org": (U[2], "", "activation"),
            "strategy_matmul_down_sampler_weight": (S[3], f"{LOW[:-1]}.{LOW}down_sampler", "matmul_weight"),
            "strategy_matmul_down_sampler_input": (S[4], f"{LOW[:-1]}.{LOW}down_sampler", "matmul_input"),
            "strategy_bias_down_sampler": (S[5], f"{LOW[:-1]}.{LOW}down_sampler", "bias_add"),
            "strategy_non_linearity": (U[6], f"{LOW[:-1]}.{LOW}non_linear", "gelu"),
            "strategy_matmul_up_sampler_weight": (S[7], f"{LOW[:-1]}.{LOW}up_sampler", "matmul_weight"),
            "strategy_matmul_up_sampler_input": (S[8], f"{LOW[:-1]}.{LOW}up_sampler", "matmul_input"),
            "strategy_bias_up_sampler": (S[9], f"{LOW[:-1]}.{LOW}up_sampler", "bias_add"),
            "strategy_residual_add": (S[10], LOW[:-1], "residual_add"),
        },
    ),
}


@pytest.fixture
def semi_auto() -> Iterator[None]:
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    yield
    ms.reset_auto_parallel_context()


def strategies(cell: nn.Cell) -> dict[tuple[str, str], tuple]:
    """Every strategy that is set on a primitive of `cell`: (path, attribute) -> strategy."""
    return {
        (path, name): value.in_strategy
        for path, inner in cell.cells_and_names()
        for name, value in vars(inner).items()
        if isinstance(value, ops.Primitive) and value.attrs.get("in_strategy")
    }


@pytest.mark.parametrize(("make", "wanted"), CASES.values(), ids=CASES)
def test_each_strategy_reaches_its_primitive(semi_auto: None, make, wanted: dict):
    cell = make()
    cell.shard(**{argument: strategy for argument, (strategy, _, _) in wanted.items()})
    assert strategies(cell) == {(path, name): strategy for strategy, path, name in wanted.values()}


@pytest.mark.parametrize(("make", "wanted"), CASES.values(), ids=CASES)
def test_none_sets_nothing(semi_auto: None, make, wanted: dict):
    cell = make()
    cell.shard()
    assert strategies(cell) == {}


def test_activations_of_several_primitives(semi_auto: None):
    lora = delta.LoRADense(6, 8, 2, 4, activation="leakyrelu")
    lora.shard(strategy_activation=((2, 4),))
    found = {name: strategy for (path, name), strategy in strategies(lora).items() if path == "activation"}
    assert found == {"mul": ((2, 4), ()), "select_op": ((2, 4), (2, 4))}
    lora = delta.LoRADense(6, 8, 2, 4, activation="silu")
    lora.shard(strategy_activation=((2, 4),))
    found = {name: strategy for (path, name), strategy in strategies(lora).items() if path == "activation"}
    assert found == {"sigmoid": ((2, 4),), "mul": ((2, 4), (2, 4))}
    lora = delta.LoRADense(6, 8, 2, 4, activation="logsigmoid")
    lora.shard(strategy_activation=((2, 4),))
    found = {name: strategy for (path, name), strategy in strategies(lora).items() if path == "activation"}
    unary = dict.fromkeys(("exp", "rec", "log"), ((2, 4),))
    assert found == unary | dict.fromkeys(("mul", "add"), ((2, 4), ()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: delta.LoRADense(6, 8, 2, 4, activation="logsoftmax"),
        lambda: delta.AdapterDense(6, 8, activation="logsoftmax"),
        lambda: delta.AdapterLayer(6, non_linearity="logsoftmax"),
        lambda: delta.LowRankAdapterDense(6, 8, activation=ops.LogSoftmax()),
        lambda: delta.LowRankAdapterLayer(6, 2, non_linearity="logsoftmax"),
    ],
)
def test_a_log_softmax_cannot_be_split(semi_auto: None, make):
    cell = make()
    with pytest.raises(ValueError, match="'LogSoftmax' activation is not supported in semi-auto or auto parallel"):
        cell.shard()
    assert strategies(cell) == {}
    ms.reset_auto_parallel_context()
    cell.shard()


def test_an_activation_without_primitives_is_named(semi_auto: None):
    lora = delta.LoRADense(6, 8, 2, 4, activation="tanhshrink")
    with pytest.raises(ValueError, match="Tanhshrink holds no primitive"):
        lora.shard(strategy_org_dense_matmul=((2, 1), (1, 1)), strategy_activation=((2, 1),))
    assert strategies(lora) == {}
