"""The phases of both machines.  A phase holds exactly the data that its part of the round needs.

When a machine moves on, it builds the next phase from the last one without what is no longer needed; nothing else
remembers a secret.  Python gives no erasure of memory, so non-retention is what is promised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from secureagg.agreement import KeyPair
from secureagg.errors import SecureAggregationError
from secureagg.identity import SiteId
from secureagg.lanes import Words
from secureagg.messages import (
    Acknowledgement,
    EncryptedShares,
    Inclusion,
    KeyAdvertisement,
    RoundReceipt,
    SurvivorList,
    UnmaskShares,
)
from secureagg.upload import Upload


@dataclass(frozen=True, slots=True, eq=False)
class Aborted:
    """Either side: the round is over without a release, for the reason that ``error`` gives."""

    error: SecureAggregationError


# --- the participant's phases: what it waits for ---


@dataclass(frozen=True, slots=True)
class Created:
    """Not started."""


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingCohortKeys:
    """Own keys are advertised."""

    mask_key: KeyPair = field(repr=False)
    channel_key: KeyPair = field(repr=False)
    advertisement: KeyAdvertisement


@dataclass(frozen=True, slots=True, eq=False)
class HeldShares:
    """The shares of one site's secrets that this participant holds."""

    mask_key: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingShares:
    """Own shares are sent.  ``*_secrets`` map each peer to what the key pairs agree on; ``holders``: who has shares of
    this site, ``dealers``: who may have sealed shares for it; ``held``: its own, if it is a holder itself."""

    mask_secrets: Mapping[SiteId, bytes] = field(repr=False)
    channel_secrets: Mapping[SiteId, bytes] = field(repr=False)
    self_seed: bytes = field(repr=False)
    holders: frozenset[SiteId]
    dealers: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingInput:
    """All shares are in; the site is still training.  ``held``: the shares of every sharer that dealt to this site;
    ``holders``: of this site's shares, those who shared too."""

    mask_secrets: Mapping[SiteId, bytes] = field(repr=False)
    self_seed: bytes = field(repr=False)
    holders: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingSurvivors:
    """The masked input is sent."""

    holders: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]
    input_digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingUnmaskRequest:
    """One survivor list is signed."""

    held: Mapping[SiteId, HeldShares]
    survivors: SurvivorList


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingAcknowledgements:
    """On the sparse graph: the survivors among those who dealt to this site are acknowledged."""

    holders: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]
    survivors: frozenset[SiteId]


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingReceipt:
    """Shares are revealed; no secret is left.  ``survivors``: how many of the sites, whose shares were held, sent an
    input."""

    survivors: int


@dataclass(frozen=True, slots=True, eq=False)
class ParticipantFinished:
    """The coordinator's receipt agrees with what this participant signed."""

    receipt: RoundReceipt


ParticipantPhase = (
    Created
    | AwaitingCohortKeys
    | AwaitingShares
    | AwaitingInput
    | AwaitingSurvivors
    | AwaitingUnmaskRequest
    | AwaitingAcknowledgements
    | AwaitingReceipt
    | ParticipantFinished
    | Aborted
)


# --- the coordinator's phases: what it collects ---


@dataclass(frozen=True, slots=True, eq=False)
class AdvertisingKeys:
    """Collects key advertisements of the cohort."""

    received: dict[SiteId, KeyAdvertisement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class SharingKeys:
    """Collects encrypted shares of those who advertised."""

    advertisements: Mapping[SiteId, KeyAdvertisement]
    received: dict[SiteId, EncryptedShares] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Dealing:
    """What one sharer is held to: its advertised mask key, its commitments to its self seed and to each holder's
    shares; and ``held``, the sharers whose shares it holds itself."""

    mask_key: bytes
    seed_commitment: bytes
    share_commitments: Mapping[SiteId, bytes]
    held: frozenset[SiteId]


@dataclass(frozen=True, slots=True, eq=False)
class CollectingMaskedInputs:
    """Collects masked inputs of the sharers: lane -> running sum; ``received``: digest of each input summed so far;
    ``uploads``: those that are not whole yet, and not in the sum; ``inclusions``: on the sparse graph, each one's
    statement to its holders."""

    dealings: Mapping[SiteId, Dealing]
    sums: Mapping[str, Words] = field(repr=False)
    received: dict[SiteId, bytes] = field(default_factory=dict)
    uploads: dict[SiteId, Upload] = field(default_factory=dict)
    inclusions: dict[SiteId, Inclusion] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class CheckingConsistency:
    """Collects the survivors' signatures on their list, or on the sparse graph their acknowledgements."""

    dealings: Mapping[SiteId, Dealing]
    sums: Mapping[str, Words] = field(repr=False)
    survivors: SurvivorList
    received: dict[SiteId, bytes | Acknowledgement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Unmasking:
    """Collects shares from those who signed."""

    dealings: Mapping[SiteId, Dealing]
    sums: Mapping[str, Words] = field(repr=False)
    survivors: SurvivorList
    signers: frozenset[SiteId]
    received: dict[SiteId, UnmaskShares] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What one round releases: lane -> the survivors' exact integer sum, its mean in the lane's units, who they are."""

    totals: Mapping[str, npt.NDArray[np.int64]] = field(repr=False)
    means: Mapping[str, npt.NDArray[np.float64]] = field(repr=False)
    survivors: tuple[SiteId, ...]
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class CoordinatorFinished:
    """The round released ``aggregate``."""

    aggregate: Aggregate


CollectingPhase = AdvertisingKeys | SharingKeys | CollectingMaskedInputs | CheckingConsistency | Unmasking
CoordinatorPhase = CollectingPhase | CoordinatorFinished | Aborted
