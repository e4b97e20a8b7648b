"""The durable record of releases."""

import fcntl
import threading
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

from dp.errors import LedgerTampered
from dp.events import PoissonSampledGaussian
from dp.ledger import Ledger, Release


def release(number: int) -> Release:
    """A release that tells by its steps which one it is."""
    event = PoissonSampledGaussian(sampling_rate=0.25, noise_multiplier=3.5, steps=number)
    return Release(run="run", round_number=number, event=event)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger file with four entries."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(1, 5):
        ledger.reserve(release(number))
    return tmp_path / "ledger.jsonl"


def test_entries_survive(path: Path) -> None:
    """A ledger opened again holds the same releases in the same order, and goes on from there."""
    again = Ledger(path)
    assert again.releases == tuple(release(number) for number in range(1, 5))
    again.reserve(release(5))
    assert Ledger(path).releases == tuple(release(number) for number in range(1, 6))


def test_a_reservation_is_on_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before ``reserve`` returns, the entry is flushed to the disk; if that fails, it raises."""
    synced: list[bytes] = []
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setattr("dp.ledger.os.fsync", lambda _: synced.append(path.read_bytes()))
    Ledger(path).reserve(release(1))
    assert synced[0].endswith(b"\n")
    assert Ledger(path).releases == (release(1),)

    def fail(_: int) -> None:
        raise OSError("disk failure")

    monkeypatch.setattr("dp.ledger.os.fsync", fail)
    ledger = Ledger(path)
    with pytest.raises(OSError, match="disk failure"):
        ledger.reserve(release(2))
    assert ledger.releases == (release(1),)


def test_every_changed_byte_shows(path: Path) -> None:
    """A changed byte of an earlier entry fails the opening; one of the last entry does, or the head differs."""
    original, head = path.read_bytes(), Ledger(path).head
    last_line = original[:-1].rindex(b"\n") + 1
    for position in range(0, len(original), 3):
        changed = bytearray(original)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        if position < last_line:
            with pytest.raises(LedgerTampered, match=f"ledger {path}, line"):
                Ledger(path)
        else:  # no line behind it would tell, so its own form or the head does
            with suppress(LedgerTampered):
                assert Ledger(path).head != head


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_removed_entry_shows(path: Path, gone: int) -> None:
    """Without one of the earlier lines the next one is not in its place."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
    with pytest.raises(LedgerTampered, match=f"line {gone + 1}: altered, or not in its place"):
        Ledger(path)


def test_exchanged_entries_show(path: Path) -> None:
    """Two lines exchanged are not in their places."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    with pytest.raises(LedgerTampered, match="line 2"):
        Ledger(path)


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"null", b"\xff", b'{"event":{}}', b"", b"[" * 100_000, b'{"event":{"steps":1e999}}'],
    ids=["object", "array", "null", "binary", "no event", "empty", "nested", "infinite"],
)
def test_what_is_no_entry_shows(path: Path, line: bytes) -> None:
    """A line that no ledger wrote is refused."""
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(LedgerTampered, match="line 5"):
        Ledger(path)


def test_a_torn_last_line_is_cut_off(path: Path) -> None:
    """A crash in the middle of a reservation leaves the earlier entries, wherever it happened; the next one fits on."""
    original = path.read_bytes()
    start = original[:-1].rindex(b"\n") + 1
    for end in range(start + 1, len(original)):
        path.write_bytes(original[:end])
        ledger = Ledger(path)
        assert ledger.releases == tuple(release(number) for number in range(1, 4))
        ledger.reserve(release(4))
        assert path.read_bytes() == original


def test_head_names_the_last_entry(path: Path) -> None:
    """Noted elsewhere, the head shows that a tail was removed."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert Ledger(path).head == sha256(lines[-1]).hexdigest()
    path.write_bytes(b"".join(lines[:-1]))
    assert Ledger(path).head == sha256(lines[-2]).hexdigest()
    assert Ledger(path.with_name("new.jsonl")).head == "0" * 64


def test_two_processes_do_not_overwrite_each_other(path: Path) -> None:
    """Two ledgers open on one file see each other's entries when they book, and the chain stays whole."""
    one, other = Ledger(path), Ledger(path)
    one.reserve(release(5))
    other.reserve(release(6))
    assert other.releases[-2:] == (release(5), release(6))
    assert Ledger(path).releases == tuple(release(number) for number in range(1, 7))


def test_a_reservation_is_exclusive(path: Path) -> None:
    """While one reservation is being checked, another process's waits: the file is locked."""
    blocked: list[bool] = []

    def check() -> None:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                blocked.append(True)

    Ledger(path).reserve(release(5), check=check)
    assert blocked == [True]


def test_a_reader_does_not_cut_off_what_is_being_written(path: Path) -> None:
    """A ledger opened while another process writes an entry waits for its end, and takes no half line for torn."""
    whole = path.read_bytes()
    half = threading.Event()
    opened: list[Ledger] = []

    def write() -> None:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            path.write_bytes(whole[:-10])
            half.set()
            reader.join(timeout=0.3)
            assert not opened
            file.write(whole[-10:])

    reader = threading.Thread(target=lambda: half.wait() and opened.append(Ledger(path)))
    reader.start()
    write()
    reader.join()
    assert path.read_bytes() == whole
    assert opened[0].releases == tuple(release(number) for number in range(1, 5))


def test_booking_again_after_a_disk_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry whose flush failed may be on the disk, so it counts; the next one fits on behind it."""
    ledger = Ledger(path)
    with monkeypatch.context() as patch:
        patch.setattr("dp.ledger.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk failure")))
        with pytest.raises(OSError, match="failure"):
            ledger.reserve(release(5))
    ledger.reserve(release(6))
    assert Ledger(path).releases == ledger.releases == tuple(release(number) for number in range(1, 7))


def test_a_refusal_leaves_the_file_as_it_was(path: Path) -> None:
    """What ``check`` raises is passed on, and nothing is booked."""
    before = path.read_bytes()

    def refuse() -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        Ledger(path).reserve(release(5), check=refuse)
    assert path.read_bytes() == before
