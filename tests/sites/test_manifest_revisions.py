"""Keys that are replaced and sites that are revoked: the next revision of a manifest, and what goes on under it."""

from pathlib import Path

import msgspec
import pytest
from support.consortium import Consortium, make_consortium
from support.federation import INITIAL, PLAIN

from sites.errors import ManifestError
from sites.keys import Keys, generate_keys
from sites.manifest import Manifest
from sites.manifest_log import LOG, ManifestChange, note_manifest

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Five sites."""
    return make_consortium(tmp_path_factory.mktemp("consortium"), names="abcde", initial=INITIAL, privacy=PLAIN)


def signed(manifest: Manifest, *keys: Keys) -> Manifest:
    """The manifest with these signatures."""
    for own in keys:
        manifest = manifest.sign(own.identity, own.site)
    return manifest


def test_a_revoked_site(consortium: Consortium) -> None:
    """Without the site, all else as it was; valid once the remaining sites have signed, for whom it continues the run;
    the revoked one cannot sign it."""
    before = consortium.manifest
    after = before.revised(revoke=["c"])
    assert [entry.name for entry in after.sites] == ["a", "b", "d", "e"]
    assert (after.consortium.revision, after.consortium.follows) == (2, before.digest.hex())
    assert after.rules == before.rules
    assert after.digest != before.digest
    with pytest.raises(ManifestError, match="not signed by a, b, d, e"):
        after.check()
    signed(after, *(consortium.keys[name] for name in "abde")).check()
    assert after.continues(before.digest, before.rules)
    assert not before.continues(after.digest, after.rules)
    with pytest.raises(ManifestError, match="site c is not listed"):
        signed(after, consortium.keys["c"])


def test_new_keys_and_new_sites(consortium: Consortium) -> None:
    """A site's new card takes the place of its old one, whose keys are worth nothing any more; a new site is added."""
    new, added = generate_keys("b"), generate_keys("f")
    after = consortium.manifest.revised(cards=[new.card, added.card])
    assert after.changes_from(consortium.manifest) == {"revoked": [], "added": ["f"], "rekeyed": ["b"]}
    assert after.roster[new.site] == new.card
    with pytest.raises(ManifestError, match="site b is not listed with these keys"):
        signed(after, consortium.keys["b"])
    signed(after, new, added, *(consortium.keys[name] for name in "acde")).check()


def test_revisions_of_revisions(consortium: Consortium) -> None:
    """Each revision continues the one before only."""
    first = consortium.manifest
    second = first.revised(revoke=["c"])
    third = second.revised(revoke=["d"])
    assert third.consortium.revision == 3
    assert third.continues(second.digest, second.rules)
    assert not third.continues(first.digest, first.rules)


def test_what_else_changes_is_no_revision(consortium: Consortium) -> None:
    """A manifest that says it follows but trains otherwise, or costs or sums otherwise, does not continue the run."""
    before = consortium.manifest
    after = before.revised(revoke=["c"])
    for table, change in (
        ("training", {"learning_rate": 0.125}),
        ("privacy", {"epsilon": 0.125}),
        ("policy", {"max_corrupt": 0}),
        ("encoding", {"value_bits": 9}),
        ("deadlines", {"phase_seconds": 0.125}),
        ("coordinator", {"address": "tcp://127.0.0.1:11"}),
        ("consortium", {"name": "Other"}),
    ):
        changed = replace(after, **{table: replace(getattr(after, table), **change)})
        assert not changed.continues(before.digest, before.rules), table


@pytest.mark.parametrize(("revision", "follows"), [(1, "0" * 64), (2, "")])
def test_revisions_that_cannot_be(consortium: Consortium, revision: int, follows: str) -> None:
    """The first revision follows none, and any other one another."""
    changed = replace(
        consortium.manifest, consortium=replace(consortium.manifest.consortium, revision=revision, follows=follows)
    )
    with pytest.raises(ManifestError, match="expected revision 1 to follow none"):
        changed.check()


def test_unfit_revisions(consortium: Consortium) -> None:
    """A site to revoke that is not there is named, and so is a policy that the sites left are too few for."""
    with pytest.raises(ManifestError, match="does not list z"):
        consortium.manifest.revised(revoke=["z"])
    with pytest.raises(ManifestError, match="length >= 3"):
        consortium.manifest.revised(revoke=["a", "b", "c"])


def test_changes_are_written_down(consortium: Consortium, tmp_path: Path) -> None:
    """A line when a manifest comes into force, none while it stays; the next one says what changed."""
    new = generate_keys("b")
    after = consortium.manifest.revised(revoke=["c"], cards=[new.card])
    for manifest, changed in ((consortium.manifest, True), (consortium.manifest, False), (after, True)):
        assert (note_manifest(tmp_path, manifest) is not None) == changed
    lines = [msgspec.json.decode(line, type=ManifestChange) for line in (tmp_path / LOG).read_bytes().splitlines()]
    assert [(line.revision, line.revoked, line.rekeyed) for line in lines] == [(1, [], []), (2, ["c"], ["b"])]
    assert lines[0].added == list("abcde")
    assert lines[1].digest == after.digest.hex()


def test_a_damaged_memory_of_the_last_manifest(consortium: Consortium, tmp_path: Path) -> None:
    """It keeps no machine from starting: the manifest in force is written down anew."""
    note_manifest(tmp_path, consortium.manifest)
    (tmp_path / "manifest.toml").write_text("[consortium")
    assert note_manifest(tmp_path, consortium.manifest) is not None
    assert note_manifest(tmp_path, consortium.manifest) is None
