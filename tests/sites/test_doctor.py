"""The doctor finds what is wrong at a site, says what to do, and finds nothing where nothing is wrong."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.consortium import Consortium, make_consortium
from typer.testing import CliRunner

from sites import doctor, recipe
from sites.cli import app
from sites.demo import free_port
from sites.doctor import Finding, examine
from sites.keys import generate_keys
from transport import PeerId, listen

CHECKS = [
    "versions",
    "packages",
    "configuration",
    "keys",
    "manifest",
    "state folder",
    "clock",
    "agreement",
    "coordinator",
]


@pytest.fixture(autouse=True)
def _installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may run from a copy of the sources that is not the installed one."""

    class Here:
        version = "0.1.0"

        def read_text(self, _name: str) -> str:
            root = Path(doctor.__file__).resolve().parents[1]
            return msgspec.json.encode({"url": root.as_uri(), "dir_info": {"editable": True}}).decode()

    monkeypatch.setattr(doctor, "distribution", lambda _name: Here())


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """Three sites, signed."""
    return make_consortium(tmp_path, names="abc", address=f"tcp://127.0.0.1:{free_port()}")


class Listening:
    """A coordinator that answers, with other keys where asked."""

    def __init__(self, consortium: Consortium, *, secret: bytes | None = None, without: str = "") -> None:
        manifest = consortium.manifest
        peers = {PeerId(site): card.transport_key for site, card in manifest.roster.items() if site != without}
        secret = secret or consortium.keys["sum"].transport_secret
        self._endpoint = listen(manifest.coordinator.address, secret_key=secret, peers=peers)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            assert self._endpoint.receive(0.02) is None

    def __enter__(self) -> "Listening":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self._endpoint.close()


@pytest.fixture
def listening(consortium: Consortium) -> Iterator[Listening]:
    """The consortium's coordinator, there."""
    with Listening(consortium) as one:
        yield one


def bad(findings: list[Finding]) -> dict[str, Finding]:
    """The findings that are not good."""
    assert all(finding.advice for finding in findings if not finding.good)
    return {finding.check: finding for finding in findings if not finding.good}


def test_a_healthy_site(consortium: Consortium, listening: Listening) -> None:
    """Where nothing is wrong every check is made and none is bad, twice in a row; nothing is written."""
    config = consortium.site_configs["a"]
    before = sorted(config.parent.iterdir())
    for _ in range(2):
        findings = examine(config)
        assert [finding.check for finding in findings] == CHECKS
        assert bad(findings) == {}
    assert sorted(config.parent.iterdir()) == before


def test_an_evaluation_that_this_site_will_not_be_in(tmp_path: Path) -> None:
    """Where the consortium evaluates personal models and this site has none asked for, that is said."""
    evaluation = msgspec.structs.replace(recipe.EVALUATION, personalised=True)
    made = make_consortium(tmp_path, names=("a", "b", "c"), evaluation=evaluation)
    found = {one.check: one for one in examine(made.site_configs["a"], patience=0.1)}
    assert found["agreement"].good
    assert "not in the evaluation, for want of [personalisation]" in found["agreement"].found


def test_nobody_listens(consortium: Consortium) -> None:
    """Without a coordinator that alone is bad, and it is said within the time that was given."""
    began = time.monotonic()
    found = bad(examine(consortium.site_configs["a"], patience=0.5))
    assert time.monotonic() - began < 10
    assert found.keys() == {"coordinator"}
    assert "nothing answers there" in found["coordinator"].found
    assert "firewall" in found["coordinator"].advice


@pytest.mark.parametrize(
    ("secret", "without", "text", "advice"),
    [
        (generate_keys("other").transport_secret, "", "handshake fails", "other keys than the manifest has"),
        (None, "a", "does not admit", "compare digests"),
    ],
    ids=["another key", "not admitted"],
)
def test_a_coordinator_that_is_another(consortium: Consortium, secret, without: str, text: str, advice: str) -> None:
    """A coordinator with other keys, or that does not list this site, is told apart from none."""
    with Listening(consortium, secret=secret, without=without):
        found = bad(examine(consortium.site_configs["a"], patience=2.0))
    assert found.keys() == {"coordinator"}
    assert text in found["coordinator"].found
    assert advice in found["coordinator"].advice


def test_keys_that_others_can_read(consortium: Consortium, listening: Listening) -> None:
    """A key file with the wrong mode is found by its own check, and stops the site from agreeing to anything."""
    keys = consortium.site_configs["a"].parents[1] / "a.keys"
    keys.chmod(0o644)
    found = bad(examine(consortium.site_configs["a"]))
    assert found.keys() == {"keys", "agreement"}
    assert f"chmod 600 {keys}" in found["keys"].advice.replace("a/../", "")


def test_a_manifest_that_was_changed(consortium: Consortium, listening: Listening) -> None:
    """A manifest without a signature, or another than the pinned one, is found."""
    config, path = consortium.site_configs["a"], consortium.manifest_path
    original = path.read_text()
    unsigned = msgspec.structs.replace(consortium.manifest, signatures=consortium.manifest.signatures[1:])
    unsigned.save(path)
    found = bad(examine(config))
    assert found.keys() == {"manifest", "agreement"}
    assert "not signed by" in found["manifest"].found
    path.write_text(original)
    config.write_text(config.read_text().replace(consortium.manifest.digest.hex(), "0" * 64))
    found = bad(examine(config))
    assert found.keys() == {"manifest", "agreement"}
    assert "pinned is 0000000000000000..." in found["manifest"].found


def test_no_configuration(tmp_path: Path) -> None:
    """Without a SITE.toml the checks end there."""
    findings = examine(tmp_path / "SITE.toml")
    assert [finding.check for finding in findings] == CHECKS[:3]
    assert bad(findings).keys() == {"configuration"}


def test_a_clock_that_is_slow(consortium: Consortium, listening: Listening) -> None:
    """A clock that is behind a file of the site's own is found."""
    os.utime(consortium.manifest_path, (time.time() + 7200,) * 2)
    found = bad(examine(consortium.site_configs["a"]))
    assert found.keys() == {"clock"}
    assert "when manifest.toml was written" in found["clock"].found


def test_a_state_folder_for_everybody(consortium: Consortium, listening: Listening) -> None:
    """A state folder that everybody can write, or that is none, is found."""
    config = consortium.site_configs["a"]
    config.parent.chmod(0o777)
    found = bad(examine(config))
    assert found.keys() == {"state folder"}
    config.parent.chmod(0o755)
    (config.parent / "file").touch()
    config.write_text(config.read_text().replace('state = "."', 'state = "file"'))
    assert bad(examine(config)).keys() == {"state folder"}


def test_packages_from_elsewhere(consortium: Consortium, listening: Listening, tmp_path, monkeypatch) -> None:
    """A package that is imported from another place than it was installed in is found."""
    monkeypatch.setattr(sys.modules["dp"], "__file__", str(tmp_path / "dp" / "__init__.py"))
    found = bad(examine(consortium.site_configs["a"]))
    assert found.keys() == {"packages"}
    assert found["packages"].found.startswith(f"dp comes from {tmp_path / 'dp'}, expected ")


def test_a_library_without_curve(consortium: Consortium, listening: Listening, monkeypatch) -> None:
    """A libzmq without CURVE is found before anything is tried with it."""
    monkeypatch.setattr("zmq.has", lambda _name: False)
    assert "versions" in bad(examine(consortium.site_configs["a"]))


def test_the_command(consortium: Consortium, listening: Listening) -> None:
    """The command prints every check, with status 0 if all are good, and status 1 naming the bad ones otherwise."""
    config = consortium.site_configs["a"]
    done = CliRunner().invoke(app, ["doctor", str(config)], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert all(check in done.stdout for check in CHECKS)
    (config.parents[1] / "a.keys").chmod(0o644)
    done = CliRunner().invoke(app, ["doctor", str(config)], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "2 of 8 checks are bad: keys, agreement" in done.output
