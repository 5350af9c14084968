"""What every model has: construction from a config, loading and saving HF checkpoints, access to its embeddings."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from huggingface_hub import CommitInfo
from mindspore import Parameter, nn
from mindspore.common.np_dtype import bfloat16
from mindspore.nn.utils import no_init_parameters

from msft_peft.backend.arrays import as_float32
from msft_peft.backend.hub import Target
from msft_peft.models.checkpoint import as_bytes, fetch_checkpoint, tensor_shapes, tensors, write_tensors
from msft_peft.models.config import ModelConfig
from msft_peft.models.resizing import resize_rows

_NUMPY = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: bfloat16}
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # TensorFlow's, in old BERTs


class PreTrainedModel(nn.Cell):
    """The base of all models here.

    Attributes:
        config: the model's `ModelConfig`.
        config_class: the config class of the family.
        base_model_prefix: the attribute under which a model with a head keeps its body ("model", "bert").
        old_prefixes: other names that the body has in files of the same family.
        buffers: a regex of the ends of keys that stand for derived values, which old files carry; they are left out.
        heads: the parts of keys that belong to task heads; a checkpoint may carry heads that this class lacks.
        fresh_heads: the heads that a checkpoint may lack altogether; they are then drawn anew, with a warning.
        parent_library: where a torch user finds the class of the same name; written into files that name a class.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    base_model_prefix: ClassVar[str] = ""
    old_prefixes: ClassVar[tuple[str, ...]] = ()
    buffers: ClassVar[str] = r"position_ids|rotary_emb\.inv_freq"
    heads: ClassVar[tuple[str, ...]] = ()
    fresh_heads: ClassVar[tuple[str, ...]] = ()
    parent_library: ClassVar[str] = "transformers"

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(config).__name__}. "
                f"Build one, or call {type(self).__name__}.from_pretrained(folder_or_hub_id)."
            )
        self.config = config

    def add_body(self, body: PreTrainedModel) -> Any:
        """Put the body in the place that `base_model_prefix` names, and return it."""
        setattr(self, self.base_model_prefix, body)
        return body

    @classmethod
    def from_config(cls, config: ModelConfig) -> PreTrainedModel:
        """Build the model with random weights, N(0, initializer_range²); `mindspore.set_seed` makes them repeat."""
        return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        config: ModelConfig | None = None,
        dtype: str | ms.Type | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Build the model and fill it from an HF checkpoint, `config.json` and safetensors, without torch.

        All keys and shapes are checked, from the files' headers, before a weight is read. Weights are read one at a
        time, straight into the model: the peak is the model and its largest tensor.

        Args:
            name_or_path: a folder, or a Hub id.
            config: settings to use in place of the folder's `config.json`.
            dtype: the type of all weights, "float32", "float16", "bfloat16" or MindSpore's. Default, or "auto": the
                checkpoint's own; but bfloat16 becomes float32 on CPU, which has hardly any bfloat16 kernels.
            ignore_mismatched_sizes: draw a task head anew where the checkpoint's has another shape (another number
                of labels); everywhere else a wrong shape stays an error.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder` go to the Hub;
                all others override settings of the config: `num_labels=3`.

        Raises:
            FileNotFoundError: no such folder, or no safetensors in it.
            ValueError: a broken file; or tensors that are missing, unexpected or misshapen: all are listed at once.
        """
        folder, paths, overrides = fetch_checkpoint(name_or_path, kwargs)
        if config is None:
            config = cls.config_class.from_pretrained(folder, **overrides)
        else:
            config = cls.config_class.from_dict(config.to_dict(), **overrides)
        config.name_or_path = os.fspath(name_or_path)
        wanted = _dtype(dtype)
        with no_init_parameters():  # memory is given to a weight only when its value is read
            model = cls(config)
        model._fill(paths, wanted, ignore_mismatched_sizes)
        model.set_train(False)
        return model

    def save_pretrained(self, folder: str | os.PathLike, max_shard_size: int | str = "5GB", **kwargs: Any) -> None:
        """Write `config.json` and `model.safetensors` with HF's keys, atomically; transformers reads them.

        Args:
            folder: made if it is not there.
            max_shard_size: bytes, or "300MB"; larger checkpoints are written as several files and their index.
            kwargs: `safe_serialization`, which is always on.

        Raises:
            TypeError: an argument that this function does not have.
            ValueError: `max_shard_size` is no size.
        """
        kwargs.pop("safe_serialization", None)
        if kwargs:
            raise TypeError(
                f"save_pretrained got {sorted(kwargs)}, which it does not have; it takes a folder and max_shard_size."
            )
        limit = as_bytes(max_shard_size)
        self.config.architectures = [type(self).__name__]
        arrays = {name: parameter.asnumpy() for name, parameter in self.parameters_and_names()}
        write_tensors(arrays, folder, limit)
        self.config.save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit: all of it is on the Hub afterwards, or nothing.

        Args:
            repo_id: "owner/name", or a name in one's own account; made if it is not there.
            commit_message, commit_description: of the commit.
            private: of a new repository.
            token: who one is; default: who is logged in.
            create_pr: open a pull request instead.
            revision: a branch, made if it is not there; default: main.

        Raises:
            HubError: no right to, no network, or a repository that is there and not as `private` says.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            target = Target(repo_id, token, private, revision, create_pr)
            return target.commit(Path(folder), commit_message or "Upload model", commit_description)

    @property
    def base_model(self) -> nn.Cell:
        """The body without the task head; the model itself where it has none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def name_or_path(self) -> str:
        """Where the weights came from."""
        return self.config.name_or_path

    @property
    def dtype(self) -> ms.Type:
        """The type of the first weight."""
        return next(self.get_parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count the weights; tied ones once."""
        return sum(p.size for p in self.get_parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Cell:
        """Return the Cell that turns token ids into vectors."""
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Cell | None:
        """Return the Cell that turns vectors into scores over the vocabulary, or None."""
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Cell:
        """Give the vocabulary another size: the embedding, the head over it, tied or not, and `config.vocab_size`.

        Optimizers and gradient functions that were built before know the old weights: build them anew.

        Args:
            new_num_tokens: how many tokens; None leaves it as it is.
            pad_to_multiple_of: round that up.
            mean_resizing: new tokens begin as the mean of all others; otherwise they are drawn from
                N(0, initializer_range²).

        Returns:
            The embedding layer.

        Raises:
            ValueError: fewer than one token, or adapters are on the layers.

        Differs: HF adds a little noise to the mean.
        """
        table, now = self.get_input_embeddings(), self.config.get("vocab_size")
        size = now if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"resize_token_embeddings: {size} tokens; there must be at least one.")
        if size != now:
            std = None if mean_resizing else self.config.initializer_range
            resize_rows(self, table, self.get_output_embeddings(), size, std)
            self.config.update({"vocab_size": size})
        return table

    def _fill(self, paths: list[str], dtype: ms.Type | None, resize_heads: bool) -> None:
        """Give every weight its value from the files, after all keys and shapes were checked."""
        targets = _all_paths(self)
        found = tensor_shapes(paths)
        names = self._own_names(list(found), set(targets))
        shapes = {names[key]: shape for key, shape in found.items() if not re.search(rf"({self.buffers})$", key)}

        filled = {id(targets[name]) for name in shapes if name in targets}
        missing = [name for name, p in targets.items() if id(p) not in filled]
        absent = [head for head in self.fresh_heads if not any(_under(name, head) for name in shapes)]
        fresh = {name for name in missing if any(_under(name, head) for head in absent)}
        misshapen = {n: s for n, s in shapes.items() if n in targets and tuple(targets[n].shape) != s}
        if resize_heads:
            fresh |= {name for name in misshapen if any(_under(name, head) for head in self.fresh_heads)}
        unexpected = [n for n in shapes if n not in targets and not any(_under(n, head) for head in self.heads)]
        problems = [f"missing: {name} {tuple(targets[name].shape)}" for name in missing if name not in fresh]
        problems += [f"unexpected: {name} {shapes[name]}" for name in unexpected]
        problems += [
            f"misshapen: {name} is {shape} in the checkpoint, {tuple(targets[name].shape)} in the model"
            for name, shape in misshapen.items()
            if name not in fresh
        ]
        if problems:
            raise ValueError(
                f"{type(self).__name__} cannot be filled from {', '.join(paths)}: {len(problems)} misfits:\n  "
                + "\n  ".join(sorted(problems))
                + "\nCheck that config.json belongs to these files and that the class is the one for the task."
            )
        for key, array in tensors(paths):
            name = names[key]
            if name in targets and name not in fresh:
                _set(targets[name], array, dtype)
        if fresh:
            for name in fresh:
                _start(targets[name], dtype)
            warnings.warn(
                f"{type(self).__name__} was given new random weights for {sorted(fresh)}, which "
                f"'{self.config.name_or_path}' does not hold (in this shape). Train them before you use the model.",
                stacklevel=3,
            )

    def _own_names(self, keys: list[str], targets: set[str]) -> dict[str, str]:
        """Translate a checkpoint's keys: old names, and the body's prefix where one side has it, or has another."""
        prefix = "" if self.base_model is self else self.base_model_prefix + "."
        known = [f"{name}." for name in (self.base_model_prefix, *self.old_prefixes)]
        theirs = next((name for name in known if any(key.startswith(name) for key in keys)), "")
        names = {}
        for key in keys:
            name = key
            for old, new in _LEGACY.items():
                name = name[: -len(old)] + new if name.endswith(old) else name
            if name not in targets and name.startswith(theirs) and prefix + name[len(theirs) :] in targets:
                name = prefix + name[len(theirs) :]
            names[key] = name
        return names


def _under(name: str, head: str) -> bool:
    return name == head or name.startswith(head + ".") or f".{head}." in name


def _all_paths(cell: nn.Cell, prefix: str = "") -> dict[str, Parameter]:
    """Map every path at which a Parameter stands to it; a tied one stands at several, as do those of a shared Cell."""
    paths = {prefix + name: parameter for name, parameter in cell._params.items() if parameter is not None}
    for name, child in cell._cells.items():
        if child is not None:
            paths.update(_all_paths(child, f"{prefix}{name}."))
    return paths


def _dtype(dtype: str | ms.Type | None) -> ms.Type | None:
    """Return the MindSpore type for `dtype`; None for the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    wanted = getattr(ms, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in _NUMPY:
        raise ValueError(f"dtype={dtype!r} is none of float32, float16, bfloat16 or 'auto'.")
    return wanted


def _set(parameter: Parameter, array: np.ndarray, dtype: ms.Type | None) -> None:
    """Let `parameter` take over the memory of `array`, after a cast where one is needed."""
    if dtype is None:
        dtype = {np.dtype(np.float16): ms.float16, np.dtype(bfloat16): ms.bfloat16}.get(array.dtype, ms.float32)
        if dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU":
            dtype = ms.float32
    if dtype == ms.float32:
        array = as_float32(array)
    parameter.set_dtype(dtype)
    parameter.set_data(ms.from_numpy(np.ascontiguousarray(array, dtype=_NUMPY[dtype])))


def _start(parameter: Parameter, dtype: ms.Type | None) -> None:
    """Draw a weight that no checkpoint gave."""
    if dtype is not None:
        parameter.set_dtype(dtype)
    parameter.init_data()
