"""How good the sites' own versions of the final model are: all learn it of all together, and nobody of one."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import tomli_w
from safetensors.torch import load as load_state
from safetensors.torch import save
from support.commands import run_command
from support.consortium import make_consortium
from support.federation import PATIENT, Together

from dp.errors import BudgetExhausted
from dp.ledger import read_ledger, verify
from sites import coordinator_loop, programs, recipe
from sites.config import OpenSite, Personalisation, open_site
from sites.control import Purpose
from sites.coordinator_loop import CoordinatorLoop
from sites.datasets.heart import HOSPITALS
from sites.demo import free_port
from sites.evaluation import Metrics, evaluate_scores
from sites.manifest import Manifest
from sites.model_state import State
from sites.participant_loop import EVALUATED
from sites.personalisation import PERSONAL_MODEL
from sites.rounds import round_parameters

EVALUATION = msgspec.structs.replace(recipe.EVALUATION, personalised=True)
PLAIN_ROUNDS = 2


class Clinic:
    """Held-out patients, on whom the site's own version is better than the final model by about 2 ``better``."""

    def __init__(self, seed: int, *, better: float = 0.3, patients: int = 40) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.integers(0, 2, patients)
        self.noise = random.random(patients)
        self.better = better
        self.asked = 0  # for its own version

    def personalise(self, final: State, run: str) -> State:
        """A model whose bias says that it is the site's own."""
        assert run
        self.asked += 1
        return {**final, "bias": final["bias"] + 100}

    def evaluate(self, state: State) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
        """Scores of the patients, and who is ill."""
        shift = self.better * (float(state["bias"][0]) > 50)
        return np.clip(self.noise + shift * (2 * self.labels - 1), 0, 1), self.labels


def expected(clinics: list[Clinic], *, own: bool) -> Metrics:
    """The metrics of all these clinics' patients in one place."""
    labels = np.concatenate([one.labels for one in clinics])
    scores = np.concatenate([np.clip(one.noise + own * one.better * (2 * one.labels - 1), 0, 1) for one in clinics])
    return evaluate_scores(scores, labels, EVALUATION.histogram_bins)


def federation(
    folder: Path, *, own: str = "abcd", seeing: str = "abcd", **options: object
) -> tuple[Together, dict[str, Clinic]]:
    """Four sites, of which those named in ``own`` make a version of their own, and those in ``seeing`` have held-out
    patients."""
    clinics = {name: Clinic(ord(name)) for name in "abcd"}
    together = Together(
        folder,
        rounds=PLAIN_ROUNDS,
        evaluate={name: clinics[name].evaluate for name in seeing},
        personalise={name: clinics[name].personalise for name in own},
        **{"deadlines": PATIENT, "evaluation": EVALUATION, **options},
    )
    return together, clinics


def test_before_and_after_of_all_sites(tmp_path: Path) -> None:
    """The last round has the metrics of all sites' held-out patients together, by the final model and by each site's
    own version of it; no round before it has any, and each site writes down that it has given its counts."""
    together, clinics = federation(tmp_path)
    together.run()
    assert (together.failure, together.errors) == (None, {})
    *training, last = together.records
    assert [record.purpose for record in together.records] == ["train"] * PLAIN_ROUNDS + ["personalise"]
    assert [(record.metrics, record.personal_metrics) for record in training] == [(None, None)] * PLAIN_ROUNDS
    assert last.metrics == expected(list(clinics.values()), own=False)
    assert last.personal_metrics == expected(list(clinics.values()), own=True)
    assert last.personal_metrics.auc > last.metrics.auc + 0.2
    for name, path in together.consortium.site_configs.items():
        assert clinics[name].asked == 1
        assert (open_site(path).state / f"{EVALUATED}.{together.consortium.manifest.digest.hex()}").exists()


@pytest.mark.parametrize(("own", "seeing"), [("abc", "abcd"), ("abcd", "abc")], ids=["no model", "nobody held out"])
def test_a_site_that_has_nothing_to_give_is_not_in_the_sum(tmp_path: Path, own: str, seeing: str) -> None:
    """A site without a model of its own, or without held-out patients, leaves the round and nothing of it is in the
    sum, or in any other; it has the final model all the same."""
    together, clinics = federation(tmp_path, own=own, seeing=seeing)
    together.run()
    assert (together.failure, together.errors) == (None, {})
    last = together.records[-1]
    assert last.survivors == ("a", "b", "c")
    assert last.metrics == expected([clinics[name] for name in "abc"], own=False)
    assert last.personal_metrics == expected([clinics[name] for name in "abc"], own=True)
    assert together.final.keys() == set("abcd")
    assert clinics["d"].asked == 0


def test_too_few_personal_models(tmp_path: Path) -> None:
    """Where fewer sites have one than a sum needs, nothing is released, and the run is none the worse for it."""
    together, _ = federation(tmp_path, own="ab")
    together.run()
    assert (together.failure, together.errors) == (None, {})
    last = together.records[-1]
    assert last.error
    assert (last.metrics, last.personal_metrics) == (None, None)
    assert together.final.keys() == set("abcd")


def test_a_coordinator_that_asks_twice(tmp_path: Path) -> None:
    """In another run under the same manifest, all sites started anew and over another set of sites, nobody trains a
    version or gives its counts again: the one site that had not given any is too few for a sum."""
    together, clinics = federation(tmp_path, own="abc")
    together.run()
    assert together.records[-1].survivors == ("a", "b", "c")
    together._personalise["d"] = clinics["d"].personalise
    together.new_run = True
    together.run()
    assert (together.failure, together.errors) == (None, {})
    assert len(together.records) == 2 * (PLAIN_ROUNDS + 1)
    assert together.records[-1].error
    assert together.records[-1].metrics is None
    assert {name: clinic.asked for name, clinic in clinics.items()} == dict.fromkeys("abcd", 1)


def test_a_site_that_crashed_after_giving_its_counts(tmp_path: Path) -> None:
    """What was written down before the counts left holds: a site that comes back with that mark gives nothing."""
    together, clinics = federation(tmp_path)
    site = open_site(together.consortium.site_configs["d"])
    site.state.mkdir(exist_ok=True)
    (site.state / f"{EVALUATED}.{together.consortium.manifest.digest.hex()}").touch()
    together.run()
    assert together.failure is None
    assert together.records[-1].survivors == ("a", "b", "c")
    assert clinics["d"].asked == 0


def test_two_programs_of_one_site(tmp_path: Path) -> None:
    """Of two programs that make the site's own version at the same time, one gives counts."""
    together, clinics = federation(tmp_path)
    state = open_site(together.consortium.site_configs["d"]).state

    def meanwhile(final: State, run: str) -> State:
        (state / f"{EVALUATED}.{together.consortium.manifest.digest.hex()}").touch()
        return clinics["d"].personalise(final, run)

    together._personalise["d"] = meanwhile
    together.run()
    assert together.failure is None
    assert together.records[-1].survivors == ("a", "b", "c")
    assert clinics["d"].asked == 1


@pytest.mark.parametrize("signed", [False, True], ids=["personalise", "evaluate"])
def test_a_coordinator_that_asks_for_what_was_not_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signed: bool
) -> None:
    """Without the manifest's word no site trains or evaluates a version of its own; with it, none evaluates the final
    model in another round, whose difference to that one would be the counts of the sites that have no own version."""
    flipped = msgspec.structs.replace(EVALUATION, personalised=not signed)
    purpose: Purpose = "evaluate" if signed else "personalise"

    def lying(manifest: Manifest, **asked: object) -> object:
        if asked["purpose"] == purpose:
            manifest = msgspec.structs.replace(manifest, evaluation=flipped)
        return round_parameters(manifest, **asked)

    def asked_for(_loop: CoordinatorLoop, number: int) -> Purpose:
        return "train" if number <= PLAIN_ROUNDS else purpose

    monkeypatch.setattr(coordinator_loop, "round_parameters", lying)
    monkeypatch.setattr(CoordinatorLoop, "_purpose", asked_for)
    evaluation = msgspec.structs.replace(EVALUATION, personalised=signed)
    together, clinics = federation(tmp_path, evaluation=evaluation)
    together.run()
    last = together.records[-1]
    assert (last.number, last.purpose) == (PLAIN_ROUNDS + 1, purpose)
    assert last.error
    assert last.metrics is None
    assert last.personal_metrics is None
    for name in "abcd":
        assert clinics[name].asked == 0
        assert together.history[name][-1].result == "parameter"


def test_where_only_sites_open_sums(tmp_path: Path) -> None:
    """With the homomorphic backend each site has both figures, and the coordinator neither."""
    pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")
    together, clinics = federation(tmp_path, policy=recipe.HOMOMORPHIC)
    together.run()
    assert (together.failure, together.errors) == (None, {})
    last = together.records[-1]
    assert (last.purpose, last.error, last.metrics, last.personal_metrics) == ("personalise", "", None, None)
    for history in together.history.values():
        assert history[-1].metrics == expected(list(clinics.values()), own=False)
        assert history[-1].personal_metrics == expected(list(clinics.values()), own=True)


def test_a_consortium_that_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """`consortium create --personalised` puts it into the manifest; without the option it is not there."""
    run: Callable[..., tuple[int, str, str]] = partial(run_command, monkeypatch, capfd)
    for name in ("sum", "a", "b", "c"):
        assert run("keygen", name, "--out", tmp_path)[0] == 0
    for options, found in (((), False), (("--personalised",), True)):
        status, _, error = run(
            *("consortium", "create", tmp_path / "manifest.toml", "--name", "Test", *options),
            *("--coordinator", tmp_path / "sum.card", "--address", "tcp://127.0.0.1:5555"),
            *(tmp_path / f"{name}.card" for name in "abc"),
        )
        assert status == 0, error
        assert Manifest.load(tmp_path / "manifest.toml").evaluation.personalised is found


def test_the_site_s_program_without_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A site that has no table, or no room in its budget, gives nothing and says why; others train once for a model."""
    consortium = make_consortium(tmp_path, hospitals=True, evaluation=EVALUATION)
    site = open_site(consortium.site_configs["va"])
    final, made = load_state(consortium.initial_path.read_bytes()), []
    assert programs._OwnVersion(site).for_the_sum(final, "run") is None
    assert "no [personalisation]" in caplog.text
    own = Personalisation(epsilon=0.5, delta=1e-3, steps=1, batch_size=8, learning_rate=0.1)
    site = replace(site, config=msgspec.structs.replace(site.config, personalisation=own))

    def personalise(_site: OpenSite, state: State, *, run: str) -> str:
        made.append(run)
        if run == "poor":
            raise BudgetExhausted("spent 1, asked 0.5, limit 1")
        (site.state / PERSONAL_MODEL).write_bytes(save({key: value + 1 for key, value in state.items()}))
        return f"version of {run}"

    monkeypatch.setattr(programs, "personalise", personalise)
    version = programs._OwnVersion(site)
    assert version.for_the_sum(final, "poor") is None
    assert "spent 1, asked 0.5, limit 1" in caplog.text
    given = version.for_the_sum(final, "rich")
    assert given is not None
    assert {key: value.unique().tolist() for key, value in given.items()} == {"bias": [1], "weight": [1]}
    assert version.of(final, "rich") == "version of rich"
    assert version.of(given, "rich") == "version of rich"
    assert made == ["poor", "rich", "rich"]


def test_the_run_of_a_site_that_was_started_anew(tmp_path: Path) -> None:
    """A site that comes back when all is over goes on by the name of the run that it was in."""
    together, _ = federation(tmp_path)
    site = open_site(together.consortium.site_configs["a"])
    assert programs._last_run(site) == ""
    together.run()
    assert programs._last_run(site) == together.records[0].run


@pytest.mark.slow
def test_programs_of_four_hospitals(tmp_path: Path) -> None:
    """`secureagg coordinator` and four `secureagg site`, one of which wants no model of its own: three personal models
    are booked and made once, the coordinator prints and writes AUC before and after, and no site's own figures are in
    anything that the coordinator has."""
    training = msgspec.structs.replace(recipe.TRAINING, rounds=2)
    consortium = make_consortium(
        tmp_path,
        hospitals=True,
        address=f"tcp://127.0.0.1:{free_port()}",
        evaluation=EVALUATION,
        training=training,
        deadlines=msgspec.structs.replace(PATIENT, join_seconds=60.0, training_seconds=60.0),
    )
    *owners, last_one = HOSPITALS
    own = {"epsilon": 0.5, "delta": 1e-3, "steps": 3, "batch_size": 16, "learning_rate": 0.2}
    for name in owners:
        path = consortium.site_configs[name]
        fields = tomllib.loads(path.read_text())
        fields["privacy"]["epsilon"] = 2.0
        path.write_text(tomli_w.dumps({**fields, "personalisation": own}))
    (tmp_path / "sum").mkdir()
    programs = {
        "sum": (
            *("coordinator", consortium.manifest_path, "--keys", consortium.coordinator_keys_path),
            *("--initial", consortium.initial_path, "--state", tmp_path / "sum"),
        ),
        **{name: ("site", path) for name, path in consortium.site_configs.items()},
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "sites.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, arguments in programs.items()
    }
    try:
        printed = {name: process.communicate(timeout=120)[0] for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    assert {name: process.returncode for name, process in running.items()} == dict.fromkeys(programs, 0), printed
    *_, record = records = [json.loads(line) for line in (tmp_path / "sum" / "rounds.jsonl").read_text().splitlines()]
    assert (record["purpose"], record["survivors"]) == ("personalise", sorted(owners))
    before, after = record["metrics"]["auc"], record["personal_metrics"]["auc"]
    assert f"AUC of the model before it {before:.3f}, of the sites' own models {after:.3f}" in printed["sum"]
    for name in owners:
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["personalised"]["after"]["auc"] is not None
        for metrics in (summary["personalised"]["before"], summary["personalised"]["after"]):
            assert all(metrics not in (one["metrics"], one["personal_metrics"]) for one in records)
        assert (tmp_path / name / PERSONAL_MODEL).exists()
        entries = verify(read_ledger(tmp_path / name / "ledger.sqlite")).entries
        assert [one["purpose"] for one in entries if one["kind"] == "reserve"] == ["train", "train", "personalise"]
    assert "no [personalisation]" in printed[last_one]
    assert not (tmp_path / last_one / PERSONAL_MODEL).exists()
