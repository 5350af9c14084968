"""HuggingFace's PEFT API over MindSpore: `from msft_peft import LoraConfig, get_peft_model`."""

from typing import TYPE_CHECKING, Any

from msft_peft import (
    prompts,
    tuners,
)
from msft_peft.config import (
    HF_PEFT_VERSION,
    NOT_BUILT,
    PeftConfig,
    PromptLearningConfig,
    TaskType,
)
from msft_peft.core.inject import inject_adapter_in_model
from msft_peft.core.switch import (
    rescale_adapter_scale,
)
from msft_peft.core.tuner import (
    Tuner,
)
from msft_peft.errors import (
    AdapterNameError,
    ConfigError,
    HubError,
    LoadError,
    MergeError,
    NoBaseModelError,
    NoMatchingPeftModuleError,
    PeftError,
    PeftWarning,
)
from msft_peft.io.adapter import (
    check_if_peft_model,
)
from msft_peft.io.load import (
    LoadReport,
)
from msft_peft.io.mindpet import (
    mindpet_to_peft,
    peft_to_mindpet,
)
from msft_peft.io.pet_config import (
    from_pet_config,
    to_pet_config,
)
from msft_peft.io.state import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from msft_peft.model import (
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    TunerLayerStatus,
    TunerModelStatus,
    cast_mixed_precision_params,
    create_arrow_model,
    disable_input_dtype_casting,
    get_layer_status,
    get_model_status,
    get_peft_model,
    prepare_model_for_gradient_checkpointing,
    prepare_model_for_kbit_training,
)
from msft_peft.prompts.cartridge import (
    CartridgeConfig,
    CartridgeEncoder,
)
from msft_peft.prompts.cpt import (
    CPTConfig,
    CPTEmbedding,
)
from msft_peft.prompts.kv_prefix import (
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from msft_peft.prompts.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from msft_peft.prompts.p_tuning import (
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
)
from msft_peft.prompts.prefix_tuning import (
    PrefixEncoder,
    PrefixTuningConfig,
)
from msft_peft.prompts.prompt_tuning import (
    PromptEmbedding,
    PromptTuningConfig,
    PromptTuningInit,
)
from msft_peft.registry import (
    METHODS,
    discover,
    get_peft_config,
    peft_types,
)
from msft_peft.tuners.adalora import (
    AdaLoraCallback,
    AdaLoraConfig,
    AdaLoraModel,
)
from msft_peft.tuners.adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
)
from msft_peft.tuners.beft import (
    BeftConfig,
    BeftModel,
)
from msft_peft.tuners.bitfit import (
    BitFitConfig,
)
from msft_peft.tuners.boft import (
    BOFTConfig,
    BOFTModel,
)
from msft_peft.tuners.bottleneck_adapter import (
    BottleneckAdapterConfig,
)
from msft_peft.tuners.c3a import (
    C3AConfig,
    C3AModel,
)
from msft_peft.tuners.deft import (
    DeftConfig,
    DeftModel,
)
from msft_peft.tuners.delora import (
    DeloraConfig,
    DeloraModel,
)
from msft_peft.tuners.fourierft import (
    FourierFTConfig,
    FourierFTModel,
)
from msft_peft.tuners.glora import (
    GloraConfig,
    GloraModel,
)
from msft_peft.tuners.gralora import (
    GraloraConfig,
    GraloraModel,
)
from msft_peft.tuners.hira import (
    HiraConfig,
    HiraModel,
)
from msft_peft.tuners.hra import (
    HRAConfig,
    HRAModel,
)
from msft_peft.tuners.ia3 import (
    IA3Config,
    IA3Model,
)
from msft_peft.tuners.lily import (
    LilyConfig,
    LilyModel,
)
from msft_peft.tuners.ln_tuning import (
    LNTuningConfig,
    LNTuningModel,
)
from msft_peft.tuners.loha import (
    LoHaConfig,
    LoHaModel,
)
from msft_peft.tuners.lokr import (
    LoKrConfig,
    LoKrModel,
)
from msft_peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    save_as_lora,
)
from msft_peft.tuners.lora.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from msft_peft.tuners.low_rank_adapter import (
    LowRankAdapterConfig,
)
from msft_peft.tuners.miss import (
    MissConfig,
    MissModel,
)
from msft_peft.tuners.oft import (
    OFTConfig,
    OFTModel,
)
from msft_peft.tuners.osf import (
    OSFConfig,
    OSFModel,
)
from msft_peft.tuners.peanut import (
    PeanutConfig,
    PeanutModel,
)
from msft_peft.tuners.poly import (
    PolyConfig,
    PolyModel,
)
from msft_peft.tuners.pvera import (
    PveraConfig,
    PveraModel,
)
from msft_peft.tuners.r_drop import (
    WithRDropLoss,
)
from msft_peft.tuners.randlora import (
    RandLoraConfig,
    RandLoraModel,
)
from msft_peft.tuners.road import (
    RoadConfig,
    RoadModel,
)
from msft_peft.tuners.shira import (
    ShiraConfig,
    ShiraModel,
)
from msft_peft.tuners.supertuning import (
    SupertuningConfig,
    SupertuningModel,
)
from msft_peft.tuners.tinylora import (
    TinyLoraConfig,
    TinyLoraModel,
)
from msft_peft.tuners.trainable_tokens import (
    TrainableTokensConfig,
    TrainableTokensModel,
)
from msft_peft.tuners.unilora import (
    UniLoraConfig,
    UniLoraModel,
)
from msft_peft.tuners.vblora import (
    VBLoRAConfig,
    VBLoRAModel,
)
from msft_peft.tuners.vera import (
    VeraConfig,
    VeraModel,
)
from msft_peft.tuners.waveft import (
    WaveFTConfig,
    WaveFTModel,
)

if TYPE_CHECKING:
    from msft_peft.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )

discover(tuners)
discover(prompts)
PeftType = peft_types()
# HF's tables, of what is here.
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType(name): method.config for name, method in METHODS.items()}
PEFT_TYPE_TO_TUNER_MAPPING = {
    PeftType(name): method.tuner or method.prompt or Tuner for name, method in METHODS.items()
}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}

__version__ = "0.1.0"

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdapterNameError",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "BdLoraConfig",
    "BeftConfig",
    "BeftModel",
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "C3AConfig",
    "C3AModel",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "ConfigError",
    "CordaConfig",
    "DeftConfig",
    "DeftModel",
    "DeloraConfig",
    "DeloraModel",
    "EvaConfig",
    "FourierFTConfig",
    "FourierFTModel",
    "GloraConfig",
    "GloraModel",
    "GraloraConfig",
    "GraloraModel",
    "HRAConfig",
    "HRAModel",
    "HiraConfig",
    "HiraModel",
    "HubError",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LilyConfig",
    "LilyModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoadError",
    "LoadReport",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "LowRankAdapterConfig",
    "MergeError",
    "MissConfig",
    "MissModel",
    "MontecloraConfig",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoBaseModelError",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "OSFConfig",
    "OSFModel",
    "PeanutConfig",
    "PeanutModel",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PolyConfig",
    "PolyModel",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PveraConfig",
    "PveraModel",
    "RandLoraConfig",
    "RandLoraModel",
    "RoadConfig",
    "RoadModel",
    "ShiraConfig",
    "ShiraModel",
    "SupertuningConfig",
    "SupertuningModel",
    "TaskType",
    "TinyLoraConfig",
    "TinyLoraModel",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "Tuner",
    "TunerLayerStatus",
    "TunerModelStatus",
    "UniLoraConfig",
    "UniLoraModel",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
    "WaveFTConfig",
    "WaveFTModel",
    "WithRDropLoss",
    "cast_mixed_precision_params",
    "check_hotswap_configs_compatible",
    "check_if_peft_model",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "create_arrow_model",
    "disable_input_dtype_casting",
    "from_pet_config",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "mindpet_to_peft",
    "peft_to_mindpet",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_gradient_checkpointing",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "to_pet_config",
]


def __getattr__(name: str) -> Any:
    # They bring all reference models with them.
    if name in __all__ and name.startswith("AutoPeft"):
        from msft_peft import auto

        return getattr(auto, name)
    method = next((key for key, start in NOT_BUILT.items() if name in _classes(start)), None)
    if method is not None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: {method} is a method of HF peft {HF_PEFT_VERSION} "
            f"that is not built here yet. There are {sorted(METHODS)}."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _classes(start: str) -> tuple[str, ...]:
    return tuple(start + end for end in ("Config", "Model", "Encoder"))
