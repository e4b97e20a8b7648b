"""What a coordinator remembers across a crash: all of a round or nothing, no number twice, and no damaged file in
silence."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sites import run_store
from sites.errors import ConfigurationError
from sites.run_store import DATABASE, LOG, Model, RunStore

START = Model(name=b"start", optimizer=b"the initial model")


@dataclass(frozen=True)
class Rules:
    """What the store asks a manifest."""

    digest: bytes
    rules: bytes = b"rules"
    follows: bytes = b""

    def continues(self, digest: bytes, rules: bytes) -> bool:
        """As ``Manifest.continues``."""
        return rules == self.rules and digest in (self.digest, self.follows)


MANIFEST = Rules(b"first")


class Crash(BaseException):
    """The machine went away."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    """A new store in ``tmp_path``."""
    opened = RunStore(tmp_path)
    yield opened
    opened.close()


def model(number: int) -> Model:
    """The model after a round."""
    return Model(name=b"name %d" % number, optimizer=b"model %d" % number, holders=("a", "b"))


def again(store: RunStore, folder: Path) -> RunStore:
    """The store of the next process."""
    store.close()
    return RunStore(folder)


def log(folder: Path) -> list[bytes]:
    """The lines of the log."""
    return (folder / LOG).read_bytes().splitlines()


def test_a_run_is_found_again(store: RunStore, tmp_path: Path) -> None:
    """The next process finds the run, the last round begun and finished, the model, who has it and who is excluded."""
    assert store.unfinished(MANIFEST) is None
    store.start("run", MANIFEST, START)
    store.begin("run", 1)
    store.finish("run", 1, b"one", model(1))
    store.begin("run", 2)
    store.finish("run", 2, b"two", None, {"d": "malformed-message"})
    store.begin("run", 3)
    found = again(store, tmp_path).unfinished(MANIFEST)
    assert (found.run, found.begun, found.finished, found.model) == ("run", 3, 2, model(1))
    assert found.excluded == {"d": "malformed-message"}
    assert log(tmp_path) == [b"one", b"two"]


def test_a_model_that_only_the_sites_have(store: RunStore, tmp_path: Path) -> None:
    """Of such a model the name is kept, and no file."""
    store.start("run", MANIFEST, Model(name=b"start", optimizer=None))
    store.finish("run", 1, b"one", Model(name=b"next", optimizer=None, holders=("a",)))
    assert again(store, tmp_path).unfinished(MANIFEST).model == Model(name=b"next", optimizer=None, holders=("a",))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_that_is_over_is_not_gone_on_with(store: RunStore) -> None:
    """A finished run, and one that a new one has taken the place of, are left alone."""
    store.start("old", MANIFEST, START)
    store.start("new", MANIFEST, START)
    assert store.unfinished(MANIFEST).run == "new"
    store.end("new", "finished")
    assert store.unfinished(MANIFEST) is None


def test_how_the_last_run_ended(store: RunStore, tmp_path: Path) -> None:
    """It is found once it is over, with its model, under its manifest and the next one only; and not while another run
    is on."""
    store.start("run", MANIFEST, START)
    assert store.finished(MANIFEST) is None
    store.begin("run", 1)
    store.finish("run", 1, b"one", model(1))
    store.end("run", "finished")
    store = again(store, tmp_path)
    for manifest in (MANIFEST, Rules(b"second", follows=b"first")):
        found = store.finished(manifest)
        assert (found.run, found.begun, found.model) == ("run", 1, model(1))
    assert store.finished(Rules(b"third", follows=b"second")) is None
    store.start("another", MANIFEST, START)
    assert store.finished(MANIFEST) is None
    store.close()


def test_a_run_goes_on_under_the_next_revision(store: RunStore, tmp_path: Path) -> None:
    """The next revision of the manifest takes over, and the one after that from there; the old one is out then."""
    store.start("run", MANIFEST, START)
    second, third = Rules(b"second", follows=b"first"), Rules(b"third", follows=b"second")
    assert store.unfinished(second).run == "run"
    store = again(store, tmp_path)
    with pytest.raises(ConfigurationError, match="run run is not over"):
        store.unfinished(MANIFEST)
    assert store.unfinished(third).run == "run"
    store.close()


@pytest.mark.parametrize(
    "other", [Rules(b"other"), Rules(b"other", follows=b"second"), Rules(b"other", rules=b"changed", follows=b"first")]
)
def test_a_run_is_not_dropped_in_silence(store: RunStore, other: Rules) -> None:
    """A manifest that is neither the run's nor its next revision, or that changes more than the sites, is refused with
    what to do about it; the run is still there."""
    store.start("run", MANIFEST, START)
    with pytest.raises(ConfigurationError, match=r"run run is not over, under the manifest .* --new-run drops it"):
        store.unfinished(other)
    assert store.unfinished(MANIFEST).run == "run"


def test_only_the_last_model_is_kept(store: RunStore, tmp_path: Path) -> None:
    """Files do not pile up over a long run."""
    store.start("run", MANIFEST, START)
    for number in range(1, 6):
        store.finish("run", number, b"%d" % number, model(number))
    assert [path.read_bytes() for path in tmp_path.glob("*.safetensors")] == [b"model 5"]


@pytest.mark.parametrize("damage", ["gone", "cut", "bit"])
def test_a_damaged_model_is_named(store: RunStore, tmp_path: Path, damage: str) -> None:
    """A model that is missing or not what was written ends the start with the file's name; no run goes on from it."""
    store.start("run", MANIFEST, START)
    store.finish("run", 1, b"one", model(1))
    (path,) = tmp_path.glob("*.safetensors")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"mode" if damage == "cut" else b"model 0")
    with pytest.raises(ConfigurationError, match=str(path)):
        store.unfinished(MANIFEST)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_damaged_database_is_named(store: RunStore, tmp_path: Path, damage: str) -> None:
    """A database that is none, or a piece of one, is named."""
    store.start("run", MANIFEST, START)
    for number in range(200):
        store.finish("run", number, bytes(100))
    store.close()
    path = tmp_path / DATABASE
    data = path.read_bytes()
    path.write_bytes(b"no database" * 100 if damage == "text" else data[: len(data) // 2 // 4096 * 4096])
    with pytest.raises(ConfigurationError, match=str(path)):
        RunStore(tmp_path).unfinished(MANIFEST)


def test_one_coordinator_at_a_time(store: RunStore, tmp_path: Path) -> None:
    """A second coordinator in the same folder is told so, and changes nothing."""
    store.start("run", MANIFEST, START)
    with pytest.raises(ConfigurationError, match="that no other coordinator uses"):
        RunStore(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A state folder in the place of a file is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=str(tmp_path / "file")):
        RunStore(tmp_path / "file")


@pytest.mark.parametrize("where", ["write_atomic", "_append", "_forget_files"])
def test_a_crash_within_the_end_of_a_round(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Wherever the machine goes away while a round is being finished, the next process finds all of it or nothing, and
    after `complete_log` the log has the line if the round counts."""
    store.start("run", MANIFEST, START)
    store.begin("run", 1)
    with monkeypatch.context() as patch:

        def crash(*_arguments: object, **_options: object) -> None:
            raise Crash

        patch.setattr(run_store if where == "write_atomic" else RunStore, where, crash)
        with pytest.raises(Crash):
            store.finish("run", 1, b"one", model(1))
    store = again(store, tmp_path)
    found = store.unfinished(MANIFEST)
    finished = where != "write_atomic"
    assert (found.finished, found.model) == ((1, model(1)) if finished else (0, START))
    store.complete_log()
    assert log(tmp_path) == ([b"one"] if finished else [])
    store.close()


def test_a_database_that_fails_half_way(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second of two statements fails, the first has not happened either."""
    store.start("run", MANIFEST, START)
    real = store._database

    class Failing:
        def execute(self, statement: str, *arguments: object) -> object:
            if statement.startswith("UPDATE"):
                raise sqlite3.OperationalError("disk I/O error")
            return real.execute(statement, *arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_database", Failing())
        with pytest.raises(ConfigurationError, match="disk I/O error"):
            store.finish("run", 1, b"one", model(1))
    found = store.unfinished(MANIFEST)
    assert (found.finished, found.model) == (0, START)


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 40), lost=st.integers(0, 3))
def test_the_log_is_completed(tmp_path_factory: pytest.TempPathFactory, cut: int, lost: int) -> None:
    """However much of the log's end is missing, all lines are there afterwards, once each and in order."""
    folder = tmp_path_factory.mktemp("log")
    store = RunStore(folder)
    store.start("run", MANIFEST, START)
    records = [b"record %d" % number for number in range(4)]
    for number, record in enumerate(records):
        store.finish("run", number, record)
    path = folder / LOG
    data = b"".join(line + b"\n" for line in records[: 4 - lost])
    path.write_bytes(data[: max(0, len(data) - cut)])
    store.complete_log()
    assert log(folder) == records
    store.complete_log()
    assert log(folder) == records
    store.close()
