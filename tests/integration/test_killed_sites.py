"""A site that is killed (SIGKILL) at any step: what its ledger says afterwards is the truth or more, and no round that
could have been released has a second draw of the noise."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.killed_site import DELTA, Server, open_site_ledger

from dp.accountants import rdp_epsilon
from dp.chain import Entry
from dp.errors import LedgerTampered, LedgerUnavailable
from dp.events import PoissonSampledGaussian
from dp.ledger import read_ledger, verify

KILLED = -9


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Runs sites in processes of their own."""
    with Server() as running:
        yield running


def lines(path: Path) -> list[dict[str, object]]:
    """What was written down."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(folder: Path) -> list[str]:
    """The steps that the site took last time."""
    return (folder / "steps").read_text().splitlines()


def released(folder: Path) -> set[int]:
    """The rounds that have an update, which may have been sent."""
    with suppress(LedgerUnavailable, LedgerTampered):  # it died before there was a ledger
        return _released(verify(read_ledger(folder / "ledger.sqlite")).entries)
    assert lines(folder / "draws") == []
    return set()


def _released(entries: tuple[Entry, ...]) -> set[int]:
    rounds = {entry["sequence"]: entry["round_number"] for entry in entries if entry["kind"] == "reserve"}
    return {rounds[entry["reservation"]] for entry in entries if entry["kind"] == "commit"}


def check(folder: Path) -> None:
    """The ledger is whole and says the truth or more, and each round has left the site as one update only."""
    draws = lines(folder / "draws")
    events = [
        PoissonSampledGaussian(**{name: value for name, value in draw.items() if name != "round"}) for draw in draws
    ]
    with open_site_ledger(folder) as ledger:
        assert len(ledger.events) >= len(draws)
        assert rdp_epsilon(ledger.events, DELTA) >= rdp_epsilon(events, DELTA) * (1 - 1e-12)
        counted = Counter(release.round_number for release in ledger.releases)
        assert all(counted[number] >= times for number, times in Counter(draw["round"] for draw in draws).items())
    found = verify(read_ledger(folder / "ledger.sqlite"))
    found.check("ledger")
    hashes = [entry["update_sha256"] for entry in found.entries if entry["kind"] == "commit"]
    for number in (1, 2):
        left = {sent["sha256"] for sent in lines(folder / "sent") if sent["round"] == number}
        assert len(left) <= 1
        assert left <= set(hashes)


def kill_and_restart(server: Server, folder: Path, last: int) -> None:
    """Kill a site before its step ``last``; look at what it left; restart it; look again."""
    assert server.live(folder, last) == KILLED
    before, drawn = released(folder), Counter(draw["round"] for draw in lines(folder / "draws"))
    if before or drawn:
        check(folder)
    assert server.live(folder) == 0
    check(folder)
    after = Counter(draw["round"] for draw in lines(folder / "draws"))
    assert {sent["round"] for sent in lines(folder / "sent")} == {1, 2}
    for number in (1, 2):
        # A round that has an update is never trained again; one that has none is, once.
        assert after[number] - drawn[number] == (0 if number in before else 1)


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The steps of a site that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.live(folder) == 0
    check(folder)
    assert Counter(draw["round"] for draw in lines(folder / "draws")) == {1: 1, 2: 1}
    return steps_of(folder)


def test_the_life_of_a_release(whole: list[str]) -> None:
    """A reservation is on the disk before the data is sampled, the update before it is sent, and what was sent is
    noted."""
    start = whole.index("INSERT INTO rows", whole.index("INSERT INTO rows") + 1)
    shown = [step for step in whole[start:] if not step.startswith(("BEGIN", "DELETE"))]
    one_round = [
        *("INSERT INTO rows", "COMMIT", "sample", "trained"),  # reserve, train
        *("INSERT INTO rows", "INSERT INTO outbox", "COMMIT", "send", "sent"),  # commit, send
        *("INSERT INTO rows", "COMMIT", "noted"),
    ]
    refresh = ["COMMIT"]
    assert shown == [*one_round, *refresh, *one_round]


@pytest.mark.parametrize(
    ("step", "time"),
    [
        ("CREATE TABLE outbox", 1),
        ("COMMIT", 1),
        ("INSERT INTO rows", 2),
        ("sample", 1),
        ("trained", 1),
        ("INSERT INTO outbox", 1),
        ("send", 1),
        ("sent", 1),
        ("DELETE FROM outbox", 1),
        ("noted", 1),
        ("sample", 2),
        ("send", 2),
    ],
)
def test_killed_at_the_main_steps(server: Server, tmp_path: Path, whole: list[str], step: str, time: int) -> None:
    """Killed before any of the main steps and restarted: epsilon is never below the true one, a released round is not
    drawn again, and what is sent twice is the same bytes."""
    number = [place for place, name in enumerate(whole, start=1) if name == step][time - 1]
    kill_and_restart(server, tmp_path, number)


@pytest.mark.slow
def test_killed_at_every_step(server: Server, tmp_path: Path, whole: list[str]) -> None:
    """The same for every single step: each statement of the database, sampling, training, sending."""
    for number in range(1, len(whole) + 1):
        (folder := tmp_path / str(number)).mkdir()
        kill_and_restart(server, folder, number)


def test_killed_again_and_again(server: Server, tmp_path: Path) -> None:
    """A site that dies while training, time after time, pays for each attempt, and still releases each round once."""
    assert server.live(tmp_path) == 0
    last = steps_of(tmp_path).index("trained") + 1
    for path in tmp_path.iterdir():
        path.unlink()
    for attempt in (1, 2, 3):
        # Where there is a ledger, its tables and first row are not made again.
        assert server.live(tmp_path, last if attempt == 1 else last - 3) == KILLED
        assert steps_of(tmp_path)[-1] == "trained"
        check(tmp_path)
        with open_site_ledger(tmp_path) as ledger:
            assert [release.round_number for release in ledger.releases] == [1] * attempt
    assert server.live(tmp_path) == 0
    check(tmp_path)
    assert Counter(sent["round"] for sent in lines(tmp_path / "sent")) == {1: 1, 2: 1}
    assert len(lines(tmp_path / "draws")) == 5
