"""A ledger's facts as one HTML file for a privacy officer: plain words, no script, nothing fetched from anywhere.

Everything that comes from the ledger is escaped (by Jinja2), and a content security policy in the page forbids scripts
and requests besides.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sites.plots import Mark, accountants_plot, composition_plot, releases_plot
from sites.reports.checklist import Status, checklist
from sites.reports.facts import Cohort, Facts, Verdict
from sites.reports.words import count, decimal, epsilon, percent, span, when

SHOWN: Final = 40  # decisions that a page lists, and problems
LARGEST: Final = math.log(1e6)  # epsilon beyond which a factor says no more
PRIORS: Final = (0.01, 0.10, 0.50)
UNITS: Final = {
    "patient": "one patient: everything this site's data holds about one person, under one key",
    "record": "one record: a single row; a person with several rows is protected less",
    "site": "this whole site: everything that it holds about all of its patients together",
}


@dataclass(frozen=True, slots=True)
class Opponent:
    """Somebody who might want to know about a patient: what they see, and the epsilon that holds against them."""

    who: str
    sees: str
    epsilon: float


def as_json(facts: Facts) -> dict[str, Any]:
    """The page's content for machines; numbers may be infinite."""
    checks = [asdict(check) for check in checklist(facts)]
    return {**asdict(facts), "verdict": facts.verdict.name.lower(), "left": facts.left, "checklist": checks}


def render(facts: Facts) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("sites.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for word in (count, decimal, epsilon, percent, span, when):
        environment.filters[word.__name__] = word
    marks = _marks(facts)
    checks = checklist(facts)
    latest = facts.decisions[-SHOWN:]
    return environment.get_template("report.html.j2").render(
        facts=facts,
        good=facts.verdict is Verdict.WITHIN,
        bad=facts.verdict not in (Verdict.WITHIN, Verdict.NOTHING),
        trusted=facts.verdict not in (Verdict.TAMPERED, Verdict.WRONG),
        sentence=_sentence(facts),
        left=_left(facts),
        wrong=[*facts.problems, *facts.wrong],
        unit=UNITS.get(facts.unit, f"one {facts.unit}, as the site defines it"),
        neighbouring=", ".join(
            f"one {facts.unit} added or removed" if value == "add or remove one" else value or "not recorded"
            for value in facts.neighbouring_recorded
        ),
        odds=[(prior, posterior(prior, facts.spent)) for prior in PRIORS],
        factor="that is above a million and protects nobody"
        if facts.spent > LARGEST
        else f"of {math.exp(facts.spent):.3g}",
        bounded=math.isfinite(facts.spent),
        guessed=right_guess(facts.spent, facts.delta or 0.0),
        adversaries=_adversaries(facts),
        secure_sums=[(cohort, _secure_sum(cohort)) for cohort in facts.cohorts],
        composition=Markup(composition_plot(marks, title=_composition_title(facts))),  # noqa: S704  its text is escaped
        each=Markup(releases_plot(marks, title="Epsilon of each release alone, one bar each")),  # noqa: S704
        accountants=Markup(_accountants(facts)),  # noqa: S704
        first=len(facts.decisions) - len(latest) + 1,
        latest=latest,
        shown=SHOWN,
        checks=checks,
        counted=[(status, sum(check.status is status for check in checks)) for status in Status],
    )


def posterior(prior: float, spent: float) -> float:
    """How sure somebody who was sure of ``prior`` can be afterwards, at most: odds grow by at most exp(epsilon)."""
    return prior / (prior + (1 - prior) * math.exp(-spent))


def right_guess(spent: float, delta: float) -> float:
    """The chance to guess right whether a patient was in the data, if both are as likely, at most.

    Kairouz, Oh, Viswanath, "The composition theorem for differential privacy", ICML 2015: the least sum of both errors
    is 2 (1 - delta) / (1 + exp(epsilon)).
    """
    shrunk = math.exp(-spent)
    return (1 + delta * shrunk) / (1 + shrunk)


def _adversaries(facts: Facts) -> list[Opponent]:
    """Whom the guarantee holds against: everybody, where a site's own noise is enough; with noise that sites share each
    of them knows another part of it."""
    corrupt = {cohort.max_corrupt for cohort in facts.cohorts}
    several = "site" if corrupt == {1} else "sites"
    up_to = f"up to {_listed(corrupt)} other {several}" if corrupt and None not in corrupt else "some other sites"
    against = facts.against
    return [
        Opponent(
            "An outsider",
            "the finished model, and the encrypted messages if they tap the network",
            against["outsider"],
        ),
        Opponent("One curious site", "every version of the model, and what it did itself", against["curious site"]),
        Opponent(
            f"The coordinator, together with {up_to}",
            "the sum of all sites' updates in each round",
            against["coordinator"],
        ),
        Opponent(
            "The coordinator and all other sites together",
            "this site's own updates, since they know the rest of the sum",
            math.inf if facts.shared else facts.spent,
        ),
    ]


def _secure_sum(cohort: Cohort) -> str:
    if cohort.sites is None or cohort.threshold is None or cohort.max_corrupt is None:
        return "the rows do not say how many sites were summed, or how many of them were allowed for as corrupt."
    return (
        f"{cohort.sites} sites, of which at least {cohort.threshold} had to take part to the end. No update was to be "
        f"seen alone as long as at most {cohort.max_corrupt} of the {cohort.sites} sites collude with the coordinator."
    )


def _sentence(facts: Facts) -> str:
    spent = f"Epsilon {epsilon(facts.spent)}" if math.isfinite(facts.spent) else "More than any epsilon can bound"
    at_delta = "" if facts.delta is None else f" at delta {decimal(facts.delta)}"
    budget = "not recorded" if facts.budget is None else f"epsilon {epsilon(facts.budget)}"
    return {
        Verdict.TAMPERED: "Rows of this ledger are not as the site wrote them. No figure on this page is reliable.",
        Verdict.WRONG: "The rows are as the site wrote them, but what they claim does not hold when it is recomputed.",
        Verdict.CONTRADICTED: "An audit has shown that more leaks about a person than the record claims.",
        Verdict.EXCEEDED: f"{spent} is spent{at_delta}; the budget in force is {budget}.",
        Verdict.NOTHING: (
            "No release is recorded, and no budget: the first request names it."
            if facts.budget is None
            else f"No release is recorded. The budget, {budget}{at_delta}, is untouched."
        ),
        Verdict.WITHIN: (
            f"Of {budget} that this data may ever cost a {facts.unit}, {epsilon(facts.spent)} is spent and "
            f"{_left(facts)} is left{at_delta}."
        ),
    }[facts.verdict]


def _marks(facts: Facts) -> list[Mark]:
    return [
        Mark(
            epsilon=0.0 if decision.epsilon is None else decision.epsilon,
            cumulative=decision.cumulative,
            budget=decision.budget,
            refused=decision.refused is not None,
        )
        for decision in facts.decisions
    ]


def _composition_title(facts: Facts) -> str:
    return (
        f"Epsilon of all {len(facts.releases)} releases together reaches {epsilon(facts.spent)}; the budget is "
        f"{epsilon(facts.budget)}; {len(facts.refused)} were refused"
    )


def _accountants(facts: Facts) -> str:
    found = [(total.name, total.epsilon) for total in facts.totals]
    title = "; ".join(f"{name}: epsilon {epsilon(value)}" for name, value in found)
    return accountants_plot(found, budget=facts.budget, title=title)


def _left(facts: Facts) -> str:
    return "less than 0.001" if 0 < facts.left < 0.001 else f"{facts.left:.2g}"


def _listed(values: set[int | None]) -> str:
    return " or ".join(map(str, sorted(value for value in values if value is not None)))
