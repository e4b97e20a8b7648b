"""One round of docs/protocol.md a second time: slow, plain, and with nothing of ``secureagg`` in it.

Python integers, bytes and lists only; the primitives (AES, X25519, Ed25519, HKDF, ChaCha20-Poly1305, SHA-256) come from
``cryptography`` and ``hashlib``.  A message is a list in the order of its fields, and ``messagepack`` gives its bytes.
This code follows honest machines: it checks nothing that an attacker could send.
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PRIME = 2**256 + 297
CHUNK_BYTES = 1 << 20
STRETCH_BYTES = 1 << 19
SIGNATURE_FIELD = 3
PHASES = ("AdvertisingKeys", "SharingKeys", "CollectingMaskedInputs", "CheckingConsistency", "Unmasking")

Entropy = Callable[[int], bytes]
Message = list  # [tag, context, ...] or [tag, context, sender, signature, ...]


# --- bytes ---


def label(purpose: str) -> bytes:
    """The domain-separation label of ``purpose``."""
    return b"secureagg/v1/" + purpose.encode()


def frame(*parts: bytes) -> bytes:
    """Each part preceded by its length as 8 bytes, little-endian."""
    framed = b""
    for part in parts:
        framed += len(part).to_bytes(8, "little") + part
    return framed


def digest(purpose: str, *parts: bytes) -> bytes:
    """SHA-256 over the label of ``purpose`` and the parts, framed."""
    return sha256(frame(label(purpose), *parts)).digest()


def messagepack(value: list | tuple | str | bytes | int) -> bytes:
    """The shortest MessagePack encoding of arrays, strings, byte strings and integers from 0."""
    if isinstance(value, list | tuple):
        head = _head(len(value), (16, 0x90), (1 << 16, 0xDC, 2), (1 << 32, 0xDD, 4))
        return head + b"".join(messagepack(item) for item in value)
    if isinstance(value, str):
        raw = value.encode()
        return _head(len(raw), (32, 0xA0), (1 << 8, 0xD9, 1), (1 << 16, 0xDA, 2), (1 << 32, 0xDB, 4)) + raw
    if isinstance(value, bytes):
        return _head(len(value), (1 << 8, 0xC4, 1), (1 << 16, 0xC5, 2), (1 << 32, 0xC6, 4)) + value
    return _head(value, (128, 0), (1 << 8, 0xCC, 1), (1 << 16, 0xCD, 2), (1 << 32, 0xCE, 4), (1 << 64, 0xCF, 8))


def _head(number: int, *forms: tuple[int, ...]) -> bytes:
    """``number`` in the first form whose limit is above it: (limit, first byte) or (limit, first byte, size)."""
    for limit, first, *size in forms:
        if number < limit:
            return bytes([first]) + number.to_bytes(size[0], "big") if size else bytes([first + number])
    raise ValueError(f"{number} is too large")


# --- primitives ---


def counting_entropy(seed: bytes) -> Entropy:
    """Reproducible bytes, as secureagg.testing.CountingEntropy gives them: SHA-256(seed, number of the draw, block)."""
    draws = 0

    def entropy(length: int) -> bytes:
        nonlocal draws
        draws += 1
        out = b""
        while len(out) < length:
            block = len(out) // 32
            out += sha256(seed + draws.to_bytes(8, "little") + block.to_bytes(8, "little")).digest()
        return out[:length]

    return entropy


def keystream(key: bytes, length: int) -> bytes:
    """``length`` bytes of AES-256-CTR under ``key``: the counter block is the number of the stretch of 512 KiB as 12
    bytes, and as 4 that of the block in it, from 2."""
    places = (divmod(16 * block, STRETCH_BYTES) for block in range(-(-length // 16)))
    counters = b"".join(stretch.to_bytes(12, "big") + (2 + at // 16).to_bytes(4, "big") for stretch, at in places)
    return Cipher(AES(key), ECB()).encryptor().update(counters)[:length]  # noqa: S305, the blocks of CTR mode


def x25519_public(secret: bytes) -> bytes:
    """The public key of an X25519 secret key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def x25519(secret: bytes, public: bytes) -> bytes:
    """What the holders of two X25519 keys agree on."""
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))


def ed25519_public(seed: bytes) -> bytes:
    """The public key of an Ed25519 seed."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def ed25519(seed: bytes, purpose: str, *parts: bytes) -> bytes:
    """The signature over the label of ``purpose`` and the parts, framed."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(frame(label(purpose), *parts))


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)


# --- what a round is ---


@dataclass(frozen=True)
class FixedPoint:
    """Reals in [-value_range, value_range] as integers of ``value_bits`` bits."""

    value_range: float
    value_bits: int = 16
    clip: bool = False

    @property
    def levels(self) -> int:
        """The largest encoded integer."""
        return 2 ** (self.value_bits - 1) - 1


@dataclass(frozen=True)
class Counts:
    """Integers from 0 to ``maximum``."""

    maximum: int


@dataclass(frozen=True)
class Lane:
    """A named vector of a round."""

    name: str
    length: int
    encoding: FixedPoint | Counts
    weighted: bool = False


@dataclass(frozen=True)
class Member:
    """One entry of the roster: name, Ed25519 public key, transport public key."""

    name: str
    signing_key: bytes
    transport_key: bytes


def card_signature(identity_seed: bytes, name: str, transport_key: bytes) -> bytes:
    """A site's signature that ties name, signing key and transport key together."""
    return ed25519(identity_seed, "card", name.encode(), ed25519_public(identity_seed), transport_key)


def roster_digest(members: Iterable[Member]) -> bytes:
    """SHA-256 over names and keys in order of name."""
    parts = []
    for member in sorted(members, key=lambda member: member.name):
        parts += [member.name.encode(), member.signing_key, member.transport_key]
    return digest("roster", *parts)


def ring_bits(lane: Lane, cohort_size: int, max_weight: int | None) -> int:
    """The least width, from 8 bits (64 for the canary), with room for the largest sum of the whole cohort."""
    if lane.name == "canary":
        return 64
    weight = max_weight if lane.weighted and max_weight is not None else 1
    if isinstance(lane.encoding, FixedPoint):
        states = 2 * cohort_size * weight * lane.encoding.levels + 1
    else:
        states = cohort_size * weight * lane.encoding.maximum + 1
    bits = 8
    while 2**bits < states:
        bits += 1
    return bits


def is_signed(lane: Lane) -> bool:
    """Whether the lane's ring elements stand for integers on both sides of 0."""
    return isinstance(lane.encoding, FixedPoint)


def word_bytes(bits: int) -> int:
    """Bytes of the machine word for so many bits: the least of 1, 2, 4 and 8 that holds ``bits`` bits."""
    return next(size for size in (1, 2, 4, 8) if bits <= 8 * size)


@dataclass(frozen=True)
class Round:
    """All that both sides must agree on.  ``own_lanes``: without canary, weight and clip counts; ``cohort``: sorted.

    On the sparse graph ``neighbours`` is k, and ``max_dropouts`` the d that both are made for; no byte depends on it.
    ``release_to``: with the homomorphic backend, who is given the sum.
    """

    consortium: str
    run: str
    number: int
    members: tuple[Member, ...]
    cohort: tuple[str, ...]
    own_lanes: tuple[Lane, ...]
    threshold: int
    max_corrupt: int
    minimum_survivors: int
    model_digest: bytes
    max_weight: int | None = None
    neighbours: int | None = None
    max_dropouts: int | None = None
    release_to: str | None = None

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """Every lane, those that the protocol adds included, in order of name."""
        lanes = [*self.own_lanes, Lane("canary", 1, Counts(1))]
        if self.max_weight is not None:
            lanes.append(Lane("weight", 1, Counts(self.max_weight)))
        for lane in self.own_lanes:
            if isinstance(lane.encoding, FixedPoint) and lane.encoding.clip:
                lanes.append(Lane(lane.name + "/clipped", 1, Counts(lane.length)))
        return tuple(sorted(lanes, key=lambda lane: lane.name))

    def bits(self, lane: Lane) -> int:
        """The ring width of a lane of this round."""
        return ring_bits(lane, len(self.cohort), self.max_weight)

    def position(self, name: str) -> int:
        """A site's Shamir coordinate."""
        return self.cohort.index(name) + 1

    def positions(self, names: Iterable[str]) -> list[int]:
        """The positions of sites, in ascending order."""
        return [self.position(name) for name in sorted(names)]

    def at(self, positions: Iterable[int]) -> list[str]:
        """The sites at these positions."""
        return [self.cohort[position - 1] for position in positions]

    @cached_property
    def roster(self) -> bytes:
        """The roster digest."""
        return roster_digest(self.members)

    @cached_property
    def parameters(self) -> bytes:
        """The parameter digest."""
        thresholds = [self.threshold, self.max_corrupt, self.minimum_survivors, self.max_weight or 0]
        if self.neighbours is not None:
            thresholds.append(self.neighbours)
        parts = [b"".join(int64le(number) for number in thresholds)]
        for lane in self.lanes:
            match lane.encoding:
                case FixedPoint(value_range, value_bits, clip):
                    encoding = b"fixed-point" + struct.pack("<d", value_range) + int64le(value_bits) + bytes([clip])
                case Counts(maximum):
                    encoding = b"counts" + int64le(maximum)
            shape = int64le(lane.length) + int64le(self.bits(lane)) + bytes([lane.weighted])
            parts += [lane.name.encode(), shape, encoding]
        if self.release_to is not None:
            parts += [b"homomorphic", self.release_to.encode()]
        return digest("parameters", *parts)

    @cached_property
    def context(self) -> bytes:
        """The 32 bytes that everything in the round is bound to."""
        return digest(
            "context",
            self.consortium.encode(),
            self.run.encode(),
            self.number.to_bytes(8, "little"),
            self.parameters,
            self.model_digest,
            self.roster,
            *(name.encode() for name in self.cohort),
        )


def int64le(number: int) -> bytes:
    """8 bytes, little-endian, two's complement."""
    return number.to_bytes(8, "little", signed=True)


# --- k and t of the sparse graph ---

UNSAFE = Fraction(1, 2**41)  # the chance of each of the two events that would be the end of all secrecy
UNLUCKY = Fraction(1, 2**20)  # the chance that a round with no more than d dropouts cannot be finished


def hypergeometric(population: int, marked: int, drawn: int, number: int) -> Fraction:
    """Pr[Hypergeometric(population, marked, drawn) = number]: so many marked ones among those drawn."""
    return Fraction(
        math.comb(marked, number) * math.comb(population - marked, drawn - number), math.comb(population, drawn)
    )


def chance(population: int, marked: int, drawn: int, numbers: Iterable[int]) -> Fraction:
    """Pr[Hypergeometric(population, marked, drawn) is one of ``numbers``]."""
    return sum((hypergeometric(population, marked, drawn, number) for number in numbers), Fraction(0))


def disconnected(n: int, k: int, lost: int) -> Fraction:
    """The bound on the chance that the graph falls apart when so many sites are lost."""
    if k > lost:
        return Fraction(0)
    ratio = Fraction(math.factorial(lost) * math.factorial(n - k), math.factorial(n) * math.factorial(lost - k))
    return Fraction(n * (n - k - 1), 2) * ratio


def least_honest(n: int, k: int, t: int, c: int) -> int:
    """The least m for which the expected number of sets of m honest sites, closed under their holders, is not small."""
    for m in range(1, n - c + 1):
        # Of k drawn among n - 1 others, t or more are among the m - 1 others of the set and the c that collude.
        closed = chance(n - 1, m - 1 + c, k, range(t, k + 1))
        if math.comb(n - c, m) * closed**m > UNSAFE / n:
            return m
    raise AssertionError("the set of all honest sites is always closed")


def plan(n: int, c: int, d: int) -> tuple[int, int, int] | None:
    """k, t and the least number of honest sites in every sum; None if only the complete graph is safe."""
    for k in range(2, n - 1, 2):
        if disconnected(n, k, c + d) > UNSAFE:
            continue
        x = next(x for x in range(k + 1) if chance(n - 1, c, k, range(x + 1, k + 1)) <= UNSAFE / n)
        for t in range(1, k + 1):
            if 2 * t <= k + x or chance(n, n - d, k, range(t)) > UNLUCKY / n:
                continue
            honest = least_honest(n, k, t, c)
            if 2 * honest > n - c:
                return k, t, honest
    return None


# --- numbers: encoding, packing ---


def encode_fixed_point(values: Sequence[float], encoding: FixedPoint, coins_key: bytes) -> tuple[list[int], int]:
    """The integers of ``values`` and how many values were moved to the edge; coin i is 32 bits, little-endian."""
    coins = keystream(coins_key, 4 * len(values))
    scale = encoding.levels / encoding.value_range
    integers, clipped = [], 0
    for i, given in enumerate(values):
        value = given
        if abs(value) > encoding.value_range:
            if not encoding.clip:
                raise ValueError(f"value {i} is out of range")
            clipped += 1
            value = math.copysign(encoding.value_range, value)
        scaled = value * scale
        below = math.floor(scaled)
        coin = int.from_bytes(coins[4 * i : 4 * i + 4], "little")
        rounded = below + 1 if coin < (scaled - below) * 2.0**32 else below
        integers.append(max(-encoding.levels, min(encoding.levels, rounded)))
    return integers, clipped


def encode_input(
    spec: Round, values: Mapping[str, Sequence[float]], weight: int | None, coins: Entropy
) -> dict[str, list[int]]:
    """Lane -> ring elements of one site; draws 32 bytes of ``coins`` for each fixed-point lane in order of name."""
    plain: dict[str, list[int]] = {"canary": [1]}
    if weight is not None:
        plain["weight"] = [weight]
    for lane in sorted(spec.own_lanes, key=lambda lane: lane.name):
        if isinstance(lane.encoding, FixedPoint):
            plain[lane.name], clipped = encode_fixed_point(values[lane.name], lane.encoding, coins(32))
            if lane.encoding.clip:
                plain[lane.name + "/clipped"] = [clipped]
        else:
            plain[lane.name] = [int(value) for value in values[lane.name]]
        if lane.weighted and weight is not None:
            plain[lane.name] = [weight * value for value in plain[lane.name]]
    return {lane.name: [value % 2 ** spec.bits(lane) for value in plain[lane.name]] for lane in spec.lanes}


def centred(element: int, bits: int, signed: bool) -> int:
    """The integer that an element of the ring of ``bits`` bits stands for."""
    return element - 2**bits if signed and element >= 2 ** (bits - 1) else element


def join(elements: Sequence[int], bits: int, signed: bool) -> list[int]:
    """Masked words: the integers of as many elements as 64 bits hold, as digits to the base 2^bits, lowest first."""
    count = 64 // bits
    words = []
    for at in range(0, len(elements), count):
        digits = [centred(element, bits, signed) for element in elements[at : at + count]]
        words.append(sum(digit * 2 ** (place * bits) for place, digit in enumerate(digits)) % 2 ** (count * bits))
    return words


def split(words: Iterable[int], length: int, bits: int, signed: bool) -> list[int]:
    """The ``length`` integers that are the digits of sums of words."""
    found = []
    for word in words:
        rest = word
        for _ in range(64 // bits):
            found.append(centred(rest % 2**bits, bits, signed))
            rest = (rest - found[-1]) // 2**bits
    return found[:length]


def pack(values: Iterable[int], bits: int) -> bytes:
    """Value i becomes bits i * bits to (i + 1) * bits of a little-endian stream, filled up with zero bits."""
    out, waiting, held = bytearray(), 0, 0
    for value in values:
        waiting |= value << held
        held += bits
        out += (waiting & (2 ** (held // 8 * 8) - 1)).to_bytes(held // 8, "little")
        waiting >>= held // 8 * 8
        held %= 8
    return bytes(out) + (bytes([waiting]) if held else b"")


def unpack(packed: bytes, length: int, bits: int) -> list[int]:
    """The ``length`` values of ``bits`` bits that ``pack`` put there."""
    values = []
    for i in range(length):
        first, last = i * bits // 8, -(-(i + 1) * bits // 8)
        values.append((int.from_bytes(packed[first:last], "little") >> i * bits % 8) % 2**bits)
    return values


# --- secrets: sharing, keys, masks, commitments ---


def shamir_share(secret: bytes, threshold: int, positions: Iterable[int], entropy: Entropy) -> dict[int, bytes]:
    """Position -> share.  Draws 48 bytes for each coefficient, that of the highest power first."""
    powers = range(threshold - 1, 0, -1)
    coefficients = {power: int.from_bytes(entropy(48), "little") % PRIME for power in powers}
    coefficients[0] = int.from_bytes(secret, "little")
    shares = {}
    for x in positions:
        value = sum(coefficient * x**power for power, coefficient in coefficients.items()) % PRIME
        shares[x] = value.to_bytes(33, "little")
    return shares


def shamir_reconstruct(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly threshold shares: the value at 0 of the polynomial through them."""
    total = 0
    for x, share in shares.items():
        factor = 1
        for other in shares:
            if other != x:
                factor = factor * other * pow(other - x, -1, PRIME) % PRIME
        total += int.from_bytes(share, "little") * factor
    return (total % PRIME).to_bytes(32, "little")


def derive(roster: bytes, context: bytes, secret: bytes, purpose: str, *names: str) -> bytes:
    """The key for ``purpose`` and ``names``."""
    return hkdf(secret, roster, frame(label(purpose), context, *(name.encode() for name in names)))


def seal(roster: bytes, context: bytes, secret: bytes, shares: bytes, sender: str, recipient: str) -> bytes:
    """The shares encrypted from ``sender`` to ``recipient``; ``secret``: what their channel keys agree on."""
    key = derive(roster, context, secret, "channel", sender, recipient)
    return ChaCha20Poly1305(key).encrypt(bytes(12), shares, share_context(context, sender, recipient))


def open_sealed(roster: bytes, context: bytes, secret: bytes, sealed: bytes, sender: str, recipient: str) -> bytes:
    """The shares that ``seal`` encrypted."""
    key = derive(roster, context, secret, "channel", sender, recipient)
    return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, share_context(context, sender, recipient))


def share_context(context: bytes, sender: str, recipient: str) -> bytes:
    """The associated data of sealed shares."""
    return frame(label("share"), context, sender.encode(), recipient.encode())


def seed_commitment(context: bytes, name: str, seed: bytes) -> bytes:
    """The commitment to a self seed."""
    return digest("seed-commitment", context, name.encode(), seed)


def share_commitments(context: bytes, owner: str, holder: str, mask_key_share: bytes, seed_share: bytes) -> bytes:
    """The 64 bytes of commitments to what ``holder`` gets of ``owner``."""
    names = owner.encode(), holder.encode()
    return digest("mask-key-share", context, *names, mask_key_share) + digest(
        "self-seed-share", context, *names, seed_share
    )


def mask(key: bytes, length: int, bits: int) -> list[int]:
    """The mask of ``length`` words under ``key``: one whole machine word of keystream each, not yet reduced."""
    size = word_bytes(bits)
    stream = keystream(key, length * size)
    return [int.from_bytes(stream[at : at + size], "little") for at in range(0, len(stream), size)]


def add_mask(values: Sequence[int], sign: int, key: bytes, bits: int) -> list[int]:
    """``values`` plus or minus the mask under ``key``, modulo 2^bits."""
    return [(value + sign * word) % 2**bits for value, word in zip(values, mask(key, len(values), bits), strict=True)]


# --- messages ---


def signed(identity_seed: bytes, message: Message) -> Message:
    """A site's message with its signature in place of the empty one."""
    unsigned = [*message[:SIGNATURE_FIELD], b"", *message[SIGNATURE_FIELD + 1 :]]
    signature = ed25519(identity_seed, "signature", messagepack(unsigned))
    return [*message[:SIGNATURE_FIELD], signature, *message[SIGNATURE_FIELD + 1 :]]


def input_digest(masked_input: Message) -> bytes:
    """What a survivor list names a masked input by."""
    return sha256(b"".join(masked_input[4])).digest()


def aggregate_digest(spec: Round, totals: Mapping[str, Sequence[int]]) -> bytes:
    """SHA-256 over names and totals of all lanes in order of name."""
    parts = []
    for lane in spec.lanes:
        parts += [lane.name.encode(), b"".join(int64le(total) for total in totals[lane.name])]
    return digest("aggregate", spec.context, *parts)


def draw_holders(spec: Round, me: str, entropy: Entropy) -> list[int]:
    """k positions of others: the first k of a shuffle by 16 bytes for each place, in ascending order."""
    others = [position for position in range(1, len(spec.cohort) + 1) if position != spec.position(me)]
    for place in range(spec.neighbours or 0):
        drawn = place + int.from_bytes(entropy(16), "little") % (len(others) - place)
        others[place], others[drawn] = others[drawn], others[place]
    return sorted(others[: spec.neighbours])


class Site:
    """An honest site: one method for each of its five messages, to be called in their order."""

    def __init__(self, spec: Round, name: str, identity_seed: bytes, entropy: Entropy) -> None:
        """Draw nothing yet."""
        self.spec, self.name, self.identity_seed, self.entropy = spec, name, identity_seed, entropy
        self.held: dict[str, tuple[bytes, bytes]] = {}

    def sign(self, tag: str, *fields: object) -> Message:
        """A signed message of this site."""
        return signed(self.identity_seed, [tag, self.spec.context, self.name, b"", *fields])

    def advertise(self) -> Message:
        """Message 0.  Draws 32 bytes for the mask key, then 32 for the channel key, then the holders."""
        self.mask_secret, self.channel_secret = self.entropy(32), self.entropy(32)
        keys = x25519_public(self.mask_secret), x25519_public(self.channel_secret)
        if self.spec.neighbours is None:
            return self.sign("key-advertisement", *keys)
        return self.sign("sparse-advertisement", *keys, draw_holders(self.spec, self.name, self.entropy))

    def share(self, keys: Message) -> Message:
        """Message 1.  Draws 32 bytes for the self seed, then the coefficients of the mask key, then of the seed."""
        spec, context, me = self.spec, self.spec.context, self.name
        advertisements = {item[2]: item for item in keys[2]}
        self.mask_keys = {name: item[4] for name, item in advertisements.items()}
        self.channel_keys = {name: item[5] for name, item in advertisements.items()}
        self.self_seed = self.entropy(32)
        holders = sorted(holders_of(spec, advertisements[me]) & set(advertisements))
        positions = spec.positions(holders)
        key_shares = shamir_share(self.mask_secret, spec.threshold, positions, self.entropy)
        seed_shares = shamir_share(self.self_seed, spec.threshold, positions, self.entropy)
        committed, sealed = [], []
        for holder in holders:
            pair = key_shares[spec.position(holder)], seed_shares[spec.position(holder)]
            committed.append([holder, share_commitments(context, me, holder, *pair)])
            if holder == me:
                self.held[me] = pair
            else:
                secret = x25519(self.channel_secret, self.channel_keys[holder])
                sealed.append([holder, seal(spec.roster, context, secret, b"".join(pair), me, holder)])
        return self.sign("encrypted-shares", seed_commitment(context, me, self.self_seed), committed, sealed)

    def masked_input(self, delivery: Message, vectors: Mapping[str, Sequence[int]]) -> tuple[Message, list[bytes]]:
        """Message 2 and its chunks."""
        spec, context, me = self.spec, self.spec.context, self.name
        for sender, sealed in delivery[3]:
            secret = x25519(self.channel_secret, self.channel_keys[sender])
            shares = open_sealed(spec.roster, context, secret, sealed, sender, me)
            self.held[sender] = shares[:33], shares[33:]
        peers = {sender for sender, _ in delivery[3]}
        if spec.neighbours is not None:
            peers |= set(spec.at(delivery[4]))
        packed = b""
        for lane in spec.lanes:
            bits = spec.bits(lane)
            own_key = derive(spec.roster, context, self.self_seed, "self-mask", lane.name, me)
            word_bits = 64 // bits * bits
            words = add_mask(join(vectors[lane.name], bits, is_signed(lane)), 1, own_key, word_bits)
            for peer in peers:
                secret = x25519(self.mask_secret, self.mask_keys[peer])
                key = derive(spec.roster, context, secret, "pairwise-mask", lane.name, min(me, peer), max(me, peer))
                words = add_mask(words, 1 if me > peer else -1, key, word_bits)
            packed += pack(words, word_bits)
        chunks = [packed[at : at + CHUNK_BYTES] for at in range(0, len(packed), CHUNK_BYTES)]
        digests = [sha256(chunk).digest() for chunk in chunks]
        if spec.neighbours is None:
            return self.sign("masked-input", digests, []), chunks
        return self.sign("sparse-input", digests, [], self.sign("inclusion", delivery[4])), chunks

    def agree(self, survivors: Message) -> Message:
        """Message 3: the signature on the list, or the acknowledgement of the dealers whose statements are shown."""
        if self.spec.neighbours is None:
            self.survivors = [name for name, _ in survivors[2]]
            signature = ed25519(self.identity_seed, "survivors", self.spec.context, messagepack(survivors))
            return self.sign("survivor-signature", signature)
        self.survivors = [inclusion[2] for inclusion in survivors[2]]
        return self.sign("acknowledgement", self.spec.positions(self.survivors))

    def unmask_shares(self) -> Message:
        """Message 4."""
        dropouts = sorted(set(self.held) - set(self.survivors))
        seeds = [[name, self.held[name][1]] for name in self.survivors]
        return self.sign("unmask-shares", seeds, [[name, self.held[name][0]] for name in dropouts])


# --- what the coordinator sends at the end of each phase: site -> message ---

Sent = dict[str, Message]


class TooFewSites(Exception):
    """The round ends without a release."""


def need(found: int, expected: int) -> None:
    """Raise TooFewSites unless as many as expected were found."""
    if found < expected:
        raise TooFewSites


def holders_of(spec: Round, advertisement: Message) -> set[str]:
    """Who is to hold shares of the site that advertised."""
    return set(spec.cohort if spec.neighbours is None else spec.at(advertisement[6]))


def sharing_with(share: Message) -> set[str]:
    """Whom a site dealt its shares to."""
    return {holder for holder, _ in share[5]}


def taking_part(spec: Round, holders: Mapping[str, set[str]]) -> list[str]:
    """Those with t holders among themselves, in order of name: without the others, counted again until all have."""
    remaining = set(holders)
    while alone := {name for name in remaining if len(holders[name] & remaining) < spec.threshold}:
        remaining -= alone
    need(len(remaining), spec.minimum_survivors)
    return sorted(remaining)


def left_out(spec: Round, names: Iterable[str]) -> Sent:
    """What those get without whom the round goes on."""
    return {name: ["round-failed", spec.context, "threshold-not-met"] for name in names}


def tagged(spec: Round, complete: str, sparse: str) -> Message:
    """The first fields of a message of the coordinator."""
    return [complete if spec.neighbours is None else sparse, spec.context]


def keys_shown(spec: Round, advertisements: Sent) -> Sent:
    """To each site its own advertisement, its holders' and its dealers': on the complete graph those of all."""
    holders = {name: holders_of(spec, message) for name, message in advertisements.items()}
    names = taking_part(spec, holders)
    sent = left_out(spec, set(holders) - set(names))
    for name in names:
        shown = [peer for peer in names if peer == name or peer in holders[name] or name in holders[peer]]
        sent[name] = [*tagged(spec, "cohort-keys", "sparse-keys"), [advertisements[peer] for peer in shown]]
    return sent


def shares_delivered(spec: Round, shares: Sent) -> Sent:
    """To each site what others dealt to it."""
    holders = {name: sharing_with(message) for name, message in shares.items()}
    names = taking_part(spec, holders)
    sent = left_out(spec, set(holders) - set(names))
    for name in names:
        dealers = [dealer for dealer in names if dealer != name and name in holders[dealer]]
        committed = [[dealer, dict(shares[dealer][5])[name]] for dealer in dealers]
        sealed = [[dealer, dict(shares[dealer][6])[name]] for dealer in dealers]
        sent[name] = [*tagged(spec, "share-delivery", "sparse-delivery"), committed, sealed]
        if spec.neighbours is not None:
            sent[name].append(spec.positions(holders[name].intersection(names)))
    return sent


def survivors_shown(spec: Round, shares: Sent, inputs: Sent) -> Sent:
    """To each survivor the list of them, or on the sparse graph the statements of its dealers among them."""
    need(len(inputs), spec.minimum_survivors)
    if spec.neighbours is None:
        listed = ["survivor-list", spec.context, [[name, input_digest(inputs[name])] for name in sorted(inputs)]]
        return dict.fromkeys(sorted(inputs), listed)
    sent = {}
    for name in inputs:
        dealers = [peer for peer in sorted(inputs) if name in sharing_with(shares[peer])]
        sent[name] = ["sparse-survivors", spec.context, [inputs[dealer][6] for dealer in dealers]]
    return sent


def shares_asked_for(spec: Round, shares: Sent, agreed: Sent) -> Sent:
    """To those who signed, all signatures; to those with t holders who acknowledged them, what these sent."""
    need(len(agreed), spec.threshold)
    if spec.neighbours is None:
        request = ["unmask-request", spec.context, [[name, agreed[name][4]] for name in sorted(agreed)]]
        return dict.fromkeys(sorted(agreed), request)
    sent = {}
    for name in agreed:
        holders = sorted(sharing_with(shares[name]) & set(agreed))
        if len(holders) >= spec.threshold:
            sent[name] = ["acknowledgement-list", spec.context, [agreed[holder] for holder in holders]]
    return sent


def receipt_of(spec: Round, totals: Mapping[str, Sequence[int]], survivors: int) -> Message:
    """What was released."""
    receipt = tagged(spec, "round-receipt", "sparse-receipt")
    receipt += [survivors, totals["canary"][0], aggregate_digest(spec, totals)]
    return receipt if spec.neighbours is None else [*receipt, spec.neighbours, spec.threshold]


def recover(
    spec: Round, advertisements: Sent, shares: Sent, inputs: Mapping[str, Sequence[bytes]], answers: Sent
) -> dict[str, list[int]]:
    """Lane -> exact totals; ``shares``: of all who took part in the end, ``inputs``: the chunks of each survivor."""
    need(len(answers), spec.threshold)
    holders = {name: sharing_with(message) for name, message in shares.items()}
    dropouts = sorted(set(shares) - set(inputs))

    def secret_of(field: int, owner: str) -> bytes:
        first = sorted(holders[owner] & set(answers))[: spec.threshold]
        need(len(first), spec.threshold)
        return shamir_reconstruct({spec.position(holder): dict(answers[holder][field])[owner] for holder in first})

    seeds = {name: secret_of(4, name) for name in sorted(inputs)}
    mask_secrets = {name: secret_of(5, name) for name in dropouts}
    totals, offset = {}, 0
    for lane in spec.lanes:
        bits = spec.bits(lane)
        word_bits, length = 64 // bits * bits, -(-lane.length // (64 // bits))
        size = -(-length * word_bits // 8)
        words = [0] * length
        for name, chunks in inputs.items():
            own = unpack(b"".join(chunks)[offset : offset + size], length, word_bits)
            words = [(word + other) % 2**word_bits for word, other in zip(words, own, strict=True)]
            own_key = derive(spec.roster, spec.context, seeds[name], "self-mask", lane.name, name)
            words = add_mask(words, -1, own_key, word_bits)
            for gone in dropouts:
                if name not in holders[gone] and gone not in holders[name]:
                    continue
                secret = x25519(mask_secrets[gone], advertisements[name][4])
                pair = min(name, gone), max(name, gone)
                key = derive(spec.roster, spec.context, secret, "pairwise-mask", lane.name, *pair)
                words = add_mask(words, -1 if name > gone else 1, key, word_bits)
        totals[lane.name] = split(words, lane.length, bits, is_signed(lane))
        offset += size
    return totals


# --- a whole round ---


@dataclass(frozen=True)
class SiteInput:
    """What one site brings: its secret identity, its randomness, its values and weight."""

    identity_seed: bytes
    entropy: Entropy
    coins: Entropy
    values: Mapping[str, Sequence[float]]
    weight: int | None = None


@dataclass(frozen=True)
class Transcript:
    """All that was sent, phase by phase: site -> frames, and what was released."""

    from_sites: Mapping[str, Mapping[str, list[bytes]]]
    to_sites: Mapping[str, Mapping[str, list[bytes]]]
    encoded: Mapping[str, Mapping[str, list[int]]]
    totals: Mapping[str, list[int]]
    survivors: tuple[str, ...]
    digest: bytes


class Conversation:
    """A round of honest sites, with every message as a list of fields.

    ``silent_from``: site -> the coordinator phase from which it sends nothing more.
    """

    def __init__(self, spec: Round, inputs: Mapping[str, SiteInput], silent_from: Mapping[str, str]) -> None:
        """Run the whole of it."""
        last = {name: PHASES.index(phase) for name, phase in silent_from.items()}

        def going_on(among: Sent) -> list[str]:
            return [name for name in sorted(among) if among[name][0] != "round-failed"]

        def speaking(phase: int, among: Sent) -> list[str]:
            return [name for name in going_on(among) if last.get(name, len(PHASES)) > phase]

        sites = {name: Site(spec, name, item.identity_seed, item.entropy) for name, item in inputs.items()}
        self.spec, self.sites = spec, sites
        self.encoded = {name: encode_input(spec, item.values, item.weight, item.coins) for name, item in inputs.items()}

        started: Sent = {name: ["start"] for name in spec.cohort}
        self.advertisements = {name: sites[name].advertise() for name in speaking(0, started)}
        self.keys = keys_shown(spec, self.advertisements)
        self.shares = {name: sites[name].share(self.keys[name]) for name in speaking(1, self.keys)}
        self.deliveries = shares_delivered(spec, self.shares)
        dealt = {name: self.shares[name] for name in going_on(self.deliveries)}
        sent = {
            name: sites[name].masked_input(self.deliveries[name], self.encoded[name])
            for name in speaking(2, self.deliveries)
        }
        self.inputs = {name: message for name, (message, _) in sent.items()}
        self.chunks = {name: chunks for name, (_, chunks) in sent.items()}
        self.survivors = survivors_shown(spec, dealt, self.inputs)
        self.agreed = {name: sites[name].agree(self.survivors[name]) for name in speaking(3, self.survivors)}
        self.requests = shares_asked_for(spec, dealt, self.agreed)
        self.answers = {name: sites[name].unmask_shares() for name in speaking(4, self.requests)}
        self.totals = recover(spec, self.advertisements, dealt, self.chunks, self.answers)
        self.receipts = dict.fromkeys(self.answers, receipt_of(spec, self.totals, len(self.inputs)))


def run_round(spec: Round, sites: Mapping[str, SiteInput], silent_from: Mapping[str, str] | None = None) -> Transcript:
    """The bytes of a round of honest sites; TooFewSites if it ends without a release."""

    def framed(*sent: Sent) -> dict[str, dict[str, list[bytes]]]:
        return {
            phase: {name: [messagepack(message)] for name, message in messages.items()}
            for phase, messages in zip(PHASES, sent, strict=True)
        }

    said = Conversation(spec, sites, silent_from or {})
    from_sites = framed(said.advertisements, said.shares, said.inputs, said.agreed, said.answers)
    for name, chunks in said.chunks.items():
        from_sites["CollectingMaskedInputs"][name] += chunks
    to_sites = framed(said.keys, said.deliveries, said.survivors, said.requests, said.receipts)
    digest_of_totals = aggregate_digest(spec, said.totals)
    return Transcript(from_sites, to_sites, said.encoded, said.totals, tuple(said.inputs), digest_of_totals)
