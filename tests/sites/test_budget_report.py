"""`secureagg budget report`: the page that a privacy officer reads."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import run_command
from support.consortium import make_consortium
from support.ledgers import DATASET, OTHER, SITE, open_ledger, release, with_sqlite

import dp.claims
import sites.reports.reading
from dp.accountants import AccountantTotal, rdp_epsilon, totals
from dp.audit import epsilon_lower_bound
from dp.budget import BudgetGuard, PrivacyBudget
from dp.chain import Row, new_row
from dp.errors import BudgetExhausted
from dp.events import PoissonSampledGaussian
from dp.ledger import Claim, Ledger, Release, read_ledger
from secureagg.identity import Identity
from sites.recipe import TRAINING
from sites.reports.checklist import Status, checklist
from sites.reports.facts import Facts, Verdict
from sites.reports.page import SHOWN, as_json, posterior, render, right_guess
from sites.reports.reading import facts_of

BUDGET = PrivacyBudget(1.0, 1e-3)
NOW = datetime(2026, 5, 4, 3, 2, tzinfo=UTC)
SECTIONS = [
    "1. What is promised",
    "2. Against whom",
    "3. Who is trusted, and for what",
    "4. What is not covered",
    "5. How it added up",
    "6. Runs",
    "7. Releases",
    "8. Audit",
    "9. Checklist",
    "10. Is the record genuine?",
    "11. What the words mean",
    "12. Signatures",
]
Report = Callable[..., tuple[int, str, str]]


@lru_cache
def _totals(events: tuple[PoissonSampledGaussian, ...], delta: float) -> tuple[AccountantTotal, ...]:
    return totals(events, delta)


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three accountants take a third of a second each time; most ledgers here are the same."""
    for module in (dp.claims, sites.reports.reading):
        monkeypatch.setattr(module, "totals", lambda events, delta: _totals(tuple(events), delta))


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Report:
    """Runs `budget report` on a ledger with these further words; returns status, page ("" if none) and error output."""

    def command(ledger: Path, *words: str) -> tuple[int, str, str]:
        target = tmp_path / "report.html"
        target.unlink(missing_ok=True)
        status, _, error = run_command(monkeypatch, capfd, "budget", "report", ledger, "--out", target, *words)
        return status, target.read_text() if target.exists() else "", error

    return command


def event_of(sampling_rate: float, noise_multiplier: float, steps: int) -> PoissonSampledGaussian:
    """A mechanism."""
    return PoissonSampledGaussian(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)


def full_release(number: int, **changes: Any) -> Release:
    """A release as a site's trainer makes it."""
    known = {
        "consortium": "Lung CT",
        "library_version": "0.1.0",
        "manifest_sha256": "a" * 64,
        "cohort": 6,
        "threshold": 5,
        "max_corrupt": 2,
        "clip_norm": 0.5,
        "random_generator": "AES-128-CTR",
    }
    return replace(release(number, steps=2), **{**known, **changes})


def spend(ledger: Ledger, *releases: Release, budget: PrivacyBudget = BUDGET, sent: bool = True) -> None:
    """Reserve, commit and send each, or have it refused."""
    guard = BudgetGuard(budget, ledger)
    for each in releases:
        with suppress(BudgetExhausted):
            committed = ledger.commit(guard.authorize(each), b"update")
            if sent:
                ledger.mark_sent(committed)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``path`` is a copy of, since refusing takes a while."""
    file = tmp_path_factory.mktemp("original") / "ledger.sqlite"
    with open_ledger(file) as ledger:
        spend(ledger, full_release(1), full_release(2))
        spend(ledger, full_release(3, run="another", event=event_of(0.1, 2.0, 5)))
        spend(ledger, full_release(4, event=event_of(1.0, 0.5, 5)))
    return file


@pytest.fixture
def path(tmp_path: Path, original: Path) -> Path:
    """The file of a ledger with three releases of two runs, and one that was refused."""
    return shutil.copy(original, tmp_path / "ledger.sqlite")


def facts(file: Path, **options: Any) -> Facts:
    """The facts of the ledger in this file."""
    return facts_of(read_ledger(file), now=NOW, **options)


def text_of(page: str) -> str:
    """What a reader sees: no markup, single spaces."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))).split())


def section(page: str, number: int) -> str:
    """The text of one numbered section."""
    text = text_of(page)
    start = text.index(SECTIONS[number - 1])
    return text[start : text.index(SECTIONS[number])] if number < len(SECTIONS) else text[start:]


def append(file: Path, signer: Identity = SITE, **content: object) -> None:
    """Add a row as whoever holds the site's key may: chained and signed, whatever it says."""
    last = read_ledger(file)[-1]
    entry = {
        "ledger": json.loads(last.body)["ledger"],
        "sequence": last.sequence + 1,
        "time": "2026-01-01T00:00:00Z",
        **content,
    }
    row = new_row(entry, previous=last.hash, signer=signer)
    values = ", ".join(f"'{value}'" for value in (row.previous, row.body.replace("'", "''"), row.hash, row.signature))
    with_sqlite(file, f"INSERT INTO rows VALUES ({row.sequence}, {values})")  # noqa: S608


def of_status(found: Facts) -> dict[str, Status]:
    """The checklist's statuses by hazard."""
    return {check.hazard: check.status for check in checklist(found)}


# --- the numbers ---


def test_every_section_has_the_right_numbers(path: Path, report: Report) -> None:
    """The page has all its sections, and each shows the figures that the accountants find for what the rows say."""
    first, second = event_of(0.25, 3.5, 4), event_of(0.1, 2.0, 5)
    spent = rdp_epsilon([first, second], 1e-3)
    status, page, error = report(path)
    assert (status, error) == (0, "")
    assert re.findall(r"<h2>(.*?)</h2>", page) == SECTIONS
    top = text_of(page)[: text_of(page).index(SECTIONS[0])]
    assert "Within budget" in top
    assert f"Spent {spent:.4g} Budget 1 Left {1 - spent:.2g} Releases 3 Refused 1" in top
    assert f"Training data {DATASET[:16]}…" in top
    assert read_ledger(path)[-1].hash in top
    assert f"epsilon {spent:.4g} and delta 0.001" in section(page, 1)
    assert f"a factor of {math.exp(spent):.3g}" in section(page, 1)
    assert "1 in 1,000" in section(page, 1)
    assert section(page, 2).count(f"{spent:.4g}") == 4
    assert "together with up to 2 other sites" in section(page, 2)
    assert "3 releases: 6 sites, of which at least 5" in section(page, 3)
    for total in totals([first, second], 1e-3):
        assert f"{total.epsilon:.4g} {total.version}" in section(page, 5), total.name
    for run, event, rounds in (("run", first, 2), ("another", second, 1)):
        expected = f"{run} train, Lung CT {rounds} {event.steps} {event.sampling_rate:g} {event.noise_multiplier:g}"
        assert f"{expected} {rdp_epsilon([event], 1e-3):.4g}" in section(page, 6)
    alone = rdp_epsilon([event_of(0.25, 3.5, 2)], 1e-3)
    assert re.search(rf"1 2 \S+ \S+ run 1 2 {alone:.4g} {alone:.4g} sent", section(page, 7))
    assert re.search(rf"another 3 5 {rdp_epsilon([second], 1e-3):.4g} {spent:.4g} sent", section(page, 7))
    assert "4 claims were recomputed; all hold." in section(page, 10)
    assert "Name Role Date Signature" in section(page, 12)


def test_the_refused_are_shown_with_their_reason(path: Path) -> None:
    """What was refused is listed with why, also where no noise was found at all, and is never counted as spent."""
    with open_ledger(path) as ledger:
        ledger.record("note", {"refused": "no noise multiplier fits", "run": "late", "round_number": 7})
    page = render(facts(path))
    listed = section(page, 7)
    assert re.search(
        r"4 11 \S+ \S+ run 4 5 [\d.]+ \S refused epsilon 0\.\d+ is spent and 5 more steps would make", listed
    )
    assert re.search(r"5 12 \S+ \S+ late 7 \S \S \S refused no noise multiplier fits", listed)
    assert len(facts(path).releases) == 3
    assert page.count('<path d="M') == 2  # a cross each


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(
        st.builds(
            PoissonSampledGaussian,
            sampling_rate=st.sampled_from([0.05, 0.5, 1.0]),
            noise_multiplier=st.sampled_from([0.8, 3.0, 20.0]),
            steps=st.integers(1, 4),
        ),
        max_size=5,
    ),
    budget=st.sampled_from([0.5, 2.0, 50.0]),
)
def test_the_pages_totals_are_those_of_recomputing(
    events: list[PoissonSampledGaussian], budget: float, tmp_path: Path
) -> None:
    """Whatever is asked for, what the page says is spent is what the accountants find for the releases that fit, and
    the last of its curve; the budget is never exceeded."""
    file = tmp_path / "any.sqlite"
    file.unlink(missing_ok=True)
    with open_ledger(file) as ledger:
        asked = [full_release(number, event=event) for number, event in enumerate(events, start=1)]
        spend(ledger, *asked, budget=PrivacyBudget(budget, 1e-4))
        reserved = ledger.events
    found = facts(file)
    expected = rdp_epsilon(reserved, 1e-4)
    assert found.spent == pytest.approx(expected, rel=1e-12, abs=0)
    assert [decision.cumulative for decision in found.releases][-1:] == [pytest.approx(expected)] * bool(reserved)
    assert found.totals == (totals(reserved, 1e-4) if reserved else ())
    assert found.verdict is (Verdict.WITHIN if reserved else Verdict.NOTHING)
    assert len(found.decisions) == len(events)
    if events:
        assert f"Spent {expected:.4g} Budget {budget:.4g}" in text_of(render(found))


def test_nothing_is_taken_from_the_rows(tmp_path: Path) -> None:
    """Numbers that a site has signed but that are too small appear nowhere but among what is wrong."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        lie = Claim(delta=1e-3, epsilon=0.0123, cumulative_epsilon=0.0123, budget_epsilon=9.0)
        ledger.reserve(full_release(1), lambda _: lie)
    found = facts(tmp_path / "ledger.sqlite")
    page = text_of(render(found))
    assert found.spent == pytest.approx(rdp_epsilon([full_release(1).event], 1e-3))
    assert page.count("0.0123") == len(found.wrong) > 0
    assert found.verdict is Verdict.WRONG
    assert Status.HOLDS not in of_status(found).values()


def test_a_long_ledger_is_shown_in_part(tmp_path: Path) -> None:
    """Of many releases the latest are listed, with a line on how many are not; all are counted and drawn."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        spend(ledger, *(full_release(number) for number in range(1, 71)), budget=PrivacyBudget(9.0, 1e-3), sent=False)
    page = render(facts(tmp_path / "ledger.sqlite"))
    assert f"The latest {SHOWN} of 70; the {70 - SHOWN} before them are left out here" in section(page, 7)
    assert f" {70 - SHOWN + 1} " in section(page, 7)
    assert page.count("made, not known to be sent") == SHOWN
    assert "Releases 70" in text_of(page)
    assert page.count('fill="#1f5fa8"/>') >= 70


def test_no_bound(tmp_path: Path) -> None:
    """Where no finite epsilon holds, the page says so, in red, and no number stands in for it."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        claim = Claim(delta=1e-3, epsilon=math.inf, cumulative_epsilon=math.inf, budget_epsilon=math.inf)
        ledger.reserve(full_release(1, event=event_of(0.5, 1e-160, 1)), lambda _: claim)
    found = facts(tmp_path / "ledger.sqlite")
    page = render(found)
    assert found.verdict is Verdict.EXCEEDED
    assert "Nothing limits what can be learned" in section(page, 1)
    assert "no bound" in section(page, 2)
    assert section(page, 5).count("not computed") >= 3
    assert not re.search(r"\b(inf|nan)\b", text_of(page))
    assert of_status(found)["Large epsilon"] is Status.PROBLEM


@pytest.mark.parametrize("deviation", [0.6, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-6, 0.05])
def test_odds_hold_for_the_gaussian_mechanism(deviation: float, delta: float) -> None:
    """Nobody guesses the Gaussian mechanism's input more often than the page says, and the bound is that of the text:
    posterior odds are the prior's times exp(epsilon)."""
    normal = lambda x: (1 + math.erf(x / math.sqrt(2))) / 2  # noqa: E731

    def exact_delta(epsilon: float) -> float:  # Balle and Wang 2018, theorem 8
        below, above = 1 / (2 * deviation) - epsilon * deviation, -1 / (2 * deviation) - epsilon * deviation
        return normal(below) - math.exp(epsilon) * normal(above)

    epsilon = next(step / 100 for step in range(1, 2000) if exact_delta(step / 100) <= delta)
    best = normal(1 / (2 * deviation))  # of the likelihood ratio test
    assert best <= right_guess(epsilon, delta) <= best + 0.35
    after = posterior(0.1, epsilon)
    assert after / (1 - after) == pytest.approx(math.exp(epsilon) * 0.1 / 0.9)
    assert (
        right_guess(epsilon, 0.0)
        == pytest.approx(posterior(0.5, epsilon))
        == pytest.approx(1 - posterior(0.5, -epsilon))
    )
    assert right_guess(0.0, delta) == pytest.approx((1 + delta) / 2)


# --- what must not get in, or out ---


def test_whatever_the_ledger_says_is_text(tmp_path: Path) -> None:
    """Names, purposes, reasons, notes and audits from the ledger are escaped wherever they are shown."""
    evil = "<script>alert('x')</script>"
    file = tmp_path / "ledger.sqlite"
    with Ledger(file, dataset=evil, site=evil, unit=evil, signer=SITE) as ledger:
        texts = dict.fromkeys(("run", "purpose", "consortium", "library_version", "random_generator"), evil)
        spend(ledger, full_release(1, unit=evil, neighbouring=evil, **texts))
        ledger.record("note", {"refused": evil, "run": evil})
        ledger.record("note", {evil: evil})
        ledger.record("audit", {"rounds": evil, evil: "also"})
    append(file, kind="note", content=evil, time=evil)
    page = render(facts(file))
    assert "<script" not in page
    assert text_of(page).count(evil) >= 12


def test_the_page_needs_and_reaches_nothing(path: Path, report: Report) -> None:
    """No script, image, font, style or address from elsewhere, and nothing about the machine that made it."""
    _, page, _ = report(path)
    assert "default-src 'none'" in page
    bare = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(
        r"https?:|//|\bsrc=|\bhref=|url\(|@import|@font-face|<script|<link|<img|<iframe|\bon\w+=", bare
    )
    assert str(path.parent) not in page


def test_pictures_and_tables_can_be_read_aloud(path: Path) -> None:
    """Each picture is well-formed, and has a title that says what it shows; each table has headers with a scope."""
    page = render(facts(path))
    pictures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314
    assert [picture.attrib["role"] for picture in pictures] == ["img"] * 3
    titles = [picture.findtext("{http://www.w3.org/2000/svg}title") for picture in pictures]
    assert (
        titles[0]
        == f"Epsilon of all 3 releases together reaches {facts(path).spent:.4g}; the budget is 1; 1 were refused"
    )
    assert all(titles)
    tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert len(tables) >= 8
    assert all('<th scope="col"' in table for table in tables)
    assert page.count("<h1>") == 1


def test_it_works_without_torch(tmp_path: Path) -> None:
    """The command never imports torch: it works where torch cannot be had."""
    path = tmp_path / "ledger.sqlite"
    words = ["secureagg", "budget", "report", str(path), "--out", str(tmp_path / "r.html"), "--roster"]
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'opacus'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from sites import cli\n"
        f"sys.argv = {[*words, str(tmp_path / 'manifest.toml')]!r}\n"
        "cli.main()\n"
    )
    consortium = make_consortium(tmp_path)
    with Ledger(path, dataset=DATASET, site="a", signer=consortium.keys["a"].identity) as ledger:
        spend(ledger, full_release(1))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "Within budget" in (tmp_path / "r.html").read_text()


# --- what is wrong is said ---


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE rows SET body = replace(body, '\"steps\":2', '\"steps\":1') WHERE sequence = 5", "row 5 (edited)"),
        ("DELETE FROM rows WHERE sequence = 6", "row 6 (removed)"),
        (
            "UPDATE rows SET signature = iif(signature LIKE '0%', 'f', '0') || substr(signature, 2) WHERE sequence = 7",
            "row 7 (signature)",
        ),
        ("UPDATE rows SET body = 'nothing' WHERE sequence = 2", "row 2 (edited)"),
        ("UPDATE rows SET body = '[]' WHERE sequence = 1", "row 1 (edited)"),
        ("DELETE FROM rows", "row 1 (empty)"),
    ],
    ids=["edited", "removed", "signature", "unreadable", "no opening", "empty"],
)
def test_a_tampered_ledger_is_named_at_the_top(path: Path, report: Report, statement: str, named: str) -> None:
    """The page is written all the same, says first that the record does not hold and in which row, and the status is
    1; nothing in it is called good."""
    with_sqlite(path, statement)
    status, page, error = report(path)
    assert status == 1
    assert "the record does not hold" in error
    top = text_of(page)[: text_of(page).index(SECTIONS[0])]
    assert "The record does not hold" in top
    assert named in top
    assert "Do not sign" in top
    assert "Left" not in top
    assert 'class="verdict bad"' in page
    assert "Does not hold" in section(page, 10)
    assert of_status(facts(path))["A record that was altered"] is Status.PROBLEM
    assert Status.HOLDS not in of_status(facts(path)).values()


def test_claims_that_do_not_hold(tmp_path: Path, report: Report) -> None:
    """A ledger that is whole and signed but claims too little is called wrong, by row, with status 1."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(full_release(1), lambda _: Claim(delta=1e-3, epsilon=9, cumulative_epsilon=9, budget_epsilon=1))
    status, page, error = report(tmp_path / "ledger.sqlite")
    assert status == 1
    assert "claims do not hold" in error
    assert "row 2: reserved at epsilon 9, expected at most its budget 1" in text_of(page)
    assert "The record's claims do not hold" in text_of(page)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"kind": "reserve", "decision": "reserved"}, "row 12: not a decision as this version writes it: KeyError"),
        ({"kind": "commit", "reservation": 2, "update_sha256": "0" * 64}, "row 12: a second update of the round"),
        ({"kind": "commit", "reservation": 11, "update_sha256": "0" * 64}, "made for row 11, which reserved none"),
        ({"kind": "commit", "reservation": ["2"]}, "which reserved none"),
        ({"kind": "sent", "reservation": 2}, "row 12: sent, but row 2 has no update that waits to be"),
        ({"kind": "audit", "content": {"canaries": 100, "guesses": 100, "correct": 100, "delta": 1e-5,
          "epsilon_lower_bound": 1.0, "claimed_epsilon": 9.0}}, "an audit that claims a lower bound of 1, found 3."),
    ],
    ids=["unreadable", "second update", "update of a refusal", "update of nothing", "sent twice", "audit"],
)  # fmt: skip
def test_signed_rows_that_cannot_be(path: Path, report: Report, content: dict[str, object], named: str) -> None:
    """Rows that are chained and signed, but that no honest program writes, are named, with status 1."""
    append(path, **content)
    status, page, _ = report(path)
    assert status == 1
    assert named in text_of(page)
    assert facts(path).verdict is Verdict.WRONG


def test_a_release_of_another_unit(path: Path) -> None:
    """A release that protects less than the page says is wrong."""
    body = json.loads(read_ledger(path)[1].body)
    append(path, **{**body, "unit": "record", "sequence": 12, "cumulative_epsilon": 1.0, "round_number": 9})
    found = facts(path)
    assert "row 12: a release per record, the ledger is per patient" in found.wrong
    assert of_status(found)["The unit is not a person"] is Status.PROBLEM


def test_a_budget_that_was_lowered_below_what_is_spent(path: Path, report: Report) -> None:
    """The budget in force is that of the latest decision; above it the verdict is red and the status 1."""
    with open_ledger(path) as ledger:
        spend(ledger, full_release(9), budget=PrivacyBudget(0.2, 1e-3))
    status, page, error = report(path)
    assert status == 1
    assert re.search(r"epsilon 0\.\d+ is spent, expected at most 0\.2", error)
    assert "Budget exceeded" in text_of(page)
    assert "The budget was changed: 1 at delta 0.001 from row 2 on, then 0.2 at delta 0.001 from row 12 on" in text_of(
        page
    )


def test_another_delta_moves_the_total(path: Path) -> None:
    """Spent is computed at the delta of the latest decision, also where nothing was released at it."""
    with open_ledger(path) as ledger:
        spend(ledger, full_release(9), budget=PrivacyBudget(0.2, 1e-6))
        events = ledger.events
    found = facts(path)
    assert (found.delta, found.budget) == (1e-6, 0.2)
    assert found.spent == rdp_epsilon(events, 1e-6)
    assert found.totals == totals(events, 1e-6)


def test_nothing_released(tmp_path: Path, report: Report) -> None:
    """An empty ledger, and one in which all was refused, say that nothing was released; nothing is ticked for it."""
    file = tmp_path / "ledger.sqlite"
    with open_ledger(file) as ledger:
        status, page, _ = report(file)
        assert status == 0
        assert "Nothing released" in text_of(page)
        assert "There is nothing to add up" in section(page, 5)
        assert Status.HOLDS not in of_status(facts(file)).values()
        spend(ledger, full_release(1, event=event_of(1.0, 0.3, 9)))
    status, page, _ = report(file)
    assert status == 0
    assert "The budget, epsilon 1 at delta 0.001, is untouched" in text_of(page)
    assert Status.HOLDS not in of_status(facts(file)).values()


def test_roster_and_head(tmp_path: Path, report: Report) -> None:
    """Key and head are called checked only if they were given, and wrong if they do not match, with status 1."""
    consortium = make_consortium(tmp_path)
    file, roster = tmp_path / "ledger.sqlite", ("--roster", str(consortium.manifest_path))
    with Ledger(file, dataset=DATASET, site="a", signer=consortium.keys["a"].identity) as ledger:
        head = ledger.head
        spend(ledger, full_release(1))
    status, page, _ = report(file)
    assert (status, section(page, 10).count("Not checked")) == (0, 2)
    status, page, _ = report(file, *roster, "--head", head)
    assert (status, section(page, 10).count("Not checked")) == (0, 1)  # no release names this manifest
    assert "It is the key that the manifest of Test lists for this site" in section(page, 10)
    assert "The head that was noted earlier is in it" in section(page, 10)
    status, page, _ = report(file, "--head", "1" * 64)
    assert status == 1
    assert "row 5 (tail removed)" in text_of(page)
    assert "The head that was noted earlier is not in it" in section(page, 10)
    for name, signer, named in (("a", "b", "row 1 (other key)"), ("z", "a", "the ledger is of z, the manifest lists")):
        other = tmp_path / f"{name}-by-{signer}.sqlite"
        Ledger(other, dataset=DATASET, site=name, signer=consortium.keys[signer].identity).close()
        status, page, _ = report(other, *roster)
        assert status == 1
        assert named in text_of(page)
        assert "It is not a key that the manifest of Test lists" in section(page, 10)


def test_a_manifest_that_not_all_have_signed(tmp_path: Path, path: Path, report: Report) -> None:
    """It lists whatever somebody wrote into it, so it confirms no key: there is no page."""
    manifest = make_consortium(tmp_path).manifest
    msgspec.structs.replace(manifest, signatures=manifest.signatures[1:]).save(tmp_path / "unsigned.toml")
    status, page, error = report(path, "--roster", str(tmp_path / "unsigned.toml"))
    assert (status, page) == (1, "")
    assert "not signed by a" in error


@pytest.mark.parametrize("what", ["nothing", "not a ledger", "manifest", "format"])
def test_where_there_is_nothing_to_report(tmp_path: Path, path: Path, report: Report, what: str) -> None:
    """No page is written for a file without rows, nor with a manifest that is none; the message names the file."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("[1, 2]\n")
    words = {
        "nothing": (tmp_path / "nowhere.jsonl",),
        "not a ledger": (broken,),
        "manifest": (path, "--roster", str(broken)),
        "format": (path, "--out", str(tmp_path / "report.pdf")),
    }[what]
    status, page, error = report(*words)
    assert (status, page) == (2 if what == "format" else 1, "")
    assert {"nothing": "nowhere", "format": ".html"}.get(what, "broken.jsonl") in error


# --- audits and the checklist ---


def test_audits(path: Path, report: Report) -> None:
    """An audit is recomputed from its counts and held against its claim; one that contradicts it makes the page red."""
    assert "Not audited yet" in section(render(facts(path)), 8)
    assert of_status(facts(path))["No empirical test"] is Status.OPEN
    counts = {"canaries": 1000, "guesses": 100, "correct": 90, "delta": 1e-5, "confidence": 0.95}
    bound = epsilon_lower_bound(**counts)
    with open_ledger(path) as ledger:
        ledger.record(
            "audit", {**counts, "epsilon_lower_bound": bound, "claimed_epsilon": 2.0, "rounds": 3, "holds": True}
        )
    status, page, _ = report(path)
    assert status == 0
    shown = section(page, 8).replace("\N{NO-BREAK SPACE}", " ")
    assert (
        f"guessed 100, 90 of them right. That shows, with 95 % confidence, an epsilon of at least {bound:.4g};" in shown
    )
    assert "does not contradict the claim" in section(page, 8)
    assert "rounds 3" in section(page, 8)
    assert of_status(facts(path))["No empirical test"] is Status.HOLDS
    with open_ledger(path) as ledger:
        ledger.record("audit", {**counts, "claimed_epsilon": 1.0})
    status, page, error = report(path)
    assert status == 1
    assert "an audit contradicts the claims" in error
    assert "An audit contradicts the claims" in text_of(page)
    assert "contradicts the claim" in section(page, 8)


@pytest.mark.parametrize(
    ("content", "contradicts"),
    [
        ({}, None),
        ({"holds": False}, True),
        ({"holds": True}, None),
        ({"epsilon_lower_bound": 0.5, "claimed_epsilon": 1}, False),
        ({"epsilon_lower_bound": 1.5, "claimed_epsilon": 1, "holds": True}, True),
        ({"epsilon_lower_bound": "inf", "claimed_epsilon": 1}, True),
        ({"epsilon_lower_bound": 1, "claimed_epsilon": "inf"}, False),
        ({"canaries": 5, "guesses": 9, "correct": 9, "delta": 1e-5, "claimed_epsilon": 1}, None),
        ({"canaries": "many", "guesses": True, "correct": 10**400, "delta": "small", "confidence": 10**400}, None),
        ({"canaries": 10**12, "guesses": 10**12, "correct": 10**12, "delta": 0.1, "claimed_epsilon": 1}, None),
    ],
)  # fmt: skip
def test_audits_of_any_form_are_read(path: Path, content: dict[str, object], contradicts: bool | None) -> None:
    """Whatever an audit's row holds or lacks, it is shown; it is in favour only with a bound and a claim to compare."""
    with open_ledger(path) as ledger:
        ledger.record("audit", content)
    found = facts(path)
    assert found.audits[0].contradicts is contradicts
    assert f"Row 12, {found.audits[0].time[:10]}" in section(render(found), 8)
    assert (
        of_status(found)["No empirical test"]
        is {None: Status.JUDGE, True: Status.PROBLEM, False: Status.HOLDS}[contradicts]
    )


@pytest.mark.parametrize(
    ("changes", "hazard", "status"),
    [
        ({}, "The unit is not a person", Status.HOLDS),
        ({}, "Unbounded contribution", Status.HOLDS),
        ({"clip_norm": None}, "Unbounded contribution", Status.JUDGE),
        ({}, "Neighbouring relation", Status.HOLDS),
        ({"neighbouring": "replace one"}, "Neighbouring relation", Status.PROBLEM),
        ({}, "Trust and collusion", Status.HOLDS),
        ({"max_corrupt": None}, "Trust and collusion", Status.JUDGE),
        ({}, "Random numbers", Status.JUDGE),
        ({}, "Large epsilon", Status.HOLDS),
        ({"event": event_of(0.5, 1.5, 2)}, "Large epsilon", Status.JUDGE),
        ({"event": event_of(1.0, 0.4, 3)}, "Large epsilon", Status.PROBLEM),
        ({}, "Large delta", Status.JUDGE),
        ({}, "A budget that moves", Status.HOLDS),
        ({}, "Releases that are not added up", Status.HOLDS),
        ({}, "Crashes and repeated rounds", Status.HOLDS),
        ({}, "A record that was altered", Status.JUDGE),
    ],
)  # fmt: skip
def test_the_checklist_says_what_the_ledger_shows(
    tmp_path: Path, changes: dict[str, Any], hazard: str, status: Status
) -> None:
    """A hazard is called held only where the rows show it; a field that they lack leaves it to the reader."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        spend(ledger, full_release(1, **changes), budget=PrivacyBudget(100.0, 1e-3))
    found = facts(tmp_path / "ledger.sqlite")
    assert of_status(found)[hazard] is status
    assert f"{hazard} {status}" in section(render(found), 9)


def test_another_unit(tmp_path: Path) -> None:
    """A ledger per record says so, and leaves it to the reader whether that is enough."""
    with open_ledger(tmp_path / "ledger.sqlite", unit="record") as ledger:
        spend(ledger, full_release(1, unit="record"))
    found = facts(tmp_path / "ledger.sqlite")
    assert of_status(found)["The unit is not a person"] is Status.JUDGE
    assert "a person with several rows is protected less" in section(render(found), 1)


def test_crashed_reservations_are_told(tmp_path: Path) -> None:
    """A reservation without an update counts in full, and the page says how many there are."""
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        BudgetGuard(BUDGET, ledger).authorize(full_release(1))
        spend(ledger, full_release(2))
    page = render(facts(tmp_path / "ledger.sqlite"))
    assert "none recorded, counts in full" in section(page, 7)
    assert "2 releases were paid for in advance, none has two updates; 1 have none" in section(page, 9)


@pytest.mark.parametrize(
    ("delta", "rate", "status", "said"),
    [
        (1e-3, 0.5, Status.JUDGE, "for 128 patients: in the worst case 0.13 of them"),
        (1e-2, 0.5, Status.PROBLEM, "not below 1 in 128"),
        (1e-5, 0.5, Status.HOLDS, "at most 1 in their square"),
        (1e-5, 1.0, Status.JUDGE, "which the ledger does not hold"),
    ],
)
def test_delta_is_held_against_the_patients(
    tmp_path: Path, delta: float, rate: float, status: Status, said: str
) -> None:
    """With the manifest that the releases name, the number of patients is known: its batch over the sampling rate."""
    consortium = make_consortium(tmp_path)
    assert TRAINING.batch_size == 64
    with Ledger(tmp_path / "l.sqlite", dataset=DATASET, site="a", signer=consortium.keys["a"].identity) as ledger:
        event = event_of(rate, 20.0, 2)
        named = consortium.manifest.digest.hex()
        spend(ledger, full_release(1, event=event, manifest_sha256=named), budget=PrivacyBudget(9.0, delta))
    found = facts(tmp_path / "l.sqlite", manifest=consortium.manifest)
    assert of_status(found)["Large delta"] is status
    assert said in section(render(found), 9)
    assert "1 of 1 releases name exactly this manifest" in section(render(found), 10)
    assert facts(tmp_path / "l.sqlite").patients is None


# --- for machines ---


def test_json(path: Path, tmp_path: Path, report: Report) -> None:
    """The same facts as JSON, with null for infinity."""
    assert report(path, "--json", tmp_path / "report.json")[0] == 0
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    found = facts(path)
    assert written["verdict"] == "within"
    assert written["spent"] == found.spent
    assert written["left"] == found.left
    assert [each["cumulative"] for each in written["decisions"]] == [each.cumulative for each in found.decisions]
    assert len(written["checklist"]) == len(checklist(found)) == len(as_json(found)["checklist"])


def test_rows_of_another_ledger(path: Path, tmp_path: Path) -> None:
    """Rows that somebody else has signed are not taken for the site's."""
    append(path, signer=OTHER, kind="note", content={})
    rows: list[Row] = read_ledger(path)
    found = facts_of(rows, now=NOW)
    assert found.problems[0].startswith("row 12 (signature)")
    assert not found.verified.signatures
    assert found.verified.chain
