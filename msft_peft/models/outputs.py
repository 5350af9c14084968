"""What a model with a head returns."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor

# What a body may have returned beside its last state, in HF's order.
_BESIDE = (
    "past_key_values",
    "decoder_hidden_states",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "hidden_states",
)


def results(body: dict[str, Any], named: dict[str, Tensor], loss: Tensor | None) -> dict[str, Any]:
    """The loss if there is one, then a head's results, then what the body returned beside its last state."""
    outputs = {} if loss is None else {"loss": loss}
    for name, value in named.items():
        outputs[name] = value
    for name in _BESIDE:
        if name in body:
            outputs[name] = body[name]
    return outputs
