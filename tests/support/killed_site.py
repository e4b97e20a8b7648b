"""A site's program that kills itself (SIGKILL) at one of its steps, and programs that race for the last of a budget.

`Server` runs each in a process of its own, forked from one that has loaded torch.  The site trains by the real trainer
under a real ledger.  What the world gets to see is written down as it happens: `draws` has a line for each use of the
data, written before it, and `sent.*` are the updates that left the site.
"""

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import torch

import dp.budget
import dp.ledger
import sites.trainer
from dp.accountants import rdp_epsilon
from dp.budget import BudgetGuard, PrivacyBudget
from dp.errors import BudgetExhausted, ReservationMisused
from dp.ledger import Ledger
from sites import recipe
from sites.datasets.heart import Hospital
from sites.trainer import Examples, LocalTrainer, fingerprint, heart_model
from support.fork_server import ForkServer
from support.ledgers import EVENT, SITE, open_ledger, release

ROUNDS = (1, 2)
NOISE = 4.0
DELTA = 1e-3
CHANGING = ("PRAGMA", "BEGIN", "CREATE", "INSERT", "DELETE", "COMMIT")
TRAINING = msgspec.structs.replace(recipe.TRAINING, rounds=len(ROUNDS))
PRIVACY = msgspec.structs.replace(recipe.PRIVACY, epsilon=50.0, delta=DELTA)
REAL_CONNECT, REAL_TRAINING = sqlite3.connect, sites.trainer.train_private


def hospital() -> Hospital:
    """A few made-up patients."""
    generator = np.random.default_rng(5)
    features, labels = generator.normal(size=(40, 13)).astype(np.float32), np.arange(40, dtype=np.float32) % 2
    return Hospital(
        name="made-up", train_features=features, train_labels=labels, test_features=features, test_labels=labels
    )


def open_site_ledger(folder: Path) -> Ledger:
    """The site's ledger."""
    return Ledger(
        folder / "ledger.sqlite", dataset=fingerprint(Examples.of_hospital(hospital()), SITE), site="a", signer=SITE
    )


def start_of(number: int) -> dict[str, torch.Tensor]:
    """The global model that a round starts from."""
    return {name: torch.full_like(tensor, 0.1 * number) for name, tensor in heart_model().state_dict().items()}


def append(path: Path, line: str) -> None:
    """Write a line at once; it is there however this process ends."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


class Steps:
    """Counts the steps of a process, writes their names down, and kills it before the one that is to be the last."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self._folder, self._last, self._count = folder, last, 0

    def at(self, name: str) -> None:
        """A step is about to be taken."""
        self._count += 1
        append(self._folder / "steps", name)
        if self._count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def run_site(folder: Path, last: int | None) -> None:
    """Take part in all rounds, those again that were already taken part in, and die before step ``last``."""
    steps = Steps(folder, last)
    (folder / "steps").unlink(missing_ok=True)

    def connect(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = REAL_CONNECT(*arguments, **options)
        connection.set_trace_callback(lambda sql: sql.startswith(CHANGING) and steps.at(" ".join(sql.split()[:3])))
        return connection

    def train(*arguments: object, **options: object) -> None:
        steps.at("sample")
        append(folder / "draws", json.dumps({**asdict(options["event"]), "round": steps.round}))
        REAL_TRAINING(*arguments, **options)
        steps.at("trained")

    dp.ledger.sqlite3.connect = connect
    sites.trainer.train_private = train
    dp.budget.noise_multiplier_for = lambda **_: NOISE  # its search takes seconds and is not what is tested
    trainer = LocalTrainer(
        name="a",
        model=heart_model(),
        data=Examples.of_hospital(hospital()),
        training=TRAINING,
        privacy=PRIVACY,
        ledger=open_site_ledger(folder),
    )
    with closing(trainer):
        for number in ROUNDS:
            steps.round = number
            try:
                result = trainer.train(start_of(number), run="run", round_number=number)
            except ReservationMisused:  # it was sent, and the site knows
                continue
            update = sites.trainer._bytes_of(result.state)
            steps.at("send")
            (folder / f"sent.{number}.{os.getpid()}").write_bytes(update)
            append(folder / "sent", json.dumps({"round": number, "sha256": sha256(update).hexdigest()}))
            steps.at("sent")
            trainer.mark_sent({("run", number): None})
            steps.at("noted")


def race(path: Path, epsilon: float, processes: int) -> list[int]:
    """Exit statuses of processes that ask for the same room at once: 0 for one that gets it, 3 for a refused one."""
    ready_out, ready_in = os.pipe()
    go_out, go_in = os.pipe()

    def ask(name: str) -> int:
        os.close(go_in)
        with open_ledger(path) as ledger:
            guard = BudgetGuard(PrivacyBudget(epsilon, DELTA), ledger)
            assert guard.spent > 0
            os.write(ready_in, b"x")
            os.read(go_out, 1)  # returns when the pipe is closed
            try:
                guard.authorize(release(9, run=name, steps=EVENT.steps))
            except BudgetExhausted:
                return 3
            return 0

    children = [fork(lambda number=number: ask(f"run-{number}")) for number in range(processes)]
    for _ in children:
        os.read(ready_out, 1)
    os.close(go_in)
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def fork(program: Callable[[], int]) -> int:
    """A process that runs ``program`` and ends with its status, 1 if it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = program()
        finally:
            os._exit(status)  # nothing of the parent's is to be flushed or closed here
    return child


class Server(ForkServer):
    """The process that has loaded torch, and forks the programs."""

    def __init__(self) -> None:
        super().__init__("support.killed_site")

    def live(self, folder: Path, last: int | None = None) -> int:
        """Run the site until it ends or dies; its exit status."""
        return self.ask("live", str(folder), last)

    def race(self, path: Path, epsilon: float, processes: int) -> list[int]:
        """See ``race``."""
        return self.ask("race", str(path), epsilon, processes)


def serve() -> NoReturn:
    """Answer requests, a line of JSON each, until there are no more."""
    torch.set_num_threads(1)
    rdp_epsilon([EVENT], DELTA)  # loads what all of them need
    for line in sys.stdin:
        what, folder, *rest = json.loads(line)
        if what == "race":
            answer = race(Path(folder), *rest)
        else:
            child = fork(lambda folder=folder, rest=rest: run_site(Path(folder), *rest) or 0)
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    sys.exit()


if __name__ == "__main__":
    serve()
