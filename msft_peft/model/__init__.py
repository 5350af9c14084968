"""PeftModel, its task classes, and `get_peft_model`."""

from msft_peft.model.arrow import create_arrow_model
from msft_peft.model.build import get_peft_model
from msft_peft.model.checkpointing import prepare_model_for_gradient_checkpointing, prepare_model_for_kbit_training
from msft_peft.model.mixed import PeftMixedModel
from msft_peft.model.peft_model import PeftModel
from msft_peft.model.precision import cast_mixed_precision_params, disable_input_dtype_casting
from msft_peft.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from msft_peft.model.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

__all__ = [
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "cast_mixed_precision_params",
    "create_arrow_model",
    "disable_input_dtype_casting",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "prepare_model_for_gradient_checkpointing",
    "prepare_model_for_kbit_training",
]
