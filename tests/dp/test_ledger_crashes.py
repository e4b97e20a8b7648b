"""Random lives of a ledger: whatever is asked, in whatever order, and wherever the process dies, the ledger says the
truth or more, and a round is released as one update."""

import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.ledgers import allow, open_ledger, refuse, release

from dp import ledger as ledger_module
from dp.errors import ReservationMisused
from dp.ledger import Claim, Ledger, Release, read_ledger, verify

ROOM = 8
REAL_CONNECT = sqlite3.connect
RUNS, ROUNDS, MODELS = st.sampled_from(["x", "y"]), st.integers(1, 3), st.sampled_from("mn")
STATEMENTS = st.none() | st.integers(0, 14)


class Crash(BaseException):
    """The process is gone; nothing that it would do in its end happens."""


class Mortal(sqlite3.Connection):
    """A connection whose process dies before one of its statements."""

    left: int | None = None

    def _count(self) -> None:
        if Mortal.left is not None:
            if Mortal.left == 0:
                raise Crash
            Mortal.left -= 1

    def execute(self, *arguments: object) -> sqlite3.Cursor:
        """Die or execute."""
        self._count()
        return super().execute(*arguments)

    def executemany(self, *arguments: object) -> sqlite3.Cursor:
        """Die or execute."""
        self._count()
        return super().executemany(*arguments)


def while_there_is_room(releases: Sequence[Release]) -> Claim:
    """A budget of ``ROOM`` releases."""
    return allow(releases) if len(releases) < ROOM else refuse(releases)


class Lives(RuleBasedStateMachine):
    """Two processes on one ledger, each of which may die at any statement and is started again.

    What really happened is kept beside it: ``draws`` counts uses of the data by round, ``seen`` has all bytes that left
    the site, ``committed`` the rounds whose update was finished.
    """

    root: Path
    processes = st.integers(0, 1)

    @initialize()
    def start(self) -> None:
        """A new ledger, and both processes."""
        self._patched = ledger_module.sqlite3.connect
        ledger_module.sqlite3.connect = lambda path, **options: REAL_CONNECT(path, factory=Mortal, **options)
        Mortal.left = None
        self.folder = self.root / os.urandom(8).hex()
        self.folder.mkdir()
        self.path = self.folder / "ledger.sqlite"
        self.ledgers: list[Ledger | None] = [open_ledger(self.path), open_ledger(self.path)]
        self.draws: Counter[tuple[str, int, str]] = Counter()
        self.seen: dict[tuple[str, int, str], set[bytes]] = {}
        self.committed: set[tuple[str, int, str]] = set()

    def _live(self, process: int, statements: int | None, act) -> None:
        """Let a process act, which dies after so many statements, and start another in its place if it did."""
        Mortal.left = statements
        try:
            act(self.ledgers[process])
        except Crash:
            Mortal.left = None
            self.ledgers[process].close()
            self.ledgers[process] = open_ledger(self.path)
        finally:
            Mortal.left = None

    @rule(process=processes, run=RUNS, number=ROUNDS, model=MODELS, statements=STATEMENTS, noted=st.booleans())
    def take_part(self, process: int, run: str, number: int, model: str, statements: int | None, noted: bool) -> None:
        """A site is asked for a round, as ``LocalTrainer.train`` and the site's program answer."""
        asked = (run, number, model)

        def act(ledger: Ledger) -> None:
            try:
                found = ledger.committed(run=run, round_number=number, model_sha256=model * 64)
            except ReservationMisused:
                assert asked in self.committed
                return
            assert (found is None) <= (asked not in self.committed)
            if found is None:
                reservation = ledger.reserve(release(number, run=run, model=model), while_there_is_room)
                if reservation.claim.refused is not None:
                    return
                self.draws[asked] += 1
                found = ledger.commit(reservation, os.urandom(8))
            update = ledger.update(found)
            self.seen.setdefault(asked, set()).add(update)
            if noted:
                ledger.mark_sent(found)

        self._live(process, statements, act)
        entries = verify(read_ledger(self.path)).entries
        rows = {entry["sequence"]: entry for entry in entries}
        for entry in entries:
            if entry["kind"] == "commit":
                of = rows[entry["reservation"]]
                self.committed.add((of["run"], of["round_number"], of["model_sha256"][0]))

    @rule(process=processes)
    def restart(self, process: int) -> None:
        """A process ends well and is started again."""
        self.ledgers[process].close()
        self.ledgers[process] = open_ledger(self.path)

    @invariant()
    def truth_or_more(self) -> None:
        """Each draw has a reservation of its own, the budget holds, each round has left as one update, and the rows
        are whole."""
        if not hasattr(self, "path"):
            return
        found = verify(read_ledger(self.path))
        found.check("ledger")
        reserved = Counter(
            (entry["run"], entry["round_number"], entry["model_sha256"][0])
            for entry in found.entries
            if entry.get("decision") == "reserved"
        )
        assert reserved.total() <= ROOM
        assert all(reserved[asked] >= times for asked, times in self.draws.items())
        assert all(len(updates) == 1 for updates in self.seen.values())
        assert self.seen.keys() <= self.committed

    def teardown(self) -> None:
        """End both processes."""
        if hasattr(self, "path"):
            for ledger in self.ledgers:
                ledger.close()
            ledger_module.sqlite3.connect = self._patched


def test_lives(tmp_path_factory) -> None:
    """No life of a ledger breaks what is promised of it."""
    Lives.root = tmp_path_factory.mktemp("lives")
    run_state_machine_as_test(Lives, settings=settings(max_examples=40, stateful_step_count=15, deadline=None))
