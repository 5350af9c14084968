"""Adaption prompts: attentions that return their output, or that with their keys."""

from functools import partial

from tests import nets
from tests.cases import Case

BOTH = ("layers.0.look", "layers.1.look")
PROMPT = {"target_modules": ["look"], "adapter_len": 3, "adapter_layers": 1}

CASES = (
    Case("plain", partial(nets.Reading, 1), PROMPT, BOTH[:1], life=True),
    Case(
        "tuple", partial(nets.Reading, paired=True), {**PROMPT, "target_modules": ".*look", "adapter_layers": 2}, BOTH
    ),
)
