"""What masking costs, as ratios measured side by side in one run: of the raw cipher, and of Flower's own functions.

    python -m benchmarks masking [--quick] [--json FILE] [--flower PYTHON]

Flower runs as a separate process in an environment of its own (`make peers` makes `.venv-flower`); without it its rows
are left out.  Times are the least of several repetitions, ratios are of times taken by turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import machines
from secureagg import encode_input
from secureagg.encoding import decode_total
from secureagg.keystream import Spread
from secureagg.masking import apply_masks, unmasked_total
from secureagg.messages import MaskedInput
from secureagg.packing import add_packed
from secureagg.phases import CollectingMaskedInputs
from secureagg.shamir import lagrange_coefficients, reconstruct, share

SITES = 16
RAW_BLOCK_BYTES = 256 * 1024
FLOWER = Path(".venv-flower/bin/python")


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def by_turns(repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
    """The least time of each function, called by turns so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: min(values) for name, values in times.items()}


# --- the cipher and the masks ---


def raw_cipher(total: int) -> None:
    """AES-256-CTR over ``total`` bytes in blocks that stay in cache: the most that a mask can be made with."""
    encryptor = Cipher(AES256(os.urandom(32)), CTR(bytes(16))).encryptor()
    zeros, out = bytes(RAW_BLOCK_BYTES), bytearray(RAW_BLOCK_BYTES)
    for _ in range(total // RAW_BLOCK_BYTES):
        encryptor.update_into(zeros, out)


def measure_masks(length: int, repeats: int) -> dict[str, float]:
    """Masks made and added, as shares of the raw cipher's rate on one thread."""
    words = np.zeros(length, "<u4")
    keys = [(os.urandom(32), 1) for _ in range(SITES)]
    with ThreadPoolExecutor(2) as pool:
        times = by_turns(
            repeats,
            raw=lambda: raw_cipher(SITES * words.nbytes),
            one=lambda: apply_masks(words, keys),
            two=lambda: apply_masks(words, keys, spread=pool.map),
            raw_two=lambda: list(pool.map(raw_cipher, [SITES * words.nbytes // 2] * 2)),
        )
    return {
        "raw cipher, GB/s": SITES * words.nbytes / times["raw"] / 1e9,
        "masks / raw cipher, one thread": times["raw"] / times["one"],
        "two threads / one thread": times["one"] / times["two"],
        "raw cipher, two threads / one": times["raw"] / times["raw_two"],
    }


# --- a whole masked input, and the coordinator's part ---


class Round:
    """A round of SITES sites with one long lane, up to the masked inputs."""

    def __init__(self, length: int, spread: Spread = map) -> None:
        made = machines(SITES, length, spread=spread)
        self.parameters, self.participants, self.coordinator = made.parameters, made.participants, made.coordinator
        pending = [(site, message) for site, one in self.participants.items() for message in one.start()]
        while not isinstance(self.coordinator.phase, CollectingMaskedInputs):
            outbound = [out for site, message in pending for out in self.coordinator.receive(message, sender=site)]
            pending = [(o.recipient, m) for o in outbound for m in self.participants[o.recipient].receive(o.message)]

    def masked_input(self, update: np.ndarray, spread: Spread = map) -> MaskedInput:
        """Encode, mask and pack one site's update; the site's machine stays as it was."""
        participant = next(iter(self.participants.values()))
        participant._spread = spread
        encoded = encode_input(self.parameters, {"update": update}, spread=spread)
        _, (message,) = participant._send_masked_input(participant.phase, encoded)
        return message

    def finish(self, update: np.ndarray) -> float:
        """Run the rest of the round, with this update at every site; returns the coordinator's seconds in it."""
        spent = 0.0
        pending = []
        for site, participant in self.participants.items():
            pending += [(site, m) for m in participant.submit(encode_input(self.parameters, {"update": update}))]
        while pending:
            outbound = []
            for site, message in pending:
                began = time.perf_counter()
                outbound += self.coordinator.receive(message, sender=site)
                spent += time.perf_counter() - began
            pending = [(o.recipient, m) for o in outbound for m in self.participants[o.recipient].receive(o.message)]
        return spent


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


def measure_input(length: int, repeats: int, flower: Path) -> dict[str, float]:
    """A site's masked input: time against Flower's, bytes and memory against float32."""
    prepared, update = Round(length), np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    message = prepared.masked_input(update)
    result = {
        "bytes on the wire / float32": sum(map(len, message.chunks)) / update.nbytes,
        "peak memory of a masked input / float32": peak_of_masked_input(length),
    }
    if not flower.exists():
        result["masked input, seconds"] = by_turns(repeats, ours=lambda: prepared.masked_input(update))["ours"]
        return result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.npy"
        np.save(path, update)
        script = Path(__file__).parent / "peers" / "flower_masking.py"
        ours, ours_on_two, theirs = [], [], []
        for _ in range(repeats):  # by turns, so that a busy machine slows all
            ours.append(seconds(lambda: prepared.masked_input(update)))
            with ThreadPoolExecutor(2) as pool:
                ours_on_two.append(seconds(lambda: prepared.masked_input(update, pool.map)))
            command = [str(flower), str(script), str(path), str(SITES - 1), "1"]
            theirs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    result |= {
        "masked input, seconds": min(ours),
        "masked input on two threads, seconds": min(ours_on_two),
        "Flower's masked input, seconds": min(one["masked_input"] for one in theirs),
        "Flower / ours, masked input": statistics.median(
            one["masked_input"] / own for one, own in zip(theirs, ours, strict=True)
        ),
        "Flower / ours, masked input on two threads": statistics.median(
            one["masked_input"] / own for one, own in zip(theirs, ours_on_two, strict=True)
        ),
        "Flower's bytes / float32": theirs[0]["bytes"] / update.nbytes,
        "Flower's peak memory / float32": max(one["peak"] for one in theirs) / update.nbytes,
    }
    return result | measure_shamir(theirs)


def measure_shamir(theirs: list[dict[str, float]]) -> dict[str, float]:
    """Sharing two secrets among 100 with threshold 67, and reconstructing 100, per secret, against Flower's."""
    positions = range(1, 101)
    secrets = [os.urandom(32) for _ in range(100)]
    ours = by_turns(
        5,
        share=lambda: [share(secret, threshold=67, positions=positions, entropy=os.urandom) for secret in secrets[:2]],
    )
    shares = [share(secret, threshold=67, positions=positions, entropy=os.urandom) for secret in secrets]

    def rebuild() -> None:
        coefficients = lagrange_coefficients(range(1, 68))
        for secret, dealt in zip(secrets, shares, strict=True):
            held = {at: dealt[at] for at in coefficients}
            if reconstruct(held, coefficients, owner="x", who="x") != secret:
                raise SystemExit("a secret was not reconstructed")

    ours |= by_turns(5, rebuild=rebuild)
    return {
        "Flower / ours, sharing a secret": min(one["share"] for one in theirs) / (ours["share"] / 2),
        "Flower / ours, reconstructing a secret": min(one["reconstruct"] for one in theirs) / (ours["rebuild"] / 100),
    }


def measure_coordinator(length: int, repeats: int) -> dict[str, float]:
    """The coordinator's work for SITES sites, against making and adding the masks that it has to remove."""
    update = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    words = np.zeros(length, "<u4")
    keys = [(os.urandom(32), -1) for _ in range(SITES)]
    prepared = Round(length)
    lane = prepared.parameters.lanes["update"]
    packed = memoryview(b"".join(prepared.masked_input(update).chunks))

    def arithmetic(spread: Spread) -> None:
        sums = np.zeros(length, lane.word)
        for _ in range(SITES):
            add_packed(sums, lane, lambda offset, size: packed[offset : offset + size], spread=spread)
        total = unmasked_total(lane, sums, keys, spread=spread)
        decode_total(lane, total, survivors=SITES, weight=None, spread=spread)

    with ThreadPoolExecutor(2) as pool:
        times = by_turns(
            repeats,
            masks=lambda: apply_masks(words, keys),
            one=lambda: arithmetic(map),
            two=lambda: arithmetic(pool.map),
        )
        whole = {name: Round(length, spread).finish(update) for name, spread in (("one", map), ("two", pool.map))}
    figures = {
        "unpack, sum, unmask and decode, one thread": times["one"],
        "unpack, sum, unmask and decode, two threads": times["two"],
        "coordinator's whole round, with hashes and signatures, one thread": whole["one"],
        "coordinator's whole round, with hashes and signatures, two threads": whole["two"],
    }
    return {f"{name} / its masks on one": spent / times["masks"] for name, spent in figures.items()}


TARGETS = {
    "masks / raw cipher, one thread": ">= 0.75",
    "two threads / one thread": ">= 1.7",
    "bytes on the wire / float32": "<= 0.63",
    "peak memory of a masked input / float32": "<= 3",
    "Flower / ours, masked input": ">= 8",
    "unpack, sum, unmask and decode, one thread / its masks on one": "<= 4",
    "Flower / ours, sharing a secret": ">= 50",
    "Flower / ours, reconstructing a secret": ">= 50",
}


def main() -> None:
    """Measure, print a table, and with ``--json`` write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the length, fewer repetitions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flower", type=Path, default=FLOWER, help="Python of the environment that has flwr")
    arguments = parser.parse_args()
    length, repeats = (1_000_000, 3) if arguments.quick else (10_000_000, 5)
    figures = {
        **measure_masks(length, repeats),
        **measure_input(length, repeats, arguments.flower),
        **measure_coordinator(length, repeats),
    }
    table = Table(title=f"Masking {length:,} values of 16 bits among {SITES} sites", title_justify="left")
    for heading in ("figure", "measured", "wanted"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}", TARGETS.get(name, ""))
    console = Console()
    console.print(table)
    if not arguments.flower.exists():
        console.print("Flower was not measured; `make peers` installs it.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"length": length, "sites": SITES, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
