"""One batch, several adapters: `model(x, adapter_names=["a", "b", "__base__"])`."""

import contextlib
from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from msft_peft.backend import arguments
from msft_peft.core.adapter import configs_of
from msft_peft.core.layer import TunerLayer
from msft_peft.core.parameter import ParameterLayer
from msft_peft.core.routing import Routing, invocations, routing_of
from msft_peft.core.wrapper import wrappers
from msft_peft.errors import AdapterNameError, ConfigError, MergeError

# The name by which a row is served by the base model alone.
BASE = "__base__"


@contextlib.contextmanager
def divided(roots: Sequence[nn.Cell], names: Sequence[str], x: Tensor | np.ndarray) -> Iterator[None]:
    """Inside the block, row i of the model's input goes through the adapter `names[i]` alone.

    Graph mode compiles once for all divisions of a batch among the model's adapters, since the names of the rows are
    numbers to it; the graphs of undivided batches are kept beside. PyNative runs those adapters only that are named.

    Args:
        roots: the cells that may be called inside, the base model last.
        names: an adapter's name, or "__base__", for each row.
        x: the model's first input; its first axis is the batch.

    Raises:
        ValueError: the model is in training mode, there are not as many names as rows, or too many rows.
        AdapterNameError: an adapter is not there.
        MergeError: an adapter is merged into the base weights.
        ConfigError: an adapter trains the base model's biases, which serve all rows.
    """
    model = roots[-1]
    check(roots, names, x)
    routing = routing_of(model)
    among = sorted(configs_of(model) if ms.get_context("mode") == ms.GRAPH_MODE else {*names} - {BASE})
    phases = [root.phase for root in roots]
    try:
        routing.choose(among or [BASE], names)
        for _, layer in wrappers(model):
            if isinstance(layer, TunerLayer):
                layer.divide()
        _note_invocations(model, routing, names, x)
        for root, phase in zip(roots, phases):
            root.phase = f"{phase}.{'.'.join(routing.names)}"
        yield
    finally:
        routing.clear()
        for root, phase in zip(roots, phases):
            root.phase = phase


def check(roots: Sequence[nn.Cell], names: Sequence[str], x: Tensor | np.ndarray) -> None:
    """Raise what `divided` raises."""
    model = roots[-1]
    if any(root.training for root in roots):
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if len(arguments.strings("adapter_names", names)) != len(x):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(x)} "
            "respectively."
        )
    configs = configs_of(model)
    unknown = sorted(map(str, {*names} - {*configs, BASE}))
    if unknown:
        raise AdapterNameError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {sorted(configs)}."
        )
    if any(isinstance(layer, TunerLayer) and layer.merged for _, layer in wrappers(model)):
        raise MergeError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if any(isinstance(layer, ParameterLayer) for _, layer in wrappers(model)):
        raise ConfigError("Cannot pass `adapter_names` with target_parameters: a parameter serves all rows at once.")
    biased = sorted(name for name, config in configs.items() if getattr(config, "bias", "none") != "none")
    if biased:
        raise ConfigError(
            f"Cannot pass `adapter_names`: {biased} train the base model's biases, which serve all rows."
        )


def _note_invocations(model: nn.Cell, routing: Routing, names: Sequence[str], x: Tensor | np.ndarray) -> None:
    """Find each row's invocation, if its adapter waits for one."""
    left = np.zeros(len(names), np.int32)
    for name in {*names} - {BASE}:
        tokens = getattr(configs_of(model)[name], "alora_invocation_tokens", None)
        if tokens is not None:
            mine = np.array([other == name for other in names])
            left = np.where(mine, invocations(Tensor(x), tuple(tokens)).asnumpy(), left)
    routing.start(Tensor(left), Tensor(0))
