"""What a site's journal promises: never the same round twice, whoever asks, whatever restarts in between."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from secureagg import RoundReplayed
from secureagg.testing import MemoryJournal
from sites.errors import ConfigurationError
from sites.journal import SqliteJournal


@pytest.fixture(params=["memory", "sqlite", "sqlite reopened"])
def journal(request, tmp_path):
    """Gives the journal for the next call: always the same one, or the same file opened anew."""
    if request.param == "memory":
        one = MemoryJournal()
        yield lambda: one
        return
    opened = [SqliteJournal(tmp_path / "journal")]

    def current():
        if request.param == "sqlite reopened":
            opened[-1].close()
            opened.append(SqliteJournal(tmp_path / "journal"))
        return opened[-1]

    yield current
    opened[-1].close()


# What every secureagg.Journal promises


def test_rounds_in_order(journal):
    """Rounds of rising numbers begin, with gaps as well."""
    for number in (1, 2, 5, 6, (1 << 63) - 1):
        journal().begin("run", number)


@pytest.mark.parametrize("number", [5, 4, 1])
def test_a_round_that_is_not_above_the_last(journal, number):
    """The last round's number, or one below it, does not begin, and this changes nothing."""
    journal().begin("run", 5)
    for _ in range(2):
        with pytest.raises(RoundReplayed, match=f"round {number} of run run"):
            journal().begin("run", number)
    journal().begin("run", 6)


def test_runs_are_apart(journal):
    """Each run counts its own rounds."""
    journal().begin("one", 5)
    journal().begin("two", 1)
    with pytest.raises(RoundReplayed):
        journal().begin("one", 5)
    with pytest.raises(RoundReplayed):
        journal().begin("two", 1)


def test_one_answer(journal):
    """A round is answered once."""
    journal().begin("run", 1)
    journal().answer("run", 1)
    for _ in range(2):
        with pytest.raises(RoundReplayed, match="round 1 of run run was answered before"):
            journal().answer("run", 1)


def test_answers_are_apart(journal):
    """An answer in one round stands in the way of no other round and no other run."""
    journal().answer("run", 2)
    journal().answer("run", 3)
    journal().answer("run", 1)
    journal().answer("other", 2)
    for run, number in (("run", 1), ("run", 2), ("run", 3), ("other", 2)):
        with pytest.raises(RoundReplayed):
            journal().answer(run, number)


def test_an_answer_is_remembered_over_later_rounds(journal):
    """A round that was answered stays answered after later ones have begun and been answered."""
    for number in (1, 2, 3):
        journal().begin("run", number)
        journal().answer("run", number)
    with pytest.raises(RoundReplayed):
        journal().answer("run", 1)


# The file


def test_two_connections(tmp_path):
    """What one connection has noted holds for another that was open all the time."""
    one, two = SqliteJournal(tmp_path / "journal"), SqliteJournal(tmp_path / "journal")
    one.begin("run", 1)
    with pytest.raises(RoundReplayed):
        two.begin("run", 1)
    two.begin("run", 2)
    with pytest.raises(RoundReplayed):
        one.begin("run", 2)
    one.answer("run", 1)
    with pytest.raises(RoundReplayed):
        two.answer("run", 1)
    one.close()
    two.close()


@pytest.mark.parametrize("method", ["begin", "answer"])
def test_two_at_the_same_moment(tmp_path, method):
    """Of two connections that ask for the same round at the same moment one passes, each time."""
    journals = [SqliteJournal(tmp_path / "journal") for _ in range(2)]
    barrier = Barrier(2)

    def passes(journal, number):
        barrier.wait()
        try:
            getattr(journal, method)("run", number)
        except RoundReplayed:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for number in range(1, 51):
            results = [pool.submit(passes, journal, number) for journal in journals]
            assert sorted(result.result() for result in results) == [False, True]
    for journal in journals:
        journal.close()


def test_on_disk_when_a_method_returns(tmp_path):
    """SQLite is told to flush each note to the disk (FULL is 2), and to wait for nobody's commit."""
    journal = SqliteJournal(tmp_path / "journal")
    assert journal._database.execute("PRAGMA synchronous").fetchone() == (2,)
    journal.begin("run", 1)
    assert not journal._database.in_transaction
    journal.close()


def test_not_a_journal(tmp_path):
    """A file that is not SQLite's is refused naming it, and stays as it was."""
    path = tmp_path / "journal"
    path.write_bytes(b"name = 'not a database'\n" * 100)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=f"journal {path}: .*expected a readable and writable SQLite file"):
        SqliteJournal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", ["folder", "none/journal"])
def test_a_place_that_cannot_hold_a_journal(tmp_path, where):
    """A folder, or a file in a missing one, is refused naming it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match=f"journal {tmp_path / where}"):
        SqliteJournal(tmp_path / where)
