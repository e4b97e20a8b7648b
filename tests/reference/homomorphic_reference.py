"""What the homomorphic backend adds, a second time: slow, plain, and with nothing of ``secureagg`` in it, nor of SEAL.

Slots and masks are Python integers; a ciphertext is opened by the textbook formula with the coefficients of the secret
key.  What SEAL draws (keys, errors, the second half of a fresh ciphertext) is not made here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from reference import protocol_reference as plain

N = 4096
Q = 2**60 - 2**14 + 1


# --- slots ---


def slot_bits(cohort_size: int) -> int:
    """The bits of t: the most with t (43 n + 3) <= q."""
    bits = 0
    while 2 ** (bits + 1) * (43 * cohort_size + 3) <= Q:
        bits += 1
    return bits


@dataclass(frozen=True)
class Place:
    """Where a lane lies: first slot, number of slots, width of a digit or of a part, offset, and whether in parts."""

    lane: plain.Lane
    first: int
    slots: int
    width: int
    offset: int
    in_parts: bool

    def of(self, index: int) -> Iterator[tuple[int, int]]:
        """Each slot with something of value ``index``, and by how many bits it is shifted there: a digit is moved up,
        a part of one down."""
        if self.in_parts:
            for part in range(self.slots // self.lane.length):
                yield self.first + part * self.lane.length + index, part * self.width
        else:
            yield self.first + index % self.slots, index // self.slots * self.width


def layout(spec: plain.Round) -> list[Place]:
    """Every lane's place, in order of name."""
    n, bits, first, places = len(spec.cohort), slot_bits(len(spec.cohort)), 0, []
    for lane in spec.lanes:
        weight = (spec.max_weight or 1) if lane.weighted else 1
        if isinstance(lane.encoding, plain.FixedPoint):
            offset = weight * (2 ** (lane.encoding.value_bits - 1) - 1)
            largest = 2 * offset
        else:
            offset, largest = 0, weight * lane.encoding.maximum
        least = 64 if lane.name == "canary" else 8
        width = max(least, (n * largest).bit_length())
        in_parts = width > bits
        if in_parts:
            width = bits - n.bit_length()
            slots = lane.length * -(-max(least, largest.bit_length()) // width)
        else:
            slots = -(-lane.length // (bits // width))
        places.append(Place(lane, first, slots, width, offset, in_parts))
        first += slots
    return places


def ciphertexts(spec: plain.Round) -> int:
    """How many a site's input takes."""
    last = layout(spec)[-1]
    return -(-(last.first + last.slots) // N)


def slots_of(spec: plain.Round, elements: Mapping[str, Sequence[int]]) -> list[int]:
    """A site's slots before they are masked, of all its ciphertexts."""
    slots = [0] * (ciphertexts(spec) * N)
    for place in layout(spec):
        for index, element in enumerate(elements[place.lane.name]):
            digit = (element + place.offset) % 2 ** spec.bits(place.lane)
            for slot, shift in place.of(index):
                slots[slot] += (digit >> shift) % 2**place.width if place.in_parts else digit << shift
    return slots


def totals_of(spec: plain.Round, slots: Sequence[int], survivors: int) -> dict[str, list[int]]:
    """The integers that the slots of a whole sum stand for."""
    totals: dict[str, list[int]] = {}
    for place in layout(spec):
        totals[place.lane.name] = found = []
        for index in range(place.lane.length):
            total = -survivors * place.offset
            for slot, shift in place.of(index):
                total += slots[slot] << shift if place.in_parts else (slots[slot] >> shift) % 2**place.width
            found.append(total)
    return totals


def add_masks(spec: plain.Round, slots: Sequence[int], masks: Sequence[tuple[bytes, int]]) -> list[int]:
    """The slots plus or minus each keystream, 8 bytes for each slot, modulo t."""
    masked = list(slots)
    for key, sign in masks:
        masked = plain.add_mask(masked, sign, key, 64)
    return [slot % 2 ** slot_bits(len(spec.cohort)) for slot in masked]


# --- secrets and digests ---


def secret_commitment(context: bytes, name: str, secret: bytes) -> bytes:
    """The commitment to what a site gives the others to make the key of."""
    return plain.digest("encryption-secret", context, name.encode(), secret)


def key_seed(roster: bytes, context: bytes, secret: bytes) -> bytes:
    """The 64 bytes that SEAL's key generator is seeded with."""
    info = plain.frame(plain.label("encryption-key"), context)
    return HKDF(algorithm=SHA256(), length=64, salt=roster, info=info).derive(secret)


def digest_key(roster: bytes, context: bytes, secret: bytes) -> bytes:
    """The key of the digest that a site reports."""
    return plain.derive(roster, context, secret, "digest-key")


def aggregate_digest(spec: plain.Round, key: bytes, totals: Mapping[str, Sequence[int]]) -> bytes:
    """What a site reports of the totals."""
    parts = [key]
    for lane in spec.lanes:
        parts += [lane.name.encode(), b"".join(plain.int64le(total) for total in totals[lane.name])]
    return plain.digest("opened-aggregate", spec.context, *parts)


def ciphertext_digest(chunks: Sequence[bytes]) -> bytes:
    """What a site signs before it opens anything."""
    return sha256(b"".join(chunks)).digest()


# --- ciphertexts ---


def decrypt(spec: plain.Round, secret_key: Sequence[int], ciphertext: bytes) -> list[int]:
    """The slots of a summed ciphertext: round(t (c0 + c1 s) / q) modulo t, s having coefficients -1, 0 and 1."""
    t = 2 ** slot_bits(len(spec.cohort))
    c0, c1 = np.frombuffer(ciphertext, "<u8").astype(np.int64).reshape(2, N)
    # c1 s modulo x^N + 1, in two halves whose sums of 4,096 numbers stay exact.
    high, low = np.zeros(N, np.int64), np.zeros(N, np.int64)
    for power, coefficient in enumerate(secret_key):
        if coefficient:
            turned = np.concatenate([-c1[N - power :], c1[: N - power]]) * coefficient
            high += turned >> 30
            low += turned & (2**30 - 1)
    phase = [(int(a) + (int(b) << 30) + int(c)) % Q for a, b, c in zip(c0, high, low, strict=True)]
    return [(2 * t * x + Q) // (2 * Q) % t for x in phase]
