"""MindPet's operations on a network: freeze parts of it, save what is trained. The modules bear MindPet's names."""

from msft_peft.graph.ckpt_util import TrainableParamsCheckPoint
from msft_peft.graph.freeze_utils import freeze_delta, freeze_from_config, freeze_modules

__all__ = ["TrainableParamsCheckPoint", "freeze_delta", "freeze_from_config", "freeze_modules"]
