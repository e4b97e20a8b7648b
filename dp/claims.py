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
class Recomputed:
    """What recomputing a ledger's claims gave: how many there are, what is wrong with them, by row, and the totals."""

    claims: int
    claimed: float
    delta: float | None
    wrong: tuple[str, ...]
    totals: tuple[AccountantTotal, ...]


def recompute(entries: Iterable[Entry]) -> Recomputed:
    """Recompute every claim: a row's own epsilon and the one with all before it by the gate's accountant, and the whole
    by all three.

    A claim is wrong if it is below what is found, and a decision if it exceeds the budget that it names.
    """
    history: list[Event] = []
    wrong: list[str] = []
    claims, claimed, delta = 0, 0.0, None
    for entry in entries:
        if entry["kind"] != "reserve":
            continue
        claims += 1
        event = release_of(entry).event
        row, at = f"row {entry['sequence']}", entry["delta"]
        cumulative = float(entry["cumulative_epsilon"])
        for what, said, found in (
            ("this release", float(entry["epsilon"]), rdp_epsilon([event], at)),
            ("all together", cumulative, rdp_epsilon([*history, event], at)),
        ):
            if said < found * (1 - TOLERANCE):
                wrong.append(f"{row}: claims epsilon {said:.6g} for {what}, found {found:.6g} at delta {at:g}")
        if entry["decision"] == RESERVED:
            if cumulative > entry["budget_epsilon"] * (1 + TOLERANCE):
                wrong.append(
                    f"{row}: reserved at epsilon {cumulative:.6g}, expected at most its budget "
                    f"{entry['budget_epsilon']:.6g}"
                )
            history.append(event)
            claimed, delta = cumulative, at
    found_by = () if delta is None else totals(history, delta)
    # RDP is an upper bound of what the other two compute nearly exactly: no finite one may be above the claim.
    wrong += [
        f"all rows: {total.name} finds epsilon {total.epsilon:.6g}, claimed is {claimed:.6g}"
        for total in found_by
        if claimed * (1 + TOLERANCE) < total.epsilon < float("inf")
    ]
    return Recomputed(claims, claimed, delta, tuple(wrong), found_by)
