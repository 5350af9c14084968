"""Adaption prompts: attentions that return their output, or that with their keys."""

from functools import partial

from tests import nets
from tests.cases import Case

UPPER = ("layers.1.look", "layers.2.look")
PROMPT = {"target_modules": ["look"], "adapter_len": 3, "adapter_layers": 1}

CASES = (
    Case("plain", nets.Reading, PROMPT, UPPER[1:], life=True),
    Case("tuple", partial(nets.Reading, True), {**PROMPT, "target_modules": ".*look", "adapter_layers": 2}, UPPER),
)
