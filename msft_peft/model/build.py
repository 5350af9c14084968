"""`get_peft_model`: the way in."""

import copy
import warnings

from mindspore import nn

from msft_peft.config import PeftConfig
from msft_peft.core.inject import say_the_second_time
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import as_cell, model_config
from msft_peft.model.mixed import PeftMixedModel
from msft_peft.model.peft_model import PeftModel


def get_peft_model(
    model: nn.Cell,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a fresh adapter into `model` and return the model to train: the adapter trainable, all else frozen.

    Args:
        model: any `nn.Cell`; it is changed in place, and none of its weights is copied.
        peft_config: the method and its settings; it is copied.
        adapter_name: the adapter's name.
        mixed: for adapters of different methods in one model; see `PeftMixedModel`.
        autocast_adapter_dtype: keep adapter weights in float32 where the base is in half precision.
        revision: of the base model, noted in the saved config.
        low_cpu_mem_usage: draw no random weights, since they are about to be loaded; until then they are NaN.

    Returns:
        A `PeftModel`, of the class that the config's `task_type` names, or a `PeftMixedModel`.

    Raises:
        ConfigError: the config is none, or of an unknown method, or names layers that the method cannot work on.
        NoMatchingPeftModuleError: its targets match nothing in the model.
        NotImplementedError: it asks for something that is not built; the field is named.

    Differs: HF changes the config that it is given.
    """
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"The input config must be a PeftConfig, got {type(peft_config)}")
    model = as_cell(model)
    say_the_second_time(model)
    config = copy.deepcopy(peft_config)
    settings = model_config(model)
    name = settings.get("_name_or_path") or settings.get("name_or_path") or getattr(model, "name_or_path", None)
    if config.base_model_name_or_path not in (None, name) and name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{config.base_model_name_or_path}' to "
            f"'{name}'. Please ensure that the correct base model is loaded when loading this checkpoint.",
            PeftWarning,
            stacklevel=2,
        )
    config.base_model_name_or_path = name or config.base_model_name_or_path
    config.revision = revision or config.revision
    kind = PeftMixedModel if mixed else PeftModel._for_task(config)
    return kind(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
