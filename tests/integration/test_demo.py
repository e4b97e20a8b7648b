"""`secureagg demo` as a newcomer runs it: real processes, real sockets, real data."""

import json
import re
import shutil
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.ledgers import with_sqlite
from support.xray_studies import write_npz

from dp.accountants import rdp_epsilon
from dp.errors import BudgetExhausted, LedgerTampered
from dp.events import PoissonSampledGaussian
from dp.ledger import read_ledger, verify
from sites.config import open_site
from sites.datasets.heart import HOSPITALS
from sites.keys import load_card
from sites.manifest import Manifest
from sites.model_state import ModelSpec
from sites.trainer import heart_model, trainer_for
from sites.xray_studies import HOSPITALS as XRAY_HOSPITALS

PATIENTS = {"cleveland": 199, "hungary": 172, "switzerland": 30, "va": 85}


ON_IMAGES = 600  # seconds for up to eight programs on images, on a computer that is busy with other things


def demo(folder: Path, *options: str, seconds: float = 170) -> tuple[dict[str, object], str, Path]:
    """The demo's JSON, what it printed, and the folder in which it kept everything."""
    kept = folder / "kept"
    command = [sys.executable, "-m", "sites.cli", "demo", "--json", str(folder / "x.json"), "--keep", str(kept)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads((folder / "x.json").read_text()), done.stdout, kept


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], str, Path]:
    """One demo without failures, shared by the tests that look at what it left."""
    return demo(tmp_path_factory.mktemp("demo"))


def test_json(ran) -> None:
    """The JSON has the documented fields, the right patients, each epsilon within its budget and nearly used, and
    metrics that a model which has learnt something reaches.

    0.78 is five standard deviations of the noise below the measured mean, a false-alarm probability below 1e-6.
    """
    result, _, _ = ran
    assert list(result) == ["backend", "mode", "rounds", "sites", "metrics", "seconds"]
    assert (result["backend"], result["mode"], result["rounds"]) == ("masked", "local", 10)
    assert {site["name"]: site["patients"] for site in result["sites"]} == PATIENTS
    for site in result["sites"]:
        assert list(site) == ["name", "patients", "epsilon", "delta", "bytes_sent", "survived"]
        assert 0.99 < site["epsilon"] <= 1
        assert site["delta"] == 1e-3
        assert site["bytes_sent"] > 10_000
        assert site["survived"] is True
    metrics = result["metrics"]
    assert metrics["local"].keys() == PATIENTS.keys()
    for values in (metrics["federated"], metrics["pooled"], *metrics["local"].values()):
        assert list(values) == ["auc", "accuracy", "balanced_accuracy"]
        assert all(0 <= value <= 1 for value in values.values())
    assert metrics["federated"]["auc"] > 0.78
    assert metrics["pooled"]["auc"] > 0.80
    assert result["seconds"].keys() == {"total", "training", "aggregation"}
    assert all(value > 0 for value in result["seconds"].values())


def test_metrics_of_the_coordinator_are_those_of_the_model(ran) -> None:
    """What the coordinator read off the securely summed counts equals the metrics computed on all held-out patients."""
    result, _, kept = ran
    last = json.loads((kept / "coordinator" / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["purpose"] == "evaluate"
    assert last["metrics"] == result["metrics"]["federated"]


def test_epsilon_can_be_recomputed_from_each_ledger(ran) -> None:
    """Each hospital's ledger is whole and signed by it, ends with the head in its summary, and holds a reservation, an
    update and its sending per round; its events give the epsilon that was shown."""
    result, _, kept = ran
    for site in result["sites"]:
        folder = kept / site["name"]
        card, summary = load_card(folder / f"{site['name']}.card"), json.loads((folder / "summary.json").read_text())
        found = verify(read_ledger(folder / "ledger.sqlite"), public_key=card.signing_key, head=summary["ledger_head"])
        found.check("ledger")
        assert found.head == summary["ledger_head"]
        assert [entry["kind"] for entry in found.entries] == ["open", *["reserve", "commit", "sent"] * 10]
        rounds = [entry for entry in found.entries if entry["kind"] == "reserve"]
        assert [entry["round_number"] for entry in rounds] == list(range(1, 11))
        assert {(entry["cohort"], entry["consortium"]) for entry in rounds} == {(4, "heart demo")}
        events = [
            PoissonSampledGaussian(**{name: value for name, value in entry["event"].items() if name != "mechanism"})
            for entry in rounds
        ]
        assert rdp_epsilon(events, site["delta"]) == pytest.approx(site["epsilon"], rel=1e-12)
        assert rounds[-1]["cumulative_epsilon"] == pytest.approx(site["epsilon"], rel=1e-12)


def test_a_round_more_is_refused_by_the_ledger(ran, tmp_path) -> None:
    """A hospital's program that goes on with the ledger that the demo left trains no round more than was planned, nor
    another run."""
    _, _, kept = ran
    copy = tmp_path / "kept"
    shutil.copytree(kept, copy)
    site = open_site(copy / "va" / "SITE.toml")
    run = next(entry["run"] for entry in verify(read_ledger(site.ledger)).entries if entry["kind"] == "reserve")
    before = len(read_ledger(site.ledger))
    for name, text in ((run, f"round 11 of run {run}: epsilon"), ("another", "is spent, expected at most 1 at")):
        with closing(trainer_for(site)) as trainer, pytest.raises(BudgetExhausted, match=text):
            trainer.train(heart_model().state_dict(), run=name, round_number=11)
    entries = verify(read_ledger(site.ledger)).entries
    assert (len(entries), entries[-2]["decision"], entries[-1]["kind"]) == (before + 2, "refused", "note")


def test_a_kept_ledger_that_was_edited(ran, tmp_path) -> None:
    """After an edit by hand the hospital's program does not start, and names the row."""
    _, _, kept = ran
    copy = tmp_path / "kept"
    shutil.copytree(kept, copy)
    file = copy / "va" / "ledger.sqlite"
    with_sqlite(file, "UPDATE rows SET body = replace(body, '\"steps\":2', '\"steps\":1') WHERE sequence = 5")
    with pytest.raises(LedgerTampered, match=r"va/ledger\.sqlite, row 5: its contents are not those that were hashed"):
        trainer_for(open_site(copy / "va" / "SITE.toml"))


def test_what_is_kept(ran) -> None:
    """Manifest, keys with mode 600, each site's state and the model are there, and the manifest is signed by all."""
    _, _, kept = ran
    Manifest.load(kept / "manifest.toml").check()
    for name in HOSPITALS:
        assert stat.S_IMODE((kept / name / f"{name}.keys").stat().st_mode) == 0o600
        for file in ("SITE.toml", "journal.sqlite", "ledger.sqlite", "summary.json", "log.txt", f"{name}.card"):
            assert (kept / name / file).stat().st_size > 0, file
    spec = ModelSpec.of_bytes((kept / "model.safetensors").read_bytes(), who="model")
    assert dict(spec.tensors) == {"weight": (1, 13), "bias": (1,)}


def test_no_secret_lies_at_the_coordinator(ran) -> None:
    """Nothing in the coordinator's folder, nor anything printed, holds a hospital's private key."""
    _, printed, kept = ran
    stored = b"".join(path.read_bytes() for path in (kept / "coordinator").iterdir()) + printed.encode()
    for name in HOSPITALS:
        for secret in re.findall(r'"([0-9a-f]{64})"', (kept / name / f"{name}.keys").read_text()):
            assert secret.encode() not in stored
            assert bytes.fromhex(secret) not in stored


def test_what_is_printed(ran) -> None:
    """The tables have a row per hospital, the references, times, and what the coordinator saw; no line is too wide for
    a terminal of 80 columns."""
    result, printed, _ = ran
    for site in result["sites"]:
        local = result["metrics"]["local"][site["name"]]["auc"]
        federated = result["metrics"]["federated"]["auc"]
        row = (
            rf"{site['name']} +│ +{site['patients']} │ +{site['epsilon']:.3f} \(0\.001\) │ +{local:.3f} │"
            rf" +{federated:.3f} │ +{site['bytes_sent']:,}"
        )
        assert re.search(row, printed)
        assert re.search(rf"{site['name']} +│ [\d,]+ bytes; its masked input begins [0-9a-f]{{24}}", printed)
    assert re.search(r"pooled, no privacy +│ 0\.8", printed)
    assert re.search(r"A typical round: \d+\.\d\d s of training .*, \d+\.\d\d s of aggregation", printed)
    assert "486 examples" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if line[:1] in "┏┃┡│├└")


def test_a_hospital_that_fails(tmp_path: Path) -> None:
    """With a hospital's machine failing in the middle round, the demo ends well, says what happened, and marks it."""
    result, printed, _ = demo(tmp_path, "--drop", "va:CollectingMaskedInputs", "--rounds", "3")
    survived = {site["name"]: site["survived"] for site in result["sites"]}
    assert survived == {"cleveland": True, "hungary": True, "switzerland": True, "va": False}
    assert re.search(
        r"Round 2: va stopped answering in CollectingMaskedInputs; the round released the sum of cleveland, hungary, "
        r"switzerland\.",
        printed,
    )
    assert re.search(r"va .* failed ", printed)


@pytest.mark.slow
def test_a_hospital_that_fails_before_it_has_done_anything(tmp_path: Path) -> None:
    """A hospital that falls silent with its first message is in the table all the same, with nothing spent."""
    result, printed, _ = demo(tmp_path, "--drop", "va:AdvertisingKeys", "--rounds", "1")
    assert {site["name"]: site["survived"] for site in result["sites"]} == {
        **dict.fromkeys(PATIENTS, True),
        "va": False,
    }
    assert result["sites"][3]["epsilon"] == result["sites"][3]["bytes_sent"] == 0
    assert "Round 1: va stopped answering in AdvertisingKeys; the round released the sum of" in printed


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["AdvertisingKeys", "SharingKeys", "CheckingConsistency", "Unmasking"])
def test_a_hospital_that_fails_in_each_other_phase(tmp_path: Path, phase: str) -> None:
    """The same in every other phase."""
    result, printed, _ = demo(tmp_path, "--drop", f"hungary:{phase}")
    assert [site["survived"] for site in result["sites"]] == [True, False, True, True]
    assert f"Round 5: hungary stopped answering in {phase}; the round released the sum of" in printed


@pytest.mark.parametrize(
    ("mode", "ledger"),
    [("shared", "ledger.sqlite"), pytest.param("site", "ledger.site.sqlite", marks=pytest.mark.slow)],
)
def test_noise_that_hospitals_share(tmp_path, mode: str, ledger: str) -> None:
    """With shared noise a run in which a hospital fails is finished by the others, nobody spends more than its budget,
    and each ledger has the sums' real noise: with three parts in them after the failure."""
    result, shown, kept = demo(tmp_path, "--mode", mode, "--rounds", "3", "--drop", "va:CollectingMaskedInputs")
    assert (result["mode"], result["rounds"]) == (mode, 3)
    assert "noise that they share" in shown.replace("\n", " ")
    for site in result["sites"]:
        gone = site["name"] == "va"
        assert site["survived"] is not gone
        found = verify(read_ledger(kept / site["name"] / ledger))
        found.check("ledger")
        reserved = [entry for entry in found.entries if entry["kind"] == "reserve"]
        assert {(entry["unit"], entry["mode"]) for entry in reserved} == {
            ("site" if mode == "site" else "patient", mode)
        }
        realised = [entry["realised"]["survivors"] for entry in found.entries if entry["kind"] == "sent"]
        assert realised == ([4] if gone else [4, 3, 3])
        assert site["epsilon"] <= 1
        assert (site["epsilon"] > 0.95) is not gone


def test_sums_that_the_coordinator_cannot_read(tmp_path) -> None:
    """On the homomorphic backend, with shared noise inside and a hospital that fails, the hospitals end with a model
    that has learnt something; the coordinator has no model and no figure of it, and its ciphertexts are all it saw."""
    pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    options = ("--backend", "homomorphic", "--mode", "shared", "--rounds", "4", "--drop", "va:Decrypting")
    result, shown, kept = demo(tmp_path, *options)
    assert (result["backend"], result["mode"]) == ("homomorphic", "shared")
    assert [site["survived"] for site in result["sites"]] == [True, True, True, False]
    assert result["metrics"]["federated"]["auc"] > 0.7
    assert "only the 3 hospitals have the key and the model" in re.sub(r"[\s│]+", " ", shown)
    assert "Round 2: va stopped answering in Decrypting; the round released the sum of cleveland, hungary," in shown
    assert not (kept / "coordinator" / "model.safetensors").exists()
    last = json.loads((kept / "coordinator" / "rounds.jsonl").read_text().splitlines()[-1])
    assert (last["metrics"], last["examples"]) == (None, None)
    models = {(kept / name / "model.safetensors").read_bytes() for name in HOSPITALS if name != "va"}
    assert models == {(kept / "model.safetensors").read_bytes()}
    summary = json.loads((kept / "hungary" / "summary.json").read_text())
    assert summary["rounds"][-1]["metrics"]["auc"] > 0.7


@pytest.mark.slow
@pytest.mark.timeout(ON_IMAGES + 30)
def test_x_rays_as_studies_of_seven_hospitals(tmp_path) -> None:
    """With X-rays written as DICOM studies, seven hospitals train end to end, a patient's images count once, and every
    hospital is shown beside the model of all."""
    npz = write_npz(tmp_path / "x.npz", rows=600)
    options = ("--data", "xray", "--npz", str(npz), "--mode", "shared", "--rounds", "3")
    result, shown, kept = demo(tmp_path, *options, seconds=ON_IMAGES)
    assert [site["name"] for site in result["sites"]] == list(XRAY_HOSPITALS)
    for site in result["sites"]:
        labels = (kept / "studies" / site["name"] / "labels.csv").read_text().splitlines()[1:]
        assert 0 < site["patients"] <= len(labels)
        assert 7.5 < site["epsilon"] <= 8
        assert re.search(rf"{site['name']} +│ +{site['patients']} ", shown)
    assert result["metrics"]["federated"]["auc"] > 0.8
    assert "On the 60 test images, which are no hospital's" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if line[:1] in "┏┃┡│├└")


@pytest.mark.slow
@pytest.mark.timeout(ON_IMAGES + 30)
def test_phantoms(tmp_path) -> None:
    """On a machine that has no data, four made-up hospitals train a model from DICOM folders that tells a fifth one's
    ill patients from the others, and better than three of them do alone."""
    result, shown, _ = demo(tmp_path, "--data", "phantom", "--mode", "none", seconds=ON_IMAGES)
    assert "Four made-up hospitals" in shown
    federated = result["metrics"]["federated"]["auc"]
    assert federated > 0.7
    assert sum(federated > local["auc"] for local in result["metrics"]["local"].values()) >= 3
