"""The `secureagg budget` commands as their users meet them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_command
from support.consortium import make_consortium
from support.ledgers import allow, open_ledger, release

from dp.budget import BudgetGuard, PrivacyBudget
from dp.events import PoissonSampledGaussian
from dp.ledger import Ledger, Release
from sites import budget_cli

Run = Callable[..., tuple[int, str, str]]
OPTIONS = {"patients": 30, "batch": 8, "rounds": 10, "steps": 2, "epsilon": 1, "delta": 0.001}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `budget plan` with these options in place of the usual ones; returns status, output and error output."""
    monkeypatch.setenv("COLUMNS", "160")

    def command(**changes: Any) -> tuple[int, str, str]:
        options = {**OPTIONS, **changes}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        monkeypatch.setattr(budget_cli.out, "_width", 160)
        return run_command(monkeypatch, capfd, "budget", "plan", *words)

    return command


def test_it_shows_noise_rounds_and_other_batches(run: Run) -> None:
    """The tables hold the noise, an epsilon per round, the three accountants, and a row per batch size."""
    status, out, _ = run()
    assert status == 0
    assert re.search(r"Noise multiplier 3\.73\d keeps 10 rounds of 2 steps within epsilon 1 at delta 0\.001; 0 is", out)
    assert re.search(r"│ +10 +│ +0\.99\d+ +│", out)
    assert re.search(r"│ RDP \(decides\) +│ +0\.99\d+ +│", out)
    assert re.search(r"│ PLD +│ +0\.85\d+ +│ +dp-accounting 0", out)
    assert re.search(r"│ +16 +│ +0\.533 +│ +7\.08\d? +│ +0\.44\d+ +│ +2\.18\d? +│", out)
    assert "30 (all)" in out


def test_json_and_plot(run: Run, tmp_path: Path) -> None:
    """Both files hold the plan: numbers under their names, and a picture."""
    status, _, error = run(json=tmp_path / "plan.json", plot=tmp_path / "plan.svg")
    assert status == 0, error
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["patients"] == 30
    assert written["planned"]["batch_size"] == 8
    assert len(written["after_round"]) == 10
    assert written["after_round"][-1] <= 1.0
    assert [total["name"] for total in written["totals"]] == ["RDP", "PRV", "PLD"]
    assert [row["batch_size"] for row in written["what_if"]] == [2, 4, 8, 16, 30]
    assert (tmp_path / "plan.svg").read_text().startswith("<svg ")


def test_json_has_null_for_what_is_not_computed(run: Run, tmp_path: Path) -> None:
    """An accountant without a figure is null in JSON and said so in the table, never a number."""
    status, out, error = run(epsilon=800, json=tmp_path / "plan.json")
    assert status == 0, error
    assert "not computed" in out
    written = json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail)
    assert [total["epsilon"] is None for total in written["totals"]] == [False, True, True]


def test_many_rounds_are_shown_in_part(run: Run) -> None:
    """A thousand rounds make a table of some twenty rows, the last one included."""
    status, out, _ = run(rounds=1000, steps=1)
    rows = re.findall(r"│ +(\d+) +│ +\d\.\d{4} +│\n", out)
    assert status == 0
    assert rows[-1] == "1000"
    assert len(rows) == 20


def test_a_ledger_counts(run: Run, tmp_path: Path) -> None:
    """What the ledger holds is spent: it is named, and more noise is needed; a full ledger is refused with numbers."""
    event = PoissonSampledGaussian(sampling_rate=0.5, noise_multiplier=14.0, steps=20)
    ledger = open_ledger(tmp_path / "ledger")
    ledger.reserve(Release(run="1" * 32, round_number=1, event=event), allow)
    status, out, _ = run(ledger=tmp_path / "ledger")
    assert status == 0
    assert re.search(r"Noise multiplier [4-9]\.\d+ keeps .*; 0\.4\d+ is spent already", out)
    for number in (2, 3, 4, 5):
        ledger.reserve(Release(run="1" * 32, round_number=number, event=event), allow)
    status, _, error = run(ledger=tmp_path / "ledger")
    assert status == 1
    assert re.fullmatch(r"Error: noise for 20 steps .*: epsilon 1\.\d+ is spent, expected at most 1 at .*\n", error)


def test_a_large_delta_is_remarked_on(run: Run) -> None:
    """A delta that is not below one in the number of patients is said to be so."""
    assert "Delta 0.1 is not below 1/30" in run(delta=0.1)[1]
    assert "is not below" not in run()[1]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("patients", 0, "greater than or equal to 1"),
        ("patients", "many", "a valid integer"),
        ("batch", 0, "greater than or equal to 1"),
        ("rounds", -1, "greater than or equal to 1"),
        ("steps", 0, "greater than or equal to 1"),
        ("epsilon", 0, "0.0 is not a finite number above 0"),
        ("epsilon", "nan", "nan is not a finite number above 0"),
        ("epsilon", "inf", "inf is not a finite number above 0"),
        ("delta", 0, "0.0 is not above 0 and below 1"),
        ("delta", 1, "1.0 is not above 0 and below 1"),
        ("delta", "nan", "nan is not above 0 and below 1"),
        ("clip_norm", -1, "-1.0 is not a finite number above 0"),
        ("ledger", "nowhere", "'nowhere' does not exist"),
        ("plot", "plan.png", "plan.png does not end in .svg"),
    ],
)
def test_mistakes_name_the_option(run: Run, option: str, value: object, expected: str) -> None:
    """A value out of range is wrong usage, status 2, and the message names the option and what it expects."""
    status, _, error = run(**{option: value})
    assert status == 2
    assert f"'--{option.replace('_', '-')}': " in error
    assert expected in error


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_missing_is_named(run: Run, option: str) -> None:
    """Each option of the plan must be given."""
    status, _, error = run(**{option: None})
    assert status == 2
    assert f"'--{option}'" in error


def test_a_file_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """A folder that does not exist is one sentence and status 1."""
    status, _, error = run(json=tmp_path / "nowhere" / "plan.json")
    assert status == 1
    assert error.startswith("Error: ")
    assert "plan.json: cannot be written" in error


def checked(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, output and error output of `budget check`."""
    return run_command(monkeypatch, capfd, "budget", "check", *words)


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A ledger that holds has status 0 and three figures; one that claims too little, or ends too early, status 1."""
    path = tmp_path / "ledger.sqlite"
    ledger = open_ledger(path)
    guard = BudgetGuard(PrivacyBudget(1.0, 1e-3), ledger)
    guard.authorize(release(1))
    status, out, _ = checked(monkeypatch, capfd, str(path), "--head", ledger.head)
    assert status == 0
    assert "claims recomputed: 1; all hold" in out
    assert re.search(r"RDP: 0\.\d+ .*\nPRV: 0\.\d+ .*\nPLD: 0\.\d+ ", out)
    status, _, error = checked(monkeypatch, capfd, str(path), "--head", "0" * 63 + "1")
    assert (status, "head" in error) == (1, True), error
    ledger.reserve(release(2), allow)
    status, out, error = checked(monkeypatch, capfd, str(path))
    assert status == 1
    assert "claims epsilon" in out
    assert "claims do not hold" in error


def test_check_against_a_roster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a manifest the ledger has to be signed by the key that it lists for the site."""
    consortium = make_consortium(tmp_path)
    own = Ledger(tmp_path / "own.sqlite", dataset="d" * 64, site="a", signer=consortium.keys["a"].identity)
    other = Ledger(tmp_path / "other.sqlite", dataset="d" * 64, site="a", signer=consortium.keys["b"].identity)
    own.close(), other.close()
    roster = ("--roster", str(consortium.manifest_path))
    assert checked(monkeypatch, capfd, str(tmp_path / "own.sqlite"), *roster)[0] == 0
    status, _, error = checked(monkeypatch, capfd, str(tmp_path / "other.sqlite"), *roster)
    assert (status, "key" in error) == (1, True)


WITHOUT_TRAINING = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"opacus", "safetensors", "sklearn", "torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from sites.cli import main
main()
"""


@pytest.mark.parametrize(
    "words", [("budget", "check", "LEDGER", "--roster", "MANIFEST"), ("ledger", "verify", "LEDGER"), ("budget", "plan")]
)
def test_officers_need_nothing_that_trains(tmp_path: Path, words: tuple[str, ...]) -> None:
    """What a privacy officer runs works where only the plain package is installed."""
    consortium = make_consortium(tmp_path)
    with Ledger(tmp_path / "l.sqlite", dataset="d" * 64, site="a", signer=consortium.keys["a"].identity) as ledger:
        BudgetGuard(PrivacyBudget(1.0, 1e-3), ledger).authorize(release(1))
    places = {"LEDGER": str(tmp_path / "l.sqlite"), "MANIFEST": str(consortium.manifest_path)}
    options = [f"--{name}={value}" for name, value in OPTIONS.items()] if "plan" in words else []
    done = without_training(*(places.get(word, word) for word in words), *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_training_without_its_packages_says_what_to_install() -> None:
    """Elsewhere it is one sentence that names the extra to install."""
    done = without_training("demo")
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: .*needs \w+, which is not installed; pip install 'secureagg\[train\]'.*\n", done.stderr
    )


def without_training(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that has none of the extra's packages."""
    command = [sys.executable, "-c", WITHOUT_TRAINING, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)
