"""The task classes: one model, and the heads that each task trains whole."""

from typing import ClassVar

from msft_peft.config import TaskType
from msft_peft.model.peft_model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A PeftModel of a decoder that predicts the next token."""

    _task: ClassVar[TaskType | None] = TaskType.CAUSAL_LM
    _pads_labels: ClassVar[bool] = True
    _pipeline_tag: ClassVar[str | None] = "text-generation"


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel of an encoder-decoder."""

    _task: ClassVar[TaskType | None] = TaskType.SEQ_2_SEQ_LM
    _has_decoder: ClassVar[bool] = True


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel of a sequence classifier; its head (`classifier` or `score`) is trained whole and saved."""

    _task: ClassVar[TaskType | None] = TaskType.SEQ_CLS
    _extends_types: ClassVar[bool] = True
    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel of a token classifier; its head (`classifier` or `score`) is trained whole and saved."""

    _task: ClassVar[TaskType | None] = TaskType.TOKEN_CLS
    _extends_types: ClassVar[bool] = True
    _pads_labels: ClassVar[bool] = True
    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel of an extractive reader; its head (`qa_outputs`) is trained whole and saved."""

    _task: ClassVar[TaskType | None] = TaskType.QUESTION_ANS
    _extends_types: ClassVar[bool] = True
    _heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel):
    """A PeftModel of an encoder whose hidden states are what is wanted."""

    _task: ClassVar[TaskType | None] = TaskType.FEATURE_EXTRACTION
