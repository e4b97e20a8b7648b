"""The command line as its users meet it: what it prints, its exit status, and one sentence for each mistake."""

import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from support.commands import run_command
from support.ledgers import reserve, with_sqlite

from dp.ledger import Ledger, read_ledger, verify
from sites.cli import _told
from sites.demo import free_port
from sites.keys import generate_keys, load_keys, save_keys
from sites.manifest import Manifest

Run = Callable[..., tuple[int, str, str]]
NAMES = ("cleveland", "hungary", "va")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its exit status, standard output and standard error."""
    return partial(run_command, monkeypatch, capfd)


def failure(outcome: tuple[int, str, str]) -> str:
    """The one sentence of a command that failed."""
    status, _, error = outcome
    assert status == 1, outcome
    assert re.fullmatch(r"Error: [^\n]+\n", error.removeprefix(warnings_of(error))), error
    return error


def warnings_of(error: str) -> str:
    """Log lines in front of the sentence."""
    return error[: error.rindex("Error: ")] if "Error: " in error else ""


@pytest.fixture
def consortium(run: Run, tmp_path: Path) -> Path:
    """A folder with keys, a manifest signed by all three hospitals, and a SITE.toml each, made with the commands."""
    for name in ("sum", *NAMES):
        assert run("keygen", name, "--out", tmp_path)[0] == 0
    cards = [tmp_path / f"{name}.card" for name in NAMES]
    address = f"tcp://127.0.0.1:{free_port()}"
    manifest = tmp_path / "manifest.toml"
    status, out, err = run(
        *("consortium", "create", manifest, "--name", "Test", "--coordinator", tmp_path / "sum.card"),
        *("--address", address, "--rounds", 2, *cards),
    )
    assert status == 0, err
    for name in NAMES:
        status, out, err = run(
            *("consortium", "sign", manifest, "--keys", tmp_path / f"{name}.keys"),
            *("--site-config", tmp_path / name / "SITE.toml", "--heart", name),
        )
        assert status == 0, err
        assert Manifest.load(manifest).digest.hex() in out
    assert "all sites have signed" in out
    return tmp_path


def sign_again(consortium: Path) -> Manifest:
    """Let all sites sign the manifest as it is now."""
    manifest = Manifest.load(consortium / "manifest.toml")
    for name in NAMES:
        own = load_keys(consortium / f"{name}.keys")
        manifest = manifest.sign(own.identity, own.site)
    manifest.save(consortium / "manifest.toml")
    return manifest


@pytest.mark.parametrize(
    "command",
    ["keygen", "consortium create", "consortium sign", "consortium show", "coordinator", "site", "status", "demo"],
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    """``--help`` ends with status 0 and an example of the very command."""
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert f"Example: secureagg {command} " in re.sub(r"\s+", " ", out)


@pytest.mark.parametrize("arguments", [["nonsense"], ["keygen"], ["demo", "--rounds", "0"], ["demo", "--data", "mri"]])
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    """A wrong command or option is status 2, with the usage."""
    status, _, err = run(*arguments)
    assert status == 2
    assert "Usage: secureagg" in err


def test_keygen(run: Run, tmp_path: Path) -> None:
    """Private keys have mode 600, the card is public, and a second call overwrites nothing."""
    status, out, _ = run("keygen", "hospital-a", "--out", tmp_path / "new")
    private, public = tmp_path / "new" / "hospital-a.keys", tmp_path / "new" / "hospital-a.card"
    assert status == 0
    assert str(private) in out
    assert str(public) in out
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    assert "exists already" in failure(run("keygen", "hospital-a", "--out", tmp_path / "new"))
    assert private.read_bytes() == before
    assert "site name 'Hospital A': expected" in failure(run("keygen", "Hospital A", "--out", tmp_path))


def test_a_whole_consortium_by_its_commands(consortium: Path) -> None:
    """Keys, manifest, signatures, coordinator and three sites, all by the commands of the README, end in a model."""
    programs = {
        "sum": [
            *("coordinator", "manifest.toml", "--keys", "sum.keys"),
            *("--initial", "initial.safetensors", "--state", "state"),
        ],
        **{name: ["site", f"{name}/SITE.toml"] for name in NAMES},
    }
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "sites.cli", *arguments],
            cwd=consortium,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in programs.items()
    }
    outputs = {name: process.communicate(timeout=150) for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == dict.fromkeys(programs, 0), outputs
    assert {err for _, err in outputs.values()} == {""}
    assert "3 sites summed" in outputs["sum"][0]
    assert "finished; the model is state/model.safetensors" in outputs["sum"][0]
    assert re.search(r"finished; 199 patients, epsilon 0\.99\d|1\.000 spent so far", outputs["cleveland"][0])
    assert (consortium / "state" / "model.safetensors").stat().st_size > 0
    found = verify(read_ledger(consortium / "cleveland" / "ledger.sqlite"))
    found.check("ledger")
    assert [entry["kind"] for entry in found.entries] == ["open", *["reserve", "commit", "sent"] * 2]


def test_ledger_commands(run: Run, tmp_path: Path) -> None:
    """A ledger is verified, exported, verified again from the export and restored; every tampering is status 1 with the
    row; a wrong card or a head that is not there is refused, and an existing ledger is never replaced."""
    keys = generate_keys("a")
    _, card = save_keys(keys, tmp_path)
    save_keys(generate_keys("b"), tmp_path)
    path, export = tmp_path / "ledger.sqlite", tmp_path / "ledger.jsonl"
    with Ledger(path, dataset="d" * 64, site="a", signer=keys.identity) as ledger:
        for number in (1, 2, 3):
            reserve(ledger, number)
        head = ledger.head
    options = ("--card", card, "--head", head)
    status, out, _ = run("ledger", "verify", path, *options)
    assert status == 0
    assert f"4 rows, all in place and signed by a, key {keys.card.signing_key.hex()}" in out
    assert f"head {head}" in out
    assert run("ledger", "export", path, export)[0] == 0
    assert run("ledger", "verify", export, *options)[0] == 0
    assert run("ledger", "restore", export, tmp_path / "new.sqlite", *options)[0] == 0
    assert run("ledger", "verify", tmp_path / "new.sqlite", *options)[0] == 0
    assert "exists already" in failure(run("ledger", "restore", export, path))
    error = failure(run("ledger", "verify", path, "--card", tmp_path / "b.card"))
    assert "row 1: the ledger is of the key" in error
    assert "no row has the noted head" in failure(run("ledger", "verify", path, "--head", "0" * 64))
    with_sqlite(path, "DELETE FROM rows WHERE sequence = 3")
    assert f"ledger {path}, row 3: is missing" in failure(run("ledger", "verify", path))
    assert "row 3: is missing" in failure(run("ledger", "export", path, tmp_path / "other.jsonl"))
    assert not (tmp_path / "other.jsonl").exists()
    assert "nowhere.sqlite" in failure(run("ledger", "verify", tmp_path / "nowhere.sqlite"))
    assert "nowhere.jsonl" in failure(run("ledger", "verify", tmp_path / "nowhere.jsonl"))


def test_show(run: Run, consortium: Path) -> None:
    """The manifest is printed with its digest and who has signed."""
    status, out, _ = run("consortium", "show", consortium / "manifest.toml")
    assert status == 0
    assert Manifest.load(consortium / "manifest.toml").digest.hex() in out
    assert out.count("(signed)") == 3


def test_what_is_inside_a_field_is_shown_in_words() -> None:
    """`consortium show` prints no Python: tables in parentheses, lists with "and", yes, no and none."""
    field = {"shape": (28, 28), "spacing": None, "targets": [{"name": "x", "on": True, "off": False}], "views": []}
    told = "(shape 28 and 28, spacing none, targets (name x, on yes, off no), views none)"
    assert _told(field) == told


def test_manifest_not_signed_by_all(run: Run, consortium: Path) -> None:
    """Neither ``show``, nor a coordinator, nor a site accepts a manifest that a site has not signed; it is named."""
    path = consortium / "manifest.toml"
    text = path.read_text()
    path.write_text(text[: text.rindex("[[signatures]]")])
    expected = "not signed by va, expected all 3 sites"
    assert expected in failure(run("consortium", "show", path))
    assert expected in failure(run("site", consortium / "cleveland" / "SITE.toml"))
    keys, initial = consortium / "sum.keys", consortium / "initial.safetensors"
    assert expected in failure(run("coordinator", path, "--keys", keys, "--initial", initial))


def test_manifest_altered(run: Run, consortium: Path) -> None:
    """A number changed after signing is noticed by a site and by the coordinator."""
    path = consortium / "manifest.toml"
    path.write_text(
        path.read_text()
        .replace("minimum_survivors = 3", "minimum_survivors = 4")
        .replace("epsilon = 1.0", "epsilon = 9.0")
    )
    for outcome in (
        run("site", consortium / "cleveland" / "SITE.toml"),
        run(
            *("coordinator", path, "--keys", consortium / "sum.keys"),
            *("--initial", consortium / "initial.safetensors"),
        ),
    ):
        assert re.search(r"signature of cleveland does not fit|at most the cohort size", failure(outcome))


def test_manifest_signed_by_all_but_not_the_pinned_one(run: Run, consortium: Path) -> None:
    """A later manifest that all have signed is not taken in place of the one that this site has pinned."""
    path = consortium / "manifest.toml"
    path.write_text(path.read_text().replace("epsilon = 1.0", "epsilon = 0.5"))
    sign_again(consortium)
    assert "expected the pinned" in failure(run("site", consortium / "cleveland" / "SITE.toml"))


def test_a_model_that_cannot_travel(run: Run, tmp_path: Path) -> None:
    """A model with a tensor of another kind than float32 is refused when the manifest is made, and named."""
    for name in ("sum", *NAMES):
        run("keygen", name, "--out", tmp_path)
    initial = tmp_path / "initial.safetensors"
    initial.write_bytes(save({"weight": np.zeros(3, np.float32), "steps": np.zeros(1, np.int64)}))
    outcome = run(
        *("consortium", "create", tmp_path / "manifest.toml", "--name", "Test", "--coordinator", tmp_path / "sum.card"),
        *("--address", "tcp://127.0.0.1:9", "--initial", initial, *(tmp_path / f"{name}.card" for name in NAMES)),
    )
    assert "initial model: tensor steps has dtype torch.int64, expected torch.float32" in failure(outcome)
    assert not (tmp_path / "manifest.toml").exists()


@pytest.mark.parametrize(("options", "released"), [((), "sites"), (("--release-to", "coordinator"), "coordinator")])
def test_a_consortium_on_the_homomorphic_backend(
    run: Run, tmp_path: Path, options: tuple[str, ...], released: str
) -> None:
    """The backend is chosen when the manifest is made, for the sites' eyes only unless they say otherwise."""
    for name in ("sum", *NAMES):
        run("keygen", name, "--out", tmp_path)
    manifest, cards = tmp_path / "manifest.toml", [tmp_path / f"{name}.card" for name in NAMES]
    status, _, err = run(
        *("consortium", "create", manifest, "--name", "Test", "--coordinator", tmp_path / "sum.card"),
        *("--address", "tcp://127.0.0.1:9", "--backend", "homomorphic", *options, *cards),
    )
    assert status == 0, err
    policy = Manifest.load(manifest).policy
    assert (policy.backend, policy.release_to) == ("homomorphic", released)


def test_unknown_site(run: Run, consortium: Path) -> None:
    """A site that the manifest does not list can neither sign nor start."""
    run("keygen", "stranger", "--out", consortium)
    keys = consortium / "stranger.keys"
    assert "stranger is not listed" in failure(run("consortium", "sign", consortium / "manifest.toml", "--keys", keys))
    config = consortium / "cleveland" / "SITE.toml"
    config.write_text(config.read_text().replace('name = "cleveland"', 'name = "stranger"'))
    assert "does not list site stranger" in failure(run("site", config))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_key_file_that_others_may_read(run: Run, consortium: Path, mode: int) -> None:
    """A key file with any right for others is refused, with the remedy."""
    keys = consortium / "cleveland.keys"
    keys.chmod(mode)
    error = failure(run("site", consortium / "cleveland" / "SITE.toml"))
    assert f"file mode {mode:03o}, expected 600; run `chmod 600" in error


def test_port_in_use(run: Run, consortium: Path) -> None:
    """A coordinator whose port is taken says which one."""
    address = Manifest.load(consortium / "manifest.toml").coordinator.address
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        taken.listen()
        error = failure(
            run(
                *("coordinator", consortium / "manifest.toml", "--keys", consortium / "sum.keys"),
                *("--initial", consortium / "initial.safetensors", "--state", consortium / "state"),
            )
        )
    assert f"{address}: Address already in use" in error


def test_another_initial_model(run: Run, consortium: Path) -> None:
    """The coordinator starts from the model that the manifest names and from no other."""
    initial = consortium / "initial.safetensors"
    initial.write_bytes(initial.read_bytes()[:-1] + b"\x01")
    error = failure(
        run("coordinator", consortium / "manifest.toml", "--keys", consortium / "sum.keys", "--initial", initial)
    )
    assert "not the file whose SHA-256" in error


def test_a_coordinator_with_a_sites_keys(run: Run, consortium: Path) -> None:
    """Only the coordinator that the manifest names can coordinate."""
    error = failure(
        run(
            *("coordinator", consortium / "manifest.toml", "--keys", consortium / "va.keys"),
            *("--initial", consortium / "initial.safetensors"),
        )
    )
    assert "not the keys of the coordinator" in error


@pytest.mark.parametrize("command", ["site", "consortium show"])
def test_missing_file(run: Run, tmp_path: Path, command: str) -> None:
    """A file that is not there is named."""
    assert "nowhere.toml: cannot be read" in failure(run(*command.split(), tmp_path / "nowhere.toml"))


def test_coordinator_gone(run: Run, consortium: Path) -> None:
    """A site that finds no coordinator says where it looked and for how long; its state is kept."""
    path = consortium / "manifest.toml"
    path.write_text(path.read_text().replace("join_seconds = 60.0", "join_seconds = 0.5"))
    manifest = sign_again(consortium)
    config = consortium / "cleveland" / "SITE.toml"
    text = config.read_text()
    pinned = re.search(r'manifest_sha256 = "(\w+)"', text)
    assert pinned
    config.write_text(text.replace(pinned[1], manifest.digest.hex()))
    error = failure(run("site", config))
    assert f"coordinator at {manifest.coordinator.address}: gone for 0.5 s; " in error
    assert "nothing answers there" in error
    assert (consortium / "cleveland" / "journal.sqlite").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--drop", "mars:Unmasking"], "found site 'mars', expected one of cleveland, hungary"),
        (["--drop", "va:Sleeping"], "expected one of AdvertisingKeys"),
        (["--epsilon", "-1"], "privacy.epsilon"),
        (["--data-folder", "/nonexistent"], "/nonexistent/processed.cleveland.data"),
        (["--json", "/nonexistent/x.json"], "/nonexistent"),
    ],
)
def test_demo_with_unfit_options(run: Run, arguments: list[str], text: str) -> None:
    """The demo refuses what it cannot do before it starts anything."""
    assert text in failure(run("demo", *arguments))


def test_demo_keeps_nothing_in_a_folder_that_is_used(run: Run, tmp_path: Path) -> None:
    """``--keep`` wants a new or empty folder, so that no key is overwritten."""
    (tmp_path / "precious").write_text("x")
    assert "is not empty" in failure(run("demo", "--keep", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
