"""What all tests share."""

import pytest
from support.rounds import StoppedRound


@pytest.fixture(params=["masked", "homomorphic"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once for each backend: every ``StoppedRound`` that it makes is of that one."""
    name: str = request.param
    if name == "homomorphic":
        pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    monkeypatch.setattr(StoppedRound, "backend", name)
    return name
