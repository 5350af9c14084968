"""Libraries with models for MindSpore that a user may have; each is imported when it is asked for."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from msft_peft.errors import NoBaseModelError


@dataclass(frozen=True)
class Provider:
    """A library that has HF's Auto classes for MindSpore.

    Attributes:
        name: what a user passes as `provider=`; the package to be installed.
        module: where its Auto classes are.
    """

    name: str
    module: str

    def load(self, class_name: str, name_or_path: str, **options: Any) -> nn.Cell:
        """The model that the class of that name makes.

        Raises:
            NoBaseModelError: the library is not installed, has no such class, or its models are no Cells.
        """
        if importlib.util.find_spec(self.name) is None:
            raise NoBaseModelError(f"not installed; pip install {self.name}")
        kind = getattr(importlib.import_module(self.module), class_name, None)
        if kind is None:
            raise NoBaseModelError(f"{self.module} has no {class_name}")
        model = kind.from_pretrained(name_or_path, **options)
        if not isinstance(model, nn.Cell):
            raise NoBaseModelError(f"{self.module}.{class_name} gives a {type(model).__name__}, no mindspore.nn.Cell")
        return model


# In the order in which they are tried.
PROVIDERS = (
    Provider("mindone", "mindone.transformers"),
    Provider("mindnlp", "mindnlp.transformers"),
    Provider("mindformers", "mindformers"),
)
