"""The delta Cells' mathematics once more, in numpy with float64: from MindPet's documents, not from the code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

Weights = Mapping[str, np.ndarray]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def leaky_relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


ACTIVATIONS = {"relu": relu, "leakyrelu": leaky_relu, "gelu": gelu, "silu": silu, "tanh": np.tanh}


def dense(w: Weights, x: np.ndarray, activation: str | None = None) -> np.ndarray:
    y = x @ w["weight"].T + w.get("bias", 0.0)
    return y if activation is None else ACTIVATIONS[activation](y)


def below(w: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}


def adapter(w: Weights, x: np.ndarray, f: str) -> np.ndarray:
    block = below(w, "mindpet_delta_adapter_block.mindpet_delta_adapter_")
    return x + dense(below(block, "up_sampler."), dense(below(block, "down_sampler."), x, f))


def low_rank(w: Weights, x: np.ndarray, f: str) -> np.ndarray:
    def part(name: str, h: np.ndarray) -> np.ndarray:
        p = below(w, f"mindpet_delta_low_rank_adapter_{name}_sampler.")
        weight = "mindpet_delta_low_rank_adapter_weight_"
        return h @ (p[weight + "left"] @ p[weight + "right"]) + p["bias"]

    return x + part("up", ACTIVATIONS[f](part("down", x)))


def lora(w: Weights, x: np.ndarray, activation: str | None, scaling: float) -> np.ndarray:
    y = dense(w, x) + scaling * x @ w["mindpet_delta_lora_a"].T @ w["mindpet_delta_lora_b"].T
    return y if activation is None else ACTIVATIONS[activation](y)


@dataclass(frozen=True)
class Formula:
    """A delta Cell by its name and arguments, and what it computes."""

    name: str
    arguments: dict[str, Any]
    compute: Callable[[Weights, np.ndarray], np.ndarray]
    size: int = 6

    def make(self, package: Any, **more: Any) -> nn.Cell:
        """The Cell, of `msft_peft.delta` or of MindPet's package, with the same random weights each time."""
        cell = getattr(package, self.name)(**self.arguments | more)
        rng = np.random.default_rng(11)
        for p in cell.get_parameters():
            p.set_data(Tensor((0.4 * rng.standard_normal(p.shape)).astype(np.float32), p.dtype))
        return cell.set_train(False)

    def x(self) -> Tensor:
        return Tensor(np.random.default_rng(3).standard_normal((2, 3, self.size)), ms.float32)


FORMULAS = {
    "lora": Formula(
        "LoRADense",
        {"in_channels": 6, "out_channels": 5, "lora_rank": 2, "lora_alpha": 3},
        lambda w, x: lora(w, x, None, 1.5),
    ),
    "lora-relu": Formula(
        "LoRADense",
        {"in_channels": 6, "out_channels": 5, "lora_rank": 4, "lora_alpha": 2.0, "activation": "relu"}
        | {"has_bias": False},
        lambda w, x: lora(w, x, "relu", 0.5),
    ),
    "adapter-layer": Formula(
        "AdapterLayer", {"hidden_size": 6, "bottleneck_size": 3}, lambda w, x: adapter(w, x, "gelu")
    ),
    "adapter": Formula(
        "AdapterDense",
        {"in_channels": 6, "out_channels": 5, "bottleneck_size": 2, "activation": "leakyrelu"}
        | {"non_linearity": "relu"},
        lambda w, x: adapter(below(w, "mindpet_delta_adapter."), dense(w, x, "leakyrelu"), "relu"),
    ),
    "low-rank-layer": Formula(
        "LowRankAdapterLayer",
        {"hidden_size": 6, "reduction_factor": 2, "low_rank_size": 2},
        lambda w, x: low_rank(w, x, "gelu"),
    ),
    "low-rank": Formula(
        "LowRankAdapterDense",
        {"in_channels": 6, "out_channels": 9, "reduction_factor": 2, "activation": "tanh"}
        | {"has_bias": False, "non_linearity": "silu"},
        lambda w, x: low_rank(below(w, "mindpet_delta_low_rank_adapter."), dense(w, x, "tanh"), "silu"),
    ),
}
