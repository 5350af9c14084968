"""AdaLoRA: the ranks of all layers are shared out among them while they train."""

from collections.abc import Mapping
from typing import Any

from mindspore import nn

from msft_peft.registry import Method
from msft_peft.tuners.adalora.allocation import RankAllocator
from msft_peft.tuners.adalora.callback import AdaLoraCallback
from msft_peft.tuners.adalora.config import AdaLoraConfig
from msft_peft.tuners.adalora.model import AdaLoraModel
from msft_peft.tuners.adalora.patch import AdaLoraPatch
from msft_peft.tuners.architectures import ADALORA

__all__ = ["METHOD", "AdaLoraCallback", "AdaLoraConfig", "AdaLoraModel", "AdaLoraPatch", "RankAllocator"]


def check_pattern(
    model: nn.Cell, config: AdaLoraConfig, cells: Any, patches: Mapping[str, AdaLoraPatch], *_: Any
) -> dict:
    """No Patches beside those at the targets; a `rank_pattern` must be about these.

    Raises:
        ConfigError: it names others.
    """
    config.check_pattern([patch.key_of(patch.site) for patch in patches.values()])
    return {}


METHOD = Method(
    config=AdaLoraConfig,
    patches=dict.fromkeys(("dense", "conv2d"), AdaLoraPatch),
    default_targets=ADALORA,
    mixed=True,
    tuner=AdaLoraModel,
    extras=check_pattern,
)
