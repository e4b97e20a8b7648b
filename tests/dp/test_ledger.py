"""The durable record of releases: what it holds, who may continue it, and how tampering is named."""

import json
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import (
    DATASET,
    OTHER,
    SITE,
    allow,
    bodies,
    open_ledger,
    refuse,
    release,
    reserve,
    with_sqlite,
)

from dp import ledger as ledger_module
from dp.chain import LABEL, Row, hash_of, new_row
from dp.errors import LedgerMismatch, LedgerTampered, LedgerUnavailable, ReservationMisused
from dp.ledger import Ledger, events_in, read_export, read_ledger, restore, verify, verify_export
from secureagg.labels import frame


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with six rows: its opening, two rounds that were finished, and a third that was only reserved."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        for number in (1, 2):
            ledger.commit(reserve(ledger, number), b"update %d" % number)
        reserve(ledger, 3)
    return tmp_path / "ledger.sqlite"


# What it holds


def test_rows_survive(path: Path) -> None:
    """A ledger opened again holds the same releases in the same order, and goes on from there."""
    with open_ledger(path) as again:
        assert again.releases == tuple(release(number) for number in (1, 2, 3))
        assert [event.steps for event in again.events] == [1, 2, 3]
        reserve(again, 4)
    with open_ledger(path) as again:
        assert again.releases == tuple(release(number) for number in (1, 2, 3, 4))


def test_the_form_of_a_row(path: Path) -> None:
    """Each body is canonical JSON with number, kind and time; each hash and signature can be computed again from the
    documented inputs, and the chain begins with zeros."""
    rows = read_ledger(path)
    assert [json.loads(row.body)["kind"] for row in rows] == [
        "open",
        "reserve",
        "commit",
        "reserve",
        "commit",
        "reserve",
    ]
    key = Ed25519PublicKey.from_public_bytes(SITE.public_key)
    for number, row in enumerate(rows, start=1):
        entry = json.loads(row.body)
        assert json.dumps(entry, sort_keys=True, separators=(",", ":")) == row.body
        assert entry["sequence"] == row.sequence == number
        assert datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) <= datetime.now(UTC)
        hashed = sha256(frame(b"secureagg/v1/ledger", row.previous.encode(), row.body.encode())).digest()
        assert row.hash == hashed.hex()
        key.verify(bytes.fromhex(row.signature), frame(b"secureagg/v1/ledger", hashed))
    assert rows[0].previous == "0" * 64
    assert all(before.hash == after.previous for before, after in pairwise(rows))


def test_the_first_row(path: Path) -> None:
    """It states data, unit, site, public key and format."""
    opening = bodies(path)[0]
    assert opening["dataset"] == DATASET
    assert (opening["unit"], opening["site"], opening["format"]) == ("patient", "a", 1)
    assert opening["public_key"] == SITE.public_key.hex()


def test_what_a_reservation_says(tmp_path: Path) -> None:
    """Everything that is known of a release and what it was said to cost is in its row; what is not known is not."""
    whole = replace(
        release(1), consortium="c", library_version="0.1", manifest_sha256="e" * 64, cohort=4, threshold=3,
        max_corrupt=1, clip_norm=0.5, random_generator="AES", mode="shared", sites=5, max_dropouts=1, honest=3,
        dimensions=14, ring_bits=20, scale=64.0, local_deviation=9.5,
    )  # fmt: skip
    with open_ledger(tmp_path / "x.sqlite") as ledger:
        ledger.reserve(whole, allow)
        ledger.reserve(release(2), allow)
    entry, less = bodies(tmp_path / "x.sqlite")[1:]
    for name, value in asdict(whole).items():
        expected = value if name != "event" else {"mechanism": "PoissonSampledGaussian", **value}
        assert entry[name] == expected
    assert entry["neighbouring"] == "add or remove one"
    assert entry["decision"] == "reserved"
    claim = {"delta": 1e-3, "epsilon": 0.1, "cumulative_epsilon": 0.1, "budget_epsilon": 1.0}
    assert claim.items() <= entry.items()
    assert not {"consortium", "cohort", "clip_norm", "refused"} & less.keys()
    with open_ledger(tmp_path / "x.sqlite") as ledger:
        assert ledger.releases == (whole, release(2))


def test_a_refusal_costs_nothing(path: Path) -> None:
    """A refusal is a row with its reason, and nothing is reserved by it; it admits no update."""
    with open_ledger(path) as ledger:
        before = ledger.events
        refused = ledger.reserve(release(4), refuse)
        assert ledger.events == before
        with pytest.raises(ReservationMisused):
            ledger.commit(refused, b"update")
    entry = bodies(path)[-1]
    assert (entry["decision"], entry["refused"], entry["epsilon"]) == ("refused", "no room", "inf")
    with open_ledger(path) as ledger:
        assert ledger.events == before


def test_notes(path: Path) -> None:
    """Results of audits and notes have rows of their own, are kept, and cost nothing."""
    with open_ledger(path) as ledger:
        before = ledger.events
        ledger.record("audit", {"epsilon_lower_bound": 0.4})
        ledger.record("note", {"text": "handed to the officer"})
        assert ledger.events == before
    assert [(entry["kind"], entry["content"]) for entry in bodies(path)[-2:]] == [
        ("audit", {"epsilon_lower_bound": 0.4}),
        ("note", {"text": "handed to the officer"}),
    ]
    open_ledger(path).close()


def test_it_is_on_the_disk(path: Path) -> None:
    """The file is in WAL mode, and a transaction's end waits for the disk."""
    with open_ledger(path) as ledger:
        assert ledger._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


# The outbox


def test_the_same_round_asked_again(path: Path) -> None:
    """An update that is not known to be sent is given out again byte for byte, after a restart too, and only for the
    same run, round and model."""
    with open_ledger(path) as ledger:
        found = ledger.committed(run="run", round_number=2, model_sha256="m" * 64)
        assert found is not None
        assert ledger.update(found) == b"update 2"
        assert found.update_sha256 == sha256(b"update 2").hexdigest() == bodies(path)[4]["update_sha256"]
        for other in (
            {"run": "another", "round_number": 2, "model_sha256": "m" * 64},
            {"run": "run", "round_number": 2, "model_sha256": "n" * 64},
            {"run": "run", "round_number": 2, "model_sha256": None},
            {"run": "run", "round_number": 3, "model_sha256": "m" * 64},
        ):
            assert ledger.committed(**other) is None


def outbox(path: Path) -> list[tuple[int, bytes]]:
    """What the outbox holds."""
    with closing(sqlite3.connect(path)) as file:
        return list(file.execute("SELECT * FROM outbox"))


def test_the_outbox_is_emptied(path: Path) -> None:
    """An update is deleted when the next one of its run is committed, or when it is known to be sent; its hash stays.
    That it was sent may be said twice."""
    assert outbox(path) == [(4, b"update 2")]
    with open_ledger(path) as ledger:
        ledger.commit(reserve(ledger, 1, run="another"), b"other run")
        assert [committed.reservation for committed in ledger.unsent] == [4, 7]
        committed = ledger.unsent[0]
        ledger.mark_sent(committed)
        ledger.mark_sent(committed)
        assert [committed.reservation for committed in ledger.unsent] == [7]
    assert outbox(path) == [(7, b"other run")]
    assert [entry["kind"] for entry in bodies(path)[6:]] == ["reserve", "commit", "sent"]
    with open_ledger(path) as ledger:
        assert [committed.reservation for committed in ledger.unsent] == [7]


def test_a_released_round_is_not_released_again(path: Path) -> None:
    """A round whose update was sent, or dropped for a later one, is refused when it is asked again; of two processes
    that train the same round, one can release an update."""
    with open_ledger(path) as ledger:
        ledger.mark_sent(ledger.unsent[0])
        for number, row in ((1, 2), (2, 4)):
            with pytest.raises(ReservationMisused, match=f"round {number} of run run was released by row {row} "):
                ledger.committed(run="run", round_number=number, model_sha256="m" * 64)
        with open_ledger(path) as other:
            one, two = reserve(ledger, 4), reserve(other, 4)
            ledger.commit(one, b"one")
            with pytest.raises(ReservationMisused, match="round 4 of run run, which has the one that row 8 admitted"):
                other.commit(two, b"two")
            found = other.committed(run="run", round_number=4, model_sha256="m" * 64)
            assert found is not None
            assert other.update(found) == b"one"
            assert len(other.releases) == 5


def test_a_reservation_admits_one_update(path: Path) -> None:
    """A second update under one reservation is refused, as is one under a reservation of a process that has ended."""
    with open_ledger(path) as ledger:
        reservation = reserve(ledger, 4)
        ledger.commit(reservation, b"update")
        with pytest.raises(ReservationMisused, match="row 7, expected an open reservation that was made here"):
            ledger.commit(reservation, b"update")
        crashed = reserve(ledger, 5)
    with open_ledger(path) as ledger, pytest.raises(ReservationMisused):
        ledger.commit(crashed, b"update")


@pytest.mark.parametrize(
    "statement", ["UPDATE outbox SET content = x'00'", "UPDATE outbox SET content = 'text'", "DELETE FROM outbox"]
)
def test_an_update_that_was_exchanged(path: Path, statement: str) -> None:
    """What is in the outbox is given out only if it is what was committed."""
    with_sqlite(path, statement)
    with open_ledger(path) as ledger, pytest.raises(LedgerTampered, match=r"outbox of row 4: .* expected the update"):
        ledger.update(ledger.unsent[0])


# Whose it is


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset": "e" * 64}, f"dataset: found {DATASET}, expected {'e' * 64}"),
        ({"unit": "record"}, "unit: found patient, expected record"),
        ({"signer": OTHER}, f"public key: found {SITE.public_key.hex()}, expected {OTHER.public_key.hex()}"),
    ],
    ids=["data", "unit", "key"],
)
def test_the_ledger_of_something_else(path: Path, change: dict[str, object], named: str) -> None:
    """A ledger of other data, another unit or another site is refused with what was found and expected, and stays as it
    is."""
    before = read_ledger(path)
    with pytest.raises(LedgerMismatch, match=named):
        open_ledger(path, **change)
    assert read_ledger(path) == before


def test_the_ledger_of_another_site(path: Path) -> None:
    """The site's name counts, even under the same key."""
    with pytest.raises(LedgerMismatch, match="site: found a, expected b"):
        Ledger(path, dataset=DATASET, site="b", signer=SITE)


def test_a_release_with_another_unit(path: Path) -> None:
    """What protects records is not counted in a ledger that counts patients."""
    with (
        open_ledger(path) as ledger,
        pytest.raises(LedgerMismatch, match="a release per record, expected one per patient"),
    ):
        ledger.reserve(replace(release(4), unit="record"), allow)
    assert len(read_ledger(path)) == 6


# Several at once


def test_two_processes_do_not_overwrite_each_other(path: Path) -> None:
    """Two ledgers open on one file see each other's rows when they write, and the chain stays whole."""
    with open_ledger(path) as one, open_ledger(path) as other:
        reserve(one, 4)
        reserve(other, 5)
        assert other.releases[-2:] == (release(4), release(5))
        one.refresh()
        assert one.head == other.head
    with open_ledger(path) as again:
        assert again.releases == tuple(release(number) for number in range(1, 6))


def test_a_decision_excludes_others(path: Path) -> None:
    """While one reservation is being decided, another process's waits, and then sees what was decided."""
    seen: list[int] = []
    ready, began, waiting = (threading.Event() for _ in range(3))

    def other() -> None:
        with open_ledger(path) as ledger:
            ready.set()
            began.wait()
            ledger._database.set_trace_callback(lambda statement: statement.startswith("BEGIN I") and waiting.set())
            ledger.reserve(release(5), lambda releases: seen.append(len(releases)) or allow(releases))

    thread = threading.Thread(target=other)
    thread.start()

    def decide(releases):
        began.set()
        assert waiting.wait(30)
        thread.join(timeout=0.2)
        assert seen == []
        return allow(releases)

    ready.wait()
    with open_ledger(path) as ledger:
        ledger.reserve(release(4), decide)
    thread.join()
    assert seen == [4]


def test_a_mistake_in_a_program_is_not_tampering(path: Path) -> None:
    """A ledger that is used after it was closed says just that, and does not call the file tampered with."""
    ledger = open_ledger(path)
    ledger.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        reserve(ledger, 4)


def test_a_decision_that_fails(path: Path) -> None:
    """What ``judge`` raises is passed on, nothing is written, and the ledger can be used again."""

    def fail(_):
        raise RuntimeError("no decision")

    before = read_ledger(path)
    with open_ledger(path) as ledger:
        with pytest.raises(RuntimeError, match="no decision"):
            ledger.reserve(release(4), fail)
        assert read_ledger(path) == before
        reserve(ledger, 4)
    assert len(read_ledger(path)) == 7


# Tampering, by hand


def forged(path: Path, number: int, *, signer=SITE, **changes: object) -> tuple[str, ...]:
    """Statements that replace a row by one with other fields, hashed and signed anew."""
    row = read_ledger(path)[number - 1]
    new = new_row({**json.loads(row.body), **changes}, previous=row.previous, signer=signer)
    values = f"body = '{new.body}', hash = '{new.hash}', signature = '{new.signature}'"
    return (f"UPDATE rows SET {values} WHERE sequence = {number}",)  # noqa: S608


EDIT = "UPDATE rows SET body = replace(body, '\"noise_multiplier\":3.5', '\"noise_multiplier\":9.5') WHERE sequence = 2"
SWAP = (
    "UPDATE rows SET sequence = 100 WHERE sequence = 3",
    "UPDATE rows SET sequence = 3 WHERE sequence = 4",
    "UPDATE rows SET sequence = 4 WHERE sequence = 100",
)
TAMPERING = {
    "edited": ([EDIT], 2, "edited", "contents are not those that were hashed and signed"),
    "hash": (["UPDATE rows SET hash = previous WHERE sequence = 3"], 3, "edited", "contents are not those"),
    "previous": (["UPDATE rows SET previous = hash WHERE sequence = 3"], 3, "edited", "contents are not those"),
    "signature": (
        ["UPDATE rows SET signature = (SELECT signature FROM rows WHERE sequence = 2) WHERE sequence = 3"],
        3, "signature", "not signed by the ledger's key",
    ),
    "signature gone": (["UPDATE rows SET signature = '' WHERE sequence = 3"], 3, "signature", "not signed"),
    "white space": (["UPDATE rows SET body = body || ' ' WHERE sequence = 3"], 3, "edited", "not canonical JSON"),
    "no JSON": (["UPDATE rows SET body = 'x' WHERE sequence = 6"], 6, "edited", "not canonical JSON"),
    "binary": (["UPDATE rows SET body = x'ff00' WHERE sequence = 6"], 6, "edited", "not canonical JSON"),
    "nested": (["UPDATE rows SET body = printf('%.100000c', '[') WHERE sequence = 6"], 6, "edited", "not canonical"),
    "array": (["UPDATE rows SET body = '[1]' WHERE sequence = 6"], 6, "edited", "not canonical JSON"),
    "infinite": (["UPDATE rows SET body = '{\"a\":1e999}' WHERE sequence = 6"], 6, "edited", "not canonical JSON"),
    "first removed": (["DELETE FROM rows WHERE sequence = 1"], 1, "removed", "is missing"),
    "one removed": (["DELETE FROM rows WHERE sequence = 3"], 3, "removed", "row 3: is missing$"),
    "two removed": (["DELETE FROM rows WHERE sequence IN (3, 5)"], 3, "removed", "row 3: is missing, and 1 more"),
    "removed and renumbered": (
        ["DELETE FROM rows WHERE sequence = 3", "UPDATE rows SET sequence = sequence - 1 WHERE sequence > 3"],
        3, "removed", "row 3: is missing",
    ),
    "reordered": (SWAP, 3, "moved", "row 4 of this ledger stands in the place of row 3"),
    "twice": (
        ["INSERT INTO rows SELECT 7, previous, body, hash, signature FROM rows WHERE sequence = 4"],
        7, "moved", "row 4 of this ledger stands in the place of row 7",
    ),
    "far away": (["UPDATE rows SET sequence = 1 << 60 WHERE sequence = 6"], 1 << 60, "moved", "stands in the place of"),
    "below": (["UPDATE rows SET sequence = -7 WHERE sequence = 6"], -7, "moved", "stands in the place|opens"),
    "all removed": (["DELETE FROM rows"], 1, "empty", "there are no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_named(path: Path, name: str) -> None:
    """Whatever is done to the rows with the sqlite3 tool is found by whoever verifies them, with the row and what is
    wrong with it; the site does not open such a ledger."""
    statements, number, what, text = TAMPERING[name]
    with_sqlite(path, *statements)
    found = verify(read_ledger(path), public_key=SITE.public_key)
    assert (what, number) in {(problem.what, problem.row) for problem in found.problems}
    with pytest.raises(LedgerTampered, match=f"ledger x, .*{text}") as raised:
        replace(found, problems=tuple(one for one in found.problems if (one.what, one.row) == (what, number))).check(
            "ledger x"
        )
    assert f"row {number}: " in str(raised.value)
    with pytest.raises(LedgerTampered, match=rf"ledger {path}, row -?\d+: "):
        open_ledger(path)


def test_one_edit_is_one_problem(path: Path) -> None:
    """What follows an edited, removed or exchanged row is not called tampered with."""
    whole = read_ledger(path)
    for changed, problems in (
        ([*whole[:1], replace(whole[1], body=whole[1].body.replace("3.5", "9.5")), *whole[2:]], [(2, "edited")]),
        ([*whole[:2], *whole[3:]], [(3, "removed")]),
        ([*whole[:2], whole[3], whole[2], *whole[4:]], [(3, "moved")]),
    ):
        assert [(problem.row, problem.what) for problem in verify(changed).problems] == problems


def test_events_of_a_ledger_that_was_edited(path: Path) -> None:
    """Whoever asks a ledger's file what was spent is not told it of rows that the site did not write."""
    assert len(events_in(path)) > 0
    with_sqlite(path, "UPDATE rows SET body = replace(body, 'reserved', 'refused') WHERE sequence = 2")
    with pytest.raises(LedgerTampered, match="row 2: its contents are not those"):
        events_in(path)


def test_a_removed_tail(path: Path) -> None:
    """A tail that is gone shows to whoever has noted the head; a head that is noted earlier is still there later."""
    with open_ledger(path) as ledger:
        head = ledger.head
        reserve(ledger, 4)
        later = ledger.head
    rows = read_ledger(path)
    assert (rows[5].hash, rows[6].hash) == (head, later)
    for noted in (None, head, later):
        assert verify(rows, head=noted).problems == ()
    with_sqlite(path, "DELETE FROM rows WHERE sequence > 5")
    assert verify(read_ledger(path)).problems == ()
    found = verify(read_ledger(path), head=head)
    assert [(problem.row, problem.what) for problem in found.problems] == [(6, "tail removed")]
    assert f"no row has the noted head {head[:16]}..., the last one here is row 5" in str(found.problems[0])
    assert verify([], head=head).problems[-1].what == "tail removed"


def test_a_tail_that_is_removed_while_the_site_runs(path: Path) -> None:
    """A running site notices that its last row is gone or another, before it writes."""
    for statement in ("DELETE FROM rows WHERE sequence = 6", "UPDATE rows SET body = '{}' WHERE sequence = 6", EDIT):
        copy = path.with_name("copy.sqlite")
        copy.write_bytes(path.read_bytes())
        with open_ledger(copy) as ledger:
            with_sqlite(copy, statement)
            if statement is not EDIT:  # an earlier row is read again when the ledger is opened again
                with pytest.raises(LedgerTampered, match="row 6: is missing or altered since it was last read"):
                    reserve(ledger, 4)


@pytest.mark.parametrize("first", [1, 2, 6])
def test_rows_signed_by_another_key(path: Path, first: int) -> None:
    """Rows that somebody else has hashed and signed anew are named, from whichever row on, even if all are consistent
    among themselves; a ledger that names another key throughout shows to whoever knows the site's."""
    rows = read_ledger(path)[: first - 1]
    for row in read_ledger(path)[first - 1 :]:
        previous = rows[-1].hash if rows else "0" * 64
        rows.append(new_row(json.loads(row.body), previous=previous, signer=OTHER))
    found = verify(rows)
    assert {(problem.row, problem.what) for problem in found.problems} == {
        (number, "signature") for number in range(first, 7)
    }
    renamed = [
        new_row({**json.loads(rows[0].body), "public_key": OTHER.public_key.hex()}, previous="0" * 64, signer=OTHER)
    ]
    for row in rows[1:]:
        renamed.append(new_row(json.loads(row.body), previous=renamed[-1].hash, signer=OTHER))
    assert verify(renamed).problems == ()
    (problem,) = verify(renamed, public_key=SITE.public_key).problems
    assert (problem.row, problem.what) == (1, "other key")
    assert OTHER.public_key.hex()[:16] in problem.text
    assert SITE.public_key.hex()[:16] in problem.text


def test_rows_of_another_ledger(path: Path) -> None:
    """Rows of another ledger of the same site, at the same places, are named as such: in the middle and at the end."""
    with open_ledger(path.with_name("other.sqlite"), dataset="e" * 64) as other:
        for number in range(1, 7):
            reserve(other, number, run="other")
        theirs = read_ledger(path.with_name("other.sqlite"))
    ours = read_ledger(path)
    for spliced, problems in (
        ([*ours[:3], theirs[3], *ours[4:]], {4}),
        ([*ours, theirs[6]], {7}),
        ([*ours[:4], *theirs[4:]], {5, 6, 7}),
        ([*theirs[:1], *ours[1:]], {2, 3, 4, 5, 6}),
    ):
        found = verify(spliced).problems
        assert {problem.row for problem in found if problem.what == "other ledger"} == problems
    values = (ours[3].hash, theirs[3].body, theirs[3].hash, theirs[3].signature)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE rows SET previous = ?, body = ?, hash = ?, signature = ? WHERE sequence = 4", values)
    with pytest.raises(LedgerTampered, match="row 4: belongs to the ledger"):
        open_ledger(path)


def test_two_ends_of_one_ledger(path: Path) -> None:
    """What was written after a restored backup does not continue what was written before it."""
    backup = path.with_name("backup.sqlite")
    backup.write_bytes(path.read_bytes())
    for file, run in ((path, "run"), (backup, "again")):
        with open_ledger(file) as ledger:
            reserve(ledger, 4, run=run)
            reserve(ledger, 5, run=run)
    joined = [*read_ledger(path)[:7], *read_ledger(backup)[7:]]
    (problem,) = verify(joined).problems
    assert (problem.row, problem.what) == (8, "moved")
    assert "follows a row with the hash" in problem.text


@pytest.mark.parametrize(
    ("statements", "named"),
    [
        (["DROP TABLE rows"], "rows altered, expected the tables rows and outbox"),
        (["DROP TABLE outbox"], "outbox altered"),
        (
            ["CREATE TRIGGER undo AFTER INSERT ON rows BEGIN DELETE FROM rows WHERE sequence = new.sequence; END"],
            "undo",
        ),
        (["ALTER TABLE rows ADD COLUMN note"], "rows altered"),
        (["DROP TABLE rows", "DROP TABLE outbox", "CREATE TABLE x (y)"], "outbox, rows, x altered"),
    ],
    ids=["no rows", "no outbox", "trigger", "column", "another file"],
)
def test_other_tables(path: Path, statements: list[str], named: str) -> None:
    """A file with other tables, or with triggers that undo what is written, is not a ledger."""
    with_sqlite(path, *statements)
    with pytest.raises(LedgerTampered, match=named):
        open_ledger(path)


def test_not_a_database(path: Path) -> None:
    """A file that is no database, and one whose pages were overwritten, is refused by the site and by the officer."""
    whole = path.read_bytes()
    for content in (b"x" * 5000, whole[:4096] + b"\xff" * (len(whole) - 4096)):
        path.write_bytes(content)
        with pytest.raises(LedgerTampered):
            open_ledger(path)
        with pytest.raises(LedgerTampered):
            verify(read_ledger(path)).check("ledger")


def test_a_signed_row_that_makes_no_sense(path: Path) -> None:
    """A row of the site's own key that no version has written is refused rather than skipped."""
    for changes in ({"event": {"mechanism": "Magic"}}, {"decision": None, "event": None}, {"event": {"steps": 1}}):
        copy = path.with_name("copy.sqlite")
        copy.write_bytes(path.read_bytes())
        with_sqlite(copy, *forged(copy, 6, **changes))
        if "decision" not in changes:
            with pytest.raises(LedgerTampered, match="row 6: signed, but not as this version writes it"):
                open_ledger(copy)
    with_sqlite(path, *forged(path, 6, kind="commit", reservation=2, update_sha256="0" * 64))
    with pytest.raises(LedgerTampered, match="a second update of round 1 of run run"):
        open_ledger(path)


def test_another_format(path: Path) -> None:
    """A ledger of a format that this version does not know is not read."""
    with_sqlite(path, *forged(path, 1, format=2))
    with pytest.raises(LedgerTampered, match="row 1: found kind open and format 2, expected open, 1"):
        open_ledger(path)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_change_of_any_field_shows(tmp_path_factory, data) -> None:
    """One character changed, dropped or added in any field of any row is found, and named at that row or the next."""
    rows = rows_of_six(tmp_path_factory)
    place = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from(["previous", "body", "hash", "signature"]))
    text = getattr(rows[place], name)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(["", "0", "1", "f", '"', "}", text[at] * 2, " "]))
    changed = text[:at] + other + text[at + 1 :]
    if changed == text:
        return
    tampered = [*rows[:place], replace(rows[place], **{name: changed}), *rows[place + 1 :]]
    found = verify(tampered, head=rows[-1].hash)
    assert found.problems
    assert {problem.row for problem in found.problems} & {place + 1, place + 2}


def rows_of_six(factory) -> list[Row]:
    """The rows of one small ledger, made once."""
    if "rows" not in ROWS:
        with open_ledger(factory.mktemp("ledger") / "x.sqlite") as ledger:
            for number in (1, 2):
                ledger.commit(reserve(ledger, number), b"update")
            reserve(ledger, 3)
            ROWS["rows"] = read_ledger(factory.getbasetemp() / ledger._path)
    return ROWS["rows"]


ROWS: dict[str, list[Row]] = {}


def test_the_label_separates_the_ledger_s_signatures() -> None:
    """A hash of the same fields under another label is another one, and what is hashed can be told apart again."""
    assert LABEL == b"secureagg/v1/ledger"
    assert hash_of("ab", "c") != hash_of("a", "bc")


# Elsewhere


def test_an_export_is_verified_elsewhere(path: Path) -> None:
    """The exported rows verify without the database and the site's secrets, say what the ledger is of, and have its
    head."""
    export = path.with_name("ledger.jsonl")
    with open_ledger(path) as ledger:
        ledger.export(export)
        head = ledger.head
    assert read_export(export) == read_ledger(path)
    found = verify_export(export, head=head, public_key=SITE.public_key)
    assert (found.problems, found.head) == ((), head)
    assert (found.opening["dataset"], found.opening["site"]) == (DATASET, "a")
    assert [entry["kind"] for entry in found.entries] == ["open", "reserve", "commit", "reserve", "commit", "reserve"]
    found.check("ledger")


def test_a_tampered_export(path: Path) -> None:
    """The same checks hold for lines that were edited, removed or exchanged, and what is no row is refused by line."""
    export = path.with_name("ledger.jsonl")
    with open_ledger(path) as ledger:
        ledger.export(export)
        head = ledger.head
    lines = export.read_text().splitlines(keepends=True)
    for changed, number, what in (
        ([lines[0], lines[1].replace("3.5", "9.5"), *lines[2:]], 2, "edited"),
        ([*lines[:2], *lines[3:]], 3, "removed"),
        ([*lines[:2], lines[3], lines[2], *lines[4:]], 3, "moved"),
        (lines[:-1], 6, "tail removed"),
        ([], 1, "empty"),
    ):
        export.write_text("".join(changed))
        problem = verify_export(export, head=head).problems[0]
        assert (problem.row, problem.what) == (number, what)
    for bad in ("x\n", "[]\n", "{}\n", "\n", lines[2].replace('"sequence"', '"number"'), lines[2][:-2] + ', "x": 1}\n'):
        export.write_text("".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(LedgerTampered, match="line 3: not a row as a ledger exports it"):
            verify_export(export)
    with pytest.raises(LedgerUnavailable, match="nowhere"):
        verify_export(path.with_name("nowhere"))


def test_a_site_moves_to_another_machine(path: Path) -> None:
    """A ledger made from an export goes on where it was; a tampered or truncated export makes none, and an existing
    ledger is never replaced."""
    export, moved = path.with_name("ledger.jsonl"), path.with_name("moved.sqlite")
    with open_ledger(path) as ledger:
        ledger.export(export)
        head = ledger.head
    restore(export, moved, head=head, public_key=SITE.public_key)
    with open_ledger(moved) as ledger:
        assert ledger.head == head
        reserve(ledger, 4)
    with pytest.raises(LedgerUnavailable, match="exists already"):
        restore(export, moved)
    assert len(read_ledger(moved)) == 7
    export.write_text("".join(export.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerTampered, match="row 6: is missing: no row has the noted head"):
        restore(export, path.with_name("new.sqlite"), head=head)
    assert not path.with_name("new.sqlite").exists()


def test_an_officer_needs_neither_torch_nor_secrets(path: Path) -> None:
    """The ledger's module is imported and verifies without loading torch or opacus, also from a folder that cannot be
    written, and the file stays as it is."""
    before = path.read_bytes()
    program = (
        "import sys; from pathlib import Path; from dp.ledger import read_ledger, verify\n"
        f"found = verify(read_ledger(Path({str(path)!r})), public_key=bytes.fromhex({SITE.public_key.hex()!r}))\n"
        "found.check('ledger'); assert len(found.entries) == 6\n"
        "assert not {'torch', 'opacus', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["ledger.sqlite"]


def test_a_ledger_is_read_while_the_site_runs(path: Path) -> None:
    """What is not yet in the main file, but in SQLite's log beside it, is read too."""
    with open_ledger(path) as ledger:
        reserve(ledger, 4)
        assert len(read_ledger(path)) == 7
    with pytest.raises(LedgerUnavailable, match="nowhere"):
        read_ledger(path.with_name("nowhere"))


# Failing disks


def test_a_full_disk(tmp_path: Path) -> None:
    """When the disk is full nothing is reserved or committed, the error says so, the object does not count what is not
    on the disk, and what was there is still whole."""
    path = tmp_path / "ledger.sqlite"
    with open_ledger(path) as ledger:
        reserve(ledger, 1)
        reservation = reserve(ledger, 2)
        pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerUnavailable, match=r"ledger .*ledger\.sqlite: database or disk is full, expected"):
            ledger.commit(reservation, b"x" * 100_000)
        assert (len(ledger.releases), ledger.unsent) == (2, ())
        with pytest.raises(LedgerUnavailable, match="full"):
            list(map(partial(reserve, ledger), range(3, 100)))
        held = len(ledger.releases)
        assert 2 < held < 90
    with open_ledger(path) as ledger:
        assert len(ledger.releases) == held
        with pytest.raises(ReservationMisused):
            ledger.commit(reservation, b"x")


def test_a_file_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only medium nothing is reserved or made, also if it becomes read-only later."""
    with open_ledger(path) as ledger:
        ledger._database.execute("PRAGMA query_only = 1")
        for act in (
            lambda: reserve(ledger, 4),
            lambda: ledger.mark_sent(ledger.unsent[0]),
            lambda: ledger.record("note", {}),
        ):
            with pytest.raises(LedgerUnavailable, match="attempt to write a readonly database"):
                act()
        assert len(ledger.releases) == 3
    real = sqlite3.connect
    monkeypatch.setattr(
        ledger_module.sqlite3, "connect", lambda path, **options: real(f"file:{path}?mode=ro", uri=True, **options)
    )
    with open_ledger(path) as ledger, pytest.raises(LedgerUnavailable, match="readonly"):
        reserve(ledger, 4)
    with pytest.raises(LedgerUnavailable, match="unable to open"):
        open_ledger(path.with_name("new.sqlite"))


def test_a_file_system_without_shared_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SQLite cannot keep its write-ahead log, the ledger is not opened."""
    monkeypatch.setattr(ledger_module.sqlite3, "connect", lambda _, **options: sqlite3_in_memory(**options))
    with pytest.raises(LedgerUnavailable, match="journal mode memory, expected wal"):
        open_ledger(path)


REAL_CONNECT = sqlite3.connect


def sqlite3_in_memory(**options: object) -> sqlite3.Connection:
    """A database that has no file, and so no write-ahead log."""
    return REAL_CONNECT(":memory:", **options)


def test_a_disk_limit_of_the_system(tmp_path: Path) -> None:
    """Where the system refuses to let the file grow, the reservation fails, and the one before it is still there."""
    program = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from support.ledgers import open_ledger, reserve
from dp.errors import LedgerUnavailable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = open_ledger(Path(sys.argv[1]))
reserve(ledger, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    for number in range(2, 200):
        reserve(ledger, number)
except LedgerUnavailable as error:
    print(len(ledger.releases), error)
"""
    path = tmp_path / "ledger.sqlite"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True, cwd=root)
    held, _, error = done.stdout.partition(" ")
    assert "disk" in error
    with open_ledger(path) as ledger:
        assert int(held) <= len(ledger.releases) <= int(held) + 1
        assert int(held) >= 1
