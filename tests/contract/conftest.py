import pytest

from tests.cases import Case, all_cases


@pytest.fixture(params=all_cases(), ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    """Each case of each method in turn."""
    return request.param
