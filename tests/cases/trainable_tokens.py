"""Trainable tokens: rows of an embedding, and of a head."""

from functools import partial

import mindspore as ms

from tests import nets
from tests.cases import Case

CASES = (
    Case(
        "head",
        nets.Dense,
        {"target_modules": ["lin0", "lin1"], "token_indices": [0, 3]},
        ("lin0", "lin1"),
        life=True,
    ),
    Case("embedding", nets.Embedding, {"target_modules": ["emb"], "token_indices": [8, 6]}, ("emb",), life=True),
    Case("half", partial(nets.Embedding, ms.float16), {"target_modules": ["emb"], "token_indices": [7]}, ("emb",)),
)
