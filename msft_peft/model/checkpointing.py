"""What a model is prepared with before it is trained in little memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from mindspore import nn

from msft_peft.backend.graphs import drop_compiled
from msft_peft.core.adapter import configs_of
from msft_peft.core.checkpointing import set_checkpointing
from msft_peft.core.tuner import base_of
from msft_peft.errors import ConfigError
from msft_peft.model.precision import halves_to_float32


def prepare_model_for_gradient_checkpointing(
    model: nn.Cell, enabled: bool = True, blocks: str | Sequence[str] | None = None
) -> nn.Cell:
    """Compute the activations of the model's blocks again in the backward pass instead of keeping them.

    `PeftModel.gradient_checkpointing_enable` and `_disable` do the same; this is for a model with no adapters yet.
    Adapters that are put in later are recomputed too. Gradients are the same, also with dropout (compiled, if
    `mindspore.set_seed` was called before the model was built). In PyNative the peak of memory falls to that of one
    block and the blocks' inputs. Compiled code only has marks for the compiler, which may save memory by them or not:
    measure there.

    Args:
        model: any Cell.
        enabled: False keeps the activations again.
        blocks: path of the CellList of the blocks, or those of several; by default they are looked for where Llama,
            BERT, GPT-2, T5 and their like have them.

    Returns:
        The model.

    Raises:
        ConfigError: no blocks were found (the lists that there are are named), or they drop whole channels at random.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    set_checkpointing(base_of(model), enabled, blocks)
    return model


def prepare_model_for_kbit_training(
    model: nn.Cell,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Cell:
    """Freeze a base model, give its half-precision parameters float32, and recompute its blocks' activations.

    To be called before `get_peft_model`. Integer parameters, which hold quantised weights, stay as they are.

    Args:
        model: the base model.
        use_gradient_checkpointing: whether to do the last of the three.
        gradient_checkpointing_kwargs: at most `use_reentrant`, which makes no difference here.

    Returns:
        The model.

    Raises:
        ConfigError: it has adapters already, which would be frozen too; no blocks were found; or
            the kwargs are not these. It is then as it was.
    """
    base = base_of(model)
    if configs_of(base):
        raise ConfigError(
            "prepare_model_for_kbit_training: this model has adapters, which would be frozen. Call it before "
            "get_peft_model."
        )
    if gradient_checkpointing_kwargs and not use_gradient_checkpointing:
        raise ConfigError("gradient_checkpointing_kwargs mean nothing with use_gradient_checkpointing=False.")
    if use_gradient_checkpointing:
        set_checkpointing(base, True, kwargs=gradient_checkpointing_kwargs)
    for p in base.get_parameters():
        p.requires_grad = False
    halves_to_float32(base)
    drop_compiled()
    return model
