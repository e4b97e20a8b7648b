"""Attack: the coordinator follows the protocol and looks hard at all that it has seen, alone or with colluding sites.

From one round it may learn the sum and who is in it, and nothing about how the honest sites made up that sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations
from math import log, sqrt

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from support.keystreams import keystream
from support.packed import integers

from secureagg import (
    Aggregate,
    Card,
    Coordinator,
    Counts,
    FixedPoint,
    Identity,
    Lane,
    Participant,
    Roster,
    RoundParameters,
    SiteId,
    encode_input,
    labels,
)
from secureagg.agreement import KeyPair, pairwise_mask_key, self_mask_key
from secureagg.codec import decode_from_coordinator, decode_from_site, encode, sign
from secureagg.lanes import RingLane, Words
from secureagg.masking import apply_masks, pairwise_sign
from secureagg.messages import (
    KeyAdvertisement,
    MaskedInput,
    SurvivorList,
    SurvivorSignature,
    ToCoordinator,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
)
from secureagg.participant import input_digest
from secureagg.phases import AwaitingShares, CoordinatorFinished
from secureagg.shamir import PRIME, SECRET_BYTES, lagrange_coefficients
from secureagg.testing import CountingEntropy, MemoryJournal

replace = msgspec.structs.replace
A, B, C, D, E = SITES = [SiteId(name) for name in ("a", "b", "c", "d", "e")]
LENGTH = 1024
# Values are whole steps, so that they are encoded as they are and a sum can be split in two ways exactly.
UPDATE = Lane(name="update", length=LENGTH, encoding=FixedPoint(value_range=32767.0), weighted=True)
HISTOGRAM = Lane(name="histogram", length=6, encoding=Counts(maximum=100))


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one site brings into a round."""

    weight: int
    update: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]


Split = Mapping[SiteId, Share]


def unpacked(ring_lane: RingLane, packed: bytes) -> Words:
    """The masked words of one packed lane: one little-endian stream of bits."""
    length, bits = ring_lane.masked_length, ring_lane.masked_bits
    stream = np.unpackbits(np.frombuffer(packed, np.uint8), count=length * bits, bitorder="little")
    words = (stream.reshape(length, bits).astype(np.uint64) << np.arange(bits, dtype=np.uint64)).sum(axis=1)
    return words.astype(ring_lane.masked_word)


def digits(ring_lane: RingLane, words: Words) -> Words:
    """The digits of reduced words, one for each value: all independent and uniform if the words are uniform."""
    shifts = np.arange(ring_lane.digits, dtype=np.uint64) * np.uint64(ring_lane.ring_bits)
    every = (words[:, None].astype(np.uint64) >> shifts) & np.uint64((1 << ring_lane.ring_bits) - 1)
    return every.ravel()[: ring_lane.lane.length]


@dataclass
class View:
    """A finished round: ``heard`` and ``said`` are the coordinator's whole view; the other fields are not known to it.

    ``held_back``: the masked input of a site that dropped out before it was sent.
    """

    parameters: RoundParameters
    identities: dict[SiteId, Identity]
    inputs: dict[SiteId, Mapping[str, Words]]
    heard: list[tuple[SiteId, ToCoordinator]] = field(default_factory=list)
    said: list[tuple[SiteId, ToSite]] = field(default_factory=list)
    mask_secrets: dict[SiteId, Mapping[SiteId, bytes]] = field(default_factory=dict)
    held_back: dict[SiteId, MaskedInput] = field(default_factory=dict)
    aggregate: Aggregate | None = None

    def heard_of(self, kind: type) -> dict[SiteId, ToCoordinator]:
        """Site -> its message of this kind."""
        return {site: message for site, message in self.heard if isinstance(message, kind)}

    def lane(self, message: ToCoordinator, name: str) -> Words:
        """The words of one lane of a masked input."""
        assert isinstance(message, MaskedInput)
        packed = b"".join(message.chunks)
        for other, ring_lane in self.parameters.lanes.items():
            if other == name:
                return unpacked(ring_lane, packed[: ring_lane.packed_bytes])
            packed = packed[ring_lane.packed_bytes :]
        raise AssertionError(name)


def play(split: Split, *, seed: object, dropout: SiteId | None = None) -> View:
    """A round of the sites of ``split`` to its end; ``dropout`` falls silent before its masked input.

    All entropy comes from ``seed``; each machine has its own, as in life.
    """
    entropy = CountingEntropy(f"{seed}".encode())
    identities = {site: Identity.generate(entropy) for site in split}
    parameters = RoundParameters.create(
        consortium="test",
        run="run",
        round_number=1,
        roster=Roster(Card.issue(site, key, entropy(32)) for site, key in identities.items()),
        cohort=split,
        lanes=[UPDATE, HISTOGRAM],
        model_digest=bytes(32),
        max_weight=10,
    )
    encoded = {}
    for site, own in split.items():
        values = {"update": own.update, "histogram": own.histogram}
        encoded[site] = encode_input(parameters, values, weight=own.weight, entropy=entropy)
    view = View(parameters, identities, {site: own.vectors for site, own in encoded.items()})
    sites = {
        site: Participant(
            site=site,
            identity=identities[site],
            parameters=parameters,
            journal=MemoryJournal(),
            entropy=CountingEntropy(f"{seed}-{site}".encode()),
        )
        for site in split
    }
    coordinator = Coordinator(parameters=parameters)
    pending = [(site, message) for site, machine in sites.items() for message in machine.start()]
    for site, machine in sites.items():
        assert machine.submit(encoded[site]) == []  # the machine knows its input before it draws its seed
    while pending:
        outbound = []
        for site, message in pending:
            if site == dropout and isinstance(message, MaskedInput):
                view.held_back[site] = message
                outbound += coordinator.drop(site)
                continue
            view.heard.append((site, message))
            outbound += coordinator.receive(decode_from_site(encode(message)), sender=site)
        pending = []
        for item in outbound:
            site, machine = item.recipient, sites[item.recipient]
            view.said.append((site, item.message))
            pending += [(site, answer) for answer in machine.receive(decode_from_coordinator(encode(item.message)))]
            if isinstance(machine.phase, AwaitingShares):
                view.mask_secrets[site] = machine.phase.mask_secrets
    assert isinstance(coordinator.phase, CoordinatorFinished)
    view.aggregate = coordinator.phase.aggregate
    return view


def two_splits(seed: int) -> tuple[Split, Split]:
    """Two ways in which sites a, b and c make up the same sums of weights, weighted updates and counts; the colluder d
    brings the same to both."""
    random = np.random.default_rng(seed)

    def numbers(limit: int) -> npt.NDArray[np.int64]:
        return random.integers(-limit, limit, LENGTH, endpoint=True)

    def counts() -> npt.NDArray[np.int64]:
        return random.integers(0, 50, 6, endpoint=True)

    same = {D: Share(weight=3, update=numbers(32767), histogram=counts())}
    one = {
        A: Share(weight=1, update=numbers(10000), histogram=np.zeros(6, np.int64)),
        B: Share(weight=9, update=np.full(LENGTH, 2000), histogram=counts()),
        C: Share(weight=2, update=np.full(LENGTH, -7000), histogram=counts()),
    }
    update = sum(own.weight * own.update for own in one.values())
    histogram = sum(own.histogram for own in one.values())
    b, c = numbers(300), numbers(400)
    other = {
        A: Share(weight=1, update=update - 8 * b - 3 * c, histogram=histogram // 2),
        B: Share(weight=8, update=b, histogram=histogram - histogram // 2),
        C: Share(weight=3, update=c, histogram=np.zeros(6, np.int64)),
    }
    return {**one, **same}, {**other, **same}


def without_inputs(message: ToCoordinator | ToSite) -> list[bytes]:
    """The bytes of a message without masked inputs, but for their sizes, their digests and the signatures on these."""
    match message:
        case MaskedInput():
            sizes = tuple(len(chunk).to_bytes(4, "little") for chunk in message.chunks)
            message = replace(message, chunks=(), chunk_digests=sizes, signature=b"")
        case SurvivorSignature():
            message = replace(message, list_signature=b"", signature=b"")
        case SurvivorList():
            message = replace(message, survivors=tuple((site, b"") for site, _ in message.survivors))
        case UnmaskRequest():
            message = replace(message, list_signatures=tuple((site, b"") for site, _ in message.list_signatures))
    return encode(message)


@pytest.mark.parametrize("dropout", [None, D])
def test_the_view_of_two_splits_differs_in_masked_inputs_only(dropout: SiteId | None) -> None:
    """With the same random bytes, every message to and from the coordinator is the same byte for byte whichever way the
    sum is split, but for masked inputs and what anybody computes from them; what is released is the same.

    Held by ``Participant.start`` and ``Participant._share_secrets``, which draw keys, seeds and shares and look at no
    input, and by ``Participant._send_masked_input``, which draws nothing.
    """
    one, other = (play(split, seed="view", dropout=dropout) for split in two_splits(1))
    for first, second in ((one.heard, other.heard), (one.said, other.said)):
        assert [site for site, _ in first] == [site for site, _ in second]
        assert [without_inputs(message) for _, message in first] == [without_inputs(message) for _, message in second]
    assert one.aggregate is not None
    assert other.aggregate is not None
    assert one.aggregate.digest == other.aggregate.digest
    assert one.aggregate.survivors == other.aggregate.survivors
    for name, total in one.aggregate.totals.items():
        np.testing.assert_array_equal(total, other.aggregate.totals[name])
    assert one.heard != other.heard


@pytest.mark.parametrize("number", [0, 1])
def test_what_was_left_out_is_computed_from_the_masked_inputs(number: int) -> None:
    """Digests and signatures say nothing beside the masked inputs: with the identities anybody could compute them.

    Held by ``Participant._send_masked_input`` and ``Participant._sign_survivors``, and by Ed25519, which draws nothing.
    """
    view = play(two_splits(1)[number], seed="view")
    inputs = view.heard_of(MaskedInput)
    survivors = []
    for site, message in inputs.items():
        digests = tuple(sha256(chunk).digest() for chunk in message.chunks)
        unsigned = MaskedInput(
            context=view.parameters.context, sender=site, chunk_digests=digests, chunks=message.chunks
        )
        assert message == sign(unsigned, view.identities[site])
        survivors.append((site, input_digest(digests)))
    shown = SurvivorList(context=view.parameters.context, survivors=tuple(survivors))
    assert [message for _, message in view.said if isinstance(message, SurvivorList)] == [shown] * len(inputs)
    for site, message in view.heard_of(SurvivorSignature).items():
        identity = view.identities[site]
        signature = identity.sign(labels.SURVIVORS, view.parameters.context, encode(shown)[0])
        unsigned = SurvivorSignature(context=view.parameters.context, sender=site, list_signature=signature)
        assert message == sign(unsigned, identity)


def test_masks_do_not_depend_on_inputs() -> None:
    """With the same random bytes, a site's two masked inputs differ by exactly what its two inputs differ by, in every
    word of each lane.

    Held by ``masks_of_input``, which is given keys and names only.
    """
    one, other = (play(split, seed="view") for split in two_splits(2))
    for site in (A, B, C, D):
        for name, ring_lane in one.parameters.lanes.items():
            first, second = (view.lane(view.heard_of(MaskedInput)[site], name) for view in (one, other))
            masked = first - second
            plain = ring_lane.join(one.inputs[site][name]) - ring_lane.join(other.inputs[site][name])
            np.testing.assert_array_equal(ring_lane.reduce(masked), ring_lane.reduce(plain))
            assert plain.any() == (site != D and name != "canary" and (name, site) != ("weight", A))


# --- what can be removed from the view ---


def seeds_and_mask_keys(view: View) -> tuple[dict[SiteId, bytes], dict[SiteId, bytes]]:
    """What the coordinator reconstructs: self seeds and mask secret keys of those for whom it has enough shares."""
    seeds, keys = {}, {}
    answers = view.heard_of(UnmaskShares)
    holders = sorted(answers)[: view.parameters.threshold]
    positions = view.parameters.positions
    coefficients = lagrange_coefficients([positions[holder] for holder in holders])
    for secrets, kind in ((seeds, "self_seed_shares"), (keys, "mask_key_shares")):
        shares = {holder: dict(getattr(answers[holder], kind)) for holder in holders}
        for site in shares[holders[0]]:
            own = {positions[holder]: shares[holder][site] for holder in holders}
            total = sum(int.from_bytes(share, "little") * coefficients[at] for at, share in own.items())
            secrets[site] = (total % PRIME).to_bytes(SECRET_BYTES, "little")
    return seeds, keys


def known_secrets(view: View, site: SiteId, colluding: Sequence[SiteId]) -> dict[SiteId, bytes]:
    """Peer -> what it and ``site`` have agreed on for their mask, as far as coordinator and colluders can know it."""
    _, keys = seeds_and_mask_keys(view)
    public = {peer: advertisement.mask_key for peer, advertisement in view.heard_of(KeyAdvertisement).items()}
    secrets = {peer: view.mask_secrets[peer][site] for peer in colluding if peer != site}
    if site in colluding:
        secrets |= view.mask_secrets[site]
    for dropout, key in keys.items():
        if dropout == site:
            secrets |= {peer: KeyPair(key).agree(public[peer], who=peer) for peer in public.keys() - {site}}
        else:
            secrets[dropout] = KeyPair(key).agree(public[site], who=dropout)
    return secrets


def stripped(view: View, site: SiteId, message: ToCoordinator, *, colluding: Sequence[SiteId]) -> Words:
    """The update lane of one masked input without all masks that coordinator and colluders can compute."""
    seeds, _ = seeds_and_mask_keys(view)
    masks = [
        (pairwise_mask_key(view.parameters, secret, lane="update", one=site, other=peer), -pairwise_sign(site, peer))
        for peer, secret in known_secrets(view, site, colluding).items()
    ]
    if site in seeds:
        masks.append((self_mask_key(view.parameters, seeds[site], lane="update", site=site), -1))
    words = view.lane(message, "update")
    apply_masks(words, masks)
    return view.parameters.lanes["update"].reduce(words)


ROUNDS = 40
SAMPLES = ROUNDS * LENGTH
HONEST = (A, B, C)
SUBSETS = [*combinations(HONEST, 1), *combinations(HONEST, 2)]
# A test compares the two splits in each of 3 masked inputs and 6 partial sums, by two statistics each.  False alarms of
# all together: at most 18 x 5e-8 < 1e-6.
FALSE_ALARM = 5e-8
# chi-square with 255 degrees of freedom exceeds this with a chance of 5e-8.
CHI_SQUARE_LIMIT = 395.0
# By Massart's form of the DKW inequality an empirical distribution of SAMPLES values is farther than half of this from
# its own with a chance of at most FALSE_ALARM / 2.
KS_LIMIT = 2 * sqrt(log(4 / FALSE_ALARM) / (2 * SAMPLES))


def chi_square(one: Words, other: Words) -> float:
    """Of two samples of one size, by their 256 byte values: how unlike their distributions are."""
    left, right = (np.bincount(np.frombuffer(sample.tobytes(), np.uint8), minlength=256) for sample in (one, other))
    both = left + right
    return float(((left - right) ** 2 / np.maximum(both, 1)).sum())


def kolmogorov_smirnov(one: Words, other: Words) -> float:
    """Of two samples of one size: the largest distance of their empirical distributions."""
    everything = np.sort(np.concatenate([one, other]))
    left, right = (np.searchsorted(np.sort(sample), everything, side="right") for sample in (one, other))
    return float(np.abs(left - right).max() / len(one))


def told_apart(one: Words, other: Words, *, ring_bits: int) -> bool:
    """Whether either statistic says that two samples of ring elements come from different distributions.

    The bytes are bits 0 to 7 and the highest 8 of each element, all of them independent if the elements are uniform.
    """
    assert ring_bits >= 16
    assert len(one) == len(other) == SAMPLES
    low_and_high = [
        np.concatenate([(sample & 0xFF).astype(np.uint8), (sample >> (ring_bits - 8)).astype(np.uint8)])
        for sample in (one, other)
    ]
    return chi_square(*low_and_high) > CHI_SQUARE_LIMIT or kolmogorov_smirnov(one, other) > KS_LIMIT


def test_no_statistic_tells_the_splits_apart() -> None:
    """Over 40 rounds of each split, every masked input as it was sent, and every sum of some but not all honest sites
    without all masks that coordinator and colluder know, looks the same; only all together say something: their sum.

    The splits are as unlike as can be: one site is constant in one of them.  A false alarm would have a chance below
    1e-6; the seeds are fixed.  Held by ``masks_of_input``: a self mask, and a pairwise mask with every other sharer.
    """
    splits = two_splits(3)
    sent: list[dict[SiteId, list[Words]]] = []
    partial: list[dict[tuple[SiteId, ...], list[Words]]] = []
    for number, split in enumerate(splits):
        sent.append({site: [] for site in HONEST})
        partial.append({subset: [] for subset in [*SUBSETS, HONEST]})
        for seed in range(ROUNDS):
            view = play(split, seed=f"split {number}, round {seed}")
            ring_lane = view.parameters.lanes["update"]
            messages = view.heard_of(MaskedInput)
            known = {site: stripped(view, site, messages[site], colluding=[D]) for site in HONEST}
            for site in HONEST:
                sent[number][site].append(digits(ring_lane, view.lane(messages[site], "update")))
            for subset, sums in partial[number].items():
                words = np.sum([known[site] for site in subset], axis=0, dtype=ring_lane.masked_word)
                read = integers if subset == HONEST else digits
                sums.append(read(ring_lane, ring_lane.reduce(words)))
    for samples in (sent, partial):
        for key in samples[0]:
            one, other = (np.concatenate(samples[number][key]) for number in (0, 1))
            if key == HONEST:
                np.testing.assert_array_equal(one, other)
                total = sum(splits[0][site].weight * splits[0][site].update for site in HONEST)
                np.testing.assert_array_equal(one, np.tile(total, ROUNDS))
            else:
                assert not told_apart(one, other, ring_bits=ring_lane.ring_bits), f"{key} gives the split away"


def test_the_statistics_would_tell() -> None:
    """The same statistics on inputs without masks, or under a mask of a few bits less, tell the splits apart."""
    one, other = (play(split, seed="power") for split in two_splits(3))
    bits = one.parameters.lanes["update"].ring_bits
    words = np.array([keystream(bytes([number]) * 32, "<u4", SAMPLES) for number in range(2)])
    words &= (1 << bits) - 1
    assert not told_apart(*words, ring_bits=bits)
    for site in HONEST:
        plain = [np.tile(view.inputs[site]["update"], ROUNDS) & ((1 << bits) - 1) for view in (one, other)]
        assert told_apart(*plain, ring_bits=bits)
    narrow = words & ((1 << (bits - 5)) - 1)
    shifted = [narrow[number] + np.tile(view.inputs[C]["update"], ROUNDS) for number, view in enumerate((one, other))]
    assert told_apart(*(sample & ((1 << bits) - 1) for sample in shifted), ring_bits=bits)


# --- after a round with a dropout ---

COLLUDING = (C, D)
# Of two independent vectors the correlation exceeds this with a chance of 4e-8 (normal, deviation 1 / sqrt(LENGTH)).
CORRELATION_LIMIT = 5.5 / sqrt(LENGTH)


def with_a_dropout() -> View:
    """A finished round of five: a and b are honest, c and d collude, e drops out after it has shared its keys."""
    random = np.random.default_rng(4)
    split = {
        site: Share(
            weight=weight,
            update=random.integers(-32767, 32767, LENGTH, endpoint=True),
            histogram=random.integers(0, 100, 6, endpoint=True),
        )
        for weight, site in enumerate(SITES, start=6)
    }
    view = play(split, seed="dropout", dropout=E)
    assert view.parameters.max_corrupt == len(COLLUDING)
    assert view.aggregate is not None
    assert view.aggregate.survivors == (A, B, C, D)
    return view


def correlation(view: View, words: Words, site: SiteId) -> float:
    """Of the digits of words with a site's weighted update."""
    lane = view.parameters.lanes["update"]
    return abs(float(np.corrcoef(integers(lane, words), lane.lift(view.inputs[site]["update"]))[0, 1]))


def test_one_mask_of_each_honest_survivor_remains() -> None:
    """Without every mask that coordinator and colluders can compute, what is left of an honest survivor's masked input
    is its update under its mask with the other honest site: unlike the update, until both are added.

    Held by a pairwise mask with every other sharer in ``masks_of_input``, and by one kind of share of each site in
    ``Participant._reveal_shares``.
    """
    view = with_a_dropout()
    lane = view.parameters.lanes["update"]
    messages = view.heard_of(MaskedInput)
    left = {site: stripped(view, site, messages[site], colluding=COLLUDING) for site in (A, B)}
    for site, other in ((A, B), (B, A)):
        own = lane.reduce(lane.join(view.inputs[site]["update"]))
        assert (left[site] == own).sum() <= 2
        assert correlation(view, left[site], site) < CORRELATION_LIMIT
        assert correlation(view, left[site], other) < CORRELATION_LIMIT
        key = pairwise_mask_key(view.parameters, view.mask_secrets[site][other], lane="update", one=A, other=B)
        bare = left[site].copy()
        apply_masks(bare, [(key, -pairwise_sign(site, other))])
        np.testing.assert_array_equal(lane.reduce(bare), own)  # just that one mask had remained
        assert correlation(view, bare, site) > 0.999
    together = sum(lane.join(view.inputs[site]["update"]) for site in (A, B))
    np.testing.assert_array_equal(lane.reduce(left[A] + left[B]), lane.reduce(together))
    # A colluder's own input is no secret to its accomplices: the method does find what can be found.
    for site in COLLUDING:
        np.testing.assert_array_equal(
            stripped(view, site, messages[site], colluding=COLLUDING),
            lane.reduce(lane.join(view.inputs[site]["update"])),
        )


def test_nothing_of_the_dropout_is_in_the_view() -> None:
    """There is no masked input of the dropout, and should it arrive late, its self mask is still on it: not even with
    the colluders' shares can its seed be had.

    Held by the self mask in ``masks_of_input``, and by one kind of share of each site in
    ``Participant._reveal_shares``.
    """
    view = with_a_dropout()
    assert E not in view.heard_of(MaskedInput)
    assert all(E not in dict(list_.survivors) for _, list_ in view.said if isinstance(list_, SurvivorList))
    seeds, keys = seeds_and_mask_keys(view)
    assert set(seeds) == {A, B, C, D}
    assert set(keys) == {E}
    assert KeyPair(keys[E]).public == view.heard_of(KeyAdvertisement)[E].mask_key
    late = view.held_back[E]
    left = stripped(view, E, late, colluding=COLLUDING)
    lane = view.parameters.lanes["update"]
    assert (left == lane.reduce(lane.join(view.inputs[E]["update"]))).sum() <= 2
    assert correlation(view, left, E) < CORRELATION_LIMIT
    # The colluders hold a share each of its seed; of the others' shares of it none is in the view.
    answers = view.heard_of(UnmaskShares).values()
    assert all(E not in dict(answer.self_seed_shares) and E in dict(answer.mask_key_shares) for answer in answers)
    assert view.parameters.threshold > len(COLLUDING)
