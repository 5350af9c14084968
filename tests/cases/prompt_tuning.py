"""Prompt tuning: the ways to begin, and the tasks."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case

N = {"num_virtual_tokens": 3}
WHOLE = partial(nets.Reader, True)

CASES = (
    Case("causal", nets.Reader, {**N, "task_type": "CAUSAL_LM"}),
    Case(
        "vocabulary",
        nets.Reader,
        {**N, "task_type": "TOKEN_CLS", "prompt_tuning_init": "SAMPLE_VOCAB"},
        whole=("classifier",),
    ),
    Case("head", WHOLE, {**N, "task_type": "SEQ_CLS"}, whole=("classifier",)),
    Case("float16", partial(nets.Reader, dtype=ms.float16), {**N, "task_type": "FEATURE_EXTRACTION"}),
)
