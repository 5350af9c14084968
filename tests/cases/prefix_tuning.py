"""Prefix tuning, with and without a projection."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case

N = {"num_virtual_tokens": 3}

CASES = (
    Case("plain", nets.Reader, {**N, "task_type": "CAUSAL_LM"}),
    Case(
        "projected",
        partial(nets.Reader, True),
        {**N, "task_type": "SEQ_CLS", "prefix_projection": True, "encoder_hidden_size": 4},
        whole=("classifier",),
    ),
    Case("float16", partial(nets.Reader, dtype=ms.float16), {**N, "task_type": "FEATURE_EXTRACTION"}),
)
