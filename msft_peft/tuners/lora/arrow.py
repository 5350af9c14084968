"""Arrow: a router that lets each token be served by the adapters whose main input direction it is nearest to."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.core.patch import Patch, Reference
from msft_peft.errors import MergeError
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.patch import LoraPatch

_GENERAL = re.compile(r"gks_\d+")
_numbers = itertools.count()


class Prototypes:
    """(E + 1, in): the adapters' main input directions, and a row of zeros.

    No Cell, so that they are not among the model's parameters.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = Parameter(Tensor(rows), name=f"arrow_prototypes_{next(_numbers)}", requires_grad=False)

    def __deepcopy__(self, memo: dict) -> "Prototypes":
        # Compiled code tells Parameters apart by their names: another one for the copy.
        return Prototypes(to_numpy(self.rows).copy())


class ArrowPatch(LoraPatch):
    """A router over the plain LoRA adapters at its layer: y = y₀ + Σₑ cₑ(x)·sₑ·Bₑ·Aₑ·x for each token x.

    Formula: vₑ is the first right singular vector of Bₑ·Aₑ. Of the affinities |x·vₑ| the `top_k` largest count, and c
    is the softmax of these over the temperature. With `use_gks` the means of the general adapters' A and B are
    subtracted from each Aₑ and Bₑ.

    Weights: lora_A and lora_B, as in HF's files. They have no part in anything and are not trained.

    Source: Ostapenko et al. 2024, arXiv:2405.11157, §4; GenKnowSub: arXiv:2505.10939.
    Differs: HF subtracts the general knowledge from the adapters' own weights, for good; here the router does. HF's
    vectors are those of a power iteration from a random start, and stay as they were when the weights change.
    """

    factored = grows = False
    routes: tuple[Reference, ...] = ()
    general: tuple[Reference, ...] = ()

    def setup(self, site: Site, config: LoraConfig) -> None:
        super().setup(site, config)
        self.fixed |= {"lora_A", "lora_B"}
        self.counted |= self.fixed
        self.arrow = config.arrow_config
        self.temperature = 1.0 / config.arrow_config.router_temperature
        self.meet({})

    def meet(self, others: Mapping[str, Patch]) -> None:
        general = self.arrow.gks_adapter_names or [] if self.arrow.use_gks else []
        tasks = {
            name: patch
            for name, patch in others.items()
            if not isinstance(patch, ArrowPatch) and name not in general and not _GENERAL.fullmatch(name)
        }
        self.fault = self._fault(tasks, general, others)
        if self.fault:
            self.routes = self.general = ()
            return
        self.routes = tuple(Reference(patch) for patch in tasks.values())
        self.general = tuple(Reference(others[name]) for name in general)
        means = [
            np.mean([_values(others[name], factor) for name in general], 0) if general else 0.0 for factor in "AB"
        ]
        rows = np.stack(
            [
                main_direction(_values(patch, "A") - means[0], _values(patch, "B") - means[1])
                for patch in tasks.values()
            ]
        )
        # One more row, so that what compiled code cuts out is not all of them, see `shares`.
        rows = np.pad(rows, ((0, 1), (0, 0))).astype(np.float32)
        known = self.__dict__.get("prototypes")
        if known is not None and known.rows.shape == rows.shape:
            write(known.rows, rows)
        else:
            self.prototypes = Prototypes(rows)

    def _fault(self, tasks: Mapping[str, Patch], general: list[str], others: Mapping[str, Patch]) -> str:
        """Why there can be no routing here; empty if there can."""
        where = f"The Arrow router at {self.site.path}"
        lost = sorted(set(general) - set(others))
        if lost:
            return f"{where} needs the general adapters {lost}, which are not there: load them."
        for name, patch in [*tasks.items(), *((name, others[name]) for name in general)]:
            if not is_plain(patch):
                return f"{where} routes among plain LoRA adapters only, and {name!r} is none: take it out."
        if len({patch.lora_A.shape for patch in (*tasks.values(), *(others[name] for name in general))}) > 1:
            return f"{where} routes among adapters of one rank: give them the same r."
        if len(tasks) < self.arrow.top_k:
            return f"{where} is to choose top_k={self.arrow.top_k} of {len(tasks)} adapters: load more, or lower it."
        return ""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.fault:
            raise ValueError(self.fault)
        tokens = ops.reshape(self.cast(x), (-1, x.shape[-1]))
        a, b = self.factors()
        h = ops.reshape(ops.matmul(tokens, ops.transpose(a, (1, 0))), (-1, len(self.routes), self.r))
        h = ops.mul(h, ops.expand_dims(self.shares(tokens), -1))
        delta = ops.matmul(ops.reshape(h, (-1, a.shape[0])), b)
        return ops.add(y, self.lora_dropout(ops.reshape(delta, y.shape)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(E·r, in) and (E·r, out): the adapters' A, scaled, and their B, transposed, one below the other."""
        mean_a: Any = 0.0
        mean_b: Any = 0.0
        for reference in self.general:
            mean_a = mean_a + reference.cell.lora_A / len(self.general)
            mean_b = mean_b + reference.cell.lora_B / len(self.general)
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        for reference in self.routes:
            patch = reference.cell
            downs.append(patch.scaled(patch.lora_A - mean_a))
            ups.append(ops.transpose(patch.lora_B - mean_b, (1, 0)))
        return ops.concat(downs, 0), ops.concat(ups, 0)

    def shares(self, tokens: Tensor) -> Tensor:
        """c (tokens, E)."""
        # A bare Parameter of a plain object cannot cross the parts of a compiled graph; what is cut out of it can.
        rows = ops.depend(self.prototypes.rows, tokens)[: len(self.routes)]
        affinity = ops.abs(ops.matmul(tokens, ops.transpose(rows, (1, 0))))
        least = ops.stop_gradient(ops.topk(affinity, self.arrow.top_k)[0][:, -1:])
        out = ops.full_like(affinity, -1e30)
        return ops.softmax(ops.where(affinity >= least, affinity * self.temperature, out), -1)

    @property
    def additive(self) -> bool:
        return False

    def check_mergeable(self) -> None:
        raise MergeError("Cannot merge an active Arrow router adapter. Remove it first: it has no weight to add.")


def main_direction(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(in,): the first right singular vector of b·a; zero while their values are not loaded yet."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.zeros(a.shape[1], np.float32)
    q, upper = np.linalg.qr(a.T)
    return q @ np.linalg.svd(b @ upper.T)[2][0]


def is_plain(patch: Patch) -> bool:
    """Whether all that the Patch does is to add s·B·A to a dense layer's weight, and the layer's weight is its own."""
    return (
        type(patch) is LoraPatch
        and patch.site.kind == "dense"
        and patch.additive
        and not (patch.residual or patch.invocation is not None)
    )


def _values(patch: nn.Cell, factor: str) -> np.ndarray:
    return as_float32(to_numpy(getattr(patch, f"lora_{factor}")))
