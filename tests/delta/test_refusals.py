"""Each documented exception is raised, and says what is wrong and where."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from msft_peft import PeftError, delta
from tests.delta.refusals import REFUSALS


@pytest.mark.parametrize(("name", "arguments", "kind"), REFUSALS)
def test_documented_exceptions(name: str, arguments: dict, kind: type):
    with pytest.raises(kind) as caught:
        getattr(delta, name)(**arguments)
    assert isinstance(caught.value, PeftError)
    assert name.replace("Dense", "") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("PrefixLayer", {"prefix_token_num": 0, "batch_size": 2, "num_heads": 2, "hidden_dim": 6, "embed_dim": 5}),
        ("AdapterLayer", {"hidden_size": 4, "non_linearity": "xx"}),
        ("LowRankAdapterLayer", {"hidden_size": 4, "reduction_factor": 2, "non_linearity": "xx"}),
    ],
)
def test_where_mindpet_raises_another_kind_than_it_documents_the_error_is_both(name: str, arguments: dict):
    for kind in (TypeError, ValueError):
        with pytest.raises(kind):
            getattr(delta, name)(**arguments)


@pytest.mark.parametrize("alpha", ["4", True, None, [4]])
def test_r_drop_refuses_what_is_no_number(mode: str, alpha: object):
    z, labels = Tensor(np.ones((4, 3)), ms.float32), Tensor([0, 0, 1, 1], ms.int32)
    with pytest.raises(TypeError, match="alpha must be an int or a float"):
        delta.RDropLoss()(z, labels, alpha)


def test_r_drop_refuses_an_odd_batch(mode: str):
    with pytest.raises(ValueError, match="3 rows"):
        delta.RDropLoss()(Tensor(np.ones((3, 3)), ms.float32), Tensor([0, 0, 1], ms.int32))
