"""A run that is interrupted and goes on under the next revision of its manifest: without a site, or with its new keys.

Over real sockets: the coordinator and the sites end, read what the remaining sites have signed, and start again.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.consortium import Consortium, make_consortium
from support.federation import INITIAL, PLAIN, QUICK, STRICT, examples_of, expected_model, moving

from sites.config import open_site, save_config
from sites.coordinator_loop import RoundRecord
from sites.demo import free_port
from sites.errors import ConfigurationError, ManifestError
from sites.keys import Keys, generate_keys, save_keys
from sites.manifest import Manifest
from sites.manifest_log import LOG, ManifestChange
from sites.participant_loop import Federation
from sites.programs import run_coordinator
from sites.recipe import ENCODING, TRAINING
from sites.run_store import RunStore
from transport import PeerUnreachable

ROUNDS = 4
NAMES = ("a", "b", "c", "d", "e")
STEP = ENCODING.value_range / (2**15 - 1)
DEADLINES = msgspec.structs.replace(QUICK, join_seconds=4.0, phase_seconds=20.0, training_seconds=20.0)


class Crash(BaseException):
    """The coordinator's machine goes away."""


class Interrupted:
    """Five sites and a coordinator, which ends after round 2; ``start`` starts programs under what is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.consortium: Consortium = make_consortium(
            folder,
            names=NAMES,
            address=f"tcp://127.0.0.1:{free_port()}",
            initial=INITIAL,
            privacy=PLAIN,
            deadlines=DEADLINES,
            encoding=STRICT,
            training=msgspec.structs.replace(TRAINING, rounds=ROUNDS),
        )
        self.said: list[str] = []
        self.errors: dict[str, BaseException] = {}
        self.final: dict[str, dict[str, torch.Tensor]] = {}
        with pytest.MonkeyPatch.context() as patch:
            real = RunStore.begin

            def crashing(store: RunStore, run: str, number: int) -> None:
                if number == 3:
                    raise Crash
                real(store, run, number)

            patch.setattr(RunStore, "begin", crashing)
            self.start(NAMES)
        assert isinstance(self.errors.pop("sum"), Crash)
        # The sites' machines lose the coordinator, and end.
        assert {type(error) for error in self.errors.values()} <= {PeerUnreachable}
        self.errors.clear()
        assert [record.number for record in self.records] == [1, 2]

    @property
    def records(self) -> list[RoundRecord]:
        """The coordinator's log."""
        lines = (self.folder / "state" / "rounds.jsonl").read_bytes().splitlines()
        return [msgspec.json.decode(line, type=RoundRecord) for line in lines]

    def changes(self, name: str) -> list[ManifestChange]:
        """Which manifests were in force at a site, or at the coordinator (`state`)."""
        lines = (self.folder / name / LOG).read_bytes().splitlines()
        return [msgspec.json.decode(line, type=ManifestChange) for line in lines]

    def sign(self, revised: Manifest, keys: Mapping[str, Keys], *, at: Path) -> None:
        """Have the revision signed by these sites, which pin it, and put it in force."""
        for name, own in keys.items():
            revised = revised.sign(own.identity, own.site)
            path = self.folder / f"{name}.keys"
            save_config(
                self.consortium.site_configs[name], manifest=revised, manifest_path=at, keys=path, site=name, data=None
            )
        revised.save(at)

    def start(self, names: tuple[str, ...], *, manifest: Path | None = None, rogue: str = "") -> None:
        """Run the coordinator and these sites to their end; a ``rogue`` one is started under what it had."""
        programs: dict[str, Callable[[], None]] = {name: lambda name=name: self._take_part(name) for name in names}
        programs["sum"] = lambda: self._coordinate(manifest or self.consortium.manifest_path)
        if rogue:
            programs[rogue] = lambda: self._take_part(rogue)
        threads = [threading.Thread(target=self._guarded, args=(name, program)) for name, program in programs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert not any(thread.is_alive() for thread in threads)

    def _guarded(self, name: str, program: Callable[[], None]) -> None:
        try:
            program()
        except BaseException as error:
            self.errors[name] = error

    def _coordinate(self, manifest: Path) -> None:
        run_coordinator(
            manifest,
            keys=self.consortium.coordinator_keys_path,
            initial=self.consortium.initial_path,
            state=self.folder / "state",
            report=lambda _record: None,
            notify=self.said.append,
        )

    def _take_part(self, name: str) -> None:
        federation = Federation(open_site(self.consortium.site_configs[name]))
        with federation:
            moving(name)(federation)
        with suppress(Exception):
            self.final[name] = federation.final_state


@pytest.fixture
def interrupted(tmp_path: Path) -> Interrupted:
    """A run that was interrupted after round 2."""
    return Interrupted(tmp_path)


def assert_model(interrupted: Interrupted, survivors: list[str]) -> None:
    """Each site that was there to the end has the model of all rounds, of both manifests."""
    for state in interrupted.final.values():
        for tensor in state.values():
            np.testing.assert_allclose(tensor.numpy(), expected_model(survivors), atol=5 * STEP)


def test_a_revoked_site(interrupted: Interrupted) -> None:
    """Without the site's signature the run goes on from round 3, with the others; the site, which comes all the same,
    is not admitted; the change is in everybody's log."""
    before = interrupted.consortium.manifest
    revised, path = before.revised(revoke=["e"]), interrupted.folder / "revised.toml"
    others = {name: interrupted.consortium.keys[name] for name in "abcd"}
    # Not before all who remain have signed it.
    interrupted.sign(revised, {name: others[name] for name in "abc"}, at=path)
    with pytest.raises(ManifestError, match="not signed by d"):
        open_site(interrupted.consortium.site_configs["a"])
    interrupted.start((), manifest=path)
    assert isinstance(interrupted.errors.pop("sum"), ManifestError)
    interrupted.sign(revised, others, at=path)
    interrupted.start(tuple("abcd"), manifest=path, rogue="e")

    assert "not admit" in str(interrupted.errors.pop("e"))
    assert interrupted.errors == {}
    records = interrupted.records
    assert [record.number for record in records] == [1, 2, 3, 4, 5]
    assert len({record.run for record in records}) == 1
    assert [record.survivors for record in records] == [NAMES] * 2 + [NAMES[:4]] * 3
    assert [record.cohort for record in records[2:]] == [NAMES[:4]] * 3
    assert records[2].examples == sum(map(examples_of, "abcd"))
    assert interrupted.final.keys() == set("abcd")
    assert_model(interrupted, ["abcde", "abcde", "abcd", "abcd"])
    for log in ("state", "a", "b", "c", "d"):
        first, second = interrupted.changes(log)
        assert (first.revision, first.revoked, sorted(first.added)) == (1, [], sorted(NAMES)), log
        assert (second.revision, second.revoked, second.digest) == (2, ["e"], revised.digest.hex()), log
    assert "manifest revision 2, revoked: e" in interrupted.said


def test_new_keys(interrupted: Interrupted) -> None:
    """A site whose keys were replaced goes on with the run under the new ones; its old transport key, in whosever
    hands, is not admitted any more; nor does the coordinator go back to the manifest before."""
    before = interrupted.consortium.manifest
    new = generate_keys("b")
    (stolen := interrupted.folder / "stolen").mkdir()
    for suffix in ("keys", "card"):
        (interrupted.folder / f"b.{suffix}").rename(stolen / f"b.{suffix}")
    save_keys(new, interrupted.folder)
    thief = stolen / "SITE.toml"
    save_config(
        thief,
        manifest=before,
        manifest_path=interrupted.consortium.manifest_path,
        keys=stolen / "b.keys",
        site="b",
        data=None,
    )
    interrupted.consortium.site_configs["thief"] = thief
    revised, path = before.revised(cards=[new.card]), interrupted.folder / "revised.toml"
    interrupted.sign(revised, {**{name: interrupted.consortium.keys[name] for name in "acde"}, "b": new}, at=path)
    interrupted.start(NAMES, manifest=path, rogue="thief")

    assert "not admit" in str(interrupted.errors.pop("thief"))
    assert interrupted.errors == {}
    assert [record.survivors for record in interrupted.records] == [NAMES] * 5
    assert_model(interrupted, ["abcde"] * 4)
    for log in ("state", *NAMES):
        assert [change.rekeyed for change in interrupted.changes(log)] == [[], ["b"]], log
    assert "manifest revision 2, new keys: b" in interrupted.said


def test_no_way_back(interrupted: Interrupted) -> None:
    """A run that has gone on under a revision does not go on under the manifest before it."""
    revised, path = interrupted.consortium.manifest.revised(revoke=["e"]), interrupted.folder / "revised.toml"
    interrupted.sign(revised, {name: interrupted.consortium.keys[name] for name in "abcd"}, at=path)
    interrupted.start((), manifest=path)  # nobody comes, and the run stays where it is, under the revision
    interrupted.errors.clear()
    interrupted.start(())
    assert isinstance(error := interrupted.errors["sum"], ConfigurationError)
    assert "expected that one or its next revision" in str(error)
