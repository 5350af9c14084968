"""Poly: skills, each a small LoRA, that every task mixes in its own way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Uniform

from msft_peft.config import TargetedConfig, check_positive
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, MergeError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL

_EPS = 1e-12
TASKS = "task_ids"
# Arguments of language models whose first axis is the batch.
_ROWS = ("input_ids", "inputs_embeds")


@dataclass
class PolyConfig(TargetedConfig):
    """Settings of Poly and of multi-head routing.

    Args:
        r: rank of each skill.
        init_weights: begin with an update of zero; False draws B at random too.
        poly_type: "poly", the one that there is.
        n_tasks: how many tasks are told apart by `model(..., task_ids=...)`.
        n_skills: skills of a layer, k.
        n_splits: parts of a layer's inputs and outputs, each of which mixes the skills for itself, q; more than one is
            multi-head routing.
        target_modules, exclude_modules, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a number below 1, or another `poly_type`.

    Source: Ponti et al. 2022, arXiv:2202.13914; multi-head routing: Caccia et al. 2022, arXiv:2211.03831.
    Differs: with one task no `task_ids` are needed. `layers_to_transform`, and layers that store (in, out), as GPT-2's
        `Conv1D`, work here.
    """

    beyond_hf = ("layers_to_transform", "layers_pattern")

    peft_type: str | None = "POLY"
    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            check_positive(name, getattr(self, name))


class PolyPatch(Patch):
    """y = W·x + b + B_t·A_t·x / r, with A_t = Σ w_tk·A_k, B_t = Σ w_tk·B_k over the skills k of the row's task t.

    w_t = s / Σs,  s = σ(z_t); while it trains, s is drawn from RelaxedBernoulli(z_t), anew for each row. Each of the q
    parts of the inputs and outputs has logits and weights of its own.

    Weights:
        poly_lora_A (q, k, in / q, r): He-uniform with a = √5.
        poly_lora_B (q, k, r, out / q): zeros.
        poly_router.module_logits (tasks, q·k): z, uniform in ±0.001.

    A row whose task is not known to compiled code becomes NaN there; a call of a model in Python refuses it.
    """

    def setup(self, site: Site, config: PolyConfig) -> None:
        self.r, self.n_tasks, self.n_skills, self.n_splits = config.r, config.n_tasks, config.n_skills, config.n_splits
        self.poly_type = config.poly_type
        q, (out, into) = config.n_splits, site.shape
        for what, size in (("input", into), ("output", out)):
            if size % q:
                raise ConfigError(f"n_splits={q} should be a factor of the {what} size {size}: at {site.path}.")
        up = "zeros" if config.init_weights else Uniform(config.r**-0.5)
        shape = (q, config.n_skills)
        self.poly_lora_A = self.weight("poly_lora_A", (*shape, into // q, self.r), Uniform((into // q) ** -0.5))
        self.poly_lora_B = self.weight("poly_lora_B", (*shape, self.r, out // q), up)
        logits = (config.n_tasks, q * config.n_skills)
        self.module_logits = self.weight("poly_router.module_logits", logits, Uniform(1e-3), "module_logits")

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        out, into = self.site.shape
        w = self.shares(x)
        rows = w.shape[1]
        a = ops.reshape(self._mixed(w, self.poly_lora_A), (rows, into, self.r))
        b = ops.reshape(ops.transpose(self._mixed(w, self.poly_lora_B), (0, 2, 1, 3)), (rows, self.r, out))
        delta = ops.bmm(ops.bmm(ops.reshape(self.cast(x), (rows, -1, into)), a), ops.div(b, self.r))
        return ops.add(y, ops.reshape(delta, y.shape))

    def shares(self, x: Tensor) -> Tensor:
        """w (q, B, k) for the rows of x; (q, 1, k) where it is the same for all of them."""
        logits = self.module_logits
        if self.n_tasks > 1:
            tasks = self.routing.tasks(x)
            known = ops.logical_and(ops.greater_equal(tasks, 0), ops.less(tasks, self.n_tasks))
            chosen = ops.cast(ops.equal(ops.expand_dims(tasks, 1), ops.arange(self.n_tasks)), self.dtype)
            lost = ops.where(known, ops.zeros_like(tasks, dtype=self.dtype), float("nan"))
            logits = ops.add(ops.matmul(chosen, logits), ops.expand_dims(lost, 1))
        if self.training:
            logits = ops.add(logits, self.noise((x.shape[0], logits.shape[1])))
        s = ops.reshape(ops.sigmoid(logits), (-1, self.n_splits, self.n_skills))
        return ops.transpose(ops.div(s, ops.add(ops.sum(s, -1, keepdim=True), _EPS)), (1, 0, 2))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Logistic random numbers: what makes a sigmoid a relaxed Bernoulli variable of temperature 1."""
        z = ops.square(ops.standard_normal((4, *shape)))
        # z₁² + z₂² is exponential, and the logarithm of the quotient of two of these is logistic.
        return ops.cast(ops.sub(ops.log(ops.add(z[0], z[1])), ops.log(ops.add(z[2], z[3]))), self.dtype)

    def _mixed(self, w: Tensor, skills: Tensor) -> Tensor:
        """(q, B, k) and (q, k, m, n) -> (B, q, m, n)."""
        q, k, m, n = skills.shape
        mixed = ops.bmm(w, ops.reshape(skills, (q, k, m * n)))
        return ops.transpose(ops.reshape(mixed, (q, -1, m, n)), (1, 0, 2, 3))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_mergeable()
        return w, b

    def check_mergeable(self) -> None:
        raise MergeError("Poly's update is another one for each task, so that no weight has it merged in.")


class PolyModel(Tuner):
    """The base model with Poly adapters in it: `model(..., task_ids=...)`, and the switches over them.

    `task_ids` (B,), integers, has the task of each row. Layers must keep the batch as their first axis.
    """

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        given = {}
        for key in kwargs:
            if key != TASKS:
                given[key] = kwargs[key]
        if TASKS not in kwargs or kwargs[TASKS] is None:
            if self.tasks() > 1:
                raise ValueError("task_ids should not be None: adapters of several tasks need the task of each row.")
            return self.model(*args, **given)
        noted = self.routing.note_tasks(kwargs[TASKS])
        if args:
            _require_a_task_each(args[0], kwargs[TASKS])
            return self.model(ops.depend(args[0], noted), *args[1:], **given)
        tied = {}
        for key in given:
            if key in _ROWS:
                _require_a_task_each(given[key], kwargs[TASKS])
            # Some other argument may be what the layers compute with.
            tied[key] = ops.depend(given[key], noted) if isinstance(given[key], Tensor) else given[key]
        return self.model(**tied)

    def tasks(self) -> int:
        """How many tasks the adapters that act tell apart at most; 0 if none acts."""
        count = 0
        for layer in self.routing.layers:
            for name in self.routing.names if self.routing.names else layer.active:
                if layer.enabled and name in layer.adapters.keys():
                    count = max(count, layer.adapters[name].n_tasks)
        return count

    def noted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.check_arguments(kwargs)
        if kwargs.get(TASKS) is None:
            if self.tasks() > 1:
                raise ValueError("task_ids should not be None: adapters of several tasks need the task of each row.")
            return kwargs
        self.routing.note_tasks(_integers(kwargs[TASKS]))
        return {key: value for key, value in kwargs.items() if key != TASKS}

    def check_arguments(self, kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError if `task_ids` are not, for each row, the number of a task."""
        if kwargs.get(TASKS) is None:
            return
        ids = _integers(kwargs[TASKS]).asnumpy()
        if ids.ndim != 1:
            raise ValueError(f"task_ids must be (B,), a task for each row, got {ids.shape}")
        beyond = [int(task) for task in ids if not 0 <= task < self.tasks()]
        if beyond and self.tasks():
            raise ValueError(f"Only {self.tasks()} tasks available. Found task id = {beyond[0]}")


def _require_a_task_each(x: Tensor, task_ids: Tensor) -> None:
    if x.shape[0] != task_ids.shape[0]:
        raise ValueError(f"task_ids must be one for each of the {x.shape[0]} rows, got {task_ids.shape[0]}")


def _integers(task_ids: Any) -> Tensor:
    return Tensor(np.asarray(task_ids.asnumpy() if isinstance(task_ids, Tensor) else task_ids), ms.int32)


METHOD = Method(
    config=PolyConfig,
    tuner=PolyModel,
    patches={"dense": PolyPatch},
    default_targets=USUAL,
    merges=False,
)
