"""Encryption of slots with BFV, whose ciphertexts can be added: the only module that imports TenSEAL.

A ciphertext here is the numbers of SEAL's own and nothing else.  A *fresh* one is c0, 4,096 coefficients of 8 bytes,
and the 64-byte seed of which c1 is made; a *summed* one is c0 and c1.  All that SEAL writes around them (sizes,
parameters, kind of compression) is fixed by the parameters, so it is left out and put back by whoever receives it:
SEAL never parses a foreign header, and a ciphertext of the right size with coefficients below q is a valid one.

``slots`` shows why decryption cannot fail for honest ciphertexts.  A sum with others is wrong but harmless: a site that
means harm can send a wrong input to any secure sum.

*What the key protects.*  Slots carry their masks already, so who has the secret key and the fresh ciphertexts sees
what the coordinator of the masked backend sees.  The coordinator learns the masks to be removed and has no key: it
takes them off the sum of ciphertexts as a plaintext, and can read nothing of either.  Left to the sites, after
decryption, it would be as safe, but each site would have to make the masks of all.  The noise of a sum, which holders
of the key can see, comes from errors and from the rounding of masked slots, whose joint distribution depends on their
sum alone: it tells nothing more, and needs no flooding.

*Randomness.*  Errors and seeds come from SEAL's generator (BLAKE2Xb, newly seeded from the system for each
ciphertext).  It cannot be injected: a factory with a fixed seed gives all ciphertexts the same error and seed.  That is
what makes a secret key of a seed here, in a context of its own that encrypts nothing.

Objects of this module share a file in memory, through which SEAL hands out bytes; use them from one thread at a time.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secureagg.agreement import encryption_key_seed
from secureagg.errors import LocalProtocolError, MalformedMessage, ParameterError
from secureagg.keystream import Spread
from secureagg.lanes import Words
from secureagg.masking import MaskKey, apply_masks
from secureagg.parameters import RoundParameters
from secureagg.slots import (
    COEFFICIENT_MODULUS,
    FRESH_BYTES,
    KEY_SEED_BYTES,
    SLOTS,
    SUMMED_BYTES,
    SlotLayout,
    Slots,
)

# SEAL's formats: a header of 16 bytes is its magic number and version (5 bytes), the compression, two zeros and the
# size of all.  What SEAL saves is one Zstandard frame of one stored block, since coefficients cannot be compressed.
_HEADER_BYTES: Final = 16
_VERSION_BYTES: Final = 5
_FRAME_BYTES: Final = 10
_BLAKE2XB: Final = b"\x01"

_CHECKED: Final[dict[int, bytes]] = {}  # bits of a slot -> SEAL's magic number and version, once both are seen to fit

# TenSEAL has no types.
_Seal = Any
_Context = Any
_Plaintext = Any
_Ciphertext = Any


@cache
def _seal() -> _Seal:
    """SEAL's API; ParameterError naming the extra that installs it."""
    try:
        from tenseal import sealapi  # noqa: PLC0415  (heavy, and only for those who use this backend)
    except ImportError as error:
        raise ParameterError(
            "homomorphic sums: TenSEAL is not installed, expected pip install 'secureagg[homomorphic]'"
        ) from error
    if not hasattr(os, "memfd_create"):
        raise ParameterError("homomorphic sums: this system has no files in memory, expected Linux")
    return sealapi


def check_installed() -> None:
    """Raise ParameterError, with what to install, where homomorphic sums cannot be had."""
    _seal()


class Bfv:
    """BFV with slots of so many bits; without a key."""

    def __init__(self, slot_bits: int) -> None:
        """``slot_bits``: of ``slots.slot_bits``.  ParameterError where SEAL is missing or refuses it, and
        LocalProtocolError if this SEAL does not write the format that is expected."""
        seal = _seal()
        self.slot_bits = slot_bits
        self._context = _plain_context(slot_bits)
        self._evaluator = seal.Evaluator(self._context)
        self._file = os.fdopen(os.memfd_create("secureagg-seal"), "w+b", buffering=0)
        self._path = f"/proc/self/fd/{self._file.fileno()}"
        self._version = _CHECKED.get(slot_bits, b"")
        if not self._version:
            self._check_seal()
            _CHECKED[slot_bits] = self._version

    def _encoded(self, slots: Slots) -> _Plaintext:
        """The plaintext of 4,096 slots."""
        if slots.shape != (SLOTS,) or int(slots.max()) >> self.slot_bits:
            raise LocalProtocolError(f"slots: expected {SLOTS} integers of {self.slot_bits} bits")
        plaintext = _seal().Plaintext()
        array = self._header(_HEADER_BYTES + 8 + 8 * SLOTS) + struct.pack("<Q", SLOTS)
        self._read(
            plaintext,
            [bytes(32), struct.pack("<Qd", SLOTS, 1.0), array, slots.astype("<u8", copy=False).data.cast("B")],
        )
        return plaintext

    # --- between SEAL's files and ciphertexts ---

    def _around(self, coefficients: int) -> bytes:
        """What SEAL writes before so many coefficients of a ciphertext; a fresh one's seed follows behind them."""
        size = 2  # polynomials; the second of a fresh one is its seed
        return b"".join(
            [
                struct.pack("<4Q", *self._context.first_parms_id()),
                struct.pack("<?QQQdQ", False, size, SLOTS, 1, 1.0, 1),  # in no NTT form, one prime, scales of 1
                self._header(_HEADER_BYTES + 8 + 8 * coefficients),
                struct.pack("<Q", coefficients),
            ]
        )

    @property
    def _before_seed(self) -> bytes:
        return self._header(_HEADER_BYTES + len(_BLAKE2XB) + KEY_SEED_BYTES) + _BLAKE2XB

    def _header(self, size: int) -> bytes:
        return self._version + bytes(3) + struct.pack("<Q", size)

    def _saved(self, ciphertext: _Ciphertext) -> bytes:
        """The bytes within the frame of what SEAL saves."""
        ciphertext.save(self._path)
        descriptor = self._file.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)[_HEADER_BYTES + _FRAME_BYTES :]

    def _fresh_bytes(self, ciphertext: _Ciphertext) -> bytes:
        saved = self._saved(ciphertext)
        before, middle = self._around(SLOTS), self._before_seed
        first, last = len(before), len(before) + 8 * SLOTS
        if (
            len(saved) != last + len(middle) + KEY_SEED_BYTES
            or saved[:first] != before
            or saved[last : last + len(middle)] != middle
        ):
            raise LocalProtocolError("SEAL: another format of a fresh ciphertext than expected")
        return saved[first:last] + saved[last + len(middle) :]

    def _summed_bytes(self, ciphertext: _Ciphertext) -> bytes:
        saved = self._saved(ciphertext)
        before = self._around(2 * SLOTS)
        if len(saved) != len(before) + SUMMED_BYTES or saved[: len(before)] != before:
            raise LocalProtocolError("SEAL: another format of a summed ciphertext than expected")
        return saved[len(before) :]

    def _load_fresh(self, ciphertext: bytes | memoryview, *, who: str) -> _Ciphertext:
        _check(ciphertext, FRESH_BYTES, who=who)
        numbers = memoryview(ciphertext)
        coefficients, seed = numbers[:-KEY_SEED_BYTES], numbers[-KEY_SEED_BYTES:]
        return self._load([self._around(SLOTS), coefficients, self._before_seed, seed], who=who)

    def _load_summed(self, ciphertext: bytes | memoryview, *, who: str) -> _Ciphertext:
        _check(ciphertext, SUMMED_BYTES, who=who)
        return self._load([self._around(2 * SLOTS), ciphertext], who=who)

    def _load(self, parts: list[bytes | memoryview], *, who: str) -> _Ciphertext:
        loaded = _seal().Ciphertext()
        try:
            self._read(loaded, parts)
        except (RuntimeError, ValueError) as error:
            raise MalformedMessage(f"{who}: SEAL refuses a ciphertext") from error
        return loaded

    def _read(self, loaded: _Plaintext | _Ciphertext, parts: Sequence[bytes | memoryview]) -> None:
        """Let SEAL read ``parts`` behind a header; it checks once more that all is as its context says."""
        size = _HEADER_BYTES + sum(map(len, parts))
        os.pwritev(self._file.fileno(), [self._header(size), *parts], 0)
        loaded.load(self._context, self._path)

    def _check_seal(self) -> None:
        """Notice here, once in a process and not as the fault of a site, that this SEAL writes or reads another
        format."""
        key = SecretKey(self, os.urandom(KEY_SEED_BYTES))
        key._encryptor.encrypt_zero_symmetric().save(self._path)
        self._version = os.pread(self._file.fileno(), _VERSION_BYTES, 0)
        slots = np.arange(SLOTS, dtype=np.uint64) * np.uint64((1 << self.slot_bits) // SLOTS)
        total = CiphertextSum(self, 1)
        try:
            for _ in range(2):
                total.add(0, key.encrypt(slots), who="SEAL")
            found = key.decrypt(total.ciphertext(0), who="SEAL")
        except MalformedMessage as error:
            raise LocalProtocolError("SEAL: does not read the format that it is expected to") from error
        if not np.array_equal(found, 2 * slots % (1 << self.slot_bits)):
            raise LocalProtocolError("SEAL: a sum of two ciphertexts does not decrypt to the sum")


class SecretKey:
    """A secret key, which encrypts and decrypts; the same for the same 64-byte ``seed``, which must be secret, and of
    which the holders of the key learn from each other."""

    __slots__ = ("_bfv", "_decryptor", "_encryptor")

    def __init__(self, bfv: Bfv, seed: bytes) -> None:
        if len(seed) != KEY_SEED_BYTES:
            raise LocalProtocolError(f"secret key: a seed of {len(seed)} bytes, expected {KEY_SEED_BYTES}")
        seal = _seal()
        # Only ever for the key: whatever this context encrypted would have one error and one seed.
        key = seal.KeyGenerator(_context(bfv.slot_bits, seal, seed)).secret_key()
        self._bfv = bfv
        self._encryptor = seal.Encryptor(bfv._context, key)
        self._decryptor = seal.Decryptor(bfv._context, key)

    def encrypt(self, slots: Slots) -> bytes:
        """A fresh ciphertext of 4,096 slots."""
        bfv = self._bfv
        return bfv._fresh_bytes(self._encryptor.encrypt_symmetric(bfv._encoded(slots)))

    def decrypt(self, ciphertext: bytes | memoryview, *, who: str) -> Slots:
        """The 4,096 slots of a summed ciphertext; MalformedMessage naming ``who`` if it is none."""
        plaintext = _seal().Plaintext()
        self._decryptor.decrypt(self._bfv._load_summed(ciphertext, who=who), plaintext)
        # SEAL leaves out zeros at the end; with them the time that reading takes does not tell how many there are.
        plaintext.resize(SLOTS)
        return np.fromiter(map(plaintext.data, range(SLOTS)), np.uint64, SLOTS)


class CiphertextSum:
    """The running sum of many sites' ciphertexts number 0 to ``count`` - 1: 64 KiB for each number, none for a site."""

    def __init__(self, bfv: Bfv, count: int) -> None:
        self._bfv = bfv
        self._sums: list[_Ciphertext | None] = [None] * count

    def add(self, number: int, ciphertext: bytes | memoryview, *, who: str) -> None:
        """Add a fresh ciphertext; MalformedMessage naming ``who`` if it is none."""
        loaded = self._bfv._load_fresh(ciphertext, who=who)
        if self._sums[number] is None:
            self._sums[number] = loaded
        else:
            self._bfv._evaluator.add_inplace(self._sums[number], loaded)

    def add_slots(self, number: int, slots: Slots) -> None:
        """Add 4,096 slots in clear: what takes the masks away."""
        self._bfv._evaluator.add_plain_inplace(self._sum(number), self._bfv._encoded(slots))

    def ciphertext(self, number: int) -> bytes:
        """The summed ciphertext, to be given to holders of the key."""
        return self._bfv._summed_bytes(self._sum(number))

    def chunks(self) -> tuple[bytes, ...]:
        """All summed ciphertexts, as ``SumReader`` takes them; the sum is used up, so that it is not there twice."""
        chunks: list[bytes] = []
        size = SumReader.CHUNK_CIPHERTEXTS
        for first in range(0, len(self._sums), size):
            numbers = range(first, min(first + size, len(self._sums)))
            chunks.append(b"".join(map(self.ciphertext, numbers)))
            for number in numbers:
                self._sums[number] = None
        return tuple(chunks)

    def _sum(self, number: int) -> _Ciphertext:
        if self._sums[number] is None:
            raise LocalProtocolError(f"ciphertext {number}: nothing was added to it yet")
        return self._sums[number]


def round_key(parameters: RoundParameters, secret: bytes) -> SecretKey:
    """The key that every site makes of the first sharer's ``secret``."""
    return SecretKey(Bfv(parameters.slot_layout.slot_bits), encryption_key_seed(parameters, secret))


def check_fresh(ciphertext: bytes | memoryview, *, who: str) -> None:
    """Raise MalformedMessage naming ``who`` unless ``ciphertext`` is a fresh one."""
    _check(ciphertext, FRESH_BYTES, who=who)


def masked_and_encrypted(
    key: SecretKey, layout: SlotLayout, vectors: Mapping[str, Words], masks: Iterable[MaskKey], *, spread: Spread = map
) -> Iterator[bytes]:
    """A site's input as fresh ciphertexts, one after the other: each lane's reduced ring elements under ``masks``."""
    keys = list(masks)
    for rows in layout.blocks():
        slots = layout.slots_of(vectors, rows)
        mask_slots(layout, slots, keys, rows, spread=spread)
        for row in slots.reshape(-1, SLOTS):
            yield key.encrypt(row)


def unmask_sum(total: CiphertextSum, layout: SlotLayout, masks: Iterable[MaskKey], *, spread: Spread = map) -> None:
    """Take off the masks that did not cancel, each with the sign that undoes it, from the sums of all ciphertexts.

    Only once: the room for noise is that of one plaintext.
    """
    keys = list(masks)
    for rows in layout.blocks():
        slots = np.zeros(len(rows) * SLOTS, np.uint64)
        mask_slots(layout, slots, keys, rows, spread=spread)
        for number, row in zip(rows, slots.reshape(-1, SLOTS), strict=True):
            total.add_slots(number, row)


def mask_slots(
    layout: SlotLayout, slots: Slots, masks: Iterable[MaskKey], rows: range, *, spread: Spread = map
) -> None:
    """Add or subtract each mask's keystream to ``slots``, those of the ciphertexts ``rows``, in place."""
    apply_masks(slots, masks, start=rows.start * SLOTS, spread=spread)
    slots &= np.uint64((1 << layout.slot_bits) - 1)


def sum_digest(chunks: Iterable[bytes]) -> bytes:
    """SHA-256 of all ciphertexts of a sum: its name before it is opened, the same as ``SumReader.digest``."""
    ciphertexts = sha256()
    for chunk in chunks:
        ciphertexts.update(chunk)
    return ciphertexts.digest()


class SumReader:
    """Decrypts a sum without masks, chunk by chunk; in memory are one chunk and the numbers that come of it.

    Until ``totals`` nothing that anybody can see depends on what the ciphertexts hold.
    """

    CHUNK_CIPHERTEXTS: Final = 16  # 1 MiB

    def __init__(self, key: SecretKey, layout: SlotLayout) -> None:
        self._key = key
        self._layout = layout
        self._sums = layout.empty_sums()
        self._taken = 0
        self._ciphertexts = sha256()

    @property
    def whole(self) -> bool:
        """Whether every ciphertext was taken."""
        return self._taken == self._layout.ciphertexts

    @property
    def digest(self) -> bytes:
        """SHA-256 of the ciphertexts that were taken."""
        return self._ciphertexts.digest()

    def take(self, chunk: bytes | memoryview, *, who: str) -> None:
        """Decrypt the next summed ciphertexts; MalformedMessage naming ``who`` if there are more or fewer than a chunk
        has, or they are none."""
        count = min(self.CHUNK_CIPHERTEXTS, self._layout.ciphertexts - self._taken)
        if not count or len(chunk) != count * SUMMED_BYTES:
            raise MalformedMessage(
                f"{who}: {len(chunk)} bytes of ciphertexts, expected {count} of {SUMMED_BYTES} bytes"
            )
        for start in range(0, len(chunk), SUMMED_BYTES):
            slots = self._key.decrypt(memoryview(chunk)[start : start + SUMMED_BYTES], who=who)
            self._layout.take_sums(slots, range(self._taken, self._taken + 1), self._sums)
            self._taken += 1
        self._ciphertexts.update(chunk)

    def totals(self, *, survivors: int) -> dict[str, npt.NDArray[np.int64]]:
        """Lane name -> the survivors' exact integer sums, once: what was read is used up."""
        if not self.whole:
            raise LocalProtocolError(f"sum: {self._taken} of {self._layout.ciphertexts} ciphertexts were taken")
        sums, self._sums = self._sums, {}
        return self._layout.totals(sums, survivors=survivors)


@cache
def _plain_context(slot_bits: int) -> _Context:
    """The context that everybody has; it never changes, so threads may share it."""
    return _context(slot_bits, _seal())


def _context(slot_bits: int, seal: _Seal, key_seed: bytes | None = None) -> _Context:
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(SLOTS)
    parameters.set_coeff_modulus([seal.Modulus(COEFFICIENT_MODULUS)])
    parameters.set_plain_modulus(1 << slot_bits)
    if key_seed is not None:
        parameters.set_random_generator(seal.Blake2xbPRNGFactory(list(struct.unpack("<8Q", key_seed))))
    # SEAL's own table: 4,096 coefficients and 60 bits are within 128 bits of security.
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise ParameterError(f"homomorphic sums: SEAL refuses t = 2^{slot_bits}: {context.parameters_error_message()}")
    return context


def _check(ciphertext: bytes | memoryview, size: int, *, who: str) -> None:
    """Raise MalformedMessage naming ``who`` unless ``ciphertext`` has ``size`` bytes and coefficients below q."""
    # Stops bytes that SEAL would have to judge: behind this, every input is a ciphertext.
    if len(ciphertext) != size:
        raise MalformedMessage(f"{who}: a ciphertext of {len(ciphertext)} bytes, expected {size}")
    coefficients = np.frombuffer(ciphertext, "<u8", count=size // (8 * SLOTS) * SLOTS)
    if coefficients.max() >= COEFFICIENT_MODULUS:
        raise MalformedMessage(f"{who}: a ciphertext with a coefficient of {COEFFICIENT_MODULUS} or more")
