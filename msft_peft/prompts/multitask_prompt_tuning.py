"""Multitask prompt tuning: one prompt for many tasks, times a low-rank matrix for each task."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend.arrays import as_float32
from msft_peft.backend.tree import Named
from msft_peft.config import check_count
from msft_peft.errors import ConfigError, LoadError
from msft_peft.io.adapter import read_file, read_tensors
from msft_peft.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig
from msft_peft.registry import Method


class MultitaskPromptTuningInit(str, Enum):
    """What the prompt begins as: as in prompt tuning, or what other tasks have left of theirs."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861).

    Args:
        prompt_tuning_init: a `MultitaskPromptTuningInit`: "RANDOM" or "TEXT" as in prompt tuning; or from the source
            adapter its shared prompt alone ("ONLY_SOURCE_SHARED"), with the mean of its tasks' factors
            ("AVERAGE_SOURCE_TASKS"), or with those of one task ("EXACT_SOURCE_TASK").
        prompt_tuning_init_state_dict_path: the source adapter's file (safetensors, or torch's .bin), or its folder.
        prompt_tuning_init_task: that one task.
        num_ranks: rank of a task's matrix.
        num_tasks: how many tasks there are; 1 to begin from source tasks.

    Raises:
        ConfigError: an unknown way to begin, one that lacks what it needs, or a number that is none.
    """

    peft_type: str = "MULTITASK_PROMPT_TUNING"
    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_ranks", "num_tasks"):
            check_count(name, getattr(self, name))

    def _check_init(self, kind: type[Enum]) -> None:
        super()._check_init(MultitaskPromptTuningInit)


class MultitaskPromptEmbedding(PromptEmbedding):
    """E ∘ (C_t·R_t) for the task t of each row of the batch: E (n, d) is shared, C_t (n, r) and R_t (r, d) are not.

    Args:
        config: a `MultitaskPromptTuningConfig`.
        word_embeddings: see `PromptEmbedding`.
        undrawn: see `VirtualTokens`.

    Raises:
        ConfigError: the source file is not named, or has not what is asked for.
    """

    in_decoder: ClassVar[bool] = True

    def setup(self, config: Any, word_embeddings: nn.Cell | None) -> None:
        super().setup(config, word_embeddings)
        tasks, ranks = config.num_tasks, config.num_ranks
        self.prefix_task_cols = _drawn("prefix_task_cols", (tasks, self.tokens, ranks))
        self.prefix_task_rows = _drawn("prefix_task_rows", (tasks, ranks, config.token_dim))
        if config.prompt_tuning_init in _FROM_SOURCE and not (config.inference_mode or self.undrawn):
            self._begin_from(_source(config), config)

    def _begin_from(self, source: dict[str, np.ndarray], config: Any) -> None:
        new = {"embedding.weight": source["prompt_embeddings"]}
        if config.prompt_tuning_init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            if config.num_tasks != 1:
                raise ConfigError(
                    f"prompt_tuning_init={config.prompt_tuning_init.value!r} makes one task of the source's: "
                    f"num_tasks must be 1, got {config.num_tasks}."
                )
            for name in ("prefix_task_cols", "prefix_task_rows"):
                new[name] = _one_task(source[name], config)
        for path, p in self.parameters_and_names():
            if path in new and new[path].shape != tuple(p.shape):
                raise ConfigError(
                    f"{config.prompt_tuning_init_state_dict_path}: {path} has shape {new[path].shape} there, here "
                    f"{tuple(p.shape)}. num_virtual_tokens, num_ranks and the base model must be those of the source."
                )
        for path, p in self.parameters_and_names():
            if path in new:
                p.set_data(Tensor(new[path]))

    def construct(self, indices: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        """(B, n, d) for `task_ids` (B,), integers."""
        if task_ids is None:
            raise ValueError("task_ids cannot be None: say which task each row of the batch belongs to.")
        rows = super().construct(indices)
        cols = ops.gather(self.prefix_task_cols, task_ids, 0)
        return ops.mul(ops.expand_dims(rows, 0), ops.bmm(cols, ops.gather(self.prefix_task_rows, task_ids, 0)))

    def stored(self) -> dict[str, Named]:
        beside = {
            name: Named(name, name, p, tuple(p.shape))
            for name, p in (("prefix_task_cols", self.prefix_task_cols), ("prefix_task_rows", self.prefix_task_rows))
        }
        return super().stored() | beside


def _drawn(name: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(Tensor(np.random.normal(0.0, 0.02, shape).astype(np.float32)), name=name)


def _source(config: Any) -> dict[str, np.ndarray]:
    """The source adapter's tensors."""
    given = config.prompt_tuning_init_state_dict_path
    if given is None:
        raise ConfigError(
            "prompt_tuning_init_state_dict_path needs to be specified with "
            f"{config.prompt_tuning_init.value} init method"
        )
    path = Path(given)
    if not path.exists():
        raise ConfigError(f"prompt_tuning_init_state_dict_path: there is no file {path}")
    try:
        tensors = read_tensors(path) if path.is_dir() else read_file(path)
    except (FileNotFoundError, LoadError) as error:
        raise ConfigError(f"prompt_tuning_init_state_dict_path: {error}") from error
    source = {key: as_float32(array) for key, array in tensors.arrays.items()}
    missing = sorted({"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"} - set(source))
    if missing and (config.prompt_tuning_init != "ONLY_SOURCE_SHARED" or "prompt_embeddings" in missing):
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path: {tensors.origin} has no {missing}; it has {sorted(source)}"
        )
    return source


def _one_task(factors: np.ndarray, config: Any) -> np.ndarray:
    """(tasks, ...) -> (1, ...): the mean of all tasks, or the one that the config names."""
    if config.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
        return factors.mean(0, keepdims=True)
    task = config.prompt_tuning_init_task
    if not 0 <= task < len(factors):
        raise ConfigError(f"prompt_tuning_init_task={task}, but the source has the tasks 0 to {len(factors) - 1}")
    return factors[task : task + 1]


METHOD = Method(
    config=MultitaskPromptTuningConfig, prompt=MultitaskPromptEmbedding, identity_at_init=False, merges=False
)
