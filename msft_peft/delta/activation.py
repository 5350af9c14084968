"""Activations by name, and how they are split over devices."""

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from msft_peft.delta.checks import DeltaArgumentError, DeltaKeyError, DeltaTypeError, DeltaValueError

Strategy = tuple | None


class GELU(nn.Cell):
    """Tanh-approximated GELU as one primitive: MindSpore's own Cell has none that a strategy could be set on."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = ops.GeLU()

    def construct(self, x: Tensor) -> Tensor:
        return self.gelu(x)


class SiLU(nn.Cell):
    """x·sigmoid(x), from primitives."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.mul = ops.Sigmoid(), ops.Mul()

    def construct(self, x: Tensor) -> Tensor:
        return self.mul(x, self.sigmoid(x))

    def split(self, x: tuple) -> None:
        """Set the strategy x of the input."""
        self.sigmoid.shard((x,))
        self.mul.shard((x, x))


class LeakyReLU(nn.Cell):
    """max(0.2·x, x), from primitives."""

    def __init__(self) -> None:
        super().__init__()
        self.mul, self.select_op = ops.Mul(), ops.Maximum()

    def construct(self, x: Tensor) -> Tensor:
        return self.select_op(self.mul(x, ops.cast(0.2, x.dtype)), x)

    def split(self, x: tuple) -> None:
        """Set the strategy x of the input."""
        self.mul.shard((x, ()))
        self.select_op.shard((x, x))


# The other activations have primitives of their own.
_SHARDABLE: dict[str, Callable[[], nn.Cell]] = {"gelu": GELU, "silu": SiLU, "leakyrelu": LeakyReLU}


def activation_named(owner: str, name: str) -> nn.Cell:
    """The activation that `mindspore.nn.get_activation` knows by this name.

    Raises:
        DeltaKeyError: it knows none of that name, or none that can be made without arguments.
    """
    if name in _SHARDABLE:
        return _SHARDABLE[name]()
    try:
        return nn.get_activation(name)
    except (KeyError, TypeError) as error:
        raise DeltaKeyError(f"{owner}: {name!r} is no activation of mindspore.nn.get_activation: {error}") from error


def output_activation(owner: str, activation: Any) -> Any:
    """What a Dense applies to its output: a Cell or Primitive as it is, one for a name, or None.

    Raises:
        DeltaTypeError: none of these.
        DeltaKeyError: an unknown name.
    """
    if isinstance(activation, str):
        return activation_named(owner, activation)
    if activation is not None and not isinstance(activation, nn.Cell | ops.Primitive):
        raise DeltaTypeError(
            f"{owner}: activation must be a str, Cell, Primitive or None, got {activation!r} "
            f"({type(activation).__name__})"
        )
    return activation


def non_linearity(owner: str, name: Any) -> nn.Cell:
    """The activation between two projections of an adapter.

    Raises:
        DeltaTypeError: `name` is no str.
        DeltaArgumentError: it is not known. MindPet documents a ValueError and raises a TypeError: this is both.
    """
    if not isinstance(name, str):
        raise DeltaTypeError(f"{owner}: non_linearity must be a str, got {name!r} ({type(name).__name__})")
    try:
        return activation_named(owner, name)
    except DeltaKeyError as error:
        raise DeltaArgumentError(str(error)) from error


def check_shardable(owner: str, activation: Any) -> None:
    """Raise DeltaValueError if `activation` is a log-softmax, which cannot be split, and it would have to be."""
    if "logsoftmax" in type(activation).__name__.lower() and parallel():
        raise DeltaValueError(
            f"{owner}: the 'LogSoftmax' activation is not supported in semi-auto or auto parallel mode: it needs "
            "whole rows. Take it out of the layer and apply it to gathered outputs."
        )


def shard_activation(owner: str, activation: Any, strategy: Strategy) -> None:
    """Set the strategy on the primitives of an activation; nothing where there is no activation or no strategy.

    Args:
        owner: the class, for messages.
        activation: a Cell or a Primitive.
        strategy: a tuple with the strategy of its input (a second one, for two inputs alike, is passed over).

    Raises:
        DeltaValueError: the activation has no primitive that a strategy can be set on.
    """
    if activation is None or strategy is None:
        return
    if isinstance(activation, ops.Primitive):
        activation.shard(strategy)
        return
    if hasattr(activation, "split"):
        activation.split(strategy[0])
        return
    x, found = strategy[0], False
    for primitive in [value for value in vars(activation).values() if isinstance(value, ops.Primitive)]:
        found = True
        beside = {"Mul": ((),), "Add": ((),), "PReLU": ((1,),)}  # what else these take: a number, or one per channel
        primitive.shard((x, *beside.get(primitive.name, ())))
    if not found:
        raise DeltaValueError(
            f"{owner}: {type(activation).__name__} holds no primitive that a strategy could be set on. Pass a "
            "Primitive as the activation, or leave its strategy out."
        )


def parallel() -> bool:
    """Whether MindSpore splits operators over devices: strategies count in these modes only."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
