"""What a ledger shows about a site's releases, as one plain record: for the page and for machines."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from dp.accountants import AccountantTotal
from dp.claims import TOLERANCE
from dp.events import Event
from dp.shared import Adversary

Update = Literal["sent", "made", "none"]


class Verdict(StrEnum):
    """What the page says first; the worst that is found."""

    TAMPERED = "The record does not hold"
    WRONG = "The record's claims do not hold"
    CONTRADICTED = "An audit contradicts the claims"
    EXCEEDED = "Budget exceeded"
    NOTHING = "Nothing released"
    WITHIN = "Within budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One release that was asked for, in row ``row``.

    ``epsilon`` of it alone and ``cumulative`` with all before it are recomputed, at ``delta``; ``budget``: the limit
    that the row names.  A release without ``event`` was refused before any noise was found that fits.  ``refused``: the
    reason, or None.  ``update``: what became of it.
    """

    row: int
    time: str
    run: str
    round_number: int | None
    event: Event | None
    epsilon: float | None
    cumulative: float
    delta: float | None
    budget: float | None
    refused: str | None
    update: Update = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The releases of one training run together; ranges are (least, largest).  ``epsilon``: of the run alone."""

    run: str
    purpose: str
    consortium: str
    rounds: int
    steps: int
    sampling_rate: tuple[float, float]
    noise_multiplier: tuple[float, float]
    epsilon: float
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """In ``releases`` of the rows: ``sites`` in the round, its ``threshold``, and how many were allowed for as
    corrupt; None where a row does not say."""

    sites: int | None
    threshold: int | None
    max_corrupt: int | None
    releases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """One audit's row.  ``bound``: recomputed from its counts, or what the row says if it has none; ``contradicts``:
    it is above ``claimed``, or the row says so itself; None if neither can be told.  ``others``: all further fields."""

    row: int
    time: str
    canaries: int | None
    guesses: int | None
    correct: int | None
    delta: float | None
    confidence: float | None
    bound: float | None
    recomputed: bool
    claimed: float | None
    contradicts: bool | None
    others: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """How the record was checked.  ``key`` and ``head``: whether they are those of the manifest and of the note that
    were given, None if none was; ``listed``: the manifest's name; ``under_it``: releases that name this manifest."""

    chain: bool
    signatures: bool
    key: bool | None
    head: bool | None
    listed: str | None
    under_it: int
    claims: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of it.  ``problems``: rows that are not as the site wrote them; ``wrong``: what they say and does not hold.

    ``spent`` at ``delta`` of ``budget``, those of the last decision (None: there was none).  ``releases``: what is
    reserved.  ``patients``: that the site trains on, where the manifest tells; ``*_recorded``: each value that a
    release names (None: one names none), with how many do.  ``against``: epsilon of all releases for each adversary,
    by the sites that are known to be in each sum; ``shared``: releases whose noise sites share.
    """

    made: str
    library: str
    site: str
    unit: str
    dataset: str
    public_key: str
    ledger: str
    opened: str
    head: str
    rows: int
    verified: Verified
    problems: tuple[str, ...]
    wrong: tuple[str, ...]
    spent: float
    delta: float | None
    budget: float | None
    budgets: tuple[tuple[int, float, float], ...]
    decisions: tuple[Decision, ...]
    runs: tuple[Run, ...]
    totals: tuple[AccountantTotal, ...]
    audits: tuple[Audit, ...]
    notes: tuple[tuple[int, str, str], ...]
    cohorts: tuple[Cohort, ...]
    patients: float | None
    consortia: tuple[str, ...]
    units_recorded: dict[str | None, int]
    neighbouring_recorded: dict[str | None, int]
    clip_norms_recorded: dict[str | None, int]
    generators_recorded: dict[str | None, int]
    libraries_recorded: dict[str | None, int]
    mechanisms_recorded: dict[str | None, int]
    against: dict[Adversary, float]
    shared: int

    @property
    def releases(self) -> tuple[Decision, ...]:
        """The decisions that count as spent."""
        return tuple(decision for decision in self.decisions if decision.refused is None)

    @property
    def refused(self) -> tuple[Decision, ...]:
        """The others."""
        return tuple(decision for decision in self.decisions if decision.refused is not None)

    @property
    def left(self) -> float:
        """Of the budget."""
        return 0.0 if self.budget is None or self.spent >= self.budget else self.budget - self.spent

    @property
    def exceeded(self) -> bool:
        """More is spent than the budget in force, or than can be compared with one."""
        return bool(self.releases) and not (
            self.budget is not None and self.spent <= self.budget * (1 + TOLERANCE) < math.inf
        )

    @property
    def verdict(self) -> Verdict:
        """The worst that is found."""
        if self.problems:
            return Verdict.TAMPERED
        if self.wrong:
            return Verdict.WRONG
        if any(audit.contradicts for audit in self.audits):
            return Verdict.CONTRADICTED
        if not self.releases:
            return Verdict.NOTHING
        return Verdict.EXCEEDED if self.exceeded else Verdict.WITHIN
