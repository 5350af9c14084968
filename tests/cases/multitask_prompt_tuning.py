"""Multitask prompt tuning: two tasks, one of which each row of the batch has."""

from tests import nets
from tests.cases import Case

CASES = (
    Case("causal", nets.Reader, {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2, "task_type": "CAUSAL_LM"}),
)
