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
from secureagg.homomorphic import SumReader
from secureagg.identity import SiteId
from secureagg.messages import (
    Acknowledgement,
    AggregateReport,
    AggregateSignature,
    EncryptedShares,
    Inclusion,
    KeyAdvertisement,
    RoundReceipt,
    SurvivorList,
    UnmaskShares,
)
from secureagg.upload import Sums, Upload


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
    this site, ``dealers``: who may have sealed shares for it; ``held``: its own, if it is a holder itself.

    ``encryption_secret``, here and later: empty with the masked backend; first the own, later what the key of the
    homomorphic one is made of."""

    mask_secrets: Mapping[SiteId, bytes] = field(repr=False)
    channel_secrets: Mapping[SiteId, bytes] = field(repr=False)
    self_seed: bytes = field(repr=False)
    holders: frozenset[SiteId]
    dealers: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]
    encryption_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingInput:
    """All shares are in; the site is still training.  ``held``: the shares of every sharer that dealt to this site;
    ``holders``: of this site's shares, those who shared too."""

    mask_secrets: Mapping[SiteId, bytes] = field(repr=False)
    self_seed: bytes = field(repr=False)
    holders: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]
    encryption_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingSurvivors:
    """The masked input is sent."""

    holders: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]
    input_digest: bytes
    encryption_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingUnmaskRequest:
    """One survivor list is signed."""

    held: Mapping[SiteId, HeldShares]
    survivors: SurvivorList
    encryption_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingAcknowledgements:
    """On the sparse graph: the survivors among those who dealt to this site are acknowledged."""

    holders: frozenset[SiteId]
    held: Mapping[SiteId, HeldShares]
    survivors: frozenset[SiteId]


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingAggregate:
    """With the homomorphic backend: shares are revealed; what is left opens the sum of the survivors' inputs."""

    survivors: tuple[SiteId, ...]
    encryption_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class OpeningAggregate:
    """Chunks of the encrypted aggregate are coming in."""

    survivors: tuple[SiteId, ...]
    encryption_secret: bytes = field(repr=False)
    reader: SumReader = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingAgreement:
    """All ciphertexts of the aggregate are in ``reader``, and their digest is signed; nobody has looked at the sum."""

    survivors: tuple[SiteId, ...]
    encryption_secret: bytes = field(repr=False)
    reader: SumReader = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AwaitingReceipt:
    """Shares are revealed, and the sum is reported if the sites open it; no secret is left.  ``survivors``: how many of
    the sites, whose shares were held, sent an input; ``aggregate``: what this site opened, with the homomorphic
    backend."""

    survivors: int
    aggregate: "Aggregate | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class ParticipantFinished:
    """The coordinator's receipt agrees with what this participant signed, and with the aggregate if it opened it."""

    receipt: RoundReceipt
    aggregate: "Aggregate | None" = None


ParticipantPhase = (
    Created
    | AwaitingCohortKeys
    | AwaitingShares
    | AwaitingInput
    | AwaitingSurvivors
    | AwaitingUnmaskRequest
    | AwaitingAcknowledgements
    | AwaitingAggregate
    | OpeningAggregate
    | AwaitingAgreement
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
    """What one sharer is held to: its advertised mask key, its commitments to its self seed, to each holder's shares
    and to its secret for the encryption key; and ``held``, the sharers whose shares it holds itself."""

    mask_key: bytes
    seed_commitment: bytes
    share_commitments: Mapping[SiteId, bytes]
    held: frozenset[SiteId]
    secret_commitment: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class CollectingMaskedInputs:
    """Collects masked inputs of the sharers in the running ``sums``; ``received``: digest of each input summed so far;
    ``uploads``: those that are not whole yet, and not in the sum; ``inclusions``: on the sparse graph, each one's
    statement to its holders."""

    dealings: Mapping[SiteId, Dealing]
    sums: Sums = field(repr=False)
    received: dict[SiteId, bytes] = field(default_factory=dict)
    uploads: dict[SiteId, Upload] = field(default_factory=dict)
    inclusions: dict[SiteId, Inclusion] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class CheckingConsistency:
    """Collects the survivors' signatures on their list, or on the sparse graph their acknowledgements."""

    dealings: Mapping[SiteId, Dealing]
    sums: Sums = field(repr=False)
    survivors: SurvivorList
    received: dict[SiteId, bytes | Acknowledgement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Unmasking:
    """Collects shares from those who signed."""

    dealings: Mapping[SiteId, Dealing]
    sums: Sums = field(repr=False)
    survivors: SurvivorList
    signers: frozenset[SiteId]
    received: dict[SiteId, UnmaskShares] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Decrypting:
    """With the homomorphic backend: collects signatures of those who revealed shares, on the encrypted aggregate in
    ``chunks``, of which ``digest`` is the SHA-256."""

    dealings: Mapping[SiteId, Dealing]
    chunks: tuple[bytes, ...] = field(repr=False)
    digest: bytes
    survivors: SurvivorList
    asked: frozenset[SiteId]
    received: dict[SiteId, AggregateSignature] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """Collects reports of those who signed: what they opened, and the key where the coordinator is given the aggregate
    too."""

    dealings: Mapping[SiteId, Dealing]
    chunks: tuple[bytes, ...] = field(repr=False)
    survivors: SurvivorList
    asked: frozenset[SiteId]
    received: dict[SiteId, AggregateReport] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What one round releases: lane -> the survivors' exact integer sum, its mean in the lane's units, who they are.

    ``totals`` and ``means`` are empty at a coordinator to which nothing is released."""

    totals: Mapping[str, npt.NDArray[np.int64]] = field(repr=False)
    means: Mapping[str, npt.NDArray[np.float64]] = field(repr=False)
    survivors: tuple[SiteId, ...]
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class CoordinatorFinished:
    """The round released ``aggregate``."""

    aggregate: Aggregate


CollectingPhase = (
    AdvertisingKeys | SharingKeys | CollectingMaskedInputs | CheckingConsistency | Unmasking | Decrypting | Opening
)
CoordinatorPhase = CollectingPhase | CoordinatorFinished | Aborted
