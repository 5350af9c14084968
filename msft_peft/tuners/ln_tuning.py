"""LN tuning: layers, usually norms, are trained whole, as copies."""

import copy
from dataclasses import dataclass

from mindspore import Parameter, Tensor, ops

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch, Reference
from msft_peft.core.tuner import Tuner
from msft_peft.hosts import Site, settle
from msft_peft.registry import Method
from msft_peft.tuners.architectures import NORMS


@dataclass
class LNTuningConfig(TargetedConfig):
    """Settings of LN tuning.

    Args:
        target_modules, exclude_modules, modules_to_save: see `TargetedConfig`. Usually norms; dense, embedding and
            convolution layers can be trained so, too.

    Source: Zhao et al. 2023, arXiv:2312.11420.
    Differs: several adapters may be active, or merged, at once: each adds what its copy has gained; HF refuses. Norms
        with running averages are refused. `layers_to_transform` works here.
    """

    beyond_hf = ("layers_to_transform", "layers_pattern")

    peft_type: str | None = "LN_TUNING"


class LNTuningPatch(Patch):
    """y = x ∘ W' + b', with ∘ what the layer does (a norm scales, a dense layer multiplies), W' and b' the adapter's.

    Several adapters add what each has gained: W + Σ(Wᵢ - W).

    Weights, in the layer's own dtype as in HF:
        ln_tuning_layers.weight, ln_tuning_layers.bias: as the layer's, and at first equal to them.
    """

    reads_base = True
    reweighs = True

    def setup(self, site: Site, config: LNTuningConfig) -> None:
        self.dtype = site.dtype
        self.casts_input = site.kind != "embedding"
        # A copy of HF's layer, and its `Conv1D` stores (in, out).
        self.turned = site.transposed if site.fan_in_fan_out is None else site.fan_in_fan_out
        own = as_float32(to_numpy(site.from_storage(site.weight)))
        self.ln_weight = self.weight("ln_tuning_layers.weight", site.shape, own, attribute="ln_weight")
        self.biased = site.bias is not None
        if site.bias is not None:
            bias = as_float32(to_numpy(site.bias))
            self.ln_bias = self.weight("ln_tuning_layers.bias", bias.shape, bias, attribute="ln_bias")

    def shape_of(self, attribute: str) -> tuple[int, ...]:
        shape = super().shape_of(attribute)
        return shape[::-1] if self.turned else shape

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # In this order: w is the base weight where nothing else is active, and the difference an exact zero.
        weight = ops.add(self.ln_weight, ops.sub(w, self.base_weight()))
        if b is None:
            return weight, b
        return weight, ops.add(self.ln_bias, ops.sub(b, getattr(self.site.layer, self.site.bias_name)))


class LNTuningNormPatch(LNTuningPatch):
    """The same of a norm: a copy of the layer runs in its place, whatever its class computes."""

    reweighs = False
    replaces = True

    def setup(self, site: Site, config: LNTuningConfig) -> None:
        if {"moving_mean", "moving_variance"} & set(site.layer._params):
            raise NotImplementedError(
                f"LN tuning of a norm with running averages is not supported: {site.path} is a "
                f"{type(site.layer).__name__}. Its averages would be shared by all adapters; use modules_to_save."
            )
        super().setup(site, config)
        # No child, whose weights would be listed twice.
        self.copy = Reference(copy.deepcopy(site.layer))
        for attribute in self.keys:
            self.put(attribute, getattr(self, attribute))

    def put(self, attribute: str, parameter: Parameter) -> None:
        super().put(attribute, parameter)
        local = self.site.weight_name if attribute == "ln_weight" else self.site.bias_name
        self.copy.cell._params[local] = parameter
        settle(self.copy.cell)

    def instead(self, x: Tensor) -> Tensor:
        return self.copy.cell(x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.add(y, ops.sub(self.copy.cell(x), self.site.layer(x)))


class LNTuningModel(Tuner):
    """The base model with trained norms in it, and the switches over them."""


METHOD = Method(
    config=LNTuningConfig,
    tuner=LNTuningModel,
    patches=dict.fromkeys(("dense", "embedding", "conv1d", "conv2d", "conv3d"), LNTuningPatch)
    | {"norm": LNTuningNormPatch},
    default_targets=NORMS,
)
