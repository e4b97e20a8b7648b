"""What a homomorphic sum costs, beside TenSEAL's CKKS with NVFlare's parameters, in one run on the same values.

All run on one thread.  NVFlare encrypts and serialises a layer with one call of TenSEAL each, under the secret key
("symmetric", as its provisioning sets it up) or the public one (TenSEAL's default); its server adds what it has loaded.
Ours is a site's whole input: encoding, the masks of a round of SITES sites, encryption, serialisation.  Times are
processor times, ratios are of times taken by turns.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tenseal

from benchmarks.memory import resident
from benchmarks.record import Figure, Record, ratios
from benchmarks.rounds import LANE, machines
from benchmarks.turns import seconds
from secureagg import encode_input
from secureagg.homomorphic import (
    Bfv,
    CiphertextSum,
    SecretKey,
    SumReader,
    masked_and_encrypted,
    unmask_sum,
)
from secureagg.masking import MaskKey
from secureagg.slots import KEY_SEED_BYTES, SLOTS

SITES = 32
KINDS = {"symmetric": tenseal.ENCRYPTION_TYPE.SYMMETRIC, "public key": tenseal.ENCRYPTION_TYPE.ASYMMETRIC}
ADDED = 4  # sites whose sum is decrypted and compared


@contextmanager
def without_warnings() -> Iterator[None]:
    """TenSEAL prints to standard output that a long vector needs several ciphertexts, each time."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


class Ours:
    """One round's sums of BFV ciphertexts."""

    def __init__(self, length: int) -> None:
        self.parameters = machines(SITES, length).parameters
        self.layout = self.parameters.slot_layout
        self.bfv = Bfv(self.layout.slot_bits)
        self.key = SecretKey(self.bfv, os.urandom(KEY_SEED_BYTES))
        self.masks: list[MaskKey] = [(os.urandom(32), 1 if index % 2 else -1) for index in range(SITES)]
        self.total = CiphertextSum(self.bfv, self.layout.ciphertexts)

    def site(self, update: np.ndarray) -> list[bytes]:
        """What a site sends."""
        vectors = encode_input(self.parameters, {LANE: update}).vectors
        return list(masked_and_encrypted(self.key, self.layout, vectors, self.masks))

    def add(self, ciphertexts: list[bytes]) -> None:
        """The coordinator's part for one site."""
        for number, ciphertext in enumerate(ciphertexts):
            self.total.add(number, ciphertext, who="site")

    def decrypt(self, survivors: int) -> np.ndarray:
        """The coordinator returns the aggregate, a site decrypts it."""
        reader = SumReader(self.key, self.layout)
        for chunk in self.total.chunks():
            reader.take(chunk, who="sum")
        return reader.totals(survivors=survivors)[LANE]


class Theirs:
    """TenSEAL with the parameters of NVFlare's provisioning."""

    def __init__(self, kind: str = "symmetric") -> None:
        self.context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=KINDS[kind],
            n_threads=1,
        )
        self.context.global_scale = 2**40
        self.total: tenseal.CKKSVector | None = None

    def site(self, update: np.ndarray) -> bytes:
        """What a site sends."""
        return tenseal.ckks_vector(self.context, update).serialize()

    def add(self, serialised: bytes) -> None:
        """The server's part for one site."""
        loaded = tenseal.ckks_vector_from(self.context, serialised)
        self.total = loaded if self.total is None else self.total + loaded

    def decrypt(self) -> np.ndarray:
        """A site decrypts the aggregate."""
        serialised = self.total.serialize()
        return np.array(tenseal.ckks_vector_from(self.context, serialised).decrypt())


def times(length: int, repeats: int) -> list[Figure]:
    """Times and sizes of both."""
    sides: dict[str, Ours | Theirs] = {"ours": Ours(length)} | {kind: Theirs(kind) for kind in KINDS}
    updates = [np.random.default_rng(site).uniform(-1, 1, length) for site in range(ADDED)]
    sent: dict[str, object] = {}
    sites: dict[str, list[float]] = {name: [] for name in sides}
    sums: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(repeats + 1):  # by turns, so that a busy machine slows all
        for name, side in sides.items():
            update = updates[index % ADDED]
            site = seconds(
                lambda side=side, update=update, name=name: sent.update({name: side.site(update)}), time.process_time
            )
            added = seconds(lambda side=side, name=name: side.add(sent[name]), time.process_time)
            if index:  # the first input finds no memory yet and is put in place, not added
                sites[name].append(site)
                sums[name].append(added)
    ours = sides["ours"]
    masks_off = seconds(lambda: unmask_sum(ours.total, ours.layout, ours.masks), time.process_time)
    opened = seconds(lambda: ours.decrypt(repeats + 1), time.process_time)
    figures = [
        Figure("bytes per parameter", [sum(map(len, sent["ours"])) / length], wanted="<= 4.2"),
        Figure("CKKS, bytes per parameter", [len(sent["symmetric"]) / length]),
        Figure("site (encode, mask, encrypt, serialise)", sites["ours"], "s"),
        Figure("coordinator (check, load, add) for one site", sums["ours"], "s"),
        Figure(f"coordinator takes off {SITES} masks", [masks_off], "s"),
        Figure("serialise, load and decrypt the aggregate", [opened], "s"),
    ]
    for kind in KINDS:
        opened = seconds(sides[kind].decrypt, time.process_time)
        figures += [
            Figure(f"CKKS {kind}, site (encrypt, serialise)", sites[kind], "s"),
            Figure(f"CKKS {kind} / ours, site", ratios(sites[kind], sites["ours"]), wanted=">= 8"),
            Figure(f"CKKS {kind}, server (load, add)", sums[kind], "s"),
            Figure(f"CKKS {kind} / ours, coordinator", ratios(sums[kind], sums["ours"]), wanted=">= 8"),
            Figure(f"CKKS {kind}, serialise, load and decrypt the aggregate", [opened], "s"),
        ]
    return figures


def errors(length: int) -> list[Figure]:
    """The largest difference between what decrypts and the sum of what was encrypted, of ours and of theirs."""
    ours, theirs = Ours(length), Theirs()
    updates = [np.random.default_rng(site).uniform(-1, 1, length) for site in range(ADDED)]
    expected = np.zeros(length, np.int64)
    for update in updates:
        vectors = encode_input(ours.parameters, {LANE: update}).vectors
        expected += ours.parameters.lanes[LANE].lift(vectors[LANE])
        ours.add(list(masked_and_encrypted(ours.key, ours.layout, vectors, ours.masks)))
        theirs.add(theirs.site(update))
    taken_off = [(key, -sign) for key, sign in ours.masks] * len(updates)
    unmask_sum(ours.total, ours.layout, taken_off)
    error = np.abs(ours.decrypt(len(updates)) - expected).max()
    return [
        Figure(f"largest error of a sum of {ADDED} encoded inputs", [float(error)], wanted="<= 0"),
        Figure(f"CKKS, of {ADDED} inputs", [float(np.abs(theirs.decrypt() - sum(updates)).max())]),
    ]


def memory(length: int) -> list[Figure]:
    """What a process of its own needs beyond the encoded vector, and beyond the running sum."""
    code = f"from benchmarks.homomorphic import _peaks; _peaks({length})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return [
        Figure("a site's memory beyond its encoded vector", [found["site"]], "MB", at={"values": length}),
        Figure("the coordinator's memory beyond the running sum", [found["coordinator"]], "MB", at={"values": length}),
    ]


def _peaks(length: int) -> None:
    """Print what making an input and adding it takes, with ciphertexts that are made and added one by one."""
    ours = Ours(length)
    vectors = encode_input(ours.parameters, {LANE: np.zeros(length)}).vectors
    before, site = resident(), 0
    for _ in masked_and_encrypted(ours.key, ours.layout, vectors, ours.masks):
        site = max(site, resident() - before)
    ciphertext, coordinator = ours.key.encrypt(np.zeros(SLOTS, np.uint64)), 0
    for first in (True, False):  # what the first input leaves behind is the running sum
        before = resident()
        for number in range(ours.layout.ciphertexts):
            ours.total.add(number, ciphertext, who="site")
            coordinator = coordinator if first else max(coordinator, resident() - before)
    print(json.dumps({"site": site / 1e6, "coordinator": coordinator / 1e6}))


def measure(*, full: bool) -> Record:
    """Both side by side, then how exact they are and what memory ours needs."""
    length, repeats = (1_000_000, 7) if full else (100_000, 3)
    title = f"Homomorphic sums of {length:,} values of 16 bits, {SITES} sites"
    with without_warnings():
        figures = [*times(length, repeats), *errors(length), *memory(length), *memory(4 * length)]
    return Record("homomorphic", title, figures, full)
