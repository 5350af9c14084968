"""An adapter for given layers, whatever its config's targets would mean."""

import re
import warnings
from collections.abc import Set
from dataclasses import replace

from mindspore import nn

from msft_peft.config import TargetedConfig
from msft_peft.core.adapter import Adapter
from msft_peft.core.prepare import prepare
from msft_peft.hosts import hf_names


def prepare_exactly(model: nn.Cell, config: TargetedConfig, name: str, paths: Set[str]) -> Adapter:
    """What `core.prepare` makes of the config, but on exactly the layers at `paths`.

    If its targets mean other layers, they are replaced by a regex that spells the paths out. There are no warnings:
    all there is to say was said when the adapters were made from which this one is derived.

    Raises: as `core.prepare`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = prepare(model, config, name)
        if set(adapter.patches) == paths:
            return adapter
        exact = replace(
            config,
            target_modules="|".join(re.escape(path) for path in sorted(map(hf_names(model), paths))),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        return prepare(model, exact, name)
