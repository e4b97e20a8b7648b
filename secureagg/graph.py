"""How many neighbours a site needs in a large cohort, and how many must answer (Bell et al., CCS 2020, SecAgg+).

Masks and shares with ``k`` random neighbours in place of all keep the cost per site at ``k``.  ``k`` and the threshold
``t`` are the least for which, but for a chance of 2^-40, the graph of honest sites stays connected and no site has
``t`` neighbours too many on the coordinator's side, and for which, but for a chance of 2^-20, enough neighbours stay.
All comparisons are between integers.  Rounds use the complete graph so far; this is the planning for larger ones.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, comb, perm
from typing import Final

from secureagg.errors import ParameterError

SECURITY_BITS: Final = 40
CORRECTNESS_BITS: Final = 20


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """``neighbours`` of each site and the ``threshold`` of shares among them."""

    neighbours: int
    threshold: int


def choose_neighbourhood(
    cohort_size: int, *, corrupt: Fraction, dropouts: Fraction, active: bool = True
) -> Neighbourhood | None:
    """The first even number of neighbours, with its threshold, that is safe; None if only the complete graph is.

    ``corrupt``, ``dropouts``: the shares of the cohort that may collude and that may drop out, counts rounded down.
    ``active``: against a coordinator that deviates; otherwise only against one that looks.
    Raises ParameterError for shares outside [0, 1) or a cohort below 3.
    """
    n = cohort_size
    if n < 3:
        raise ParameterError(f"cohort: found {n} sites, expected 3 or more")
    for what, share in (("corrupt", corrupt), ("dropouts", dropouts)):
        if not 0 <= share < 1:
            raise ParameterError(f"{what}: found a share of {share}, expected at least 0 and below 1")
    bad = int(corrupt * n)
    lost = bad + int(dropouts * n)
    alive = ceil((1 - dropouts) * n)
    for k in range(2, n - 1, 2):
        if not _connected(n, k, lost):
            continue
        worst = _least_exceeded(n, bad, k)
        # Against an active coordinator 2t > k + worst, as on the complete graph; t is above what this leaves.
        floor = ceil(Fraction(4 * (worst + k) - 5, 8)) if active else worst
        if _most_guaranteed(n, alive, k) > floor:
            return Neighbourhood(k, floor + 1)
    return None


def _connected(n: int, k: int, lost: int) -> bool:
    """Whether the honest survivors' graph falls apart with a chance below 2^-(s+1): n(n-k-1)/2 B!(n-k)!/(n!(B-k)!)."""
    return n * (n - k - 1) * perm(lost, k) << SECURITY_BITS < perm(n, k)


def _least_exceeded(n: int, bad: int, k: int) -> int:
    """The least x with Pr[more than x of k neighbours are bad] <= 2^-(s+1) / n."""
    allowed = comb(n, k)  # over n 2^(s+1)
    tail = 0
    for x in range(min(bad, k), -1, -1):
        tail += comb(bad, x) * comb(n - bad, k - x)  # of exactly x
        if (tail * n) << (SECURITY_BITS + 1) > allowed:
            return x
    return 0


def _most_guaranteed(n: int, alive: int, k: int) -> int:
    """The greatest y with Pr[fewer than y of k neighbours stay] <= 2^-e / n."""
    allowed = comb(n, k)
    tail = 0
    for y in range(k + 1):
        tail += comb(alive, y) * comb(n - alive, k - y)  # of exactly y
        if (tail * n) << CORRECTNESS_BITS > allowed:
            return y
    return k
