"""PeftModel, its task classes, and `get_peft_model`."""

from msft_peft.model.build import get_peft_model
from msft_peft.model.mixed import PeftMixedModel
from msft_peft.model.peft_model import PeftModel
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
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
]
