"""HuggingFace's PEFT API over MindSpore: `from msft_peft import LoraConfig, get_peft_model`."""

from msft_peft import tuners
from msft_peft.config import PeftConfig, TaskType
from msft_peft.core.inject import inject_adapter_in_model
from msft_peft.core.tuner import Tuner
from msft_peft.errors import (
    AdapterNameError,
    ConfigError,
    LoadError,
    MergeError,
    NoMatchingPeftModuleError,
    PeftError,
    PeftWarning,
)
from msft_peft.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from msft_peft.registry import discover, get_peft_config, peft_types
from msft_peft.tuners.lora import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    save_as_lora,
)

discover(tuners)
PeftType = peft_types()

__version__ = "0.1.0"

__all__ = [
    "AdapterNameError",
    "ConfigError",
    "CordaConfig",
    "EvaConfig",
    "LoadError",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MergeError",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "Tuner",
    "convert_to_lora",
    "get_eva_state_dict",
    "get_peft_config",
    "get_peft_model",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "preprocess_corda",
    "preprocess_loraga",
    "save_as_lora",
]
