"""The hazards that NIST SP 800-226 (March 2025) warns of, and others of its kind, held against one ledger.

Nothing is ticked here that the ledger does not show: what rests on the software, on the data or on people is left to
the reader's judgement, with what the ledger says about it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sites.reports.facts import Facts
from sites.reports.words import count, decimal, epsilon

STRONG: Final = 1.0  # epsilon; Ponomareva et al., "How to DP-fy ML", JAIR 77 (2023), section 5.2, tiers 1 and 2
WEAK: Final = 10.0


class Status(StrEnum):
    """What the record says about a hazard, worst first."""

    PROBLEM = "Problem found"
    JUDGE = "Needs your judgement"
    OPEN = "Not covered"
    HOLDS = "Held by the record"
    NOTHING = "Nothing released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One hazard, its status, and the evidence in one or two sentences."""

    hazard: str
    status: Status
    evidence: str


_Judged = tuple[Status, str]


def checklist(facts: Facts) -> tuple[Check, ...]:
    """All hazards, worst status first."""
    checks = [Check(hazard=hazard, status=status, evidence=text) for hazard, (status, text) in _judged(facts)]
    return tuple(sorted(checks, key=lambda check: list(Status).index(check.status)))


def _judged(facts: Facts) -> list[tuple[str, _Judged]]:
    found = [(hazard, judge(facts)) for hazard, judge in _ALWAYS.items()]
    for hazard, of_releases in _OF_RELEASES.items():
        nothing = (Status.NOTHING, "No release is recorded that could be judged.")
        found.append((hazard, of_releases(facts) if facts.releases else nothing))
    if facts.problems or facts.wrong:
        return [(hazard, _doubted(*judged)) for hazard, judged in found]
    return found


def _doubted(status: Status, text: str) -> _Judged:
    """What a record that does not hold would hold."""
    return (
        (Status.JUDGE, f"As found, in a record that does not hold: {text}")
        if status is Status.HOLDS
        else (status, text)
    )


# --- what can be said of any ledger ---


def _record(facts: Facts) -> _Judged:
    if facts.problems:
        return Status.PROBLEM, f"{len(facts.problems)} of its rows are not as the site wrote them; see the top."
    missing = [
        text
        for text, given in (
            ("nobody else has confirmed the site's key", facts.verified.key),
            ("a removed end would not show, since no earlier head was given", facts.verified.head),
        )
        if given is None
    ]
    if missing:
        return Status.JUDGE, f"Every row is chained and signed, but {' and '.join(missing)}."
    return Status.HOLDS, "Every row is chained and signed by the listed key; the noted head is among them."


def _audited(facts: Facts) -> _Judged:
    if any(audit.contradicts for audit in facts.audits):
        return Status.PROBLEM, "An audit has shown more leakage than is claimed."
    if not facts.audits:
        return Status.OPEN, "No audit is recorded. The figures rest on mathematics and on the software being right."
    if any(audit.contradicts is None for audit in facts.audits):
        return Status.JUDGE, "An audit is recorded, but not with a bound and a claim that could be compared."
    return Status.HOLDS, f"Of {len(facts.audits)} recorded audits none contradicts what it tested."


def _elsewhere(facts: Facts) -> _Judged:
    return Status.JUDGE, (
        f"Only releases in this ledger are counted, for data {facts.dataset[:12]}. Another ledger file on the same "
        "patients, statistics, publications or an earlier model are not in it."
    )


def _changed_data(facts: Facts) -> _Judged:
    return Status.JUDGE, (
        "Data that changes has another fingerprint and another ledger. If patients of this one were in an earlier data "
        "set, add what they paid there by hand."
    )


def _two_hospitals(facts: Facts) -> _Judged:
    return Status.JUDGE, (
        "This page assumes that no patient is in two hospitals' data. One who is has the sum of both epsilons and both "
        "deltas."
    )


def _tuning(facts: Facts) -> _Judged:
    if len(facts.runs) > 1:
        text = f"{len(facts.runs)} runs are recorded and all of them are paid for, also those that were tried and left."
    else:
        text = f"{len(facts.runs) or 'No'} run is recorded."
    return Status.JUDGE, f"{text} Ask whether settings were tried on these patients outside this ledger."


def _data_dependent(facts: Facts) -> _Judged:
    return Status.JUDGE, (
        "The sampling rate depends on the number of patients. Ask how features were normalised and who chose clip norm "
        "and model: statistics of the patients computed without noise are not in this account."
    )


def _side_channels(facts: Facts) -> _Judged:
    return Status.OPEN, "Training time, message sizes and who takes part when can be seen, and are not in this account."


def _without_noise(facts: Facts) -> _Judged:
    return Status.OPEN, (
        "The number of patients and the evaluation counts are released as exact sums over the sites, without noise."
    )


def _subgroups(facts: Facts) -> _Judged:
    return Status.OPEN, (
        "The ledger holds no accuracy. Noise and clipping weigh most on small groups of patients: have the model's "
        "accuracy checked for each."
    )


def _raw_data(facts: Facts) -> _Judged:
    return (
        Status.OPEN,
        "Access to the patients' records, to this machine and to its signing key is outside this account.",
    )


def _starting_point(facts: Facts) -> _Judged:
    return (
        Status.OPEN,
        "What the model was before its first round, and the data it was made from, is not in this account.",
    )


# --- what needs a release ---


def _unit(facts: Facts) -> _Judged:
    if set(facts.units_recorded) != {facts.unit}:
        return Status.PROBLEM, f"The ledger is per {facts.unit}, its releases are per {_values(facts.units_recorded)}."
    if facts.unit != "patient":
        return Status.JUDGE, f"The unit is a {facts.unit}, not a person: who has several of them is protected less."
    return Status.HOLDS, f"All {len(facts.releases)} releases are recorded per patient."


def _joined_rows(facts: Facts) -> _Judged:
    return Status.JUDGE, (
        "Rows count as one patient's where the data gives them the same key. Ask whether a patient who came twice has "
        "one key; the ledger cannot show it."
    )


def _large_epsilon(facts: Facts) -> _Judged:
    spent = f"Epsilon is {facts.spent:.4g}"
    if facts.spent <= STRONG:
        return Status.HOLDS, f"{spent}; up to {STRONG:g} counts as a strong guarantee in the literature."
    if facts.spent <= WEAK:
        return Status.JUDGE, f"{spent}; between {STRONG:g} and {WEAK:g} it is reasonable, and no longer strong."
    if math.isinf(facts.spent):
        return Status.PROBLEM, "Epsilon has no bound: no protection can be shown."
    return Status.PROBLEM, f"{spent}; above {WEAK:g} it promises next to nothing by itself."


def _large_delta(facts: Facts) -> _Judged:
    if facts.delta is None:
        return Status.PROBLEM, "No delta is recorded."
    if facts.patients is None:
        return Status.JUDGE, (
            f"Delta is {decimal(facts.delta)}. It should be far below one in the number of patients, which the ledger "
            "does not hold: compare it with your own number."
        )
    expected, cautious = facts.delta * facts.patients, 1 / facts.patients**2
    text = f"Delta is {decimal(facts.delta)}, for {facts.patients:g} patients"
    if expected >= 1:
        return Status.PROBLEM, f"{text}: not below 1 in {facts.patients:g}, it would allow to publish a patient."
    if facts.delta <= cautious:
        return Status.HOLDS, f"{text}: at most 1 in their square, which is cautious."
    return Status.JUDGE, (
        f"{text}: in the worst case {expected:.2g} of them are expected to be exposed. 1 in their square, "
        f"{cautious:.2g}, would be cautious."
    )


def _composition(facts: Facts) -> _Judged:
    if facts.wrong or facts.problems:
        return Status.PROBLEM, "The record's own sums do not hold, or its rows do not; see the top."
    return Status.HOLDS, (
        f"{count(len(facts.releases), 'release')} of {count(len(facts.runs), 'run')} are composed as one; "
        f"{facts.verified.claims} claims were recomputed and hold."
    )


def _contribution(facts: Facts) -> _Judged:
    if None in facts.clip_norms_recorded:
        return Status.JUDGE, f"{facts.clip_norms_recorded[None]} releases do not say what a contribution is clipped to."
    return Status.HOLDS, (
        f"Each {facts.unit}'s contribution to a step is clipped to norm {_values(facts.clip_norms_recorded)} in all "
        "releases."
    )


def _neighbouring(facts: Facts) -> _Judged:
    if set(facts.neighbouring_recorded) == {"add or remove one"}:
        return Status.HOLDS, (
            "All releases are for data sets that differ by one added or removed, as the accountants compute. For "
            "replacing one, count twice the epsilon and more delta."
        )
    return Status.PROBLEM, (
        f"The accountants compute for one added or removed, the record says: {_values(facts.neighbouring_recorded)}."
    )


def _trust(facts: Facts) -> _Judged:
    unknown = sum(each.releases for each in facts.cohorts if each.max_corrupt is None or each.sites is None)
    text = "The noise is the site's own and complete, so that epsilon needs no trust in coordinator or other sites."
    if facts.shared:
        return Status.JUDGE, (
            f"In {count(facts.shared, 'release')} the noise is shared: epsilon holds while no more sites than section "
            "2 says work for the coordinator, and rests on the secure sum. Whether they can be trusted that far is for "
            "people to say."
        )
    if unknown:
        return Status.JUDGE, f"{text} What the secure sum adds is not recorded in {unknown} releases."
    return Status.HOLDS, f"{text} The secure sum's thresholds are recorded in all releases."


def _random_numbers(facts: Facts) -> _Judged:
    if None in facts.generators_recorded:
        return Status.JUDGE, f"{facts.generators_recorded[None]} releases do not say what drew their noise."
    return Status.JUDGE, f"Recorded is {_values(facts.generators_recorded)}. That it was used rests on the software."


def _floating_point(facts: Facts) -> _Judged:
    return Status.JUDGE, (
        f"Rests on the software (version {_values(facts.libraries_recorded)}), which by its documentation rounds sums "
        "and noise to a grid, so that low-order digits tell nothing. Its noise is a rounded normal, not an ideal one."
    )


def _crashes(facts: Facts) -> _Judged:
    if facts.problems or facts.wrong:
        return Status.PROBLEM, "The record does not hold, so neither does its account of updates; see the top."
    without = sum(decision.update == "none" for decision in facts.releases)
    text = f"{len(facts.releases)} releases were paid for in advance, none has two updates"
    return Status.HOLDS, (
        f"{text}; {without} have none, after a stop in the middle perhaps, and count in full."
        if without
        else f"{text}, all have one."
    )


def _limit(facts: Facts) -> _Judged:
    if facts.exceeded:
        return Status.PROBLEM, f"Spent: {epsilon(facts.spent)}. Budget in force: {epsilon(facts.budget)}."
    limits = [f"{epsilon(limit)} at delta {decimal(delta)}" for _, limit, delta in facts.budgets]
    if len(limits) > 1:
        return Status.JUDGE, f"The budget was changed: {', then '.join(limits)}. Ask who decided that."
    return Status.HOLDS, f"It has been {limits[0]} from the first decision on."


def _values(recorded: Mapping[str | None, int]) -> str:
    return ", ".join("not recorded" if value is None else value for value in recorded)


_ALWAYS: Final[dict[str, Callable[[Facts], _Judged]]] = {
    "A record that was altered": _record,
    "No empirical test": _audited,
    "Releases outside this record": _elsewhere,
    "Data that changes": _changed_data,
    "A patient at two hospitals": _two_hospitals,
    "Trying out settings": _tuning,
    "Parameters that depend on the data": _data_dependent,
    "Side channels": _side_channels,
    "Figures without noise beside it": _without_noise,
    "Accuracy for small groups": _subgroups,
    "Security of the data itself": _raw_data,
    "The initial model and its data": _starting_point,
}
_OF_RELEASES: Final[dict[str, Callable[[Facts], _Judged]]] = {
    "The unit is not a person": _unit,
    "Several rows of one person": _joined_rows,
    "Unbounded contribution": _contribution,
    "Large epsilon": _large_epsilon,
    "Large delta": _large_delta,
    "Releases that are not added up": _composition,
    "A budget that moves": _limit,
    "Neighbouring relation": _neighbouring,
    "Trust and collusion": _trust,
    "Random numbers": _random_numbers,
    "Floating point": _floating_point,
    "Crashes and repeated rounds": _crashes,
}
