"""LoHa: the delta weight is the elementwise product of two low-rank ones."""

import math
from dataclasses import dataclass

from mindspore import Tensor, ops

from msft_peft.core.patch import he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.lycoris import LycorisConfig, LycorisPatch, rebuilt


@dataclass
class LoHaConfig(LycorisConfig):
    """Settings of LoHa; those that are not here are `LycorisConfig`'s.

    Args:
        init_weights: begin with a delta of zero; False draws all factors.

    Source: Hyeon-Woo et al. 2021, arXiv:2108.06098, §2 (FedPara); LyCORIS, arXiv:2309.14859.
    """

    peft_type: str | None = "LOHA"
    init_weights: bool = True


class LoHaPatch(LycorisPatch):
    """ΔW = s·(A₁·B₁) ∘ (A₂·B₂), of rank up to r².

    Weights, with K the kernel's size (1 for a dense layer):
        hada_w1_a, hada_w2_a (out, r): He-uniform with a = √5.
        hada_w1_b, hada_w2_b (r, in·K): He-uniform, and zeros.
        hada_t1, hada_t2 (r, r, kernel...), with `use_effective_conv2d` alone: He-uniform. Then a and b are (r, out)
            and (r, in), and A·B stands for Σ_ij t[i, j]·a[i]·b[j].
    """

    def setup(self, site: Site, config: LoHaConfig) -> None:
        super().setup(site, config)
        out, inputs, *kernel = site.shape
        drawn, last = he_uniform(), "zeros" if config.init_weights else he_uniform()
        if self.by_itself:
            core = (self.r, self.r, *kernel, *(1,) * (2 - len(kernel)))
            self.hada_t1, self.hada_t2 = (self.weight(key, core, drawn) for key in ("hada_t1", "hada_t2"))
            a, b = (self.r, out), (self.r, inputs)
        else:
            a, b = (out, self.r), (self.r, math.prod(site.shape) // out)
        self.hada_w1_a, self.hada_w1_b = self.weight("hada_w1_a", a, drawn), self.weight("hada_w1_b", b, drawn)
        self.hada_w2_a, self.hada_w2_b = self.weight("hada_w2_a", a, drawn), self.weight("hada_w2_b", b, last)

    def delta_weight(self) -> Tensor:
        if self.by_itself:
            one = rebuilt(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            other = rebuilt(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            one = ops.matmul(self.hada_w1_a, self.hada_w1_b)
            other = ops.matmul(self.hada_w2_a, self.scaled(self.hada_w2_b))
        if self.by_itself:
            other = self.scaled(other)
        return ops.reshape(ops.mul(one, other), self.site.shape)


class LoHaModel(Tuner):
    """The base model with LoHa adapters in it, and the switches over them."""


METHOD = Method(
    config=LoHaConfig,
    tuner=LoHaModel,
    patches=dict.fromkeys(("dense", "conv1d", "conv2d"), LoHaPatch),
    default_targets=USUAL,
    mixed=True,
)
