"""LoRA."""

from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL
from msft_peft.tuners.lora.arrow import ArrowPatch
from msft_peft.tuners.lora.bdlora import BdLoraPatch
from msft_peft.tuners.lora.config import LoraConfig, LoraRuntimeConfig
from msft_peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from msft_peft.tuners.lora.corda import preprocess_corda
from msft_peft.tuners.lora.dora import DoraEmbeddingPatch, DoraPatch
from msft_peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from msft_peft.tuners.lora.extras import extra_patches
from msft_peft.tuners.lora.init_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from msft_peft.tuners.lora.kasa import KasaPatch
from msft_peft.tuners.lora.lora_ga import preprocess_loraga
from msft_peft.tuners.lora.model import LoraModel
from msft_peft.tuners.lora.monteclora import MontecloraPatch
from msft_peft.tuners.lora.patch import LoraEmbeddingPatch, LoraPatch
from msft_peft.tuners.lora.variant_config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from msft_peft.tuners.lora.velora import VeloraPatch

__all__ = [
    "METHOD",
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraEmbeddingPatch",
    "LoraGAConfig",
    "LoraModel",
    "LoraPatch",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "save_as_lora",
]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")

METHOD = Method(
    config=LoraConfig,
    patches={"dense": LoraPatch, "embedding": LoraEmbeddingPatch} | dict.fromkeys(_CONVOLUTIONS, LoraPatch),
    variants={
        "dora": {"dense": DoraPatch, "embedding": DoraEmbeddingPatch} | dict.fromkeys(_CONVOLUTIONS, DoraPatch),
        "alora": {"dense": LoraPatch},
        "arrow": {"dense": ArrowPatch},
        "bdlora": {"dense": BdLoraPatch},
        "kasa": {"dense": KasaPatch},
        "velora": {"dense": VeloraPatch},
        "monteclora": {"dense": MontecloraPatch},
        "mica": {"dense": LoraPatch, "embedding": LoraEmbeddingPatch},
    },
    default_targets=USUAL,
    mixed=True,
    extras=extra_patches,
    tuner=LoraModel,
)
