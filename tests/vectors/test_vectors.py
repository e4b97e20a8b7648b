"""The implementation against the known answers in ``v1``, and the files against their generator."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.keystreams import keystream
from support.packed import elements, integers, unpack, words_of
from vectors import generate

from secureagg import (
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
)
from secureagg.aggregate import aggregate_of
from secureagg.agreement import (
    KeyPair,
    digest_key,
    encryption_key_seed,
    open_shares,
    pairwise_mask_key,
    seal_shares,
    self_mask_key,
)
from secureagg.codec import decode_from_coordinator, decode_from_site, encode
from secureagg.commitments import check_share_commitments, secret_commitment, seed_commitment, share_commitments
from secureagg.encoding import encode_input
from secureagg.errors import AuthenticationFailed, MalformedMessage, SecureAggregationError
from secureagg.homomorphic import mask_slots
from secureagg.keystream import STRETCH_BYTES, Keystream, Room
from secureagg.labels import VERSION
from secureagg.lanes import RingLane
from secureagg.masking import apply_masks
from secureagg.packing import pack
from secureagg.phases import Aborted, CoordinatorFinished, ParticipantFinished
from secureagg.shamir import PRIME, check_share, lagrange_coefficients, reconstruct, share
from secureagg.slots import SLOTS, slot_bits
from secureagg.testing import MemoryJournal

FILES = Path(__file__).parent / "v1"
ROUNDS = ("round.json", "round_dropout.json", "round_sparse.json")
HOSTILE = ("hostile.json", "hostile_sparse.json")


def load(name: str) -> Any:
    """The contents of one file."""
    return json.loads((FILES / name).read_text(encoding="utf-8"))


def raw(text: str) -> bytes:
    """The bytes that ``text`` has in hexadecimal."""
    return bytes.fromhex(text)


def drawn(draws: list[str]) -> Callable[[int], bytes]:
    """Entropy that gives exactly ``draws``, each asked for with its length."""
    rest: Iterator[str] = iter(draws)

    def entropy(length: int) -> bytes:
        value = raw(next(rest))
        assert len(value) == length
        return value

    return entropy


def lane_of(item: dict[str, Any]) -> Lane:
    """The lane that a file describes."""
    encoding = dict(item["encoding"])
    kind = {"fixed-point": FixedPoint, "counts": Counts}[encoding.pop("kind")]
    return Lane(name=item["name"], length=item["length"], weighted=item["weighted"], encoding=kind(**encoding))


def card_of(item: dict[str, str]) -> Card:
    """The card that a file describes."""
    return Card(
        site=SiteId(item["name"]),
        signing_key=raw(item["signing_key"]),
        transport_key=raw(item["transport_key"]),
        signature=raw(item["card_signature"]),
    )


def identity_of(name: str) -> Identity:
    """The identity of a site of all vectors."""
    seeds = {card["name"]: card["identity_seed"] for card in load("roster.json")["cards"]}
    return Identity.from_private_bytes(raw(seeds[name]))


def parameters_of(item: dict[str, Any]) -> RoundParameters:
    """The parameters that a file describes; the implementation finds k and t of a sparse graph by itself."""
    sparse = "neighbours" in item
    parameters = RoundParameters.create(
        consortium=item["consortium"],
        run=item["run"],
        round_number=item["round_number"],
        roster=Roster(card_of(card) for card in load("roster.json")["cards"][: item["roster"]]),
        cohort=[SiteId(name) for name in item["cohort"]],
        lanes=[lane_of(lane) for lane in item["lanes"]],
        model_digest=raw(item["model_digest"]),
        max_weight=item["max_weight"],
        threshold=None if sparse else item["threshold"],
        max_corrupt=item["max_corrupt"],
        minimum_survivors=item["minimum_survivors"],
        graph="sparse" if sparse else "complete",
        backend="homomorphic" if "release_to" in item else "masked",
        release_to=item.get("release_to"),
        max_dropouts=item.get("max_dropouts"),
    )
    assert (parameters.neighbours, parameters.threshold) == (item.get("neighbours"), item["threshold"])
    return parameters


def bound_to(item: dict[str, str]) -> Any:
    """What key derivation and commitments read of a round: its context and its roster's digest."""
    return SimpleNamespace(context=raw(item["context"]), roster=SimpleNamespace(digest=raw(item.get("roster", ""))))


# --- the files themselves ---


def test_the_generator_writes_these_files(tmp_path: Path) -> None:
    """Running the generator again gives every file, byte for byte, and no other."""
    generate.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in FILES.iterdir())
    for path in FILES.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_files_are_small() -> None:
    """All files together stay below 500 KB."""
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 500_000


def test_the_folder_is_the_version() -> None:
    """The vectors are those of the protocol version that the labels carry."""
    assert VERSION.decode() == f"secureagg/{FILES.name}"


# --- single steps ---


def test_cards_and_roster_digests() -> None:
    """Keys, card signatures and roster digests are as given, in whatever order the cards come."""
    known = load("roster.json")
    for item in known["cards"]:
        identity = Identity.from_private_bytes(raw(item["identity_seed"]))
        assert Card.issue(SiteId(item["name"]), identity, raw(item["transport_key"])) == card_of(item)
        card_of(item).check()
    for item in known["digests"]:
        cards = [card_of(card) for card in known["cards"][: item["first"]]]
        assert Roster(cards).digest == Roster(cards[::-1]).digest == raw(item["digest"])


@pytest.mark.parametrize("item", load("roster.json")["refused"], ids=lambda item: item["why"])
def test_cards_to_refuse(item: dict[str, Any]) -> None:
    """A card that was changed is refused with the given code."""
    with pytest.raises(SecureAggregationError) as caught:
        card_of(item["card"]).check()
    assert caught.value.code == item["code"]


def test_contexts() -> None:
    """Ring widths, parameter digests and contexts are as given, and no two contexts are the same."""
    known = load("context.json")
    for item in known:
        parameters = parameters_of(item)
        assert {name: lane.ring_bits for name, lane in parameters.lanes.items()} == item["ring_bits"]
        assert [*parameters.lanes] == [*item["ring_bits"]]
        assert parameters.digest == raw(item["parameters"])
        assert parameters.context == raw(item["context"])
    assert len({item["context"] for item in known}) == len(known)


def test_key_agreement() -> None:
    """X25519 gives the public keys and shared secrets as given, keeps the secret as drawn, refuses low order."""
    known = load("keys.json")
    for item in known["x25519"]:
        pair = KeyPair(raw(item["secret"]))
        assert pair.public == raw(item["public"])
        assert pair.secret_bytes() == raw(item["secret"])
        assert pair.agree(raw(item["peer_public"]), who="peer") == raw(item["shared"])
    for key in known["low_order"]:
        with pytest.raises(AuthenticationFailed):
            KeyPair(raw(known["x25519"][0]["secret"])).agree(raw(key), who="peer")


def test_derived_keys() -> None:
    """Mask keys are as given, the pairwise ones from both sides, and all are different."""
    known = load("keys.json")
    parameters = bound_to(known)
    checked = 0
    for item in known["derived"]:
        secret, names, key = raw(item["secret"]), item["names"], raw(item["key"])
        if item["purpose"] == "pairwise-mask":
            lane, one, other = names
            assert pairwise_mask_key(parameters, secret, lane=lane, one=one, other=other) == key
            assert pairwise_mask_key(parameters, secret, lane=lane, one=other, other=one) == key
            checked += 1
        elif item["purpose"] == "self-mask":
            lane, site = names
            assert self_mask_key(parameters, secret, lane=lane, site=site) == key
            checked += 1
    assert checked == 5
    assert len({item["key"] for item in known["derived"]}) == len(known["derived"])


def test_channel_keys() -> None:
    """Under the given channel keys ChaCha20-Poly1305 gives the ciphertexts that ``seal_shares`` gives."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    known = load("keys.json")
    keys = {tuple(item["names"]): raw(item["key"]) for item in known["derived"] if item["purpose"] == "channel"}
    parameters = bound_to(known)
    for item in known["sealed"]:
        ends = {"sender": item["sender"], "recipient": item["recipient"]}
        secret, shares, sealed = raw(item["secret"]), raw(item["shares"]), raw(item["sealed"])
        assert seal_shares(parameters, secret, shares, **ends) == sealed
        assert open_shares(parameters, secret, sealed, **ends) == shares
        key = keys[(item["sender"], item["recipient"])]
        # The ciphertext without its tag depends on the key alone.
        assert ChaCha20Poly1305(key).encrypt(bytes(12), shares, None)[: len(shares)] == sealed[: len(shares)]
        with pytest.raises(AuthenticationFailed):
            open_shares(parameters, secret, sealed, sender=item["recipient"], recipient=item["sender"])


def test_shares() -> None:
    """The shares of a secret are as given for the given entropy, and each given subset of them has that secret."""
    known = load("shares.json")
    assert raw(known["prime"]) == PRIME.to_bytes(33, "little")
    for item in known["dealt"]:
        dealt = {int(at): raw(value) for at, value in item["shares"].items()}
        entropy = drawn(item["entropy"])
        assert share(raw(item["secret"]), threshold=item["threshold"], positions=[*dealt], entropy=entropy) == dealt
        for subset in item["subsets"]:
            coefficients = lagrange_coefficients(subset)
            assert reconstruct(dealt, coefficients, owner="owner", who="test") == raw(item["secret"])


def test_shares_to_refuse() -> None:
    """What is no field element is no share, and shares of a number above 2^256 - 1 have no secret."""
    known = load("shares.json")
    for value in known["accepted"]:
        check_share(raw(value), who="test")
    for value in known["refused"]:
        with pytest.raises(MalformedMessage):
            check_share(raw(value), who="test")
    dealt = {int(at): raw(value) for at, value in known["no_secret"]["shares"].items()}
    with pytest.raises(AuthenticationFailed):
        reconstruct(dealt, lagrange_coefficients([*dealt]), owner="owner", who="test")


def test_commitments() -> None:
    """Commitments to a seed and to shares are as given, and hold for that owner and holder only."""
    known = load("commitments.json")
    parameters = bound_to(known)
    for item in known["seeds"]:
        assert seed_commitment(parameters, item["site"], raw(item["seed"])) == raw(item["commitment"])
    for item in known["shares"]:
        given = {"mask_key": raw(item["mask_key_share"]), "self_seed": raw(item["self_seed_share"])}
        ends = {"owner": item["owner"], "holder": item["holder"]}
        committed = raw(item["commitments"])
        assert share_commitments(parameters, **ends, **given) == committed
        check_share_commitments(parameters, committed, **ends, **given, who="test")
        with pytest.raises(AuthenticationFailed):
            check_share_commitments(parameters, committed, owner="z", holder=item["holder"], **given, who="test")


def test_homomorphic_rounds() -> None:
    """Contexts, commitments, keys and the keyed digest are as given; inputs become the slots as given, under masks too,
    and the slots of the sum are its totals."""
    known = load("homomorphic.json")
    for item in known["slot_bits"]:
        assert slot_bits(item["cohort_size"]) == item["bits"]
    made = [parameters_of(item) for item in known["rounds"]]
    for parameters, item in zip(made, known["rounds"], strict=True):
        assert (parameters.digest, parameters.context) == (raw(item["parameters"]), raw(item["context"]))
    parameters, secret = made[0], raw(known["secret"])
    assert encryption_key_seed(parameters, secret) == raw(known["key_seed"])
    assert digest_key(parameters, secret) == raw(known["digest_key"])
    layout, masks = parameters.slot_layout, [(raw(mask["key"]), mask["sign"]) for mask in known["masks"]]
    end = len(known["sum"])
    for item in known["inputs"]:
        assert secret_commitment(parameters, item["site"], secret) == raw(item["secret_commitment"])
        vectors = {name: np.array(item["elements"][name], lane.word) for name, lane in parameters.lanes.items()}
        slots = layout.slots_of(vectors, range(1))
        assert slots[:end].tolist() == item["slots"]
        assert not slots[end:].any()
        mask_slots(layout, slots, masks, range(1))
        assert slots[:end].tolist() == item["masked"]
    sums = layout.empty_sums()
    layout.take_sums(np.pad(np.array(known["sum"], np.uint64), (0, SLOTS - end)), range(1), sums)
    totals = layout.totals(sums, survivors=4)
    assert {name: total.tolist() for name, total in totals.items()} == known["totals"]
    aggregate = aggregate_of(
        parameters, totals, survivors=parameters.cohort, digest_key=raw(known["digest_key"]), who="test"
    )
    assert aggregate.digest == raw(known["aggregate_digest"])


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_keystreams(bits: int) -> None:
    """The first bytes of a keystream are as given, as bytes and as little-endian words, read at once or in parts."""
    for item in load("masks.json")["keystreams"]:
        first, known = raw(item["first_bytes"]), item["words"][str(bits)]
        word, size = f"<u{bits // 8}", bits // 8
        words = keystream(raw(item["key"]), word, len(first) // size)
        assert words.tobytes() == first
        assert words[: len(known)].tolist() == known
        stream, room = Keystream(raw(item["key"])), Room(np.dtype(word), len(words))
        assert b"".join(stream.next(room, at // size).tobytes() for at in (16, 48)) == first


@pytest.mark.parametrize("offset", [0, STRETCH_BYTES - 32])
def test_keystreams_over_a_stretch(offset: int) -> None:
    """The bytes around the end of a keystream's first stretch are as given, read from the beginning or from there."""
    for item in load("masks.json")["keystreams"]:
        words = keystream(raw(item["key"]), "<u8", (STRETCH_BYTES + 32 - offset) // 8, offset=offset)
        assert words[-8:].tobytes() == raw(item["over_a_stretch"])


@pytest.mark.parametrize("item", load("masks.json")["masked"], ids=lambda item: f"{item['word_bits']} bits")
def test_masked_values(item: dict[str, Any]) -> None:
    """Values under an added and a subtracted mask are as given, in the ring."""
    lane = words_of(item["word_bits"], len(item["values"]))
    words = np.array(item["values"], lane.masked_word)
    apply_masks(words, [(raw(mask["key"]), mask["sign"]) for mask in item["masks"]])
    assert lane.reduce(words).tolist() == item["masked"]


@pytest.mark.parametrize(
    "item", load("packing.json")["packed"], ids=lambda item: f"{len(item['words'])} of {item['word_bits']} bits"
)
def test_packed_values(item: dict[str, Any]) -> None:
    """Words pack to the given bytes, and these unpack to them."""
    lane = words_of(item["word_bits"], len(item["words"]))
    assert pack(lane, np.array(item["words"], lane.masked_word)) == raw(item["packed"])
    assert unpack(lane, raw(item["packed"]), who="test").tolist() == item["words"]


@pytest.mark.parametrize("item", load("packing.json")["joined"], ids=lambda item: f"{item['ring_bits']} bits")
def test_joined_values(item: dict[str, Any]) -> None:
    """Integers become the given words as their digits, and are read off them again."""
    encoding = FixedPoint(value_range=1.0) if item["signed"] else Counts(maximum=1)
    lane = Lane(name="x", length=len(item["integers"]), encoding=encoding)
    ring_lane = RingLane(lane=lane, ring_bits=item["ring_bits"])
    values = np.array([integer % 2**64 for integer in item["integers"]], np.uint64).astype(ring_lane.word)
    assert ring_lane.reduce(ring_lane.join(values)).tolist() == item["words"]
    found = integers(ring_lane, np.array(item["words"], ring_lane.masked_word))
    assert found.view(np.uint64).tolist() == [integer % 2**64 for integer in item["integers"]]


def test_packed_bytes_to_refuse() -> None:
    """Bytes of another length, and filling bits that are not zero, are refused."""
    for item in load("packing.json")["refused"]:
        with pytest.raises(MalformedMessage):
            unpack(words_of(item["word_bits"], item["length"]), raw(item["packed"]), who="test")


@pytest.mark.parametrize("index", range(len(load("encoding.json"))))
def test_encoded_values(index: int) -> None:
    """Values, coins and weight give the ring elements as given, clip counts, weight and canary included."""
    item = load("encoding.json")[index]
    lane = lane_of(item["lane"])
    added = {name: Lane(name=name, length=1, encoding=Counts(maximum=1)) for name in item["ring_bits"]}
    lanes = {
        name: RingLane(lane=lane if name == lane.name else added[name], ring_bits=bits)
        for name, bits in item["ring_bits"].items()
    }
    parameters: Any = SimpleNamespace(lanes=lanes, max_weight=item["max_weight"])
    values = {lane.name: np.array(item["values"])}
    encoded = encode_input(parameters, values, weight=item["weight"], entropy=drawn([item["coins_key"]]))
    assert elements(encoded, parameters) == item["encoded"]


# --- whole rounds ---


class Replay:
    """The machines of a round in a file, whose messages are compared with the file as they come."""

    def __init__(self, name: str) -> None:
        """Create and start every site, and give it its input."""
        self.known = load(name)
        self.parameters = parameters_of(self.known["parameters"])
        self.coordinator = Coordinator(parameters=self.parameters)
        self.participants = {}
        self.pending: dict[str, list[Any]] = {}
        for site, item in self.known["sites"].items():
            values = {lane: np.array(given) for lane, given in item["values"].items()}
            encoded = encode_input(self.parameters, values, weight=item["weight"], entropy=drawn(item["coins"]))
            assert elements(encoded, self.parameters) == item["encoded"]
            self.participants[site] = Participant(
                site=SiteId(site),
                identity=identity_of(site),
                parameters=self.parameters,
                journal=MemoryJournal(),
                entropy=drawn(item["entropy"]),
            )
            self.pending[site] = self.participants[site].start() + self.participants[site].submit(encoded)

    def speak(self, phase: dict[str, Any], sites: list[str] | None = None) -> list[Any]:
        """Give the coordinator what ``sites`` (all, if none are given) send in ``phase``; returns what it sends."""
        outbound: list[Any] = []
        for site in phase["from_sites"] if sites is None else sites:
            (message,) = self.pending.pop(site)
            frames = encode(message)
            assert [frame.hex() for frame in frames] == phase["from_sites"][site]
            outbound += self.coordinator.receive(decode_from_site(frames), sender=SiteId(site))
        return outbound

    def listen(self, phase: dict[str, Any], outbound: list[Any]) -> None:
        """Give each site what the coordinator sent at the end of ``phase``."""
        if not outbound:
            outbound = self.coordinator.close_phase()
        sent = {item.recipient: [frame.hex() for frame in encode(item.message)] for item in outbound}
        assert sent == phase["to_sites"]
        for item in outbound:
            message = decode_from_coordinator(encode(item.message))
            self.pending[item.recipient] = self.participants[item.recipient].receive(message)

    def until(self, done: Callable[[], bool]) -> list[dict[str, Any]]:
        """Run honestly phase by phase until ``done``; returns the phases that are left."""
        phases = list(self.known["phases"])
        while phases and not done():
            phase = phases.pop(0)
            self.listen(phase, self.speak(phase))
        return phases

    def check_release(self) -> None:
        """The coordinator released what the file says."""
        phase = self.coordinator.phase
        assert isinstance(phase, CoordinatorFinished)
        aggregate = phase.aggregate
        assert {lane: total.tolist() for lane, total in aggregate.totals.items()} == self.known["totals"]
        assert [*aggregate.survivors] == self.known["survivors"]
        assert aggregate.digest == raw(self.known["aggregate_digest"])


def in_phase(machine: Any, name: str) -> Callable[[], bool]:
    """Whether ``machine`` is in the phase of that name."""
    return lambda: type(machine.phase).__name__ == name


def is_message(frames: list[bytes]) -> bool:
    """Whether ``frames`` decode as a message of the coordinator."""
    try:
        decode_from_coordinator(frames)
    except MalformedMessage:
        return False
    return True


@pytest.mark.parametrize("name", ROUNDS)
def test_a_whole_round(name: str) -> None:
    """With the given entropy every message of a round, its totals and its digest are as given."""
    replay = Replay(name)
    parameters = replay.known["parameters"]
    assert replay.parameters.digest == raw(parameters["parameters"])
    assert replay.parameters.context == raw(parameters["context"])
    assert not replay.until(lambda: False)
    replay.check_release()
    for site in replay.known["phases"][-1]["to_sites"]:
        assert isinstance(replay.participants[site].phase, ParticipantFinished)


def hostile(kind: str) -> list[Any]:
    """The hostile messages of a kind in all files, each with the name of its round."""
    return [
        pytest.param(known["round"], item, id=f"{known['round']}, {item['phase']}: {item['name']}")
        for known in map(load, HOSTILE)
        for item in known[kind]
    ]


@pytest.mark.parametrize(("round_file", "item"), hostile("to_sites"))
def test_hostile_message_to_a_site(round_file: str, item: dict[str, Any]) -> None:
    """The site refuses the bytes with the given code, and the round is over for it, if they are a message at all."""
    replay = Replay(round_file)
    site = replay.participants[item["machine"]]
    replay.until(in_phase(site, item["phase"]))
    assert in_phase(site, item["phase"])()
    frames = [raw(frame) for frame in item["frames"]]
    with pytest.raises(SecureAggregationError) as caught:
        site.receive(decode_from_coordinator(frames))
    assert caught.value.code == item["code"]
    assert isinstance(site.phase, Aborted) == is_message(frames)


@pytest.mark.parametrize(("round_file", "item"), hostile("to_coordinator"))
def test_hostile_message_to_the_coordinator(round_file: str, item: dict[str, Any]) -> None:
    """The coordinator refuses the bytes with the given code; the honest rest of the round gives the same release."""
    replay = Replay(round_file)
    phase, *rest = replay.until(in_phase(replay.coordinator, item["phase"]))
    assert phase["phase"] == item["phase"]
    replay.speak(phase, item["received_from"])
    frames = [raw(frame) for frame in item["frames"]]
    with pytest.raises(SecureAggregationError) as caught:
        replay.coordinator.receive(decode_from_site(frames), sender=SiteId(item["sender"]))
    assert caught.value.code == item["code"]
    others = [site for site in phase["from_sites"] if site not in item["received_from"]]
    replay.listen(phase, replay.speak(phase, others))
    for later in rest:
        replay.listen(later, replay.speak(later))
    replay.check_release()
