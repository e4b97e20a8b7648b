"""What masking costs a site and the coordinator, as ratios of times taken by turns in one run.

The physical floors of a site's masked input are measured beside it: reading the update once, generating its keystreams
at the rate of the cipher alone, and writing the packed bytes.
"""

import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM

from benchmarks.record import Figure, Record, ratios
from benchmarks.rounds import LANE, machines
from benchmarks.turns import by_turns
from secureagg import encode_input
from secureagg.encoding import decode_total
from secureagg.keystream import Spread
from secureagg.masking import apply_masks, unmasked_total
from secureagg.messages import MaskedInput
from secureagg.packing import add_packed
from secureagg.parameters import Backend
from secureagg.phases import CollectingMaskedInputs

SITES = 16
RAW_BLOCK_BYTES = 256 * 1024
MASK_BYTES = 8 / 3  # of a value: three of 20 bits have a word of 64


# --- the cipher and the masks ---


def raw_cipher(total: float, mode: CTR | GCM | None = None) -> None:
    """AES-256 over ``total`` bytes in blocks that stay in cache, by OpenSSL's code for CTR if no ``mode`` is given."""
    encryptor = Cipher(AES256(os.urandom(32)), mode or CTR(bytes(16))).encryptor()
    zeros, out = bytes(RAW_BLOCK_BYTES), bytearray(RAW_BLOCK_BYTES)
    for _ in range(int(total) // RAW_BLOCK_BYTES):
        encryptor.update_into(zeros, out)


def fast_cipher(total: float) -> None:
    """The same by its code for GCM, tag included: faster where the processor has wide AES instructions."""
    raw_cipher(total, GCM(bytes(12)))


def masks(length: int, repeats: int) -> list[Figure]:
    """Masks made and added, against the raw cipher, on one thread and on two."""
    words = np.zeros(int(length * MASK_BYTES / 8), "<u8")
    keys = [(os.urandom(32), 1) for _ in range(SITES)]
    total = SITES * words.nbytes
    with ThreadPoolExecutor(2) as pool:
        times = by_turns(
            repeats,
            {
                "raw": lambda: raw_cipher(total),
                "fast": lambda: fast_cipher(total),
                "one": lambda: apply_masks(words, keys),
                "two": lambda: apply_masks(words, keys, spread=pool.map),
                "raw two": lambda: list(pool.map(raw_cipher, [total // 2] * 2)),
            },
        )
    return [
        Figure("AES-256-CTR alone", [total / each / 1e9 for each in times["raw"]], "GB/s"),
        Figure("AES-256-GCM alone", [total / each / 1e9 for each in times["fast"]], "GB/s"),
        Figure("rate of masks / rate of AES alone", ratios(times["raw"], times["one"]), wanted=">= 0.75"),
        Figure("rate of masks / rate of AES-256-GCM alone", ratios(times["fast"], times["one"])),
        Figure("speed on two threads / on one", ratios(times["one"], times["two"]), wanted=">= 1.7"),
        Figure("AES alone, speed on two threads / on one", ratios(times["raw"], times["raw two"])),
    ]


# --- a whole masked input, and the coordinator's part ---


class Round:
    """A round of SITES sites with one long lane, up to the masked inputs."""

    def __init__(self, length: int, spread: Spread = map, backend: Backend = "masked") -> None:
        made = machines(SITES, length, spread=spread, backend=backend)
        self.parameters, self.participants, self.coordinator = made.parameters, made.participants, made.coordinator
        pending = [(site, message) for site, one in self.participants.items() for message in one.start()]
        while not isinstance(self.coordinator.phase, CollectingMaskedInputs):
            outbound = [out for site, message in pending for out in self.coordinator.receive(message, sender=site)]
            pending = [(o.recipient, m) for o in outbound for m in self.participants[o.recipient].receive(o.message)]

    def masked_input(self, update: np.ndarray, spread: Spread = map) -> MaskedInput:
        """Encode, mask and pack one site's update; the site's machine stays as it was."""
        participant = next(iter(self.participants.values()))
        participant._spread = spread
        encoded = encode_input(self.parameters, {LANE: update}, spread=spread)
        _, (message,) = participant._send_masked_input(participant.phase, encoded)
        return message

    def finish(self, update: np.ndarray) -> float:
        """Run the rest of the round, with this update at every site; returns the coordinator's seconds in it."""
        spent = 0.0
        pending = []
        for site, participant in self.participants.items():
            pending += [(site, m) for m in participant.submit(encode_input(self.parameters, {LANE: update}))]
        while pending:
            outbound = []
            for site, message in pending:
                began = time.perf_counter()
                outbound += self.coordinator.receive(message, sender=site)
                spent += time.perf_counter() - began
            pending = [(o.recipient, m) for o in outbound for m in self.participants[o.recipient].receive(o.message)]
        return spent


def masked_input(length: int, repeats: int) -> list[Figure]:
    """A site's masked input: processor time against its physical floors, bytes and memory against float32."""
    prepared, update = Round(length), np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    message = prepared.masked_input(update)
    sent = sum(map(len, message.chunks))
    packed, out = bytes(sent), bytearray(sent)

    def write() -> None:
        memoryview(out)[:] = packed

    times = by_turns(
        repeats,
        {
            "ours": lambda: prepared.masked_input(update),
            "read": update.max,
            "keystreams": lambda: raw_cipher(SITES * length * MASK_BYTES),
            "fast": lambda: fast_cipher(SITES * length * MASK_BYTES),
            "write": write,
        },
        clock=time.process_time,
    )
    floors, lower = (
        [sum(each) for each in zip(times["read"], times[streams], times["write"], strict=True)]
        for streams in ("keystreams", "fast")
    )
    return [
        Figure("masked input (encode, mask, pack, hash, sign), processor time", times["ours"], "s"),
        Figure("floor: read the update once", times["read"], "s"),
        Figure(f"floor: {SITES} keystreams at the rate of AES alone", times["keystreams"], "s"),
        Figure("floor: write the packed bytes", times["write"], "s"),
        Figure("masked input / sum of its floors", ratios(times["ours"], floors), wanted="<= 2"),
        Figure("masked input / the same, at the rate of AES-256-GCM alone", ratios(times["ours"], lower)),
        Figure("bytes up / float32", [sent / update.nbytes], wanted="<= 0.63"),
        Figure("peak memory / float32", [peak_of_masked_input(length)], wanted="<= 3"),
    ]


def peak_of_masked_input(length: int) -> float:
    """Peak memory of a masked input beyond what was there before, as a multiple of the float32 input, in a process of
    its own."""
    code = f"from benchmarks.masking import _peak; _peak({length})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _peak(length: int) -> None:
    prepared, update = Round(length), np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    tracemalloc.start()
    prepared.masked_input(update)
    print(tracemalloc.get_traced_memory()[1] / update.nbytes)


def coordinator(length: int, repeats: int) -> list[Figure]:
    """The coordinator's work for SITES sites, against making and adding the masks that it has to remove."""
    update = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    keys = [(os.urandom(32), -1) for _ in range(SITES)]
    prepared = Round(length)
    lane = prepared.parameters.lanes[LANE]
    words = np.zeros(lane.masked_length, lane.masked_word)
    packed = memoryview(b"".join(prepared.masked_input(update).chunks))

    def arithmetic(spread: Spread) -> None:
        sums = np.zeros(lane.masked_length, lane.masked_word)
        for _ in range(SITES):
            add_packed(sums, lane, lambda offset, size: packed[offset : offset + size], spread=spread)
        total = unmasked_total(lane, sums, keys, spread=spread)
        decode_total(lane, total, survivors=SITES, weight=None, spread=spread)

    with ThreadPoolExecutor(2) as pool:
        times = by_turns(
            repeats,
            {
                "masks": lambda: apply_masks(words, keys),
                "one": lambda: arithmetic(map),
                "two": lambda: arithmetic(pool.map),
            },
        )
        whole = {"one": Round(length).finish(update), "two": Round(length, pool.map).finish(update)}
    figures = []
    for threads, wanted in (("one", "<= 4"), ("two", "")):
        name = f"{threads} thread{'s' if threads == 'two' else ''}"
        spent = ratios(times[threads], times["masks"])
        figures.append(Figure(f"coordinator: unpack, sum, unmask, decode / its masks, {name}", spent, wanted=wanted))
        spent = [whole[threads] / statistics.median(times["masks"])]
        figures.append(Figure(f"coordinator: whole round, hashes and signatures too / its masks, {name}", spent))
    return figures


def measure(*, full: bool) -> Record:
    """Masks, a site's input and the coordinator's sum."""
    length, repeats = (10_000_000, 7) if full else (1_000_000, 5)
    title = f"Masking {length:,} values of 16 bits among {SITES} sites"
    figures = [*masks(length, repeats), *masked_input(length, repeats), *coordinator(length, repeats)]
    return Record("masking", title, figures, full)
