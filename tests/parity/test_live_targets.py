"""The layers that each method adapts by default, by the base model's architecture, against HF's."""

import pytest
from peft.utils import constants

from msft_peft.registry import METHODS

PREFIX, SUFFIX = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
HF = {
    name.removeprefix(PREFIX).removesuffix(SUFFIX): mapping
    for name, mapping in vars(constants).items()
    if name.startswith(PREFIX) and name.endswith(SUFFIX)
}


@pytest.mark.parametrize("name", ["BOFT", "FOURIERFT", "OSF", "RANDLORA", "VBLORA", "VERA", "WAVEFT"])
def test_default_targets(name):
    def in_order(targets):
        return {kind: layers if isinstance(layers, str) else sorted(layers) for kind, layers in targets.items()}

    assert in_order(METHODS[name].default_targets) == in_order(HF[name])
