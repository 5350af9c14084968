"""The Auto classes: they pick a model's class from `model_type` in its `config.json`."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from msft_peft.models import bert, bloom, gpt2, llama, opt, roberta, t5
from msft_peft.models.checkpoint import CONFIG_FILE, resolve_folder
from msft_peft.models.config import CONFIG_CLASSES, ModelConfig
from msft_peft.models.pretrained import PreTrainedModel


class AutoConfig(ModelConfig):
    """Reads a config of any supported family: `AutoConfig.from_pretrained(folder_or_hub_id)`."""

    @classmethod
    def for_model(cls, model_type: str, **values: Any) -> ModelConfig:
        """Build the config of a family from settings."""
        return cls.from_dict({"model_type": model_type}, **values)


class _AutoModel:
    classes: ClassVar[tuple[type[PreTrainedModel], ...]] = ()

    def __init__(self):
        raise TypeError(f"{type(self).__name__} is not built itself: call its from_pretrained or from_config.")

    @classmethod
    def class_for(cls, config: ModelConfig) -> type[PreTrainedModel]:
        """Return the class for the config's family.

        Raises:
            ValueError: this task is not built for that family.
        """
        for model_class in cls.classes:
            if model_class.config_class is type(config):
                return model_class
        built = ", ".join(model_class.config_class.model_type for model_class in cls.classes)
        raise ValueError(
            f"{cls.__name__} has no model for model_type '{config.model_type}'; it has: {built}. "
            f"All families: {', '.join(CONFIG_CLASSES)}."
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> PreTrainedModel:
        """Build the model with random weights."""
        return cls.class_for(config)(config)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        """Load an HF checkpoint; the arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the family, or this task of it, is not built; or as in `PreTrainedModel.from_pretrained`.
        """
        config = kwargs.get("config")
        if config is None:
            folder, _ = resolve_folder(name_or_path, [CONFIG_FILE], kwargs)
            config = AutoConfig.from_pretrained(folder)
        return cls.class_for(config).from_pretrained(name_or_path, **kwargs)


class AutoModel(_AutoModel):
    """The model without a head."""

    classes = (
        llama.LlamaModel,
        llama.MistralModel,
        llama.Qwen2Model,
        llama.Qwen3Model,
        gpt2.GPT2Model,
        opt.OPTModel,
        bloom.BloomModel,
        bert.BertModel,
        roberta.RobertaModel,
        t5.T5Model,
        t5.MT5Model,
    )


class AutoModelForCausalLM(_AutoModel):
    """The model that scores the next token."""

    classes = (
        llama.LlamaForCausalLM,
        llama.MistralForCausalLM,
        llama.Qwen2ForCausalLM,
        llama.Qwen3ForCausalLM,
        gpt2.GPT2LMHeadModel,
        opt.OPTForCausalLM,
        bloom.BloomForCausalLM,
    )


class AutoModelForSequenceClassification(_AutoModel):
    """The model that scores whole sequences."""

    classes = (
        llama.LlamaForSequenceClassification,
        llama.MistralForSequenceClassification,
        llama.Qwen2ForSequenceClassification,
        llama.Qwen3ForSequenceClassification,
        gpt2.GPT2ForSequenceClassification,
        opt.OPTForSequenceClassification,
        bloom.BloomForSequenceClassification,
        bert.BertForSequenceClassification,
        roberta.RobertaForSequenceClassification,
        t5.T5ForSequenceClassification,
        t5.MT5ForSequenceClassification,
    )


class AutoModelForTokenClassification(_AutoModel):
    """The model that scores every token."""

    classes = (
        llama.LlamaForTokenClassification,
        llama.MistralForTokenClassification,
        llama.Qwen2ForTokenClassification,
        llama.Qwen3ForTokenClassification,
        gpt2.GPT2ForTokenClassification,
        bloom.BloomForTokenClassification,
        bert.BertForTokenClassification,
        roberta.RobertaForTokenClassification,
        t5.T5ForTokenClassification,
        t5.MT5ForTokenClassification,
    )


class AutoModelForQuestionAnswering(_AutoModel):
    """The model that scores where an answer starts and ends."""

    classes = (
        llama.LlamaForQuestionAnswering,
        llama.MistralForQuestionAnswering,
        llama.Qwen2ForQuestionAnswering,
        llama.Qwen3ForQuestionAnswering,
        gpt2.GPT2ForQuestionAnswering,
        opt.OPTForQuestionAnswering,
        bloom.BloomForQuestionAnswering,
        bert.BertForQuestionAnswering,
        roberta.RobertaForQuestionAnswering,
        t5.T5ForQuestionAnswering,
        t5.MT5ForQuestionAnswering,
    )


class AutoModelForMaskedLM(_AutoModel):
    """The model that scores the token behind a mask."""

    classes = (bert.BertForMaskedLM, roberta.RobertaForMaskedLM)


class AutoModelForSeq2SeqLM(_AutoModel):
    """The encoder-decoder that scores the next token."""

    classes = (t5.T5ForConditionalGeneration, t5.MT5ForConditionalGeneration)
