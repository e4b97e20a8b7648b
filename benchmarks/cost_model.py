"""What a round would cost, from a handful of measured constants: a site and the coordinator, in seconds and bytes.

With n sites, d values in rings of b bits, k holders of each site's shares, of whom t suffice, and s sites that drop
out before their input (k = n - 1 on the complete graph):

    neighbours         v = n - 1, or 2k - k^2 / (n - 1) on the sparse graph, where a site has masks with those whom it
                           drew or who drew it, each of the others with probability 1 - (1 - k / (n - 1))^2
    masked words       m = d / (64 div b), rounded up
    bytes of a mask    w = 8 m
    packed bytes       p = m (64 div b) b / 8, rounded up
    rebuilt masks      r = (n - s) self masks + s v (n - s) / (n - 1) pairwise ones

    site, seconds          d (encode + pack) + w (1 + v) mask + p hash + site + v neighbour + k holder + k t share
    coordinator, seconds   (n - s) (p take + d add) + w r mask + d release
                           + n member + n k edge + sets t^2 coefficient + (pairwise ones of r) agreement
                           with 1 set of holders on the complete graph, whose coefficients serve all, else n
    up from a site         p + 32 digests of chunks + up + v up_neighbour + k up_holder
    down to a site         down + v down_neighbour + k down_holder, and on the sparse graph
                           (v k + 2 k^2) down_entry: lists of k positions, of each neighbour's draw, in the statement
                           of each dealer and in that of each holder

    a site's input alone   d (encode + pack) + w (1 + v) mask + p hash + (1 + v) setup, which neighbour has in it

With the homomorphic backend and c ciphertexts of 4,096 slots of 8 bytes, which are masked as m words:

    site, seconds          d encode + 32,768 c (1 + v) mask + c (encrypt + open) + (bytes of both) hash + the keys' part
    coordinator, seconds   (n - s) c load + 32,768 c r mask + c release_ciphertext + the keys' part
    up, down               32,832 c and 65,536 c beside the messages'

A link carries the bytes of a site both ways and the model, 4 d, down to it; the coordinator's link those of all sites.
Encryption of the transport costs processor time for each byte at both ends.  Nothing is taken to overlap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from scipy.optimize import nnls

from secureagg import FixedPoint, Lane
from secureagg.graph import Neighbourhood
from secureagg.lanes import RingLane
from secureagg.messages import MaskedInput
from secureagg.parameters import Backend, Graph, choose_thresholds
from secureagg.slots import FRESH_BYTES, SLOTS, SUMMED_BYTES, SlotLayout

DIGEST_BYTES = 32
WORD_BYTES = 8  # of a mask, and of a slot
# By ``choose_neighbourhood`` for a tenth of the sites corrupt and a tenth dropping out, which takes a minute.
SLOWLY_CHOSEN = {10_000: Neighbourhood(neighbours=122, threshold=85)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Seconds, and bytes where it says ``up`` or ``down``; the module says of what."""

    # for each value
    encode: float
    pack: float
    add: float
    release: float
    # for each byte
    mask: float
    hash: float
    take: float
    send: float
    receive: float
    # of a site's messages: for each site, neighbour, holder, and holder times threshold; ``setup``: for each mask
    site: float
    neighbour: float
    holder: float
    share: float
    setup: float
    up: float
    up_neighbour: float
    up_holder: float
    down: float
    down_neighbour: float
    down_holder: float
    down_entry: float
    # of the coordinator's messages and secrets
    member: float
    edge: float
    coefficient: float
    agreement: float
    # for each ciphertext
    encrypt: float
    open: float
    load: float
    release_ciphertext: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A round as far as its cost depends on it; the names are those of the module."""

    n: int
    d: int
    k: int
    t: int
    s: int
    b: int
    sparse: bool
    c: int = 0  # ciphertexts; 0 with the masked backend

    @classmethod
    def of(cls, sites: int, values: int, *, graph: Graph = "auto", backend: Backend = "masked") -> Self:
        """Of default thresholds, values of 16 bits, and a tenth of the sites dropping out where so many may."""
        graph = "complete" if backend == "homomorphic" else graph
        chosen = SLOWLY_CHOSEN.get(sites)
        if chosen is None:
            thresholds = choose_thresholds(sites, graph=graph)
            chosen = Neighbourhood(neighbours=thresholds.neighbours or sites - 1, threshold=thresholds.threshold)
        lane = Lane(name="update", length=values, encoding=FixedPoint(value_range=1.0, value_bits=16))
        ring = RingLane.for_cohort(lane, cohort_size=sites, max_weight=1)
        ciphertexts = 0
        if backend == "homomorphic":
            ciphertexts = SlotLayout.of({"update": ring}, cohort_size=sites, max_weight=1).ciphertexts
        return cls(
            n=sites,
            d=values,
            k=chosen.neighbours,
            t=chosen.threshold,
            s=min(-(-sites // 10), sites - chosen.threshold),
            b=ring.ring_bits,
            sparse=chosen.neighbours < sites - 1,
            c=ciphertexts,
        )

    @property
    def v(self) -> float:
        """Neighbours of a site, on average."""
        return 2 * self.k - self.k**2 / (self.n - 1) if self.sparse else self.n - 1

    @property
    def m(self) -> int:
        """Words of a mask, and of a masked input."""
        return self.c * SLOTS if self.c else -(-self.d // (64 // self.b))

    @property
    def p(self) -> int:
        """Bytes of an input."""
        return self.c * FRESH_BYTES if self.c else -(-self.m * (64 // self.b) * self.b // 8)

    @property
    def pairs(self) -> float:
        """Pairwise masks that are rebuilt."""
        return self.s * self.v * (self.n - self.s) / (self.n - 1)

    @property
    def w(self) -> int:
        """Bytes of a mask."""
        return WORD_BYTES * self.m


# Which constants a quantity has beside what each value costs, and how often.
Terms = Mapping[str, Callable[[Shape], float]]
SITE: Terms = {
    "site": lambda _: 1,
    "neighbour": lambda x: x.v,
    "holder": lambda x: x.k,
    "share": lambda x: x.k * x.t,
}
COORDINATOR: Terms = {
    "member": lambda x: x.n,
    "edge": lambda x: x.n * x.k,
    "coefficient": lambda x: (x.n if x.sparse else 1) * x.t**2,
    "agreement": lambda x: x.pairs,
}
UP: Terms = {"up": lambda _: 1, "up_neighbour": lambda x: x.v, "up_holder": lambda x: x.k}
DOWN: Terms = {
    "down": lambda _: 1,
    "down_neighbour": lambda x: x.v,
    "down_holder": lambda x: x.k,
    "down_entry": lambda x: x.v * x.k + 2 * x.k**2 if x.sparse else 0,
}


def _sum(terms: Terms, constants: Constants, shape: Shape) -> float:
    return sum(getattr(constants, name) * of(shape) for name, of in terms.items())


def fitted(terms: Terms, measured: Sequence[tuple[Shape, float]]) -> dict[str, float]:
    """The constants of ``terms``, none below zero, with the least squared relative error over some measurements."""
    rows = np.array([[of(shape) / found for of in terms.values()] for shape, found in measured])
    # So that large features do not drown small ones.
    scale = np.maximum(np.linalg.norm(rows, axis=0), np.finfo(float).tiny)
    solved, _ = nnls(rows / scale, np.ones(len(rows)))
    return dict(zip(terms, (solved / scale).tolist(), strict=True))


def _of_values(constants: Constants, x: Shape) -> float:
    """Processor time of a site for its values."""
    own = x.c * constants.encrypt if x.c else x.d * constants.pack
    return own + x.d * constants.encode + x.w * (1 + x.v) * constants.mask + x.p * constants.hash


def input_seconds(constants: Constants, x: Shape) -> float:
    """Processor time of a site's input."""
    return _of_values(constants, x) + (1 + x.v) * constants.setup


def site_seconds(constants: Constants, x: Shape) -> float:
    """Processor time of a site in the protocol, without the transport's."""
    opening = x.c * (constants.open + SUMMED_BYTES * constants.hash)
    return _of_values(constants, x) + opening + _sum(SITE, constants, x)


def coordinator_seconds(constants: Constants, x: Shape) -> float:
    """Processor time of the coordinator in the protocol, without the transport's."""
    masks = x.w * (x.n - x.s + x.pairs) * constants.mask
    if x.c:
        own = (x.n - x.s) * x.c * constants.load + x.c * constants.release_ciphertext
    else:
        own = (x.n - x.s) * (x.p * constants.take + x.d * constants.add) + x.d * constants.release
    return own + masks + _sum(COORDINATOR, constants, x)


def bytes_up(constants: Constants, x: Shape) -> float:
    """From a site, in messages of the protocol."""
    return x.p + DIGEST_BYTES * x.p / MaskedInput.CHUNK_BYTES + _sum(UP, constants, x)


def bytes_down(constants: Constants, x: Shape) -> float:
    """To a site, in messages of the protocol: without the model."""
    return x.c * SUMMED_BYTES + _sum(DOWN, constants, x)


def round_seconds(constants: Constants, x: Shape, *, bits_per_second: float) -> tuple[float, float]:
    """A site's and the coordinator's time of one round, with the model's way down, over links of this speed."""
    up, down = bytes_up(constants, x), bytes_down(constants, x) + 4 * x.d
    link = 8 / bits_per_second
    site = site_seconds(constants, x) + up * (constants.send + link) + down * (constants.receive + link)
    every = x.n * (up * (constants.receive + link) + down * (constants.send + link))
    return site, coordinator_seconds(constants, x) + every


def zeros() -> dict[str, float]:
    """Every constant, of nothing measured yet."""
    return {each.name: 0.0 for each in fields(Constants)}
