"""What an operator is told about a coordinator: what it does now, whom it waits for, how the last round went."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from support.consortium import Consortium, make_consortium
from support.federation import INITIAL

from secureagg.testing import HOMOMORPHIC_PHASES
from sites.coordinator_loop import STATUS, RoundRecord, Status
from sites.errors import ConfigurationError
from sites.status import is_running, read_status, status_table

LAST = RoundRecord(
    run="0123456789abcdef",
    number=3,
    purpose="train",
    cohort=("a", "b", "c", "d"),
    survivors=("a", "b", "c"),
    dropped={"d": "CollectingMaskedInputs"},
    seconds={"AdvertisingKeys": 0.25, "SharingKeys": 1.5},
)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Four sites."""
    return make_consortium(tmp_path_factory.mktemp("consortium"), initial=INITIAL)


def status(consortium: Consortium, **changes: object) -> Status:
    """A coordinator in the middle of a round."""
    fields: dict[str, object] = {
        "manifest": consortium.manifest.digest.hex(),
        "process": os.getpid(),
        "run": LAST.run,
        "number": 4,
        "phase": "CollectingMaskedInputs",
        "since": time.time() - 42,
        "present": ["a", "b"],
        "waiting_for": ["b"],
        "excluded": {"c": "malformed-message"},
        "last": LAST,
        **changes,
    }
    return Status(**fields)  # type: ignore[arg-type]


def shown(found: Status, consortium: Consortium) -> str:
    """What the operator reads, as plain text."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(status_table(found, consortium.manifest))
    return captured.get()


def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_in_the_middle_of_a_round(consortium: Consortium) -> None:
    """Phase and how long it lasts, who is present, waited for, missing and excluded, and how the last round went."""
    text = shown(status(consortium), consortium)
    for expected in (
        "waiting for masked inputs while sites train, for 42 s",
        "round 4 of 10",
        "2 of 4: a, b",
        "waiting for│b│",
        "missing│d│",
        "c (malformed-message)",
        "3, train: summed 3 sites, 1.8 s",
        "collecting shares",
        "1.50 s",
        "d while waiting for masked inputs",
    ):
        assert expected in re.sub(" *│ *", "│", text), expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"phase": "", "number": 0, "last": None}, ["waiting for sites", "none yet"]),
        ({"since": 0.0}, ["min"]),
        ({"over": "finished", "number": 11}, ["over: finished", "the final evaluation"]),
    ],
)
def test_other_moments(consortium: Consortium, changes: dict[str, object], expected: list[str]) -> None:
    """Before the first round, after hours, and when all is over."""
    text = shown(status(consortium, **changes), consortium)
    assert all(part in text for part in expected)


def test_a_coordinator_that_is_gone(consortium: Consortium) -> None:
    """A coordinator whose process has ended without finishing is said to be gone, and what to do about it."""
    found = status(consortium, process=gone())
    assert not is_running(found)
    assert "not running, since it was waiting for masked inputs" in shown(found, consortium)
    assert "start it again to go on" in shown(found, consortium)
    assert is_running(status(consortium))
    assert not is_running(status(consortium, over="finished"))


def test_files_that_are_no_status(consortium: Consortium, tmp_path: Path) -> None:
    """A folder without a status, a damaged one and one of another consortium are named."""
    path = tmp_path / STATUS
    with pytest.raises(ConfigurationError, match=f"{path}: No such file"):
        read_status(consortium.manifest, tmp_path)
    for content in (b"{", b"{}", b"[]"):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"{path}: not a coordinator's status"):
            read_status(consortium.manifest, tmp_path)
    path.write_bytes(msgspec.json.encode(status(consortium, manifest="0" * 64)))
    with pytest.raises(ConfigurationError, match=r"of the manifest with digest 0000000000000000\.\.\., expected"):
        read_status(consortium.manifest, tmp_path)
    path.write_bytes(msgspec.json.encode(status(consortium)))
    assert read_status(consortium.manifest, tmp_path).last == LAST


def test_every_phase_has_words(consortium: Consortium) -> None:
    """There is something to say about each phase of the coordinator."""
    for phase in ("", *HOMOMORPHIC_PHASES):
        assert shown(status(consortium, phase=phase), consortium)
