"""From a ledger's rows to facts, recomputed.

Nothing here believes the ledger.  Rows that cannot be read, and numbers that do not hold, end in ``Facts.problems`` and
``Facts.wrong``; whatever can still be shown is shown.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

from dp.accountants import rdp_epsilon, totals
from dp.audit import CONFIDENCE, epsilon_lower_bound
from dp.chain import Entry, Problem, Row, Tampering, verify
from dp.claims import Found, recompute
from dp.errors import UnsupportedEvent
from dp.events import Event, PoissonSampledGaussian
from dp.ledger import RESERVED, Release, release_of
from dp.shared import ADVERSARIES, Adversary, seen_by
from secureagg import ParameterError
from secureagg.identity import site_id
from sites.manifest import Manifest
from sites.reports.facts import Audit, Cohort, Decision, Facts, Run, Update, Verified

_AUDIT_TOLERANCE: Final = 1e-3  # a row may round its bound
_MOST_GUESSES: Final = 10**7  # of an audit that is recomputed
_CHAIN: Final[tuple[Tampering, ...]] = ("empty", "edited", "other ledger", "moved", "removed")


def facts_of(
    rows: Sequence[Row],
    *,
    manifest: Manifest | None = None,
    head: str | None = None,
    now: datetime | None = None,
) -> Facts:
    """What ``rows`` show, whatever is wrong with them.

    ``manifest``: one that lists the site, whose key the ledger must be signed by; ManifestError unless all its sites
    have signed it.  ``head``: noted earlier, as in ``dp.chain.verify``.  ``now``: when the page is made.
    """
    opening = verify(rows[:1]).opening
    key, unlisted = _listed_key(manifest, opening)
    found = verify(rows, head=head, public_key=key)
    kinds = {problem.what for problem in found.problems}
    checked = recompute(found.entries)
    reading = _Reading(found.entries, checked.found, unit=opening.get("unit"))
    events = [release.event for release in reading.releases.values()]
    last = next((decision for decision in reversed(reading.decisions) if decision.delta is not None), None)
    delta = None if last is None else last.delta
    totalled = checked.totals if delta in (None, checked.delta) or not events else totals(events, delta)
    digest = None if manifest is None else manifest.digest.hex()
    of_manifest = [release for release in reading.releases.values() if release.manifest_sha256 == digest is not None]
    return Facts(
        made=(now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        library=version("secureagg"),
        site=_text(opening, "site"),
        unit=_text(opening, "unit"),
        dataset=_text(opening, "dataset"),
        public_key=_text(opening, "public_key"),
        ledger=_text(opening, "ledger"),
        opened=_text(opening, "time"),
        head=found.head,
        rows=len(rows),
        verified=Verified(
            chain=not kinds & set(_CHAIN),
            # A row that was edited or brought in is no longer held against its signature.
            signatures=not kinds & {"empty", "edited", "other ledger", "signature"},
            key=None if manifest is None else key is not None and "other key" not in kinds,
            head=None if head is None else "tail removed" not in kinds,
            listed=None if manifest is None else manifest.consortium.name,
            under_it=len(of_manifest),
            claims=checked.claims,
        ),
        problems=(*unlisted, *map(_line, found.problems)),
        wrong=(*checked.wrong, *reading.wrong),
        spent=0.0 if delta is None else rdp_epsilon(events, delta),
        delta=delta,
        budget=None if last is None else last.budget,
        budgets=_budgets(reading.decisions),
        decisions=tuple(reading.decisions),
        runs=_runs(reading, delta),
        totals=totalled,
        audits=tuple(reading.audits),
        notes=tuple(reading.notes),
        cohorts=tuple(
            Cohort(sites=sites, threshold=threshold, max_corrupt=corrupt, releases=count)
            for (sites, threshold, corrupt), count in Counter(
                (_whole(each.cohort), _whole(each.threshold), _whole(each.max_corrupt))
                for each in reading.releases.values()
            ).items()
        ),
        patients=None if manifest is None else _patients(manifest, of_manifest),
        consortia=tuple(dict.fromkeys(str(each.consortium) for each in reading.asked if each.consortium is not None)),
        units_recorded=_recorded(each.unit for each in reading.releases.values()),
        neighbouring_recorded=_recorded(each.neighbouring for each in reading.releases.values()),
        clip_norms_recorded=_recorded(each.clip_norm for each in reading.releases.values()),
        generators_recorded=_recorded(each.random_generator for each in reading.releases.values()),
        libraries_recorded=_recorded(each.library_version for each in reading.releases.values()),
        mechanisms_recorded=_recorded(type(each.event).__name__ for each in reading.releases.values()),
        against={who: 0.0 if delta is None else rdp_epsilon(reading.seen_by(who), delta) for who in ADVERSARIES},
        shared=sum(each.honest is not None for each in reading.releases.values()),
    )


class _Reading:
    """The rows, one after the other: decisions, what became of them, audits, notes, and what cannot be."""

    def __init__(self, entries: Iterable[Entry], found: Sequence[Found], *, unit: object) -> None:
        self.releases: dict[int, Release] = {}
        self.asked: list[Release] = []
        self.decisions: list[Decision] = []
        self.audits: list[Audit] = []
        self.notes: list[tuple[int, str, str]] = []
        self.wrong: list[str] = []
        self._updates: dict[int, Update] = {}
        self._survivors: dict[int, int] = {}
        self._released: dict[tuple[object, ...], int] = {}
        self._unit = unit
        remaining = list(found)
        for entry in entries:
            number, content = entry["sequence"], entry.get("content")
            match entry["kind"]:
                case "reserve" if remaining and remaining[0].sequence == number:
                    self._decide(entry, remaining.pop(0))
                case "commit" | "sent" as kind:
                    self._follow(kind, number, entry.get("reservation"))
                    self._realise(entry.get("reservation"), entry.get("realised"))
                case "audit" if isinstance(content, Mapping):
                    self._audit(entry, content)
                case "note" if isinstance(content, Mapping) and "refused" in content:
                    self._refuse(entry, content)
                case "note" | "audit":
                    self.notes.append((number, _text(entry, "time"), _shown(content)))
        self.decisions = [replace(each, update=self._updates.get(each.row, "none")) for each in self.decisions]

    def seen_by(self, adversary: Adversary) -> list[Event]:
        """What all releases together are to ``adversary``; of noise that sites share, with the parts that were in the
        sum, or where that is not known, in the smallest that was allowed."""
        events: list[Event] = []
        for number, release in self.releases.items():
            event, honest, sites, missing = release.event, release.honest, release.sites, release.max_dropouts
            if isinstance(event, PoissonSampledGaussian) or honest is None or sites is None or missing is None:
                events.append(event)
                continue
            fewest = sites - missing
            survivors = max(fewest, self._survivors.get(number, fewest))
            colluders = fewest - honest
            events.append(seen_by(event, adversary, survivors=survivors, colluders=colluders, honest=honest))
        return events

    def _realise(self, reservation: object, realised: object) -> None:
        if isinstance(realised, Mapping) and isinstance(reservation, int):
            survivors = _whole(realised.get("survivors"))
            if survivors is not None:
                self._survivors[reservation] = survivors

    def _decide(self, entry: Entry, found: Found) -> None:
        release, number = release_of(entry), entry["sequence"]
        self.asked.append(release)
        refused = None if entry["decision"] == RESERVED else _shown(entry.get("refused", "no reason is recorded"))
        if refused is None:
            self.releases[number] = release
            self._updates[number] = "none"
            # Stops a release that protects something else than what the page says.
            if release.unit != self._unit:
                self.wrong.append(f"row {number}: a release per {_shown(release.unit)}, the ledger is per {self._unit}")
        self.decisions.append(
            Decision(
                row=number,
                time=_text(entry, "time"),
                run=_shown(release.run),
                round_number=_whole(release.round_number),
                event=release.event,
                epsilon=found.epsilon,
                cumulative=found.cumulative,
                delta=float(entry["delta"]),
                budget=float(entry["budget_epsilon"]),
                refused=refused,
            )
        )

    def _refuse(self, entry: Entry, content: Mapping[str, object]) -> None:
        spent = next((each.cumulative for each in reversed(self.decisions) if each.refused is None), 0.0)
        self.decisions.append(
            Decision(
                row=entry["sequence"],
                time=_text(entry, "time"),
                run=_shown(content.get("run", "")),
                round_number=_whole(content.get("round_number")),
                event=None,
                epsilon=None,
                cumulative=spent,
                delta=None,
                budget=None,
                refused=_shown(content["refused"]),
            )
        )

    def _follow(self, kind: str, number: int, reservation: object) -> None:
        """An update that was made, or sent, must be the one and only of an earlier reservation and of its round."""
        release = self.releases.get(reservation) if isinstance(reservation, int) else None
        if release is None or not isinstance(reservation, int):
            what = "made" if kind == "commit" else "sent"
            self.wrong.append(f"row {number}: an update was {what} for row {_shown(reservation)}, which reserved none")
        elif kind == "commit":
            of_round = (release.run, release.round_number, release.model_sha256)
            # Stops a second draw of the noise, which says more than is accounted for.
            if (first := self._released.setdefault(tuple(map(str, of_round)), number)) != number:
                self.wrong.append(f"row {number}: a second update of the round that row {first} has released")
            self._updates[reservation] = "made"
        elif self._updates[reservation] == "made":
            self._updates[reservation] = "sent"
        else:
            self.wrong.append(f"row {number}: sent, but row {reservation} has no update that waits to be")

    def _audit(self, entry: Entry, content: Mapping[str, object]) -> None:
        number, fields = entry["sequence"], dict(content)
        canaries, guesses, correct = (_whole(fields.pop(name, None)) for name in ("canaries", "guesses", "correct"))
        delta, confidence, written, claimed = (
            _number(fields.pop(name, None))
            for name in ("delta", "confidence", "epsilon_lower_bound", "claimed_epsilon")
        )
        holds, recomputed = fields.pop("holds", None), _lower_bound(canaries, guesses, correct, delta, confidence)
        bound = written if recomputed is None else recomputed
        # Stops an audit that writes a smaller bound than its counts prove.
        if recomputed is not None and written is not None and not written >= recomputed * (1 - _AUDIT_TOLERANCE):
            self.wrong.append(
                f"row {number}: an audit that claims a lower bound of {written:.4g}, found {recomputed:.4g}"
            )
        above = None if bound is None or claimed is None else not bound <= claimed
        self.audits.append(
            Audit(
                row=number,
                time=_text(entry, "time"),
                canaries=canaries,
                guesses=guesses,
                correct=correct,
                delta=delta,
                confidence=confidence,
                bound=bound,
                recomputed=recomputed is not None,
                claimed=claimed,
                contradicts=True if holds is False else above,
                others={str(name): _shown(value) for name, value in fields.items()},
            )
        )


def _lower_bound(
    canaries: int | None, guesses: int | None, correct: int | None, delta: float | None, confidence: float | None
) -> float | None:
    """The bound that an audit's counts prove; None if they are missing or no audit's."""
    if canaries is None or guesses is None or correct is None or delta is None or guesses > _MOST_GUESSES:
        return None
    with suppress(UnsupportedEvent):
        return epsilon_lower_bound(
            canaries=canaries,
            guesses=guesses,
            correct=correct,
            delta=delta,
            confidence=CONFIDENCE if confidence is None else confidence,
        )
    return None


def _listed_key(manifest: Manifest | None, opening: Entry) -> tuple[bytes | None, tuple[str, ...]]:
    """The key that a manifest lists for the site that a ledger names, or why there is none."""
    if manifest is None:
        return None, ()
    manifest.check()
    name = _text(opening, "site")
    try:
        card = manifest.roster.get(site_id(name))
    except ParameterError:  # no name of a site at all
        card = None
    if card is None:
        listed = ", ".join(manifest.roster)
        return None, (f"row 1: the ledger is of {name or 'nobody'}, the manifest lists {listed}",)
    return card.signing_key, ()


def _line(problem: Problem) -> str:
    return f"row {problem.row} ({problem.what}): {problem.text}"


def _runs(reading: _Reading, delta: float | None) -> tuple[Run, ...]:
    times = {decision.row: decision.time for decision in reading.decisions}
    grouped: dict[tuple[str, str, str], dict[int, Release]] = {}
    for row, release in reading.releases.items():
        of_run = (_shown(release.run), _shown(release.purpose), _shown(release.consortium or ""))
        grouped.setdefault(of_run, {})[row] = release
    return tuple(
        Run(
            run=run,
            purpose=purpose,
            consortium=consortium,
            rounds=len({str(release.round_number) for release in releases.values()}),
            steps=sum(release.event.steps for release in releases.values()),
            sampling_rate=_range(release.event.sampling_rate for release in releases.values()),
            noise_multiplier=_range(release.event.noise_multiplier for release in releases.values()),
            epsilon=math.inf if delta is None else rdp_epsilon([each.event for each in releases.values()], delta),
            first=times[min(releases)],
            last=times[max(releases)],
        )
        for (run, purpose, consortium), releases in grouped.items()
    )


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _budgets(decisions: Iterable[Decision]) -> tuple[tuple[int, float, float], ...]:
    """The row from which on each budget was in force, its epsilon and its delta."""
    changes: list[tuple[int, float, float]] = []
    for each in decisions:
        if each.budget is None or each.delta is None:
            continue
        if not changes or changes[-1][1:] != (each.budget, each.delta):
            changes.append((each.row, each.budget, each.delta))
    return tuple(changes)


def _patients(manifest: Manifest, releases: Sequence[Release]) -> float | None:
    """How many patients the site trains on: the manifest has the expected size of a batch, a row its share of them."""
    rate = releases[-1].event.sampling_rate if releases else 1.0
    # With a rate of 1 a batch is everybody, however many they are.
    return None if rate == 1 else round(manifest.training.batch_size / rate, 6)


def _recorded(values: Iterable[object]) -> dict[str | None, int]:
    return dict(Counter(None if value is None else _shown(value) for value in values))


def _text(entry: Entry, name: str) -> str:
    return _shown(entry.get(name, ""))


def _shown(value: object) -> str:
    """Whatever a row holds, as text of bearable length."""
    if isinstance(value, Mapping):
        text = "; ".join(f"{name}: {each}" for name, each in value.items())
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 500 else f"{text[:500]}..."


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """A number as a ledger writes it: JSON has no infinity, so that one is written as its name."""
    if value == "inf":
        return math.inf
    with suppress(OverflowError):  # an integer beyond all floats
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return None
