"""What a homomorphic sum costs, beside TenSEAL's CKKS with NVFlare's parameters, in one run on the same values.

    python -m benchmarks homomorphic [--quick] [--json FILE]

All run on one thread.  NVFlare encrypts and serialises a layer with one call of TenSEAL each, under the secret key
("symmetric", as its provisioning sets it up) or the public one (TenSEAL's default); its server adds what it has loaded.
Ours is a site's whole input: encoding, the masks of a round of SITES sites, encryption, serialisation.  Times are the
least processor time of several repetitions, ratios are medians of those of times taken by turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tenseal
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import LANE, machines
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


def seconds(function: Callable[[], object]) -> float:
    """Processor time of one call: others may be using the machine."""
    began = time.process_time()
    function()
    return time.process_time() - began


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


def measure(length: int, repeats: int) -> dict[str, float]:
    """Times, sizes and errors of both."""
    sides: dict[str, Ours | Theirs] = {"ours": Ours(length)} | {kind: Theirs(kind) for kind in KINDS}
    updates = [np.random.default_rng(site).uniform(-1, 1, length) for site in range(ADDED)]
    sent: dict[str, object] = {}
    sites: dict[str, list[float]] = {name: [] for name in sides}
    sums: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(repeats + 1):  # by turns, so that a busy machine slows all
        for name, side in sides.items():
            update = updates[index % ADDED]
            site = seconds(lambda side=side, update=update, name=name: sent.update({name: side.site(update)}))
            added = seconds(lambda side=side, name=name: side.add(sent[name]))
            if index:  # the first input finds no memory yet and is put in place, not added
                sites[name].append(site)
                sums[name].append(added)
    ours = sides["ours"]
    masks_off = seconds(lambda: unmask_sum(ours.total, ours.layout, ours.masks))
    figures = {
        "bytes per parameter": sum(map(len, sent["ours"])) / length,
        "CKKS, bytes per parameter": len(sent["symmetric"]) / length,
        "site (encode, mask, encrypt, serialise), seconds": min(sites["ours"]),
        "coordinator (check, load, add) for one site, seconds": min(sums["ours"]),
        f"coordinator takes off {SITES} masks, seconds": masks_off,
        "serialise, load and decrypt the aggregate, seconds": seconds(lambda: ours.decrypt(repeats + 1)),
    }
    for kind in KINDS:
        figures |= {
            f"CKKS {kind}, site (encrypt, serialise), seconds": min(sites[kind]),
            f"CKKS {kind} / ours, site": median_ratio(sites[kind], sites["ours"]),
            f"CKKS {kind}, server (load, add), seconds": min(sums[kind]),
            f"CKKS {kind} / ours, coordinator": median_ratio(sums[kind], sums["ours"]),
            f"CKKS {kind}, serialise, load and decrypt the aggregate, seconds": seconds(sides[kind].decrypt),
        }
    error, their_error = errors(length, updates)
    figures[f"largest error of a sum of {ADDED} encoded inputs"] = error
    figures[f"CKKS, of {ADDED} inputs"] = their_error
    return figures


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios of pairs."""
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


def errors(length: int, updates: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference between what decrypts and the sum of what was encrypted, of ours and of theirs."""
    ours, theirs = Ours(length), Theirs()
    expected = np.zeros(length, np.int64)
    for update in updates:
        vectors = encode_input(ours.parameters, {LANE: update}).vectors
        expected += ours.parameters.lanes[LANE].lift(vectors[LANE])
        ours.add(list(masked_and_encrypted(ours.key, ours.layout, vectors, ours.masks)))
        theirs.add(theirs.site(update))
    taken_off = [(key, -sign) for key, sign in ours.masks] * len(updates)
    unmask_sum(ours.total, ours.layout, taken_off)
    error = np.abs(ours.decrypt(len(updates)) - expected).max()
    return float(error), float(np.abs(theirs.decrypt() - sum(updates)).max())


def memory(length: int) -> dict[str, float]:
    """MB that a process of its own needs beyond the encoded vector, and beyond the running sum."""
    code = f"from benchmarks.homomorphic import _peaks; _peaks({length})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peaks(length: int) -> None:
    """Print what making an input and adding it takes, with ciphertexts that are made and added one by one."""
    ours = Ours(length)
    vectors = encode_input(ours.parameters, {LANE: np.zeros(length)}).vectors
    before, site = _resident(), 0
    for _ in masked_and_encrypted(ours.key, ours.layout, vectors, ours.masks):
        site = max(site, _resident() - before)
    ciphertext, coordinator = ours.key.encrypt(np.zeros(SLOTS, np.uint64)), 0
    for first in (True, False):  # what the first input leaves behind is the running sum
        before = _resident()
        for number in range(ours.layout.ciphertexts):
            ours.total.add(number, ciphertext, who="site")
            coordinator = coordinator if first else max(coordinator, _resident() - before)
    print(json.dumps({"site": site / 1e6, "coordinator": coordinator / 1e6}))


TARGETS = {
    "bytes per parameter": "<= 4.2",
    **{f"CKKS {kind} / ours, {side}": ">= 8" for kind in KINDS for side in ("site", "coordinator")},
    f"largest error of a sum of {ADDED} encoded inputs": "0",
}


def main() -> None:
    """Measure, print a table, and with ``--json`` write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the length, fewer repetitions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    length, repeats = (100_000, 3) if arguments.quick else (1_000_000, 7)
    figures = measure(length, repeats)
    for size in (length, 4 * length):
        for side, peak in memory(size).items():
            beyond = "its encoded vector" if side == "site" else "the running sum"
            figures[f"{side}'s memory beyond {beyond}, {size:,} values, MB"] = peak
    table = Table(title=f"Homomorphic sums of {length:,} values of 16 bits, {SITES} sites", title_justify="left")
    for heading in ("figure", "measured", "wanted"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}", TARGETS.get(name, ""))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"length": length, "sites": SITES, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
