"""AdaLoRA: the ranks of all layers are shared out among them while they train."""

from msft_peft.registry import Method
from msft_peft.tuners.adalora.allocation import RankAllocator
from msft_peft.tuners.adalora.callback import AdaLoraCallback
from msft_peft.tuners.adalora.config import AdaLoraConfig
from msft_peft.tuners.adalora.model import AdaLoraModel
from msft_peft.tuners.adalora.patch import AdaLoraPatch
from msft_peft.tuners.architectures import ADALORA

__all__ = ["METHOD", "AdaLoraCallback", "AdaLoraConfig", "AdaLoraModel", "AdaLoraPatch", "RankAllocator"]

METHOD = Method(
    config=AdaLoraConfig,
    patches=dict.fromkeys(("dense", "conv2d"), AdaLoraPatch),
    default_targets=ADALORA,
    mixed=True,
    tuner=AdaLoraModel,
)
