"""C³A: the update is made of circulant blocks."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal, Uniform

from msft_peft.config import TargetedConfig, check_bias, check_patterns, check_positive
from msft_peft.core.patch import Patch
from msft_peft.core.targets import match_pattern
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL

_INITS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


@dataclass
class C3AConfig(TargetedConfig):
    """Settings of C³A.

    Args:
        block_size: side of a block; divides the inputs and the outputs of every layer.
        bias: "none", "all" or "c3a_only": which biases of the base model are trained.
        block_size_pattern: regex for the end of a layer's path -> its own block size.
        init_weights: "xavier_uniform" (or False), "kaiming_uniform" or "gaussian", none of which begins as the
            identity; True begins with zeros.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range.

    Source: Chen et al. 2024, arXiv:2407.19342, §3.
    Differs: HF fails with two active adapters; here they add up. `exclude_modules` and GPT-2's
        `Conv1D` work here.
    """

    beyond_hf = ("exclude_modules",)

    peft_type: str | None = "C3A"
    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_size_pattern = self.block_size_pattern or {}
        check_positive("block_size", self.block_size)
        check_patterns("block_size_pattern", self.block_size_pattern, check_positive)
        check_bias(self.bias, "c3a")
        if self.init_weights not in _INITS:
            raise ConfigError(f"Unknown init_weights: {self.init_weights!r}; there are {_INITS}")


class C3APatch(Patch):
    """W' = W + ΔW / in, with the block ΔW[m, n] circulant: its entry [k, i] is w[m, n, (i - k) mod b].

    Weights:
        c3a_kernel (out / b, in / b, b): uniform in ±√(6 / (in + out)), or see `init_weights`.

    A product with such blocks is a convolution, which HF does by Fourier transforms. MindSpore has no gradient of
    complex products on CPU, so that the blocks are laid out, by one gather.
    """

    builds_delta = True

    def setup(self, site: Site, config: C3AConfig) -> None:
        out, inputs = site.shape
        self.block_size = b = match_pattern(config.block_size_pattern, site.path, config.block_size)
        for what, size in (("input", inputs), ("output", out)):
            if size % b:
                raise ConfigError(
                    f"The block size should be a factor of the {what} size. However, the {what} size is {size} and "
                    f"the block size is {b}: at {site.path}."
                )
        self.c3a_kernel = self.weight("c3a_kernel", (out // b, inputs // b, b), _init(config, out, inputs))
        places = (np.arange(b) - np.arange(b)[:, None]) % b
        self.places = Tensor(places.reshape(-1).astype(np.int32))

    def delta_weight(self) -> Tensor:
        rows, columns, b = self.c3a_kernel.shape
        blocks = ops.reshape(ops.gather(self.c3a_kernel, self.places, 2), (rows, columns, b, b))
        return ops.div(ops.reshape(ops.transpose(blocks, (0, 2, 1, 3)), self.site.shape), columns * b)


def _init(config: C3AConfig, out: int, inputs: int) -> Any:
    if config.init_weights is True:
        return "zeros"
    if config.init_weights == "gaussian":
        return Normal(1.0)
    return Uniform(math.sqrt(1 / inputs if config.init_weights == "kaiming_uniform" else 6 / (inputs + out)))


class C3AModel(Tuner):
    """The base model with C3A adapters in it, and the switches over them."""


METHOD = Method(
    config=C3AConfig,
    tuner=C3AModel,
    patches={"dense": C3APatch},
    default_targets=USUAL | {key: ["mlp.c_proj"] for key in ("gpt2", "gpt_bigcode")},
    identity_at_init=False,
)
