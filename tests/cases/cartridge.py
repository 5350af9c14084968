"""Cartridges, with tokens that are frozen and without."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case

N = {"num_virtual_tokens": 3}

CASES = (
    Case("plain", nets.Reader, {**N, "task_type": "CAUSAL_LM"}),
    Case(
        "nothing frozen",
        partial(nets.Reader, True, ms.float16),
        {**N, "num_frozen_tokens": 0, "task_type": "SEQ_CLS"},
        whole=("classifier",),
    ),
)
