"""A network with one delta Cell of each kind that has parameters."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class Mixed(nn.Cell):
    def __init__(self, package: Any) -> None:
        super().__init__()
        self.lora = package.LoRADense(6, 8, 2, 4, compute_dtype=ms.float32)
        self.adapter = package.AdapterDense(8, 8, bottleneck_size=2, compute_dtype=ms.float32)
        self.low = package.LowRankAdapterDense(8, 8, reduction_factor=2, compute_dtype=ms.float32)
        self.prefix = package.PrefixLayer(4, 2, 2, 8, 5, 6, 0.0)
        self.encoder = package.PrefixEncoder(2, 1, 2, 2, False, 4, 0.0)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Dense(8, 3)

    def construct(self, x: Tensor) -> Tensor:
        return self.head(ops.relu(self.low(self.adapter(self.lora(x)))))

    def sample(self) -> Tensor:
        return Tensor(np.random.default_rng(2).standard_normal((4, 6)), ms.float32)


def trained(net: nn.Cell) -> set[str]:
    return {path for path, p in net.parameters_and_names() if p.requires_grad}
