"""Context-aware prompt tuning: one example before the input."""

from tests import nets
from tests.cases import Case

EXAMPLE = {"cpt_token_ids": [4, 2, 7, 0], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}

CASES = (Case("causal", nets.Reader, {**EXAMPLE, "opt_projection_epsilon": 20.0, "task_type": "CAUSAL_LM"}),)
