"""What the contract is tested on: for each method, a table of models and configs in the module of its name."""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from msft_peft import PeftConfig, PeftModel, get_peft_model
from msft_peft.core.layer import TunerLayer
from msft_peft.core.patch import Patch
from msft_peft.core.wrapper import fixed_in
from msft_peft.registry import METHODS, Method
from tests.tolerances import array


@dataclass(frozen=True)
class Case:
    """A model, a config, and what must come of them, said by hand.

    Attributes:
        note: what is special; the test's id.
        net: makes the base model.
        settings: the config's arguments.
        targets: paths of the layers that are adapted.
        whole: paths of the layers that are trained whole, as copies.
        trains: the base model's own parameters that are trained in place (biases).
        identity: False if these settings change the outputs at once, whatever the method's default.
        merges: False if a layer here cannot be merged, though the method can.
        life: it is also tested on what does not depend on the kind of layer: files, switches, failures.
        residual: the base weights give up what the fresh adapter adds, so that they are not what they were beside it.
        idle: names of weights that have no part in evaluation, and no gradient there.
        method: filled in by `all_cases`.
    """

    note: str
    net: Callable[[], nn.Cell]
    settings: dict[str, Any]
    targets: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    trains: tuple[str, ...] = ()
    identity: bool = True
    merges: bool = True
    life: bool = False
    residual: bool = False
    idle: tuple[str, ...] = ()
    method: Method = field(default=None, repr=False)  # type: ignore[assignment]

    @property
    def can_merge(self) -> bool:
        return self.method.merges and self.merges

    def base(self) -> nn.Cell:
        """The base model; the same weights each time."""
        ms.set_seed(5)
        return self.net().set_train(False)

    def config(self, **changes: Any) -> PeftConfig:
        return self.method.config(**self.settings | changes)

    def adapted(self, name: str = "default", base: nn.Cell | None = None, **changes: Any) -> PeftModel:
        """The base model with one adapter, whose weights are random and large enough to matter."""
        model = get_peft_model(base or self.base(), self.config(**changes), adapter_name=name)
        shake(weights_of(model, name))
        return model

    def pair(self) -> PeftModel:
        """The base model with two adapters, "one" (active) and "two"; neither trains a bias, which two cannot."""
        unbiased = {"bias": "none"} if "bias" in self.settings else {}
        model = self.adapted("one", **unbiased)
        model.add_adapter("two", self.config(**unbiased))
        shake(weights_of(model, "two"), seed=2)
        return model


def all_cases() -> list[Case]:
    """The cases of every registered method that works in a model's layers."""
    return [case for case in _every_case() if case.method.prompt is None]


def prompt_cases() -> list[Case]:
    """The cases of every registered method that puts something before the input."""
    return [case for case in _every_case() if case.method.prompt is not None]


def _every_case() -> list[Case]:
    """Each method has a module of cases, or this fails."""
    return [
        replace(case, method=method, note=f"{name.lower()}-{case.note}")
        for name, method in sorted(METHODS.items())
        for case in importlib.import_module(f"tests.cases.{name.lower()}").CASES
    ]


# `make test-2.7.2` asks for few cases: what differs between versions is MindSpore's, not a method's.
FEW = bool(os.environ.get("FEW_CASES"))
# One of each kind: what adds, changes the input, takes the layer's place, shares weights.
KINDS = ("LORA", "OFT", "LN_TUNING", "VERA")


def life_cases() -> list[Case]:
    """Some cases of each method, for what depends on its bookkeeping and not on the kinds of layers."""
    found = [case for case in all_cases() if case.life]
    firsts = {case.method.name: case for case in reversed(found)}
    return [case for case in found if not FEW or case.method.name == "LORA" or case is firsts[case.method.name]]


def first_cases() -> list[Case]:
    """One plain case of each method, for what does not depend on the layers."""
    firsts = list({case.method.name: case for case in reversed(all_cases())}.values())
    return [case for case in firsts if not FEW or case.method.name in KINDS]


def block_cases() -> list[Case]:
    """One case of each method with layers some levels down, for what depends on their paths."""
    nested = [case for case in all_cases() if case.targets[0].count(".") > 1 and not case.trains]
    firsts = list({case.method.name: case for case in reversed(nested)}.values())
    return [case for case in firsts if not FEW or case.method.name in KINDS]


def weights_of(model: nn.Cell, adapter: str) -> list[Parameter]:
    """The parameters that bear the adapter's name and may train. No layer of the test models is called like one."""
    fixed = {id(p) for p in fixed_of(model)}
    return [p for p in model.get_parameters() if adapter in p.name.split(".") and id(p) not in fixed]


def fixed_of(model: nn.Cell) -> list[Parameter]:
    """What adapters never train."""
    found = [p for layer in layers_of(model) for patch in layer.adapters.values() for p in fixed_in(patch)]
    return list({id(p): p for p in found}.values())


def kept_of(model: nn.Cell) -> list[Parameter]:
    """What adapters never train and keep in files."""
    patches = [patch for layer in layers_of(model) for patch in layer.adapters.values()]
    shared = [patch.shared for patch in patches if patch.shared is not None]
    made = {id(getattr(holder, attribute)) for holder in [*patches, *shared] for attribute in holder.unsaved}
    return [p for p in fixed_of(model) if id(p) not in made]


def shared_keys(model: nn.Cell) -> set[str]:
    """The keys in files of what all layers of an adapter share."""
    shared = [patch.shared for layer in layers_of(model) for patch in layer.adapters.values() if patch.shared]
    return {f"base_model.{key}" for cell in shared for key in cell.keys.values()}


def layers_of(model: nn.Cell) -> list[TunerLayer]:
    """The adapted layers, in network order."""
    return [cell for _, cell in model.cells_and_names() if isinstance(cell, TunerLayer)]


def read_the_base(model: nn.Cell) -> bool:
    """Whether what an adapter does depends on the base weight, so that none can be merged on top of another."""
    return any(patch.reads_base for layer in layers_of(model) for patch in layer.adapters.values())


def act_in_turn(model: nn.Cell) -> bool:
    """Whether the order of several active adapters matters: one of them changes what the others did, or is no sum."""
    if not all(METHODS[str(config.peft_type)].merges for config in model.peft_config.values()):
        return True
    patches = [patch for layer in layers_of(model) for patch in layer.adapters.values()]
    return any(
        patch.reads_base or (patch.reweighs and not patch.additive) or type(patch).before is not Patch.before
        for patch in patches
    )


def state_of(net: nn.Cell) -> dict[str, Any]:
    """All that a failed call must leave as it was: the cells, the parameters, their names, flags and numbers."""
    return {
        "cells": [(path, id(cell), cell.training) for path, cell in net.cells_and_names()],
        "parameters": [(path, id(p), p.name, p.requires_grad) for path, p in net.parameters_and_names()],
        "numbers": [array(p).tobytes() for p in net.get_parameters()],
        "config": repr(getattr(net, "peft_config", "none")),
        "active": getattr(net, "active_adapters", "none"),
    }


def shake(parameters: Iterable[Parameter], seed: int = 1) -> None:
    """Add noise of scale 0.3, in place."""
    rng = np.random.default_rng(seed)
    for p in parameters:
        noise = 0.3 * rng.standard_normal(p.shape)
        p.copy_(Tensor((array(p) + noise).astype(array(p).dtype)))


@contextlib.contextmanager
def in_pynative() -> Iterator[None]:
    """PyNative mode inside the block: for results to compare with, without a compilation."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)


def output(model: nn.Cell, x: Tensor | None = None) -> np.ndarray:
    """What the model makes of its own sample (or of x), computed in PyNative."""
    with in_pynative():
        return array(model(model.sample() if x is None else x))
