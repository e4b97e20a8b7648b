"""What all tests share."""

import pytest
from support.rounds import StoppedRound


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread over several processes, the tests of a file stay together, since they share what takes long to make; but
    for the longest, which share nothing."""
    for item in items:
        if "statemachine" not in item.path.parts:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(params=["masked", "homomorphic"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once for each backend: every ``StoppedRound`` that it makes is of that one."""
    name: str = request.param
    if name == "homomorphic":
        pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    monkeypatch.setattr(StoppedRound, "backend", name)
    return name
