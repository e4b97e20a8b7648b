"""Coordinators and sites as processes that may be killed at any moment, forked from one that has loaded everything.

The coordinator's is the program behind `secureagg coordinator`.  A site's is a training loop of a few lines around
``Federation``.  What a site does is written down as it happens, a line of JSON each, which is on the disk however the
process ends: `start`, the model that it was given for a round; `sent`, its encoded input before it is masked; `draw`,
a use of the data under a ledger; `final`, the model it ends with.
"""

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

import dp.budget
import sites.participant_loop
import sites.trainer
from secureagg import EncodedInput, RoundParameters
from secureagg.encoding import encode_input
from secureagg.homomorphic import check_installed
from sites.config import open_site
from sites.participant_loop import Federation
from sites.programs import allow_many_connections, run_coordinator
from sites.rounds import UPDATE, transport_limits
from sites.trainer import Examples, heart_model, trainer_of
from support.fork_server import ForkServer
from support.killed_site import NOISE, append, hospital
from support.packed import elements
from transport import connect

TAKEN = "taken.jsonl"
REAL_TRAINING = sites.trainer.train_private


def update_of(seed: int, site: str, round_number: int, length: int) -> npt.NDArray[np.float32]:
    """By what a site moves the model in a round, in [-1/2, 1/2]: nothing that another site or round has."""
    digest = sha256(f"{seed}/{site}/{round_number}".encode()).digest()
    return np.random.default_rng(list(digest)).uniform(-0.5, 0.5, length).astype(np.float32)


def weight_of(site: str) -> int:
    """A site's examples: a 10, b 11, ..."""
    return 10 + int.from_bytes(site.encode()[-1:]) - ord("a") if len(site) == 1 else 10


def coordinate(folder: str) -> None:
    """Run the coordinator of the consortium in ``folder``, or go on with its run."""
    root = Path(folder)
    run_coordinator(
        root / "manifest.toml",
        keys=root / "sum.keys",
        initial=root / "initial.safetensors",
        state=root / "state",
        report=lambda _record: None,
        notify=lambda text: os.write(1, f"{text}\n".encode()),
    )


def take_part(folder: str, name: str, address: str, seed: int, ledger: bool, quiet: bool) -> None:
    """Take part as the site ``name`` over the line at ``address``, by a trainer with a ``ledger`` or without; a
    ``quiet`` one writes nothing down."""
    site = open_site(Path(folder) / name / "SITE.toml")
    notes = Path(folder) / name / TAKEN

    def note(what: str, **fields: object) -> None:
        if not quiet:
            append(notes, json.dumps({"what": what, **fields}))

    def encode(parameters: RoundParameters, values: Any, **options: Any) -> EncodedInput:
        encoded = encode_input(parameters, values, **options)
        lanes = {
            lane: [parameters.lanes[lane].ring_bits, lane == UPDATE, vector]
            for lane, vector in ({} if quiet else elements(encoded, parameters)).items()
        }
        where = {"run": parameters.run, "round": parameters.round_number, "context": parameters.context.hex()}
        note("sent", **where, lanes=lanes)
        return encoded

    sites.participant_loop.encode_input = encode
    endpoint = connect(
        address,
        secret_key=site.keys.transport_secret,
        server_key=site.manifest.coordinator.card.transport_key,
        limits=transport_limits(site.manifest),
    )
    federation = Federation(site, endpoint=endpoint)
    trainer = None
    if ledger:
        dp.budget.noise_multiplier_for = lambda **_: NOISE  # its search takes seconds
        trainer = trainer_of(site, heart_model(), Examples.of_hospital(hospital()))
        federation.attach(trainer)
    run = ""
    with federation:
        for training_round in federation.rounds():
            run, number = training_round.run, training_round.number
            state = training_round.global_state
            note("start", run=run, round=number, vector=[] if quiet else _flat(state))
            if trainer is not None:

                def train(*arguments: Any, number: int = number, run: str = run, **options: Any) -> None:
                    note("draw", run=run, round=number)
                    REAL_TRAINING(*arguments, **options)

                sites.trainer.train_private = train
                result = trainer.train_round(training_round)
                note("release", run=run, round=number, sha256=sha256(sites.trainer._bytes_of(result.state)).hexdigest())
                training_round.submit_trained(result)
                continue
            length = sum(tensor.numel() for tensor in state.values())
            moves = torch.from_numpy(update_of(seed, name, number, length)).split([t.numel() for t in state.values()])
            moved = {
                key: tensor + move.reshape(tensor.shape)
                for (key, tensor), move in zip(state.items(), moves, strict=True)
            }
            training_round.submit(moved, examples=weight_of(name))
        note("final", run=run, vector=[] if quiet else _flat(federation.final_state))


def _flat(state: dict[str, torch.Tensor]) -> list[float]:
    return torch.cat([tensor.reshape(-1) for tensor in state.values()]).tolist()


class Nursery(ForkServer):
    """The process that has loaded everything, and forks the programs; its children end with it."""

    def __init__(self) -> None:
        super().__init__("support.chaos_programs", OMP_NUM_THREADS="1")

    def start(self, program: str, log: Path, *arguments: object) -> int:
        """Start "coordinate" or "take_part"; its process number.  What it says is added to ``log``."""
        return int(self.ask("start", program, str(log), *arguments))

    def ended(self) -> dict[int, tuple[int, int]]:
        """Process number -> exit status and peak memory in bytes of those that have ended since the last time."""
        return {int(pid): (status, peak) for pid, (status, peak) in self.ask("ended").items()}


def _start(program: str, log: str, *arguments: object) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # for a watchdog that finds it stuck
        run: Callable[..., None] = {"coordinate": coordinate, "take_part": take_part}[program]
        run(*arguments)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)  # nothing of the parent's is to be flushed or closed here


def serve() -> NoReturn:
    """Answer requests, a line of JSON each, until there are no more."""
    torch.set_num_threads(1)
    allow_many_connections()
    with suppress(Exception):
        check_installed()
    children: set[int] = set()
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "start":
            answer: object = _start(*rest)
            children.add(answer)
        else:
            gone = {}
            for child in children.copy():
                found, status, usage = os.wait4(child, os.WNOHANG)
                if found:
                    children.discard(child)
                    gone[child] = (os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10)
            answer = gone
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for child in children:
        os.kill(child, signal.SIGKILL)
    sys.exit()


if __name__ == "__main__":
    serve()
