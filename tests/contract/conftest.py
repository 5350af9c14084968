import pytest

from tests.cases import FEW, Case, all_cases, life_cases


@pytest.fixture(params=life_cases() if FEW else all_cases(), ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    """Each case of each method in turn."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Graph mode is for the cases of life: the goldens compare the numbers of every kind of layer in both modes."""
    items[:] = [item for item in items if not _is_doubled(item)]


def _is_doubled(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    case = params.get("case")
    return isinstance(case, Case) and not case.life and params.get("mode") == "graph"
