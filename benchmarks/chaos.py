"""Whether a federation survives: processes that are killed, stopped and cut off while all that they write is judged.

    python -m benchmarks chaos [--seeds 1 2 3] [--rounds 100] [--backend masked] [--json FILE]
    python -m benchmarks chaos --soak 2000 [--json FILE]           # no faults: memory and descriptors over many rounds
    python -m benchmarks chaos --sites 100 --parameters 1000000 [--json FILE]       # no faults: one large round

Without options: the plan that docs/reliability.md tells of.  Exits with 1 as soon as anything does not hold that must;
tests/support/chaos_judge.py says what that is.  The machinery is the tests' (tests/support/chaos.py).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.memory import resident
from sites import recipe

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.chaos import COORDINATOR, DEADLINES, Chaos
from support.chaos_judge import Violated
from support.chaos_programs import Nursery

# backend, seed, rounds; "ledgers": masked, with DP-SGD behind each site's ledger.
PLAN: Final = (
    ("masked", 1, 100),
    ("homomorphic", 2, 100),
    ("masked", 3, 100),
    ("ledgers", 4, 100),
    ("masked", 5, 60),
    ("homomorphic", 6, 60),
)
EVERY: Final = 2.5  # rounds between two faults, on average


def chaos(nursery: Nursery, folder: Path, backend: str, seed: int, rounds: int) -> dict[str, Any]:
    """One run through its seed's faults."""
    policy = recipe.HOMOMORPHIC if backend == "homomorphic" else recipe.POLICY
    options = {"seed": seed, "rounds": rounds, "policy": policy, "ledgers": backend == "ledgers", "every": EVERY}
    with Chaos(folder, nursery, **options) as federation:
        outcome = federation.run()
    found = asdict(outcome)
    found.pop("peak")
    return {"backend": backend, **found}


def soak(nursery: Nursery, folder: Path, rounds: int) -> dict[str, Any]:
    """Many rounds without faults: memory and descriptors of the coordinator and of a site, and their slopes over the
    last three quarters."""
    samples: dict[str, list[tuple[int, int, int]]] = {COORDINATOR: [], "a": []}

    def watch(federation: Chaos, done: int) -> None:
        for name, kept in samples.items():
            pid = federation.pid(name)
            if pid and done - (kept[-1][0] if kept else 0) >= 20:
                kept.append((done, resident(pid), len(list(Path(f"/proc/{pid}/fd").iterdir()))))

    names = tuple("abcd")
    with Chaos(folder, nursery, seed=0, rounds=rounds, names=names, faults=(), lines={}, watch=watch) as federation:
        outcome = federation.run()
    result: dict[str, Any] = {"what": "soak", "sites": len(names), "rounds": rounds, "seconds": outcome.seconds}
    for name, kept in samples.items():
        late = np.array(kept[len(kept) // 4 :], float)
        slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
        result[name] = {
            "bytes at a quarter": int(late[0, 1]),
            "bytes at the end": int(late[-1, 1]),
            "bytes per round": round(slope, 1),
            "descriptors, least and most": [int(late[:, 2].min()), int(late[:, 2].max())],
        }
    return {**result, "models checked": outcome.tally.models, "digests checked": outcome.tally.exact}


def large(nursery: Nursery, folder: Path, sites: int, parameters: int) -> dict[str, Any]:
    """One round of many sites, each a process, over good lines."""
    deadlines = msgspec.structs.replace(DEADLINES, join_seconds=600.0, phase_seconds=900.0, training_seconds=1800.0)
    names = tuple(f"site-{number:03d}" for number in range(sites))
    with Chaos(
        folder,
        nursery,
        seed=0,
        rounds=1,
        names=names,
        faults=(),
        lines={},
        parameters=parameters - 1,
        quiet=True,
        deadlines=deadlines,
        without_progress=3000.0,
    ) as federation:
        outcome = federation.run()
    record = json.loads((folder / "state" / "rounds.jsonl").read_bytes().splitlines()[0])
    summed, received = record["seconds"], record["bytes_received"]
    return {
        "what": "one large round",
        "sites": sites,
        "parameters": parameters,
        "survivors": len(record["survivors"]),
        "seconds of the round": sum(summed.values()),
        "seconds by phase": summed,
        "seconds with joining, evaluation and the end": outcome.seconds,
        "bytes received per site": round(sum(received.values()) / sites),
        "bytes per parameter": sum(received.values()) / sites / parameters,
        "peak bytes, coordinator": outcome.peak[COORDINATOR],
        "peak bytes, largest site": max(peak for name, peak in outcome.peak.items() if name != COORDINATOR),
        "sites with the final model": outcome.with_final_model,
    }


def main() -> None:
    """Run, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--backend", choices=("masked", "homomorphic", "ledgers"), default="masked")
    parser.add_argument("--soak", type=int, metavar="ROUNDS")
    parser.add_argument("--sites", type=int)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="leave all files in this folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="secureagg-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    began, load = time.monotonic(), os.getloadavg()[0]
    console = Console()
    try:
        with Nursery() as nursery:
            if options.soak is not None:
                rows.append(soak(nursery, root / "soak", options.soak))
            elif options.sites is not None:
                rows.append(large(nursery, root / "large", options.sites, options.parameters))
            else:
                chosen = [(options.backend, seed, options.rounds) for seed in options.seeds or ()] or PLAN
                for backend, seed, rounds in chosen:
                    rows.append(chaos(nursery, root / f"{backend}-{seed}", backend, seed, rounds))
                    console.print(rows[-1], soft_wrap=True)
    except Violated as error:
        sys.exit(f"VIOLATED: {error}; everything is in {root}")
    table = Table("what", "figures")
    for row in rows:
        table.add_row(
            str(row.get("what", row.get("backend"))), ", ".join(f"{key} {value}" for key, value in row.items())
        )
    console.print(table)
    if options.json is not None:
        found = {"load of the machine": [load, os.getloadavg()[0]], "seconds": time.monotonic() - began, "runs": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.keep is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
