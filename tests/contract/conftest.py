import pytest

from tests.cases import FEW, Case, all_cases, life_cases


@pytest.fixture(params=life_cases() if FEW else all_cases(), ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    """Each case of each method in turn."""
    return request.param
