"""A federation of processes whose machines fail: killed, stopped, cut off, behind slow lines; and a watchdog.

All that happens is drawn from one seed: what, to whom, for how long, and after which round, so that a run of the same
seed meets the same faults in the same order.  At which message of a round a fault hits is up to the machine.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import torch
from safetensors.torch import save

from sites import recipe
from sites.demo import free_port
from sites.manifest import Policy
from support.chaos_judge import Judge, Tally, Violated
from support.chaos_programs import Nursery
from support.consortium import make_consortium
from support.faulty_link import Faults, FaultyLink

COORDINATOR: Final = "sum"
SITES: Final = ("a", "b", "c", "d", "e")
DEADLINES: Final = msgspec.structs.replace(recipe.DEADLINES, join_seconds=15.0, phase_seconds=2.0, training_seconds=3.0)
PLAIN: Final = msgspec.structs.replace(recipe.PRIVACY, mode="none")
LOCAL: Final = msgspec.structs.replace(recipe.PRIVACY, mode="local", epsilon=1000.0)
ENCODING: Final = msgspec.structs.replace(recipe.ENCODING, value_range=4.0, max_examples=100, out_of_range="error")
EVALUATION: Final = msgspec.structs.replace(recipe.EVALUATION, histogram_bins=2, max_examples=1000)
WITHOUT_PROGRESS: Final = 90.0  # seconds without the end of a round, after which a federation counts as stuck
KINDS: Final = {
    "kill coordinator": 3,
    "kill site": 4,
    "kill several": 2,
    "kill all": 1,
    "stop site": 3,
    "stop coordinator": 2,
    "cut line": 4,
    "cut all lines": 1,
    "line down": 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens once so many rounds have ended, ``delay`` seconds after that: to whom, for how many ``seconds``
    (until it is started again, goes on, or can be reached)."""

    after: int
    delay: float
    kind: str
    whom: tuple[str, ...]
    seconds: float


def draw_faults(seed: int, *, rounds: int, names: Sequence[str], every: float) -> list[Fault]:
    """A fault about ``every`` so many rounds, none in the last two, and the coordinator killed when all are over."""
    chance = random.Random(f"faults {seed}")  # noqa: S311  not a secret
    faults, place = [], 1.0
    while (place := place + chance.expovariate(1 / every)) < rounds - 2:
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        several = chance.sample(list(names), chance.randint(2, len(names)))
        whom = {
            "kill coordinator": [COORDINATOR],
            "stop coordinator": [COORDINATOR],
            "kill several": [*several, *([COORDINATOR] if chance.random() < 0.5 else [])],
            "kill all": [*names, COORDINATOR],
            "cut all lines": names,
        }.get(kind, several[:1])
        seconds = chance.uniform(0.0, 3.0 if "stop" in kind or "down" in kind else 1.0)
        faults.append(
            Fault(after=int(place), delay=chance.uniform(0.0, 0.4), kind=kind, whom=tuple(whom), seconds=seconds)
        )
    last = Fault(after=rounds + 1, delay=0.0, kind="kill coordinator", whom=(COORDINATOR,), seconds=0.5)
    return [*faults, last]


def draw_lines(seed: int, names: Sequence[str]) -> dict[str, Faults]:
    """A line for each site: a good one, and late, slow, lossy and stalling ones, in an order of the seed's."""
    chance = random.Random(f"lines {seed}")  # noqa: S311
    cuts = tuple(sorted(chance.randrange(2_000, 2_000_000) for _ in range(20)))
    stalls = tuple((chance.randrange(2_000, 1_000_000), chance.uniform(0.2, 1.5)) for _ in range(15))
    lines = [
        Faults(seed=seed),
        Faults(seed=seed, delay=0.015),
        Faults(seed=seed, delay=0.005, bytes_per_second=125_000),
        Faults(seed=seed, delay=0.005, loss=0.02),
        Faults(seed=seed, stalls=stalls, cuts=cuts),
    ]
    chance.shuffle(lines)
    return {name: lines[place % len(lines)] for place, name in enumerate(names)}


@dataclass(slots=True)
class _Program:
    pid: int = 0
    starts: int = 0
    due: float | None = 0.0  # when it is to be started; None while it runs, or once it has ended well
    ended_well: bool = False
    failures: int = 0
    stopped: bool = False


@dataclass(slots=True)
class Outcome:
    """What a run of chaos came to."""

    seed: int
    seconds: float
    injected: dict[str, int]
    restarts: int
    gave_up: int  # times that a program ended by itself with an error, and was started again
    with_final_model: int
    tally: Tally
    peak: dict[str, int] = field(default_factory=dict)  # program -> most memory of its last process, in bytes


class Chaos:
    """Runs one federation through ``faults`` to its end; raises Violated for whatever does not hold."""

    def __init__(
        self,
        folder: Path,
        nursery: Nursery,
        *,
        seed: int,
        rounds: int,
        policy: Policy = recipe.POLICY,
        names: Sequence[str] = SITES,
        ledgers: bool = False,
        every: float = 2.0,
        faults: Sequence[Fault] | None = None,
        lines: dict[str, Faults] | None = None,
        parameters: int = 12,
        quiet: bool = False,
        deadlines: msgspec.Struct = DEADLINES,
        without_progress: float = WITHOUT_PROGRESS,
        watch: Callable[["Chaos", int], None] = lambda _chaos, _rounds: None,
    ) -> None:
        self.folder, self._nursery, self._seed, self._rounds, self._names = folder, nursery, seed, rounds, tuple(names)
        self._ledgers, self._quiet, self._patience, self._watch = ledgers, quiet, without_progress, watch
        folder.mkdir(parents=True, exist_ok=True)
        length = 13 if ledgers else parameters
        self._consortium = make_consortium(
            folder,
            names=names,
            address=f"tcp://127.0.0.1:{free_port()}",
            initial=save({"weight": torch.zeros(1, length), "bias": torch.zeros(1)}),
            privacy=LOCAL if ledgers else PLAIN,
            deadlines=deadlines,
            encoding=ENCODING,
            evaluation=EVALUATION,
            policy=policy,
            training=msgspec.structs.replace(recipe.TRAINING, rounds=rounds),
        )
        self.manifest = self._consortium.manifest
        self._faults = draw_faults(seed, rounds=rounds, names=names, every=every) if faults is None else list(faults)
        self._line_faults = draw_lines(seed, names) if lines is None else lines
        self.judge = Judge(folder, names, self.manifest, None if ledgers else seed)
        self._programs = {name: _Program() for name in (COORDINATOR, *names)}
        self._lines: dict[str, FaultyLink] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._injected: Counter[str] = Counter()
        self._peak: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        address = self.manifest.coordinator.address
        for name, faults in self._line_faults.items():
            self._lines[name] = self._stack.enter_context(FaultyLink(address, faults))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for program in self._programs.values():
            self._kill(program)
        self._stack.close()

    def pid(self, name: str) -> int:
        """Number of the process that is this program now."""
        return self._programs[name].pid

    # --- programs ---

    def _start(self, name: str) -> None:
        program, log = self._programs[name], self.folder / f"{name}.log"
        program.due, program.starts = None, program.starts + 1
        if name == COORDINATOR:
            program.pid = self._nursery.start("coordinate", log, str(self.folder))
            return
        line = self._lines.get(name)
        address = self.manifest.coordinator.address if line is None else line.address
        options = (address, self._seed, self._ledgers, self._quiet)
        program.pid = self._nursery.start("take_part", log, str(self.folder), name, *options)

    def _kill(self, program: _Program) -> None:
        if program.pid and program.due is None and not program.ended_well:
            with suppress(ProcessLookupError):
                os.kill(program.pid, signal.SIGKILL)

    def _note_ended(self) -> None:
        """Whoever ended with an error is started again, as systemd would; whoever was killed, when its fault says."""
        for pid, (status, peak) in self._nursery.ended().items():
            name = next((name for name, program in self._programs.items() if program.pid == pid), None)
            if name is None:
                continue
            program = self._programs[name]
            program.pid, program.stopped = 0, False
            self._peak[name] = peak
            if self._ledgers and name != COORDINATOR:
                self.judge.look_at_ledger(name)
            if status == 0:
                program.ended_well = True
            elif program.due is None:
                program.failures += status != -signal.SIGKILL
                program.due = time.monotonic() + 0.3

    # --- faults ---

    def _inject(self, fault: Fault) -> None:
        self._injected[fault.kind] += 1
        for name in fault.whom:
            program = self._programs[name]
            if fault.kind.startswith("kill"):
                self._kill(program)
                if program.pid:
                    program.due = time.monotonic() + fault.seconds
            elif fault.kind.startswith("stop") and program.pid and not program.stopped:
                with suppress(ProcessLookupError):
                    os.kill(program.pid, signal.SIGSTOP)
                program.stopped = True
                self._after(fault.seconds, lambda program=program, pid=program.pid: self._go_on(program, pid))
            elif fault.kind == "line down":
                self._lines[name].down = True
                self._lines[name].cut()
                self._after(fault.seconds, lambda name=name: setattr(self._lines[name], "down", False))
            elif fault.kind.startswith("cut"):
                self._lines[name].cut()

    def _go_on(self, program: _Program, pid: int) -> None:
        if program.pid == pid:
            program.stopped = False
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, act))

    # --- the run ---

    def run(self) -> Outcome:
        """To the end of the coordinator, and of the sites that hear of it."""
        began = progressed = time.monotonic()
        rounds = 0
        while not self._programs[COORDINATOR].ended_well:
            self._step(rounds)
            if (now := self._ended()) > rounds:
                rounds, progressed = now, time.monotonic()
                self._watch(self, rounds)
            elif time.monotonic() - progressed > self._patience:
                self._show_stacks()
                raise Violated(f"stuck after round {rounds}, for {self._patience:g} s; see {self.folder}/*.log")
        # Those who hear of the end, end; others are gone after as long as the coordinator lets them be gone.
        deadline = time.monotonic() + self.manifest.deadlines.join_seconds + 5
        while time.monotonic() < deadline and any(program.pid for program in self._programs.values()):
            self._later, due = [], self._later
            for _, act in due:
                act()
            self._note_ended()
            time.sleep(0.02)
        for name in self._names:
            self._kill(self._programs[name])
        while any(program.pid for program in self._programs.values()):
            self._note_ended()
            time.sleep(0.02)
        finals = self._names_with_final_model()
        return Outcome(
            seed=self._seed,
            seconds=time.monotonic() - began,
            injected=dict(self._injected),
            restarts=sum(program.starts - 1 for program in self._programs.values()),
            gave_up=sum(program.failures for program in self._programs.values()),
            with_final_model=finals,
            tally=self.judge.tally,
            peak=self._peak,
        )

    def _ended(self) -> int:
        """How many rounds have ended; judged, unless nobody writes down what a judge needs."""
        if not self._quiet:
            return self.judge.look()
        log = self.folder / "state" / "rounds.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def _names_with_final_model(self) -> int:
        if self._quiet:
            return sum(self._programs[name].ended_well for name in self._names)
        if self._ledgers:
            for name in self._names:
                self.judge.look_at_ledger(name)
        return self.judge.finish(rounds=self._rounds)

    def _step(self, rounds: int) -> None:
        now = time.monotonic()
        while self._faults and self._faults[0].after <= rounds:
            fault = self._faults.pop(0)
            self._after(fault.delay, lambda fault=fault: self._inject(fault))
        due = [act for at, act in self._later if at <= now]
        self._later = [(at, act) for at, act in self._later if at > now]
        for act in due:
            act()
        self._note_ended()
        for name, program in self._programs.items():
            if not program.pid and program.due is not None and program.due <= now:
                self._start(name)
        time.sleep(0.02)

    def _show_stacks(self) -> None:
        for program in self._programs.values():
            if program.pid:
                os.kill(program.pid, signal.SIGCONT)
                os.kill(program.pid, signal.SIGUSR1)
        time.sleep(1)
