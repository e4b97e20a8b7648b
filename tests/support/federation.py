"""A whole federation in one process: the coordinator's loop and each site's session, over real sockets, in threads."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save

from secureagg import codec
from secureagg.messages import KeyAdvertisement, MaskedInput, ToCoordinator
from sites import control
from sites.config import OpenSite, open_site
from sites.coordinator_loop import CoordinatorLoop, RoundRecord
from sites.demo import free_port
from sites.participant_loop import Evaluate, Federation, Personalise, RoundResult
from sites.recipe import DEADLINES, ENCODING, PRIVACY, TRAINING
from sites.rounds import transport_limits
from support.consortium import Consortium, make_consortium
from support.faulty_link import Faults, FaultyLink
from transport import Endpoint, PeerId, connect, listen

PLAIN = msgspec.structs.replace(PRIVACY, mode="none")
# Deadlines that a test waits out where a machine fails, long enough for a live one on a busy computer ...
QUICK = msgspec.structs.replace(DEADLINES, join_seconds=4.0, phase_seconds=3.0, training_seconds=3.0)
# ... and such that no test waits for.
PATIENT = msgspec.structs.replace(DEADLINES, join_seconds=4.0, phase_seconds=30.0, training_seconds=30.0)
STRICT = msgspec.structs.replace(ENCODING, out_of_range="error")
INITIAL = save({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)})

Program = Callable[[Federation], None]


def step_of(name: str) -> float:
    """By how much the site of this name moves every number in each round: a 0.01, b 0.02, ..."""
    return (ord(name) - ord("a") + 1) / 100


def examples_of(name: str) -> int:
    """How many examples the site of this name says it has: a 10, b 20, ..."""
    return 10 * (ord(name) - ord("a") + 1)


def moving(name: str) -> Program:
    """A program that moves the model by ``step_of`` its name in each round."""

    def program(federation: Federation) -> None:
        for training_round in federation.rounds():
            state = {key: tensor + step_of(name) for key, tensor in training_round.global_state.items()}
            training_round.submit(state, examples=examples_of(name))

    return program


class SilentFrom:
    """An endpoint whose machine fails: from one message of one round on, nothing leaves it and nothing arrives."""

    def __init__(self, endpoint: Endpoint, message: type[ToCoordinator], *, round_number: int = 1) -> None:
        self._endpoint, self._message, self._rounds_left = endpoint, message, round_number
        self.dead = False

    def send(self, peer: PeerId, frames: Sequence[bytes]) -> None:
        """Send unless the machine has failed, or fails now."""
        if frames[0] == control.ROUND:
            sent = codec.decode_from_site([bytes(frame) for frame in frames[1:]], streamed=True)
            self._rounds_left -= isinstance(sent, KeyAdvertisement)
            self.dead |= self._rounds_left <= 0 and isinstance(sent, self._message)
        if not self.dead:
            self._endpoint.send(peer, frames)

    def receive(self, timeout: float) -> object:
        """What arrives, unless the machine has failed."""
        if self.dead:
            time.sleep(timeout)  # a dead machine does nothing for as long as it is asked
            return None
        return self._endpoint.receive(timeout)

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


class Tampering:
    """An endpoint of a site that means harm: it changes its own messages before they leave, and signs them rightly."""

    def __init__(
        self, endpoint: Endpoint, site: OpenSite, change: Callable[[ToCoordinator], ToCoordinator | None]
    ) -> None:
        self._endpoint, self._site, self._change = endpoint, site, change

    def send(self, peer: PeerId, frames: Sequence[bytes]) -> None:
        """Send what the change makes of a message of the round; None leaves it as it is."""
        if frames[0] == control.ROUND:
            message = codec.decode_from_site([bytes(frame) for frame in frames[1:]], streamed=True)
            if (changed := self._change(message)) is not None:
                frames = [control.ROUND, *codec.encode(codec.sign(changed, self._site.keys.identity))]
        self._endpoint.send(peer, frames)

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


class ChangedUpload:
    """An endpoint on whose way the pieces of a masked input are changed: ``change`` takes the number of a piece (0: the
    header, from 1: the chunks) and its frames, and gives the messages that leave in its place."""

    def __init__(self, endpoint: Endpoint, change: Callable[[int, list[bytes]], list[list[bytes]]]) -> None:
        self._endpoint, self._change = endpoint, change
        self._piece = 0

    def send(self, peer: PeerId, frames: Sequence[bytes]) -> None:
        """Send what is made of a piece, and everything else as it is."""
        sent = [list(frames)]
        if frames[0] == control.CHUNK:
            self._piece += 1
            sent = self._change(self._piece, sent[0])
        elif frames[0] == control.ROUND and isinstance(codec.decode_from_site(frames[1:], streamed=True), MaskedInput):
            self._piece = 0
            sent = self._change(0, sent[0])
        for message in sent:
            self._endpoint.send(peer, message)

    def __getattr__(self, name: str) -> object:
        return getattr(self._endpoint, name)


class Together:
    """Runs a federation to its end; afterwards ``records`` and ``failure`` of the coordinator, ``errors``, ``history``
    and ``final`` of each site, and ``said``, what the coordinator told its operator."""

    def __init__(
        self,
        folder: Path,
        *,
        names: Sequence[str] = ("a", "b", "c", "d"),
        rounds: int = 2,
        initial: bytes = INITIAL,
        programs: Mapping[str, Program] | None = None,
        fails: Mapping[str, tuple[type[ToCoordinator], int]] | None = None,
        evaluate: Mapping[str, Evaluate] | None = None,
        personalise: Mapping[str, Personalise] | None = None,
        late: Mapping[str, threading.Event] | None = None,
        wrap: Mapping[str, Callable[[Endpoint, OpenSite], object]] | None = None,
        through: Mapping[str, Faults] | None = None,
        coordinator: Callable[[Consortium], None] | None = None,
        report: Callable[[RoundRecord], None] = lambda _record: None,
        **tables: msgspec.Struct,
    ) -> None:
        changes = {
            "privacy": PLAIN,
            "deadlines": QUICK,
            "encoding": STRICT,
            "training": msgspec.structs.replace(TRAINING, rounds=rounds),
            **tables,
        }
        self.folder = folder
        self.consortium = make_consortium(
            folder, names=names, address=f"tcp://127.0.0.1:{free_port()}", initial=initial, **changes
        )
        self._initial = initial
        self.endpoint: Endpoint | None = None
        self.names = list(names)
        self.programs = {name: moving(name) for name in names} | dict(programs or {})
        self._evaluate, self._late = dict(evaluate or {}), dict(late or {})
        self._personalise = dict(personalise or {})
        self._wrap = {
            name: lambda real, _site, how=how: SilentFrom(real, how[0], round_number=how[1])
            for name, how in (fails or {}).items()
        } | dict(wrap or {})
        self._through = dict(through or {})
        self.lines: dict[str, FaultyLink] = {}
        self.patience = 120.0  # seconds for each program to end
        self.new_run = False
        self._coordinate = coordinator or self._run_coordinator
        self._report = report
        self.records: list[RoundRecord] = []
        self.failure: Exception | None = None
        self.errors: dict[str, Exception] = {}
        self.history: dict[str, tuple[RoundResult, ...]] = {}
        self.final: dict[str, dict[str, torch.Tensor]] = {}
        self.said: list[str] = []

    def run(self) -> "Together":
        """Run everybody; returns when all have ended."""
        threads = [threading.Thread(target=self._guarded_coordinator)]
        threads += [threading.Thread(target=self._run_site, args=(name,)) for name in self.names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=self.patience)
        assert not any(thread.is_alive() for thread in threads), "a program has not ended"
        return self

    def _guarded_coordinator(self) -> None:
        try:
            self._coordinate(self.consortium)
        except Exception as error:
            self.failure = error

    def _run_coordinator(self, consortium: Consortium) -> None:
        manifest = consortium.manifest
        peers = {PeerId(site): card.transport_key for site, card in manifest.roster.items()}
        secret = consortium.keys["sum"].transport_secret

        def report(record: RoundRecord) -> None:
            self.records.append(record)
            self._report(record)

        limits = transport_limits(manifest)
        with listen(manifest.coordinator.address, secret_key=secret, peers=peers, limits=limits) as endpoint:
            self.endpoint = endpoint
            CoordinatorLoop(
                manifest=manifest,
                endpoint=endpoint,
                initial=self._initial,
                state=self.folder / "state",
                new_run=self.new_run,
                report=report,
                notify=self.said.append,
            ).run()

    def _run_site(self, name: str) -> None:
        if name in self._late:
            assert self._late[name].wait(60)
        try:
            site = open_site(self.consortium.site_configs[name])
            with ExitStack() as stack:
                federation = Federation(
                    site,
                    endpoint=self._endpoint(site, stack),
                    evaluate=self._evaluate.get(name),
                    personalise=self._personalise.get(name),
                )
                try:
                    with federation:
                        self.programs[name](federation)
                finally:
                    self.history[name] = federation.history
                    with suppress(Exception):
                        self.final[name] = federation.final_state
        except Exception as error:
            self.errors[name] = error

    def _endpoint(self, site: OpenSite, stack: ExitStack) -> object:
        """A site's endpoint where it is not the usual one: over a bad line, or wrapped."""
        if site.name not in self._wrap | self._through:
            return None
        address = site.manifest.coordinator.address
        if site.name in self._through:
            self.lines[site.name] = stack.enter_context(FaultyLink(address, self._through[site.name]))
            address = self.lines[site.name].address
        real = connect(
            address,
            secret_key=site.keys.transport_secret,
            server_key=site.manifest.coordinator.card.transport_key,
            limits=transport_limits(site.manifest),
        )
        return self._wrap[site.name](real, site) if site.name in self._wrap else real


def expected_model(survivors: Sequence[Sequence[str]]) -> float:
    """Where every number of the model stands after rounds with these survivors, if each site is ``moving``."""
    return sum(
        sum(step_of(name) * examples_of(name) for name in names) / sum(examples_of(name) for name in names)
        for names in survivors
    )
