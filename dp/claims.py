"""Whether releases cost what a ledger's rows claim: recomputed by three accountants, from the rows alone.

For whoever reads a ledger without the site's key and trusts none of its numbers.  The rows must have been verified.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dp.accountants import AccountantTotal, rdp_epsilon, totals
from dp.chain import Entry
from dp.events import Event
from dp.ledger import RESERVED, release_of

TOLERANCE: Final = 1e-6  # relative; what another version of a library may round otherwise


@dataclass(frozen=True, slots=True)
class Found:
    """What the gate's accountant finds for the decision in row ``sequence``, at its delta: the ``epsilon`` of its
    release alone, and ``cumulative``, with all that was reserved before it."""

    sequence: int
    epsilon: float
    cumulative: float


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What recomputing a ledger's claims gave: how many there are, what is wrong with them, by row, the totals, and
    what was found for each decision."""

    claims: int
    claimed: float
    delta: float | None
    wrong: tuple[str, ...]
    totals: tuple[AccountantTotal, ...]
    found: tuple[Found, ...] = ()


def recompute(entries: Iterable[Entry]) -> Recomputed:
    """Recompute every claim: a row's own epsilon and the one with all before it by the gate's accountant, and the whole
    by all three.

    A claim is wrong if it is below what is found, a decision if it exceeds the budget that it names, and a row if it is
    not one that can be read.
    """
    history: list[Event] = []
    wrong: list[str] = []
    found: list[Found] = []
    claims, claimed, delta = 0, 0.0, None
    for entry in entries:
        if entry["kind"] != "reserve":
            continue
        claims += 1
        row = f"row {entry['sequence']}"
        try:
            event, reserved = release_of(entry).event, entry["decision"] == RESERVED
            at, said_alone, cumulative, budget = (
                float(entry[name]) for name in ("delta", "epsilon", "cumulative_epsilon", "budget_epsilon")
            )
            rdp_epsilon((), at)  # a delta that is none is an error of the row
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            wrong.append(f"{row}: not a decision as this version writes it: {type(error).__name__}: {error}")
            continue
        alone, together = rdp_epsilon([event], at), rdp_epsilon([*history, event], at)
        found.append(Found(entry["sequence"], alone, together))
        for what, said, bound in (("this release", said_alone, alone), ("all together", cumulative, together)):
            # Said the other way round, a claim of NaN would hold.
            if not said >= bound * (1 - TOLERANCE):
                wrong.append(f"{row}: claims epsilon {said:.6g} for {what}, found {bound:.6g} at delta {at:g}")
        if reserved:
            if not cumulative <= budget * (1 + TOLERANCE):
                wrong.append(f"{row}: reserved at epsilon {cumulative:.6g}, expected at most its budget {budget:.6g}")
            history.append(event)
            claimed, delta = cumulative, at
    found_by = () if delta is None else totals(history, delta)
    # RDP is an upper bound of what the other two compute nearly exactly: no finite one may be above the claim.
    wrong += [
        f"all rows: {total.name} finds epsilon {total.epsilon:.6g}, claimed is {claimed:.6g}"
        for total in found_by
        if claimed * (1 + TOLERANCE) < total.epsilon < float("inf")
    ]
    return Recomputed(claims, claimed, delta, tuple(wrong), found_by, tuple(found))
