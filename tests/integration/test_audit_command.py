"""`secureagg audit`: a site's own data and training, a signed row in its own ledger, and a status that tells."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
from support.broken_noise import Removed
from support.commands import run_command
from support.consortium import make_consortium

import dp.training
import sites.audit
from dp.accountants import rdp_epsilon
from dp.audit import AuditPlan, epsilon_lower_bound
from dp.events import PoissonSampledGaussian
from dp.ledger import events_in, read_ledger, verify
from sites.config import open_site
from sites.errors import ConfigurationError
from sites.recipe import PRIVACY
from sites.site_data import hospital_of

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--canaries", "500", "--guesses", "100", "--rounds", "4")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its exit status, standard output and standard error."""
    return partial(run_command, monkeypatch, capfd)


def config_in(folder: Path, **changes: msgspec.Struct) -> Path:
    """The SITE.toml of Hungary in a new consortium of the four hospitals."""
    return make_consortium(folder, hospitals=True, **changes).site_configs["hungary"]


def audits(config: Path) -> list[dict[str, object]]:
    """The audits in the site's ledger, every row of which must be in its place and signed by the site."""
    site = open_site(config)
    found = verify(read_ledger(site.ledger), public_key=site.keys.identity.public_key)
    assert not found.problems
    return [dict(entry["content"]) for entry in found.entries if entry["kind"] == "audit"]


def test_the_claim_stands(run: Run, tmp_path: Path) -> None:
    """Status 0, a bound below the claim, and a signed row with the numbers that an officer needs to recompute both."""
    config = config_in(tmp_path)
    status, out, error = run("audit", config, *QUICK)
    assert status == 0, error
    assert "the claim stands" in out
    assert "no proof of privacy" in out
    assert "nothing was released" in out
    (row,) = audits(config)
    asked = {"canaries": 500, "guesses": 100, "rounds": 4, "trainings": 1, "delta": 1e-5, "confidence": 0.95}
    assert asked.items() <= row.items()
    site = open_site(config)
    assert row["clip_norm"] == PRIVACY.clip_norm
    assert row["patients"] == len(hospital_of(site).train_labels)
    assert row["manifest_sha256"] == site.manifest.digest.hex()
    event = PoissonSampledGaussian(
        sampling_rate=row["sampling_rate"], noise_multiplier=row["noise_multiplier"], steps=row["rounds"] * row["steps"]
    )
    assert row["claimed_epsilon"] == pytest.approx(rdp_epsilon([event], row["delta"]))
    numbers = {name: row[name] for name in ("canaries", "guesses", "correct", "delta", "confidence")}
    assert row["epsilon_lower_bound"] == epsilon_lower_bound(**numbers)
    assert row["epsilon_lower_bound"] < row["claimed_epsilon"]
    assert row["holds"] is True
    assert f"{row['correct']} of 100" in out


def test_an_audit_releases_and_costs_nothing(run: Run, tmp_path: Path) -> None:
    """Nothing is spent, and the ledger is all that an audit leaves at the site: no model, no canaries."""
    config = config_in(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert run("audit", config, *QUICK)[0] == 0
    ledger = open_site(config).ledger
    assert events_in(ledger) == ()
    assert {path.name.removesuffix("-wal").removesuffix("-shm") for path in set(tmp_path.rglob("*")) - before} == {
        ledger.name
    }


def test_coins_stay_in_the_process(run: Run, tmp_path: Path) -> None:
    """What an audit writes and prints is as long for many canaries as for few: there is no coin and no score in it."""
    config = config_in(tmp_path)
    outputs = []
    for canaries in ("500", "1000"):
        status, out, _ = run("audit", config, *QUICK, "--canaries", canaries)
        assert status == 0
        outputs.append(out)
    few, many = audits(config)
    assert few.keys() == many.keys()
    assert all(isinstance(value, bool | int | float | str) for value in many.values())
    assert max(len(str(value)) for value in many.values()) <= 80
    assert [len(out.splitlines()) for out in outputs] == [len(outputs[0].splitlines())] * 2


def test_broken_noise_ends_with_a_loud_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound above the claim is status 1 and says what not to do, and the row says that the claim does not hold."""
    config = config_in(tmp_path)
    monkeypatch.setattr(dp.training, "GaussianNoise", Removed)
    status, out, error = run("audit", config, *QUICK)
    assert status == 1
    assert "THE CLAIM IS CONTRADICTED" in out
    assert re.search(r"Error: site hungary: THE AUDIT FAILED: [^\n]*do not train or release[^\n]*\n\Z", error)
    (row,) = audits(config)
    assert row["holds"] is False
    assert row["epsilon_lower_bound"] > row["claimed_epsilon"]


def test_a_site_without_differential_privacy(run: Run, tmp_path: Path) -> None:
    """There is nothing to audit without differential privacy, and no ledger is made."""
    config = config_in(tmp_path, privacy=msgspec.structs.replace(PRIVACY, mode="none"))
    status, _, error = run("audit", config, *QUICK)
    assert status == 1
    assert "privacy mode none in its manifest, expected local" in error
    assert not open_site(config).ledger.exists()


def test_a_plan_that_proves_nothing(run: Run, tmp_path: Path) -> None:
    """Numbers with which no guesses could contradict the claim are refused, and leave no row."""
    config = config_in(tmp_path)
    status, _, error = run("audit", config, *QUICK, "--epsilon", 8)
    assert status == 1
    assert "could prove epsilon" in error
    assert audits(config) == []


def test_defaults(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options the plan is the one whose power is documented."""
    plans = []

    def noting(_, plan, **__):
        plans.append(plan)
        raise ConfigurationError("enough")

    monkeypatch.setattr(sites.audit, "audit_site", noting)
    status, _, error = run("audit", config_in(tmp_path))
    assert (status, error) == (1, "Error: enough\n")
    assert plans == [AuditPlan()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_default_audit(run: Run, tmp_path: Path) -> None:
    """At its full size the command leaves the shipped training of a real hospital standing."""
    config = config_in(tmp_path)
    status, _, error = run("audit", config)
    assert status == 0, error
    (row,) = audits(config)
    assert row["epsilon_lower_bound"] < 0.8 * row["claimed_epsilon"]
