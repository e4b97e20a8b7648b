"""What a whole round over sockets costs: ours masked, ours homomorphic, and plain float32 through the same transport.

``federated_rounds`` says what is run.  Systems take turns, so that a busy machine slows all; each launch gives several
laps.  Beside them is what the machine can do at best (``limits``), and from that the floor of a site's round: read its
update once, make its keystreams at the rate of the cipher, write the packed bytes, move the bytes of its connection.
Where the time goes is measured in launches of their own, since naming functions slows them.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

import numpy as np

from benchmarks import limits
from benchmarks.federated_rounds import OTHER, PLAIN, SYSTEMS, Lap, federate, resnet18
from benchmarks.masking import MASK_BYTES, raw_cipher
from benchmarks.record import Figure, Grid, Record, across, ratios
from benchmarks.turns import by_turns

MASKED_INPUT = ("encode", "masks", "pack", "hash", "sign, verify")  # the steps of what `masking` calls a masked input
OURS = ("masked", "homomorphic")
PROFILED = (*OURS, PLAIN)

# What is measured of a lap: unit, and how.
QUANTITIES: dict[str, tuple[str, Callable[[Lap], float]]] = {
    "processor time of a site": ("s", lambda lap: fmean(each.cpu for each in lap.sites)),
    "processor time of the coordinator": ("s", lambda lap: lap.coordinator.cpu),
    "wall time of the round": ("s", lambda lap: lap.seconds),
    "up from a site": ("MB", lambda lap: fmean(each.sent for each in lap.sites) / 1e6),
    "down to a site": ("MB", lambda lap: fmean(each.received for each in lap.sites) / 1e6),
    "peak memory of a site, beyond what it had": ("MB", lambda lap: max(each.peak for each in lap.sites) / 1e6),
    "peak memory of the coordinator, beyond what it had": ("MB", lambda lap: lap.coordinator.peak / 1e6),
}


def costs(laps: Mapping[str, Sequence[Lap]]) -> list[Figure]:
    """What each system's rounds cost, then ours as ratios to plain of the same turn."""
    values = {
        name: {system: [of(lap) for lap in taken] for system, taken in laps.items()}
        for name, (_, of) in QUANTITIES.items()
    }
    figures = [
        Figure(name, found, QUANTITIES[name][0], at={"system": system})
        for name, systems in values.items()
        for system, found in systems.items()
    ]
    for name, systems in values.items():
        figures += [
            Figure(f"{name}, of plain's", ratios(systems[system], systems[PLAIN]), at={"system": system})
            for system in systems
            if system != PLAIN
        ]
    return figures


def floors(
    laps: Sequence[Lap], profiled: Sequence[Lap], reached: Sequence[Figure], *, length: int, repeats: int
) -> list[Figure]:
    """The least that a site of a masked round can spend, and what it spends beside that."""
    sites = len(laps[0].sites)
    update = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    packed = bytes(round(fmean(each.sent for lap in laps for each in lap.sites)))
    out = bytearray(len(packed))

    def write() -> None:
        memoryview(out)[:] = packed

    times = by_turns(
        repeats,
        {
            "read the update once": update.max,
            f"{sites} keystreams at the rate of AES alone": lambda: raw_cipher(sites * length * MASK_BYTES),
            "write the packed bytes": write,
        },
        clock=time.process_time,
    )
    masked = median(map(sum, zip(*times.values(), strict=True)))
    encrypted = {
        whom: next(each.median for each in reached if each.name == f"limit: {limits.ENCRYPTED}, {whom}")
        for whom in (limits.SENDS, limits.RECEIVES)
    }
    up, down = (
        fmean(each) / 1e9 for each in zip(*((s.sent, s.received) for lap in laps for s in lap.sites), strict=True)
    )
    moving = {
        "encrypt and send its bytes": up * encrypted[limits.SENDS],
        "receive and decrypt the model": down * encrypted[limits.RECEIVES],
    }
    spent = [fmean(each.cpu for each in lap.sites) for lap in laps]
    inputs = [fmean(sum(each.steps[name] for name in MASKED_INPUT) for each in lap.sites) for lap in profiled]
    whole = masked + sum(moving.values())
    return [
        *(Figure(f"floor of a site: {name}", values, "s") for name, values in times.items()),
        *(Figure(f"floor of a site: {name}", [seconds], "s") for name, seconds in moving.items()),
        Figure(
            "masked: processor time of a site / read, keystreams, write", [one / masked for one in spent], wanted="<= 2"
        ),
        Figure("masked: the same / these and its bytes' way through the transport", [one / whole for one in spent]),
        Figure(
            f"masked: its steps {', '.join(MASKED_INPUT)} / read, keystreams, write", [one / masked for one in inputs]
        ),
    ]


def where(laps: Mapping[str, Sequence[Lap]]) -> list[Figure]:
    """How a round's processor time is split, from profiled laps."""
    figures = []
    for system, taken in laps.items():
        split: dict[str, list[Mapping[str, float]]] = {
            "site": [
                {
                    name: fmean(each.steps.get(name, 0.0) for each in lap.sites)
                    for name in sorted(set().union(*(each.steps for each in lap.sites)))
                }
                for lap in taken
            ],
            "coordinator": [lap.coordinator.steps for lap in taken],
        }
        for who, steps in split.items():
            found: dict[str, list[float]] = defaultdict(list)
            for lap in steps:
                for name in {name for each in steps for name in each}:
                    found[name].append(lap.get(name, 0.0))
            at = {"system": system, "who": who}
            whole = [sum(lap.values()) for lap in steps]
            ranked = sorted(found, key=lambda name: (name == OTHER, -median(found[name])))
            figures += [
                Figure(f"step: {name}", found[name], "s", at=at)
                for name in ranked
                if name == OTHER or median(found[name]) >= 0.002 * median(whole)
            ]
            figures.append(Figure("share of processor time in no named step", ratios(found[OTHER], whole), at=at))
    return figures


def measure(*, full: bool) -> Record:
    """Rounds by turns, the machine's limits, and profiled rounds."""
    if full:
        systems, profiles, sites, tensors, turns, megabytes = tuple(SYSTEMS), PROFILED, 8, resnet18(), 2, 256
    else:
        systems, profiles, sites, tensors, turns, megabytes = PROFILED, PROFILED[:1], 4, {"weight": (1000, 1000)}, 1, 32
    length = sum(map(math.prod, tensors.values()))
    taken: dict[str, list[Lap]] = {system: [] for system in systems}
    for _ in range(turns):
        for system in systems:
            taken[system] += federate(system, sites=sites, tensors=tensors, laps=2)
    profiled = {system: federate(system, sites=sites, tensors=tensors, laps=1, profiled=True) for system in profiles}
    reached = limits.measure(megabytes << 20, 5 if full else 2)
    figures = [
        *costs(taken),
        *reached,
        *floors(taken["masked"], profiled["masked"], reached, length=length, repeats=5),
        *where(profiled),
    ]
    title = f"A round of {sites} sites with {length:,} values of 16 bits, each site and the coordinator a process"
    return Record("round", title, figures, full)


def tables(record: Record) -> list[Grid]:
    """What a round costs in each system, the limits beside it, and where its processor time goes."""
    steps = [each for each in record.figures if "who" in each.at]
    systems = [each for each in record.figures if "system" in each.at and each not in steps]
    ratios_to_plain = [each for each in systems if each.name.endswith(", of plain's")]
    limits_and_floors = [each for each in record.figures if "system" not in each.at]
    by_machine = [
        replace(each, name=each.name.removeprefix("step: "), at={"machine": f"{each.at['system']}, {each.at['who']}"})
        for each in steps
    ]
    return [
        across(record.title, [each for each in systems if each not in ratios_to_plain], "system"),
        across("The same, of plain's in the same turn", ratios_to_plain, "system"),
        replace(record, title="What the machine can do, and what is beyond it", figures=limits_and_floors).grid(),
        across("Where a round's processor time goes: profiled, s", by_machine, "machine"),
    ]
