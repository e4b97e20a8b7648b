"""Three hospitals with folders of DICOM studies, by the commands that a hospital uses, from keys to personal models."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from support.xray_studies import write_some
from typer.testing import CliRunner

from dp.ledger import read_ledger, verify
from sites.cli import app
from sites.demo import free_port
from sites.errors import ConfigurationError
from sites.xray_studies import HOSPITALS

NAMES = HOSPITALS[:3]
IMAGES = """model = "filter-bank"
[plan]
shape = [28, 28]
images_per_patient = 3
held_out = 0.3
[[targets]]
name = "pneumonia"
kind = "classification"
classes = ["no", "yes"]
"""


def command(*arguments: object) -> list[str]:
    """The command line of `secureagg`."""
    return [sys.executable, "-m", "sites.cli", *map(str, arguments)]


def run(*arguments: object) -> str:
    """What a command prints, in this process; it must succeed."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with studies, keys, a manifest with [images] signed by all, and a SITE.toml each."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "studies").mkdir()
    write_some(folder / "studies", *NAMES, rows=150)
    (folder / "images.toml").write_text(IMAGES)
    for name in ("sum", *NAMES):
        run("keygen", name, "--out", folder)
    run(
        *("consortium", "create", folder / "manifest.toml", "--name", "X-rays", "--coordinator", folder / "sum.card"),
        *("--address", f"tcp://127.0.0.1:{free_port()}", "--images", folder / "images.toml", "--rounds", 2),
        *("--batch-size", 1000, *(folder / f"{name}.card" for name in NAMES)),
    )
    for name in NAMES:
        studies = folder / "studies" / name
        run(
            *("consortium", "sign", folder / "manifest.toml", "--keys", folder / f"{name}.keys"),
            *("--site-config", folder / name / "SITE.toml"),
            *("--images", studies / "images", "--labels", studies / "labels.csv"),
        )
    # The last one has a model of its own made, too.
    path = folder / NAMES[-1] / "SITE.toml"
    fields = tomllib.loads(path.read_text())
    fields["privacy"]["epsilon"] = 2.0
    own = {"epsilon": 0.5, "delta": 1e-3, "steps": 2, "batch_size": 8, "learning_rate": 0.1}
    path.write_text(tomli_w.dumps({**fields, "personalisation": own}))
    return folder


@pytest.mark.slow
def test_a_run_on_folders_of_studies(consortium: Path) -> None:
    """Images are prepared, then all train and end with one model; evaluation counts held-out images; each ledger has
    its patients' rounds; nothing that any party wrote down names a patient or a file."""
    run("site", consortium / NAMES[0] / "SITE.toml", "--prepare")
    assert (consortium / NAMES[0] / "images.cache" / "card.json").exists()
    assert not (consortium / NAMES[0] / "ledger.sqlite").exists()
    sum_state = consortium / "sum"
    programs = [
        command(
            *("coordinator", consortium / "manifest.toml", "--keys", consortium / "sum.keys"),
            *("--initial", consortium / "initial.safetensors", "--state", sum_state),
        ),
        *(command("site", consortium / name / "SITE.toml") for name in NAMES),
    ]
    sum_state.mkdir()
    running = [
        subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for program in programs
    ]
    try:
        printed = [process.communicate(timeout=150)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * 4, printed
    models = {(consortium / name / "model.safetensors").read_bytes() for name in NAMES}
    assert models == {(sum_state / "model.safetensors").read_bytes()}
    last = json.loads((sum_state / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["purpose"] == "evaluate"
    assert last["metrics"]["auc"] is not None
    for name in NAMES:
        labels = (consortium / "studies" / name / "labels.csv").read_text().splitlines()[1:]
        card = json.loads((consortium / name / "images.cache" / "card.json").read_text())
        summary = json.loads((consortium / name / "summary.json").read_text())
        assert sum(card["patients"].values()) == len(labels)
        assert summary["patients"] == card["patients"]["train"]
        entries = verify(read_ledger(consortium / name / "ledger.sqlite")).entries
        booked = [entry["purpose"] for entry in entries if entry["kind"] == "reserve"]
        personal = ["personalise"] if name == NAMES[-1] else []
        assert booked == ["train", "train", *personal]
        assert (summary["personalised"] is not None) is bool(personal)
        assert (consortium / name / "personal.safetensors").exists() is bool(personal)
        patients = {line.split(",")[0].encode() for line in labels}
        written = [file for place in (name, "sum") for file in (consortium / place).rglob("*") if file.is_file()]
        for file in (one for one in written if one.suffix not in {".toml", ".npy"}):
            content = file.read_bytes()
            assert not any(patient in content for patient in patients), file
            assert b".dcm" not in content
    assert "personal model: AUC on this site's held-out data" in printed[-1]


@pytest.mark.parametrize("options", [("--images", "x"), ("--images", "x", "--labels", "y", "--heart", "va")])
def test_options_that_do_not_go_together(consortium: Path, options: tuple[str, ...]) -> None:
    """Images need labels, and a site has one kind of data."""
    arguments = (
        "consortium",
        "sign",
        consortium / "manifest.toml",
        "--keys",
        consortium / f"{NAMES[0]}.keys",
        *options,
    )
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(done.exception, ConfigurationError)
    assert "expected --images and --labels together, or --heart" in str(done.exception)
