"""transformers' Trainer on mindnlp: it takes our models for what it takes HF peft's."""

import functools
import importlib
import warnings
from typing import Any

from msft_peft.errors import PeftWarning

_NAMES = ("_is_peft_model", "is_peft_available")


@functools.cache
def teach(kind: type) -> None:
    """Let the Trainer know models of this class for `PeftModel`s, once a process; of other models it thinks as before.

    It asks whether a model is one of peft's to decide how to save it, to resume and to load the best: by
    `save_pretrained` and `load_adapter`, or by a state dict of the whole model. Without peft it never asks, and the
    questions are functions of its module; there is nothing that one could register with.
    """
    trainer: Any = importlib.import_module("transformers.trainer")
    if not all(hasattr(trainer, name) for name in _NAMES):
        warnings.warn(
            "This release of transformers has a Trainer that does not know these models: its checkpoints hold the "
            'whole model instead of the adapters. Say save_strategy="no", and call model.save_pretrained.',
            PeftWarning,
            stacklevel=4,
        )
        return
    installed, theirs = trainer.is_peft_available(), trainer._is_peft_model
    trainer._is_peft_model = lambda model: isinstance(model, kind) or bool(installed and theirs(model))
    trainer.PeftModel = (kind, trainer.PeftModel) if installed else kind
    trainer.is_peft_available = lambda: True
