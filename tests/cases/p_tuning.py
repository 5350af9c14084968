"""P-tuning: both networks."""

from functools import partial

from tests import nets
from tests.cases import Case

SMALL = {"num_virtual_tokens": 3, "encoder_hidden_size": 4}

CASES = (
    Case("mlp", nets.Reader, {**SMALL, "task_type": "CAUSAL_LM"}),
    Case(
        "lstm",
        partial(nets.Reader, True),
        {**SMALL, "task_type": "SEQ_CLS", "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
        whole=("classifier",),
    ),
)
