import os

import pytest

from tests.cases import Case, all_cases, life_cases

# `make test-2.7.2` asks for the cases of life alone: each method, and the main kinds of layers.
CASES = life_cases() if os.environ.get("FEW_CASES") else all_cases()


@pytest.fixture(params=CASES, ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    """Each case of each method in turn."""
    return request.param
