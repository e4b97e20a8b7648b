"""A round with lanes of every kind, for tests of homomorphic sums."""

from collections.abc import Mapping

import numpy as np

from secureagg import (
    Card,
    Counts,
    FixedPoint,
    Identity,
    Lane,
    RingElements,
    Roster,
    RoundParameters,
    encode_input,
    site_id,
)
from secureagg.testing import CountingEntropy


def round_parameters(length: int = 10_000, sites: int = 5) -> RoundParameters:
    """A round of a long weighted lane, a histogram, noise in a wide ring, and the protocol's own lanes."""
    entropy = CountingEntropy(1)
    keys = {site_id(f"site-{index:03d}"): Identity.generate(entropy) for index in range(sites)}
    return RoundParameters.create(
        consortium="test",
        run="run",
        round_number=1,
        roster=Roster(Card.issue(site, key, entropy(32)) for site, key in keys.items()),
        cohort=keys,
        lanes=[
            Lane(name="update", length=length, encoding=FixedPoint(value_range=1.0, clip=True), weighted=True),
            Lane(name="histogram", length=7, encoding=Counts(maximum=1000)),
            Lane(name="noised", length=300, encoding=RingElements(ring_bits=63)),
        ],
        model_digest=bytes(32),
        max_weight=50,
    )


def vectors_of(parameters: RoundParameters, seed: int) -> Mapping[str, np.ndarray]:
    """The ring elements of one site's random input to ``round_parameters``."""
    rng = np.random.default_rng(seed)
    values = {
        "update": rng.uniform(-1, 1, parameters.lanes["update"].lane.length),
        "histogram": rng.integers(0, 1001, 7),
        "noised": rng.integers(-(2**59), 2**59, 300) & (2**63 - 1),
    }
    return encode_input(parameters, values, weight=int(rng.integers(0, 51))).vectors
