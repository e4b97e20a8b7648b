"""Whole rounds over encrypted sockets, each site and the coordinator a process of its own, and what each of them spent.

Ours runs as whoever embeds it runs it: a loop over ``Federation.rounds()`` at each site, ``run_coordinator`` beside
them.  *Plain* federated averaging does the same work over the same transport, with updates as float32 in clear to the
coordinator: a site takes the model, trains, and sends the difference in pieces of a mebibyte; the coordinator adds the
pieces up as they come, and sends the model that the mean makes.

A *lap* of a site is from one incoming model to the next, one of the coordinator from one finished round to the next: so
each holds the whole of a round once.  Training is no part of it; a site that is done with that waits for the others.
The first lap, which loads code, is not counted.
"""

import ctypes
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks import memory
from benchmarks.stopwatch import Stopwatch, io_seconds
from secureagg import FixedPoint
from sites.config import open_site
from sites.keys import load_keys
from sites.manifest import Manifest
from sites.model_state import ModelSpec, State
from sites.participant_loop import Federation
from sites.programs import run_coordinator
from sites.recipe import DEADLINES, ENCODING, HOMOMORPHIC, POLICY, PRIVACY, TRAINING
from sites.rounds import model_spec, transport_limits
from transport import COORDINATOR, Delivery, PeerId, connect, listen

PLAIN = "plain"
# System -> the manifest's policy, and the largest weight that a site may give its update inside the sum.
SYSTEMS = {
    "masked": (POLICY, 1),
    "homomorphic": (HOMOMORPHIC, 1),
    PLAIN: (POLICY, 1),
    "masked, weighted": (POLICY, ENCODING.max_examples),
}
PIECE_BYTES = 1 << 20
PATIENCE = 900.0  # seconds for one federation
VALUE_RANGE = 2.0
MEMORY_BYTES = 512 << 20  # of messages under way: for the homomorphic backend 256 MiB hold no copy of a ResNet-18

# Which functions a round's time is spent in.  What is left of a process's time is in none of them.
STEPS = {
    "keys, shares": [
        *(
            f"secureagg.participant:Participant.{name}"
            for name in (
                *("start", "_share_secrets", "_take_shares", "_sign_survivors", "_reveal_shares", "_reveal_keyed"),
                "_sign_ciphertexts",
            )
        ),
        *(
            f"secureagg.coordinator:Coordinator.{name}"
            for name in ("_collect_advertisement", "_collect_shares", "_keys_shown", "_shares_delivered")
        ),
    ],
    "sign, verify": [
        *("secureagg.codec:sign", "secureagg.codec:check_signature"),
        *("secureagg.identity:verify", "secureagg.identity:Identity.sign"),
    ],
    "encode": ["secureagg.encoding:encode_input"],
    "masks": [
        *(
            "secureagg.masking:masked_and_packed",
            "secureagg.masking:masks_of_input",
            "secureagg.homomorphic:mask_slots",
        ),
        "secureagg.masking:unmasked_total",
    ],
    "rebuild secrets": ["secureagg.coordinator:Coordinator._recover", "secureagg.coordinator:Coordinator._masks"],
    "pack": ["secureagg.lanes:RingLane.join", "secureagg.packing:pack", "secureagg.participant:_cut"],
    "ciphertexts (BFV)": [
        *("secureagg.homomorphic:masked_and_encrypted", "secureagg.homomorphic:SumReader.take"),
        *("secureagg.homomorphic:SumReader.totals", "secureagg.homomorphic:CiphertextSum.chunks"),
        *("secureagg.homomorphic:CiphertextSum.add", "secureagg.homomorphic:CiphertextSum.add_slots"),
    ],
    "hash": [
        *("hashlib:sha256", "secureagg.labels:digest", "secureagg.homomorphic:sum_digest"),
        "secureagg.participant:chunk_digests",
    ],
    "spool": ["secureagg.upload:Upload.take", "secureagg.upload:Upload._read"],
    "unpack, add": [
        *("secureagg.packing:add_packed", "benchmarks.federated_rounds:_add_piece"),
    ],
    "decode": ["secureagg.aggregate:aggregate_of"],
    "model": [
        *(f"sites.model_state:ModelSpec.{name}" for name in ("from_bytes", "restore", "flatten", "to_bytes")),
        *("sites.participant_loop:Round.submit", "sites.held_model:HeldModel.move"),
        *("sites.server_optimizer:ServerOptimizer.step", "sites.server_optimizer:ServerOptimizer.to_bytes"),
        *("sites.rounds:mean_update", "benchmarks.federated_rounds:_difference", "benchmarks.federated_rounds:_moved"),
    ],
    "state on disk": [
        *(f"sites.run_store:RunStore.{name}" for name in ("begin", "finish")),
        *("sites.files:write_atomic", "sites.journal:SqliteJournal.begin", "sites.journal:SqliteJournal.answer"),
    ],
    "frames": [
        *("transport.zeromq:_ZmqEndpoint.receive", "transport.zeromq:DealerEndpoint.send"),
        *("transport.zeromq:RouterEndpoint.send", "secureagg.codec:encode"),
    ],
}
ENCRYPTED_SOCKET = "encrypted socket"
OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one process spent in one lap: processor seconds, bytes (of a site, as the transport counts them), and peak
    memory beyond that when the lap began; ``steps``: processor seconds of each step, where it was profiled."""

    cpu: float
    sent: int
    received: int
    peak: int
    steps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One round: from when all sites are done with training until the last has the next model, in ``seconds``."""

    seconds: float
    sites: Sequence[Spent]
    coordinator: Spent


def resnet18() -> dict[str, tuple[int, ...]]:
    """The tensors of a model as large as torchvision's ResNet-18: 11,689,512 numbers."""
    tensors: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        tensors[f"{name}.conv"] = (out, into, kernel, kernel)
        tensors[f"{name}.scale"] = tensors[f"{name}.shift"] = (out,)

    convolution("stem", 64, 3, 7)
    into = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in (0, 1):
            convolution(f"{stage}.{block}.first", width, into, 3)
            convolution(f"{stage}.{block}.second", width, width, 3)
            if into != width:
                convolution(f"{stage}.{block}.shortcut", width, into, 1)
            into = width
    return {**tensors, "head.weight": (1000, 512), "head.bias": (1000,)}


# --- what each process measures ---


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a process stands: what it has spent since it began."""

    arrived: float
    began: float
    cpu: float
    sent: int
    received: int
    resident: int
    peak: int
    steps: Mapping[str, float]


class _Laps:
    """The marks of one process."""

    def __init__(self, *, profiled: bool) -> None:
        self.marks: list[_Mark] = []
        self._aside = 0.0
        self._watch = Stopwatch() if profiled else None
        if self._watch is not None:
            self._watch.install(STEPS)

    @contextmanager
    def between(self, sent: int = 0, received: int = 0) -> Iterator[None]:
        """One lap ends, and another begins; what the calling thread does meanwhile is part of neither."""
        arrived, aside = time.monotonic(), time.thread_time()
        peak = memory.peak()
        steps = {}
        if self._watch is not None:
            steps = {**self._watch.spent, ENCRYPTED_SOCKET: io_seconds()}
        cpu = time.process_time() - self._aside
        yield
        ctypes.CDLL(None).malloc_trim(0)  # what the last lap left behind is not there to be used again
        memory.forget_peak()
        self._aside += time.thread_time() - aside
        self.marks.append(_Mark(arrived, time.monotonic(), cpu, sent, received, memory.resident(), peak, steps))


def spent(before: _Mark, after: _Mark) -> Spent:
    """Of the lap from one mark to the next."""
    cpu = after.cpu - before.cpu
    steps = {name: seconds - before.steps.get(name, 0.0) for name, seconds in after.steps.items()}
    if steps:
        steps[OTHER] = cpu - sum(steps.values())
    return Spent(
        cpu=cpu,
        sent=after.sent - before.sent,
        received=after.received - before.received,
        peak=max(0, after.peak - before.resident),
        steps=steps,
    )


# --- the sites' training, which is known ---


class _Training:
    """What a site trains: each round moves every number by its own share of one vector, which all know."""

    def __init__(self, number: int, *, sites: int, spec: ModelSpec, step: float) -> None:
        base = np.random.default_rng(0).uniform(-1, 1, spec.length).astype(np.float32)
        self._base, self._step = spec.restore(base), step
        self._share, self._mean = (number + 1) / sites, (sites + 1) / (2 * sites)
        self._before: State | None = None

    def train(self, model: State) -> State:
        """The trained model, once this one is seen to be the last one moved by the mean of all sites' updates."""
        if self._before is not None:
            errors = [
                float((model[name] - before - self._mean * self._base[name]).abs().max())
                for name, before in self._before.items()
            ]
            if max(errors) > self._step:
                raise AssertionError(f"wrong aggregate: off by {max(errors):.3g}, expected at most {self._step:.3g}")
        self._before = model
        return {name: tensor + self._share * self._base[name] for name, tensor in model.items()}


# --- programs ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What the processes of a federation are told: which system, how many laps after the first, and where its files
    are."""

    system: str
    names: Sequence[str]
    laps: int
    profiled: bool
    folder: Path

    @property
    def manifest(self) -> Manifest:
        """Which all sites have signed."""
        return Manifest.load(self.folder / "manifest.toml")

    @property
    def step(self) -> float:
        """By how much a right aggregate may be off."""
        rounded = 0.0 if self.system == PLAIN else FixedPoint(value_range=VALUE_RANGE).step
        return rounded + 1e-5  # of float32, whose numbers grow to the number of rounds


def _site(job: _Job, number: int, gate: Barrier, results: Connection) -> None:
    torch.set_num_threads(1)  # the training here is no part of what is measured, and its threads would be
    laps = _Laps(profiled=job.profiled)
    site = open_site(job.folder / job.names[number] / "SITE.toml")
    manifest = site.manifest
    training = _Training(number, sites=len(job.names), spec=model_spec(manifest), step=job.step)
    address, limits = manifest.coordinator.address, transport_limits(manifest)
    keys = {"secret_key": site.keys.transport_secret, "server_key": manifest.coordinator.card.transport_key}
    endpoint = connect(address, **keys, limits=limits)

    def train(model: State) -> State:
        sent, received = endpoint.bytes_sent.get(COORDINATOR, 0), endpoint.bytes_received.get(COORDINATOR, 0)
        with laps.between(sent, received):
            trained = training.train(model)
            gate.wait(PATIENCE)
        return trained

    if job.system == PLAIN:
        with endpoint:
            endpoint.send(COORDINATOR, [b"hello"])
            while len(laps.marks) < job.laps + 2:
                _plain_round(endpoint, model_spec(manifest), endpoint.receive(PATIENCE), train)
    else:
        with Federation(site, endpoint=endpoint) as federation:
            for training_round in federation.rounds():
                trained = train(training_round.global_state)
                if len(laps.marks) == job.laps + 2:
                    break
                training_round.submit(trained, examples=1)
                del trained
    results.send(laps.marks)


def _plain_round(endpoint: Any, spec: ModelSpec, delivery: Delivery, train: Callable[[State], State]) -> None:
    vector = spec.from_bytes(delivery.frames[0], who="model")
    del delivery
    update = memoryview(_difference(spec, train(spec.restore(vector)), vector)).cast("B")
    for start in range(0, len(update), PIECE_BYTES):
        endpoint.send(COORDINATOR, [update[start : start + PIECE_BYTES]])


def _difference(spec: ModelSpec, trained: State, vector: np.ndarray) -> np.ndarray:
    return spec.flatten(trained, who="trained model") - vector


def _coordinator(job: _Job, results: Connection) -> None:
    laps = _Laps(profiled=job.profiled)

    def lap() -> None:
        with laps.between():
            pass
        if len(laps.marks) == job.laps + 1:
            results.send(laps.marks)

    keys, initial = job.folder / "sum.keys", job.folder / "initial.safetensors"
    if job.system == PLAIN:
        _plain_coordinator(job, load_keys(keys).transport_secret, initial.read_bytes(), lap)
    else:
        run_coordinator(
            job.folder / "manifest.toml",
            keys=keys,
            initial=initial,
            state=job.folder / "state",
            report=lambda record: _report(record, lap),
            notify=lambda _: None,
            memory_bytes=MEMORY_BYTES,
        )


def _report(record: Any, lap: Callable[[], None]) -> None:
    if record.error or record.dropped or record.refused:
        raise AssertionError(f"round {record.number}: {record.error}, dropped {record.dropped}, {record.refused}")
    lap()


def _plain_coordinator(job: _Job, secret: bytes, initial: bytes, lap: Callable[[], None]) -> None:
    manifest = job.manifest
    spec, limits = model_spec(manifest), transport_limits(manifest, memory_bytes=MEMORY_BYTES)
    vector = spec.from_bytes(initial, who="initial model")
    peers = {PeerId(site): card.transport_key for site, card in manifest.roster.items()}
    with listen(manifest.coordinator.address, secret_key=secret, peers=peers, limits=limits) as endpoint:
        present: set[PeerId] = set()
        while len(present) < len(peers):
            if (delivery := endpoint.receive(1.0)) is not None:
                present.add(delivery.peer)
        while True:
            payload = spec.to_bytes(vector)
            for peer in peers:
                endpoint.send(peer, [payload])
            total, places = np.zeros_like(vector), dict.fromkeys(peers, 0)
            while sum(places.values()) < len(peers) * total.nbytes:
                if (delivery := endpoint.receive(1.0)) is not None:
                    places[delivery.peer] += _add_piece(total, places[delivery.peer], delivery.frames[0])
            vector = _moved(vector, total, len(peers))
            lap()


def _add_piece(total: np.ndarray, place: int, piece: bytes) -> int:
    values = np.frombuffer(piece, np.float32)
    start = place // values.itemsize
    total[start : start + len(values)] += values
    return len(piece)


def _moved(vector: np.ndarray, total: np.ndarray, sites: int) -> np.ndarray:
    return vector + total / sites


# --- a federation ---


def _told(program: Callable[..., None], *arguments: Any) -> None:
    """Run a program whose last argument is where its results go; what goes wrong goes there too."""
    try:
        program(*arguments)
    except BaseException:
        with suppress(OSError):  # nobody listens any more
            arguments[-1].send(traceback.format_exc())


def federate(
    system: str, *, sites: int, tensors: Mapping[str, Sequence[int]], laps: int, profiled: bool = False
) -> list[Lap]:
    """Run a federation of ``system`` and return its laps after the first; RuntimeError if a process fails, or has got a
    wrong aggregate."""
    # Processes are forked from one that has loaded everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    spec = ModelSpec.of(tensors)
    names = [f"site-{number:03d}" for number in range(sites)]
    with TemporaryDirectory() as folder:
        job = _Job(system=system, names=names, laps=laps, profiled=profiled, folder=Path(folder))
        _found(job, spec)
        gate = context.Barrier(sites)
        pipes, processes = [], []
        programs: list[tuple[Any, ...]] = [
            (_coordinator, job),
            *((_site, job, number, gate) for number in range(sites)),
        ]
        for program in programs:
            here, there = context.Pipe(duplex=False)
            processes.append(context.Process(target=_told, args=(*program, there), daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
        try:
            marks = _results(pipes, system)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
    coordinator, *of_sites = marks
    return [
        Lap(
            seconds=max(each[lap + 1].arrived for each in of_sites) - max(each[lap].began for each in of_sites),
            sites=[spent(each[lap], each[lap + 1]) for each in of_sites],
            coordinator=spent(coordinator[lap - 1], coordinator[lap]),
        )
        for lap in range(1, laps + 1)
    ]


def _results(pipes: Sequence[Connection], system: str) -> list[list[_Mark]]:
    results: dict[int, list[_Mark]] = {}
    deadline = time.monotonic() + PATIENCE
    while len(results) < len(pipes):
        waiting = {pipe: number for number, pipe in enumerate(pipes) if number not in results}
        ready = wait(list(waiting), timeout=deadline - time.monotonic())
        if not ready:
            raise RuntimeError(f"{system}: {len(waiting)} processes have not ended after {PATIENCE:g} s")
        for pipe in ready:
            found = pipe.recv()
            if isinstance(found, str):
                raise RuntimeError(f"{system}: a process failed\n{found}")
            results[waiting[pipe]] = found
    return [results[number] for number in range(len(pipes))]


def _found(job: _Job, spec: ModelSpec) -> None:
    """Write the keys, manifest and model of the federation."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    # The programs know nothing of these.
    from support.consortium import make_consortium  # noqa: PLC0415

    from sites.demo import free_port  # noqa: PLC0415

    policy, max_examples = SYSTEMS[job.system]
    make_consortium(
        job.folder,
        names=job.names,
        address=f"tcp://127.0.0.1:{free_port()}",
        initial=spec.to_bytes(np.zeros(spec.length, np.float32)),
        policy=policy,
        encoding=msgspec.structs.replace(
            ENCODING, value_range=VALUE_RANGE, out_of_range="error", max_examples=max_examples
        ),
        training=msgspec.structs.replace(TRAINING, rounds=job.laps + 2),
        privacy=msgspec.structs.replace(PRIVACY, mode="none"),
        deadlines=msgspec.structs.replace(DEADLINES, phase_seconds=PATIENCE, training_seconds=PATIENCE),
    )
