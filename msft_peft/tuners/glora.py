"""GLoRA: weight and bias are scaled and shifted, each by something low-rank, a vector, a number or nothing."""

import math
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Initializer, Normal, Uniform

from msft_peft.config import TargetedConfig, check_bias, check_positive
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, LoadError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL

_KINDS = {
    "config_A_B": ("constant", "lora", "none", "vector"),
    "config_C": ("lora", "none", "vector"),
    "config_D_E": ("constant", "none", "vector"),
}


@dataclass
class GloraConfig(TargetedConfig):
    """Settings of GLoRA.

    Args:
        r: rank of what is "lora".
        bias: "none", "all" or "glora_only": which biases of the base model are trained.
        config_A_B: what scales and what shifts the weight: "lora", "vector" (a number for each output), "constant"
            (one number) or "none".
        config_C: what the bias gains of the weight: "lora", "vector" (a number for each input) or "none".
        config_D_E: what scales and what shifts the bias: "vector", "constant" or "none".
        init_weights: begin as the identity; False draws everything.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Chavan et al. 2023, arXiv:2306.07967, §3.
    Differs: GPT-2's `Conv1D`, `exclude_modules` and `layers_to_transform` work here.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern")

    peft_type: str | None = "GLORA"
    r: int = 8
    bias: str = "none"
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_bias(self.bias, "glora")
        for name, known in _KINDS.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"Invalid {name} value: {value!r}. Valid values are: {', '.join(known)}.")


class GloraPatch(Patch):
    """W' = W + W ∘ A + B, and b' = b + b ∘ D + E + W·C, where there is a bias.

    Several adapters each change the base weight and bias, not what others made of them.

    Weights, for each of A and B (out, in), C (in, 1), D and E (out,):
        lora: glora_A.Xd (out, r), zeros, times glora_A.Xu (r, in), He-uniform with a = √5.
        vector: glora_A.X (out, 1), glora_C.X (in, 1), glora_D.X (out,): zeros.
        constant: glora_A.X (1,): zero.
        none: glora_A.zeros, of the whole shape, only because HF reads and writes it.
    """

    reads_base = True
    reweighs = True

    def setup(self, site: Site, config: GloraConfig) -> None:
        of_weight = config.config_A_B
        across, of_bias = ("none", "none") if site.bias is None else (config.config_C, config.config_D_E)
        out, inputs = site.out_features, site.in_features
        self.scale_w = self.declare("glora_A", of_weight, (out, inputs), config)
        self.shift_w = self.declare("glora_B", of_weight, (out, inputs), config)
        self.across = self.declare("glora_C", across, (inputs, 1), config)
        self.scale_b = self.declare("glora_D", of_bias, (out,), config)
        self.shift_b = self.declare("glora_E", of_bias, (out,), config)

    def declare(self, place: str, kind: str, shape: tuple[int, ...], config: GloraConfig) -> tuple[str, ...]:
        """Declare the weights of one of the five; their attributes, of which there are none where it is nothing."""
        if kind == "none":
            zeros = np.zeros(shape, np.float32)
            self.put(f"{place}_zeros", self.weight(f"{place}.zeros", shape, zeros, fixed=True, dtype=self.site.dtype))
            return ()
        parts: dict[str, tuple[int, ...]] = {"X": (1,)} if kind == "constant" else {"X": (shape[0], 1)[: len(shape)]}
        if kind == "lora":
            parts = {"Xd": (shape[0], config.r), "Xu": (config.r, shape[-1])}
        for name, size in parts.items():
            init = "zeros" if config.init_weights and name != "Xu" else _drawn(kind, size)
            self.put(f"{place}_{name}", self.weight(f"{place}.{name}", size, init))
        return tuple(f"{place}_{name}" for name in parts)

    def check_values(self, attribute: str, values: np.ndarray) -> None:
        if attribute.endswith("zeros") and values.any():
            raise LoadError("by the adapter's config there are only zeros here, and these are others")

    def value(self, names: tuple[str, ...]) -> Tensor:
        """One of the five, as far as it must be spread out to be added or multiplied."""
        x = getattr(self, names[0])
        return x if len(names) == 1 else ops.matmul(x, getattr(self, names[1]))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        base = self.base_weight()
        if self.scale_w:
            w = ops.add(w, ops.add(ops.mul(base, self.value(self.scale_w)), self.value(self.shift_w)))
        if b is None:
            return w, b
        if self.scale_b:
            own = ops.cast(getattr(self.site.layer, self.site.bias_name), self.dtype)
            b = ops.add(b, ops.add(ops.mul(own, self.value(self.scale_b)), self.value(self.shift_b)))
        if self.across:
            b = ops.add(b, ops.reshape(ops.matmul(base, self.value(self.across)), (-1,)))
        return w, b


def _drawn(kind: str, shape: tuple[int, ...]) -> Initializer:
    """How a weight of this kind begins at random."""
    if kind == "constant":
        return Normal(0.02)
    # As torch draws the weights of a linear layer: of a row of n numbers with n inputs.
    return he_uniform() if len(shape) > 1 else Uniform(1 / math.sqrt(shape[0]))


class GloraModel(Tuner):
    """The base model with GLoRA adapters in it, and the switches over them."""


METHOD = Method(config=GloraConfig, tuner=GloraModel, patches={"dense": GloraPatch}, default_targets=USUAL)
