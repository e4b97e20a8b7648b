"""The neighbour graph of a large cohort (Bell et al., CCS 2020, SecAgg+, Algorithm 4).

Masks and shares with ``k`` random neighbours in place of all keep the cost per site at ``k``.  Each site draws its own
neighbours, the holders of its shares, and signs them: a graph made from anything that the coordinator can influence
could be ground until it suits.  Masks run along every edge, whichever end drew it.

``k`` and the threshold ``t`` of shares are the least for which, but for a chance of 2^-40, no site can be shown as
alive to some and as dropped to others, and a lying coordinator gets one sum at most, over more than half of the honest
sites; and for which, but for a chance of 2^-20, enough neighbours stay.  The argument stands in docs/protocol.md.  All
comparisons are between integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil, comb, perm
from typing import Final

from secureagg.errors import MalformedMessage, ParameterError
from secureagg.identity import Entropy

SECURITY_BITS: Final = 40
CORRECTNESS_BITS: Final = 20
# A site refuses more who drew it: by chance nobody gets near, and a coordinator with many colluders could flood it.
MOST_DEALERS_PER_NEIGHBOUR: Final = 4
_FRACTION_BITS: Final = 128


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """``neighbours`` that each site draws, and the ``threshold`` of shares among them."""

    neighbours: int
    threshold: int


def draw_neighbours(*, position: int, cohort_size: int, neighbours: int, entropy: Entropy) -> tuple[int, ...]:
    """``neighbours`` positions of the cohort other than ``position``, uniformly, in ascending order."""
    others = [other for other in range(1, cohort_size + 1) if other != position]
    for place in range(neighbours):
        # 16 bytes modulo less than 2^32 are uniform to within 2^-96.
        drawn = place + int.from_bytes(entropy(16), "little") % (len(others) - place)
        others[place], others[drawn] = others[drawn], others[place]
    return tuple(sorted(others[:neighbours]))


def check_neighbours(found: Sequence[int], *, position: int, cohort_size: int, neighbours: int, who: str) -> None:
    """Raise MalformedMessage naming ``who`` unless ``found`` is something that ``draw_neighbours`` gives."""
    # Stops a site with more holders than its threshold is made for, or one that is its own holder.
    if len(found) != neighbours or list(found) != sorted(set(found) - {position}):
        raise MalformedMessage(f"{who}: {len(found)} neighbours, expected {neighbours} others in ascending order")
    if not 1 <= found[0] <= found[-1] <= cohort_size:
        raise MalformedMessage(f"{who}: neighbours {found[0]} to {found[-1]}, expected 1 to {cohort_size}")


@cache
def choose_neighbourhood(
    cohort_size: int,
    *,
    corrupt: Fraction,
    dropouts: Fraction,
    active: bool = True,
    one_sum: bool = False,
    security_bits: int = SECURITY_BITS,
    correctness_bits: int = CORRECTNESS_BITS,
) -> Neighbourhood | None:
    """The first even number of neighbours, with its threshold, that is safe; None if only the complete graph is.

    ``corrupt``, ``dropouts``: the shares of the cohort that may collude and that may drop out, counts rounded down.
    ``active``: against a coordinator that deviates; otherwise only against one that looks.  ``one_sum``: a lying
    coordinator can never open two sums, over two halves of the honest sites.
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
        if not _connected(n, k, lost, security_bits):
            continue
        worst = _least_exceeded(n, bad, k, security_bits)
        # Against an active coordinator 2t > k + worst, as on the complete graph; t is above what this leaves.
        floor = ceil(Fraction(4 * (worst + k) - 5, 8)) if active else worst
        for t in range(floor + 1, _most_guaranteed(n, alive, k, correctness_bits) + 1):
            if not one_sum or _opens_one_sum(n, k, t, bad, security_bits):
                return Neighbourhood(k, t)
    return None


@cache
def least_honest_survivors(
    cohort_size: int, neighbours: int, threshold: int, corrupt: int, *, security_bits: int = SECURITY_BITS
) -> int:
    """The least number of honest sites that a sum can cover, whatever the coordinator does.

    But for a chance of 2^-``security_bits``; see docs/protocol.md for the argument.
    """
    sizes = range(1, cohort_size - corrupt)
    return next(
        (m for m in sizes if not _none_closed(m, cohort_size, neighbours, threshold, corrupt, security_bits)),
        cohort_size - corrupt,
    )


def _opens_one_sum(n: int, k: int, t: int, bad: int, security_bits: int) -> bool:
    """Whether every sum covers more than half of the honest sites, so that there are no two."""
    half = (n - bad) // 2
    # Half of them is the hardest to rule out; the others are only worth a look if that is.
    return _none_closed(half, n, k, t, bad, security_bits) and (
        least_honest_survivors(n, k, t, bad, security_bits=security_bits) > half
    )


def _none_closed(m: int, n: int, k: int, t: int, bad: int, security_bits: int) -> bool:
    """Whether, but for a chance of 2^-(s+1) / n, no ``m`` honest sites each drew ``t`` holders among themselves and the
    ``bad`` ones: the number of such sets, times the chance of one."""
    inside, outside = m - 1 + bad, n - m - bad
    first = max(t, k - outside)
    term = comb(inside, first) * comb(outside, k - first)  # ways to draw exactly this many inside
    ways = 0
    for y in range(first, min(k, inside) + 1):
        ways += term
        term = term * (inside - y) * (k - y) // ((y + 1) * (outside - k + y + 1))
    chance = -(-(ways << _FRACTION_BITS) // comb(n - 1, k))  # of one site, in units of 2^-128, rounded up
    sets = (comb(n - bad, m) * n) << (security_bits + 1)
    # The power is long; rounding it up to a power of two for every eighth site settles most cases.
    eighth = (chance**8).bit_length() - 8 * _FRACTION_BITS
    return sets.bit_length() + m // 8 * eighth <= 0 or sets * chance**m <= 1 << (_FRACTION_BITS * m)


def _connected(n: int, k: int, lost: int, security_bits: int) -> bool:
    """Whether the honest survivors' graph falls apart with a chance below 2^-(s+1): n(n-k-1)/2 B!(n-k)!/(n!(B-k)!)."""
    return n * (n - k - 1) * perm(lost, k) << security_bits < perm(n, k)


def _least_exceeded(n: int, bad: int, k: int, security_bits: int) -> int:
    """The least x with Pr[more than x of k neighbours, drawn among the n - 1 others, are bad] <= 2^-(s+1) / n."""
    allowed = comb(n - 1, k)  # over n 2^(s+1)
    tail = 0
    for x in range(min(bad, k), -1, -1):
        tail += comb(bad, x) * comb(n - 1 - bad, k - x)  # of exactly x
        if (tail * n) << (security_bits + 1) > allowed:
            return x
    return 0


def _most_guaranteed(n: int, alive: int, k: int, correctness_bits: int) -> int:
    """The greatest y with Pr[fewer than y of k neighbours stay] <= 2^-e / n."""
    allowed = comb(n, k)
    tail = 0
    for y in range(k + 1):
        tail += comb(alive, y) * comb(n - alive, k - y)  # of exactly y
        if (tail * n) << correctness_bits > allowed:
            return y
    return k
