"""What callers hand over and is of no use: said by the argument's name, before anything is done with it."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msft_peft.errors import AdapterNameError


def adapter_names(given: Any) -> list[str]:
    """One name or several, as a list, each once; whether there are adapters of these names is not asked.

    Raises:
        AdapterNameError: something else.
    """
    found = [given] if isinstance(given, str) else _strings(given)
    if found is None:
        raise AdapterNameError(f"adapters are named by a string or a list of strings, got {given!r}")
    return list(dict.fromkeys(found))


def adapter_name(given: Any) -> str:
    """One name.

    Raises:
        AdapterNameError: something else.
    """
    if not isinstance(given, str):
        raise AdapterNameError(f"an adapter is named by a string, got {given!r}")
    return given


def strings(where: str, given: Any) -> list[str]:
    """A list of strings.

    Raises:
        TypeError: it is none; `where` names the argument.
    """
    found = _strings(given)
    if found is None:
        raise TypeError(f"`{where}` must be a list of strings, got {given!r}")
    return found


def mapping(where: str, given: Any) -> Mapping[str, Any]:
    """A dict, or what is like one, whose keys are strings.

    Raises:
        TypeError: it is none; `where` names the argument.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise TypeError(f"`{where}` must be a dict with strings for keys, got {type(given).__name__}")
    return given


def path(where: str, given: Any) -> Path:
    """A path.

    Raises:
        TypeError: it is none; `where` names the argument.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"`{where}` must be a path (a string or an os.PathLike), got {given!r}")
    return Path(given)


def _strings(given: Any) -> list[str] | None:
    # A string is a list of strings too, and was never meant as one.
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        return None
    found = list(given)
    return found if all(isinstance(one, str) for one in found) else None
