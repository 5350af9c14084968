"""Files of weights from one format into another, without the model that they are for."""

import re
from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from msft_peft.backend.files import replacing
from msft_peft.core.adapter import check_name
from msft_peft.core.keys import PREFIX
from msft_peft.errors import ConfigError, LoadError
from msft_peft.io.adapter import ADAPTER_ENTRY, read_file, write_arrays

READABLE, WRITABLE = (".safetensors", ".ckpt", ".bin"), (".safetensors", ".ckpt")

# Virtual tokens, as HF's files and as parameters call them.
_VIRTUAL_TOKENS, _PROMPT = "prompt_embeddings", "prompt_encoder."
# MindSpore's names for what HF's files call weight and bias.
_LOCAL = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
# A weight that a tuner adds: its name, as HF spells them, ends in a capital or tells of a tuner.
_OF_A_TUNER = re.compile(r"\.((?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|[a-z_]+_[A-Z])(?=\.|$))")


def convert(source: Path, target: Path, adapter_name: str = "default") -> int:
    """Write the tensors of one file as another; the formats are told by the names' endings.

    Args:
        source: `.safetensors`, `.ckpt` or `.bin`.
        target: `.safetensors` or `.ckpt`; its folder is made if need be.
        adapter_name: what an adapter is called in the names of a `.ckpt`.

    Returns:
        The number of tensors.

    Raises:
        AdapterNameError: `adapter_name` cannot be one.
        ConfigError: a format that is not read or not written, or an adapter that is a network which makes tokens.
        FileNotFoundError: there is no `source`.
        LoadError: it is broken, or two tensors would get one name.
    """
    if source.suffix not in READABLE or target.suffix not in WRITABLE:
        raise ConfigError(
            f"cannot convert '{source.name}' to '{target.name}': {', '.join(READABLE)} are read, "
            f"{' and '.join(WRITABLE)} are written."
        )
    check_name(adapter_name)
    if not source.is_file():
        raise FileNotFoundError(f"there is no file '{source}'")
    tensors = read_file(source)
    adapter = any(key.startswith((PREFIX, _PROMPT)) or key == _VIRTUAL_TOKENS for key in tensors.arrays)
    renamed: dict[str, np.ndarray] = {}
    for key, array in tensors.arrays.items():
        if adapter and source.suffix == ".ckpt":
            key = _as_hf_key(key, tensors.adapter or adapter_name)
        if adapter and target.suffix == ".ckpt":
            key = _as_parameter_name(key, adapter_name)
        if key in renamed:
            raise LoadError(f"{source} has two tensors that would be called {key}")
        renamed[key] = array
    if target.suffix == ".ckpt":
        _write_ckpt(target, renamed, adapter_name if adapter else None)
    else:
        write_arrays(target, renamed)
    return len(renamed)


def _as_hf_key(name: str, adapter: str) -> str:
    """A parameter's name without the adapter's: ...q_proj.lora_A.default.weight -> ...q_proj.lora_A.weight."""
    if name.startswith(_PROMPT):
        if name != f"{_PROMPT}{adapter}.embedding.weight":
            raise ConfigError(
                f"{name} is of a network that makes virtual tokens, which HF's files do not have. Load the adapter "
                "into its base model and call save_pretrained: that evaluates the network."
            )
        return _VIRTUAL_TOKENS
    below = name.removeprefix(PREFIX)
    below = re.sub(rf"\.modules_to_save\.{re.escape(adapter)}(?=\.)", "", below)
    below = re.sub(rf"\.{re.escape(adapter)}(?=(\.[^.]+)?$)", "", below)
    layer, dot, weight = below.rpartition(".")
    return PREFIX + layer + dot + _LOCAL.get(weight, weight)


def _as_parameter_name(key: str, adapter: str) -> str:
    """The adapter's name where a tuner's weight has it; other tensors keep their keys, which are read all the same."""
    if not key.startswith(PREFIX):
        return key
    return PREFIX + _OF_A_TUNER.sub(rf".\1.{adapter}", key.removeprefix(PREFIX), count=1)


def _write_ckpt(path: Path, arrays: Mapping[str, np.ndarray], adapter: str | None) -> None:
    parameters = [{"name": key, "data": Tensor(np.ascontiguousarray(arrays[key]))} for key in sorted(arrays)]
    entry = {} if adapter is None else {ADAPTER_ENTRY: adapter}
    with replacing(path) as temporary:
        ms.save_checkpoint(parameters, str(temporary), append_dict=entry or None)
