"""Libraries with models for MindSpore that a user may have; each is imported when it is asked for."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from msft_peft.errors import NoBaseModelError
from msft_peft.hosts.models import as_cell


@dataclass(frozen=True)
class Provider:
    """A library that has HF's Auto classes for MindSpore.

    Attributes:
        name: what a user passes as `provider=`; the package to be installed.
        module: where its Auto classes are.
        first: it must be imported before transformers, which it changes.
    """

    name: str
    module: str
    first: bool = False

    def load(self, class_name: str, name_or_path: str, **options: Any) -> nn.Cell:
        """The model that the class of that name makes.

        Raises:
            NoBaseModelError: the library is not installed, has no such class, cannot load it, or gives no model for
                MindSpore.
        """
        if importlib.util.find_spec(self.name) is None:
            raise NoBaseModelError(f"not installed; pip install {self.name}")
        if self.first and self.name not in sys.modules and "transformers" in sys.modules:
            raise NoBaseModelError(f"transformers was imported already; import {self.name} before it")
        with _environment_kept():
            kind = getattr(importlib.import_module(self.module), class_name, None)
        if kind is None:
            raise NoBaseModelError(f"{self.module} has no {class_name}")
        try:
            return as_cell(kind.from_pretrained(name_or_path, **options))
        except (ImportError, OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
            text = str(error).strip().partition("\n")[0]
            raise NoBaseModelError(f"{self.module}.{class_name} cannot load it: {text}") from error


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    # mindnlp sends every client of the Hub in the process to a mirror.
    before = dict(os.environ)
    try:
        yield
    finally:
        if "HF_ENDPOINT" not in before:
            os.environ.pop("HF_ENDPOINT", None)


# In the order in which they are tried.
PROVIDERS = (
    Provider("mindone", "mindone.transformers"),
    Provider("mindnlp", "mindnlp.transformers", first=True),
    Provider("mindformers", "mindformers"),
)
