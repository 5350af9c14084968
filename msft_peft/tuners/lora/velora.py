"""VeLoRA: what the backward pass needs of a layer's inputs is kept as a few numbers for each token."""

import numpy as np
from mindspore import Tensor, ops

from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.patch import LoraPatch


class VeloraPatch(LoraPatch):
    """LoRA whose A learns from compressed inputs: outputs and the inputs' gradients are exact, A's is approximate.

    The input is cut into parts x₁, …, x_G, of which c_g = x_g·e is kept; for A's gradient c_g·e stands for x_g.

    Formula: dL/dA = t·Σ gᵀ·[c₁·eᵀ, …, c_G·eᵀ], with g = dL/d(A·x), t = `VeloraConfig.scale`, and the sum over tokens.
    So A·x is computed as x·stop(A)ᵀ + t·(c·Ãᵀ - stop(c·Ãᵀ)) with Ã = [A₁·e, …, A_G·e] (r, G): the second term is zero
    and has that gradient, which needs c alone.

    Weights: those of LoRA, and
        lora_velora_embed (⌈in / G⌉,): e, of length 1; written by forward passes in training, never trained.

    Source: Miles et al. 2024, arXiv:2405.17991.
    Differs: HF takes e from the first batch again when a saved "batch_average_once" adapter is trained on.
    """

    def setup(self, site: Site, config: LoraConfig) -> None:
        super().setup(site, config)
        velora = config.velora_config
        self.groups, self.grad_scale, self.init_type = velora.num_groups, velora.scale, velora.init_type
        self.width = -(-site.in_features // self.groups)
        start = np.zeros(self.width, np.float32)
        if velora.init_type == "random":
            start = np.random.standard_normal(self.width).astype(np.float32)  # ms.set_seed sets numpy's seed too
            start /= np.linalg.norm(start)
        self.lora_velora_embed = self.weight("lora_velora_embed", (self.width,), start, fixed=True)

    def hidden(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().hidden(x)
        parts = self.parted(ops.stop_gradient(x))
        e = self.direction(parts)
        kept = ops.reshape(ops.matmul(parts, e), (*x.shape[:-1], self.groups))
        rough = ops.matmul(kept, ops.transpose(ops.matmul(self.parted(self.lora_A), e), (1, 0)))
        exact = self.op(x, ops.stop_gradient(self.lora_A))
        return self.scaled(ops.add(exact, self.grad_scale * ops.sub(rough, ops.stop_gradient(rough))))

    def parted(self, x: Tensor) -> Tensor:
        """(n, G, ⌈in / G⌉): the rows of x (..., in) in parts, the last ones filled up with zeros."""
        x, missing = ops.reshape(x, (-1, x.shape[-1])), self.groups * self.width - x.shape[-1]
        if missing:
            x = ops.concat((x, ops.zeros((x.shape[0], missing), x.dtype)), 1)
        return ops.reshape(x, (-1, self.groups, self.width))

    def direction(self, parts: Tensor) -> Tensor:
        """e for this batch, which is noted if it is new."""
        if self.init_type == "random":
            return self.lora_velora_embed
        mean = ops.reduce_mean(ops.reshape(parts, (-1, self.width)), 0)
        e = _unit(mean)
        if self.init_type == "batch_average_once":
            known = ops.depend(self.lora_velora_embed, e)
            e = ops.where(ops.reduce_sum(ops.square(known)) > 0, known, e)
        e = ops.stop_gradient(e)
        return ops.depend(e, ops.assign(self.lora_velora_embed, e))


def _unit(v: Tensor) -> Tensor:
    """v in length 1; all numbers alike if it is zero."""
    square = ops.reduce_sum(ops.square(v))
    even = ops.full_like(v, v.shape[0] ** -0.5)
    return ops.where(square > 0, ops.mul(v, ops.rsqrt(ops.where(square > 0, square, ops.ones_like(square)))), even)
