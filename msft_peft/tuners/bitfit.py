"""BitFit: only biases are trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mindspore import Tensor, nn, ops

from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method


@dataclass
class BitFitConfig(TargetedConfig):
    """BitFit: what biases gain is trained, and nothing else.

    Args:
        target_modules: layers whose biases are trained; None means all that have one: dense, convolution and norm
            layers.

    With another method: `LoraConfig(bias="all")` and the `bias` of the adapters' configs train the biases themselves
    within that one adapter; `get_peft_model(mixed=True)` puts a BitFit adapter beside others.
    """

    peft_type: str | None = "BITFIT"


class BitFitPatch(Patch):
    """b' = b + δ.

    Weights: bitfit.bias, as b: zeros.

    What the bias gains, and not the bias itself, so that several adapters can be had and switched off.

    Source: Ben Zaken et al. 2022, arXiv:2106.10199.
    """

    def setup(self, site: Site, config: BitFitConfig) -> None:
        if site.bias is None:
            raise ConfigError(
                f"Target module {site.path} has no bias for BitFit to train. Leave it out of target_modules; without "
                "any, all layers that have one are found."
            )
        self.bitfit_bias = self.weight("bitfit.bias", tuple(site.bias.shape), "zeros")
        self.channel_axis = site.channel_axis

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.bitfit_bias
        if self.channel_axis == 1:
            delta = ops.reshape(delta, (-1,) + (1,) * (len(y.shape) - 2))
        return ops.add(y, delta)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w, b + self.bitfit_bias


def with_bias(config: BitFitConfig, model: nn.Cell, sites: Mapping[str, Site]) -> str:
    """All layers that have a bias, but those that are trained whole.

    Raises:
        ConfigError: there are none.
    """
    paths = [path for path, site in sites.items() if site.bias is not None and site.kind in METHOD.patches]
    if not paths:
        raise ConfigError("BitFit trains biases, and none of the model's layers has one: choose another method.")
    # Not a list: "head" in one would mean "other.head" as well, whether that has a bias or not.
    return "|".join(map(re.escape, paths))


METHOD = Method(
    config=BitFitConfig,
    patches=dict.fromkeys(("dense", "conv1d", "conv2d", "conv3d", "norm"), BitFitPatch),
    find_targets=with_bias,
    mixed=True,
)
