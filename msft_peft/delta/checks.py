"""What the delta Cells refuse, with the kinds of errors that MindPet documents.

Where MindPet's documents promise one kind and its code raises another, the error is both.
"""

from typing import Any

import mindspore as ms
from mindspore import Tensor
from mindspore.common.initializer import Initializer, initializer

from msft_peft.errors import PeftError

DTYPES = (ms.float16, ms.float32, ms.bfloat16)


class DeltaTypeError(PeftError, TypeError):
    """An argument of a delta Cell is of the wrong type."""


class DeltaValueError(PeftError, ValueError):
    """An argument of a delta Cell has a value that makes no sense."""


class DeltaKeyError(PeftError, KeyError):
    """A name that is none of those known."""

    # A KeyError shows the repr of its message.
    __str__ = Exception.__str__


class DeltaArgumentError(DeltaTypeError, DeltaValueError):
    """For arguments whose documented kind of error is not the one that MindPet raises."""


def check_positive(owner: str, **values: Any) -> None:
    """Each value is an int above zero.

    Raises:
        DeltaTypeError: one is no int (a bool is none).
        DeltaValueError: one is zero or negative.
    """
    for name, value in values.items():
        if type(value) is not int:
            raise DeltaTypeError(f"{owner}: {name} must be a positive int, got {value!r} ({type(value).__name__})")
        if value <= 0:
            raise DeltaValueError(f"{owner}: {name} must be positive, got {value}")


def check_size(owner: str, **values: Any) -> None:
    """As `check_positive`, but what is not positive is a TypeError as well: so the prefix Cells document it.

    Raises:
        DeltaTypeError: one is no int.
        DeltaArgumentError: one is zero or negative.
    """
    try:
        check_positive(owner, **values)
    except DeltaValueError as error:
        raise DeltaArgumentError(str(error)) from None


def check_dropout(owner: str, name: str, value: Any) -> None:
    """The value is a float in [0, 1).

    Raises:
        DeltaTypeError: it is no float (0 is none: write 0.0).
        DeltaValueError: it is outside.
    """
    if not isinstance(value, float):
        raise DeltaTypeError(f"{owner}: {name} must be a float in [0.0, 1.0), got {value!r} ({type(value).__name__})")
    if not 0.0 <= value < 1.0:
        raise DeltaValueError(f"{owner}: {name} must lie in [0.0, 1.0), got {value}")


def check_bool(owner: str, name: str, value: Any) -> None:
    """Raise DeltaTypeError unless the value is a bool."""
    if not isinstance(value, bool):
        raise DeltaTypeError(f"{owner}: {name} must be a bool, got {value!r} ({type(value).__name__})")


def check_dtypes(owner: str, **values: Any) -> None:
    """Raise DeltaTypeError unless each value is float16, float32 or bfloat16 of `mindspore.dtype`."""
    for name, value in values.items():
        if not any(value is dtype for dtype in DTYPES):
            raise DeltaTypeError(f"{owner}: {name} must be one of {[str(d) for d in DTYPES]}, got {value!r}")


def check_init(owner: str, name: str, value: Any, shape: tuple[int, ...], kinds: tuple[type, ...] = ()) -> None:
    """The value can initialise a parameter of this shape.

    Args:
        owner: the class, for messages.
        name: the argument.
        value: a Tensor, the name of an initializer, an Initializer, or a number.
        shape: the parameter's.
        kinds: the types that are taken, if not all of these.

    Raises:
        DeltaTypeError: another type.
        DeltaValueError: a Tensor of another shape, or an unknown name.
    """
    kinds = kinds or (Tensor, str, Initializer, int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise DeltaTypeError(f"{owner}: {name} must be one of {names}, got {value!r} ({type(value).__name__})")
    if isinstance(value, Tensor):
        if tuple(value.shape) != shape:
            raise DeltaValueError(f"{owner}: {name} must have shape {shape}, got {tuple(value.shape)}")
    elif isinstance(value, str):
        try:
            initializer(value, shape, ms.float32)
        except ValueError as error:
            raise DeltaValueError(f"{owner}: {name}={value!r} is no initializer of MindSpore: {error}") from error
