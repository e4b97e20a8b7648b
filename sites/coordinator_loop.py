"""The coordinator's program: frames in, frames out, one round after another.

It drives ``secureagg.Coordinator`` with what arrives, turns the end of a time-out into the end of a phase, and moves
the global model by each released mean update.  All it ever holds of a site are its public keys, ciphertexts and masked
integers; what it learns are sums.
"""

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final

import msgspec

from secureagg import (
    Aggregate,
    AuthenticationFailed,
    Coordinator,
    MalformedMessage,
    Outbound,
    RemoteProtocolError,
    SiteId,
)
from secureagg import codec as round_codec
from secureagg.lanes import WEIGHT
from secureagg.messages import MaskedInput, RoundFailed
from secureagg.phases import Aborted, CollectingMaskedInputs, CoordinatorFinished
from sites import control
from sites.control import FederationOver, GivenUp, Purpose, Refused, StartRound, Withdraw
from sites.errors import FederationFailed
from sites.evaluation import Metrics, metrics_from_counts
from sites.files import write_atomic
from sites.manifest import Manifest
from sites.model_state import model_digest
from sites.rounds import CORRECT, HISTOGRAM, TOTAL, UPDATE, mean_update, model_spec, round_parameters
from sites.server_optimizer import ServerOptimizer
from transport import Delivery, Endpoint, PeerId, TransportError

SAMPLE_BYTES: Final = 12  # of a masked input, kept in the record to show what the coordinator saw
FAILURES_IN_A_ROW: Final = 3
# Of one site, beside two uploads, and one more for each second; it needs one or two, and a hello each 2 s.
MESSAGES_PER_PHASE: Final = 100
TOO_MANY: Final = "too-many-messages"


@dataclass(slots=True, kw_only=True)
class RoundRecord:
    """What happened in one round, as far as the coordinator can know; one line of its log, filled in as it goes.

    ``dropped``: site -> phase in which it was given up; ``refused``: site -> error codes of what it sent and was
    refused for, or is to blame for; ``seconds``: phase -> wall time; ``masked_sample``: site -> first bytes of its
    masked input, whole or not, in hexadecimal; ``examples``: the survivors' summed weight; ``metrics``: of the model
    that the round started from; ``error``: code of the error that ended it, or empty.
    """

    run: str
    number: int
    purpose: Purpose
    cohort: tuple[str, ...]
    survivors: tuple[str, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_received: dict[str, int] = field(default_factory=dict)
    masked_sample: dict[str, str] = field(default_factory=dict)
    examples: int | None = None
    metrics: Metrics | None = None
    error: str = ""


class CoordinatorLoop:
    """Runs a whole federation over ``endpoint``, from the sites' joining to the final model.

    ``initial``: safetensors bytes of the model to start from; ``state``: folder for the model and the log;
    ``report``: called after each round.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        endpoint: Endpoint,
        initial: bytes,
        state: Path,
        report: Callable[[RoundRecord], None] = lambda _record: None,
        notify: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._manifest = manifest
        self._endpoint = endpoint
        self._spec = model_spec(manifest)
        vector = self._spec.from_bytes(initial, who="initial model")
        self._optimizer = ServerOptimizer(
            manifest.training.server_optimizer, manifest.training.server_learning_rate, vector
        )
        self._model = self._spec.to_bytes(vector)
        self._state = state
        self._report = report
        self._notify = notify
        self._run = secrets.token_hex(8)
        self._present: set[SiteId] = set()
        self._excluded: dict[SiteId, str] = {}  # for the rest of the run: site -> code of the error that proves it
        self._told: dict[tuple[str, PeerId], int] = {}  # what the operator knows of refused intruders
        self._roster = manifest.roster
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="secureagg-masks")

    def run(self) -> list[RoundRecord]:
        """Run every round of the manifest and a last one that evaluates the final model; returns their records.

        Raises FederationFailed when too few sites join or several rounds in a row end without a release; the last good
        model is on disk then, and the sites are told.
        """
        self._state.mkdir(parents=True, exist_ok=True)
        self._save_model()
        records: list[RoundRecord] = []
        code = FederationFailed.code
        try:
            self._wait_for_sites()
            rounds = self._manifest.training.rounds
            failures = 0
            for number in range(1, rounds + 2):
                record, aggregate = self._play(number, "train" if number <= rounds else "evaluate")
                records.append(record)
                if aggregate is not None and UPDATE in aggregate.totals:
                    self._model = self._spec.to_bytes(self._optimizer.step(mean_update(self._manifest, aggregate)))
                    self._save_model()
                with (self._state / "rounds.jsonl").open("ab") as log:
                    log.write(msgspec.json.encode(record) + b"\n")
                self._report(record)
                self._tell_of_intruders()
                failures = 0 if aggregate is not None else failures + 1
                if failures == FAILURES_IN_A_ROW or (aggregate is None and number > rounds):
                    raise FederationFailed(
                        f"coordinator: round {number} and {failures - 1} before it ended without a release, the last "
                        f"one with {record.error}; the model of the last finished round is in {self._state}"
                    )
            code = "finished"
        finally:
            over = control.encode(FederationOver(code=code, payload=self._model))
            told = [PeerId(site) for site in self._present.copy() if self._send(site, over)]
            self._endpoint.flush(told, patience=self._manifest.deadlines.phase_seconds)
            self._pool.shutdown()
        return records

    # --- presence ---

    def _wait_for_sites(self) -> None:
        """Return once every site of the roster is present, or enough are and the time to join is over."""
        deadline = time.monotonic() + self._manifest.deadlines.join_seconds
        minimum = self._manifest.policy.minimum_cohort
        while len(self._present) < len(self._roster):
            delivery = self._endpoint.receive(max(0.0, deadline - time.monotonic()))
            if delivery is not None:
                self._take_control(delivery)
            elif time.monotonic() >= deadline:
                break
        if len(self._present) < minimum:
            missing = sorted(set(self._roster) - self._present)
            raise FederationFailed(
                f"coordinator: {len(self._present)} of {len(self._roster)} sites joined within "
                f"{self._manifest.deadlines.join_seconds:g} s, expected at least {minimum}; missing: "
                f"{', '.join(missing)}"
            )

    def _take_control(self, delivery: Delivery) -> Withdraw | None:
        """Note who is present; returns a withdrawal for the running round to deal with."""
        site = SiteId(str(delivery.peer))
        if delivery.frames[0] != control.CONTROL:
            return None  # a late message of an earlier round
        try:
            message = control.decode_from_site(delivery.frames[1:])
        except RemoteProtocolError as error:
            self._notify(f"{site}: {error}")
            return None
        if isinstance(message, Withdraw):
            if message.leaving:
                self._present.discard(site)
            return message
        if message.manifest_digest != self._manifest.digest:
            self._notify(f"{site} holds another manifest than the coordinator; it was told so")
            self._send(site, control.encode(Refused(code=control.MANIFEST_DIFFERS)))
            return None
        if site in self._excluded:
            self._send(site, control.encode(Refused(code=self._excluded[site])))
        elif site not in self._present:
            self._present.add(site)
            self._notify(f"{site} is present ({len(self._present)} of {len(self._roster)})")
        return None

    # --- one round ---

    def _play(self, number: int, purpose: Purpose) -> tuple[RoundRecord, Aggregate | None]:
        """One round from its start to a release or an abort; the record says which, the aggregate is None for the
        latter."""
        if len(self._present) < self._manifest.policy.minimum_cohort:
            self._wait_for_sites()
        record = RoundRecord(run=self._run, number=number, purpose=purpose, cohort=tuple(sorted(self._present)))
        parameters = round_parameters(
            self._manifest,
            run=self._run,
            round_number=number,
            purpose=purpose,
            cohort=record.cohort,
            model_digest=model_digest(self._model),
        )
        machine = Coordinator(parameters=parameters, spread=self._pool.map, spool=self._spool)
        start = control.encode(
            StartRound(run=self._run, round_number=number, purpose=purpose, cohort=record.cohort, payload=self._model)
        )
        for site in parameters.cohort:
            if not self._send(site, start):
                self._give_up(machine, record, [site])
        chunks = -(-parameters.packed_bytes // MaskedInput.CHUNK_BYTES)
        self._drive(machine, record, most=MESSAGES_PER_PHASE + 2 * chunks)
        if isinstance(machine.phase, CoordinatorFinished):
            aggregate = machine.phase.aggregate
            record.survivors = aggregate.survivors
            totals = aggregate.totals
            if TOTAL in totals:
                record.metrics = metrics_from_counts(
                    correct=int(totals[CORRECT][0]),
                    total=int(totals[TOTAL][0]),
                    histogram=totals[HISTOGRAM].reshape(2, -1),
                )
            record.examples = int(totals[WEIGHT][0]) if WEIGHT in totals else None
            return record, aggregate
        if isinstance(machine.phase, Aborted):
            error = machine.phase.error
            record.error = error.code
            self._notify(str(error))
            if isinstance(error, AuthenticationFailed) and error.blamed is not None:
                record.refused.setdefault(error.blamed, []).append(error.code)
                self._exclude(SiteId(error.blamed), error.code)
        return record, None

    def _drive(self, machine: Coordinator, record: RoundRecord, *, most: int) -> None:
        """Feed the machine until it ends; a phase that outlasts its deadline goes on with those who answered.

        ``most``: messages of one site that are looked at in a phase, beside one for each second.
        """
        while not isinstance(machine.phase, CoordinatorFinished | Aborted):
            phase, began = machine.phase, time.monotonic()
            heard: Counter[SiteId] = Counter()
            deadline = began + self._allowed_seconds(machine, record.purpose)
            while machine.phase is phase:
                left = deadline - time.monotonic()
                delivery = self._endpoint.receive(left) if left > 0 else None
                if delivery is not None:
                    site = SiteId(str(delivery.peer))
                    heard[site] += 1
                    # Stops a site from keeping the others waiting with messages that are refused one by one.
                    if heard[site] > most + time.monotonic() - began and site not in self._excluded:
                        self._exclude(site, TOO_MANY)
                        self._give_up(machine, record, [site])
                    if site not in self._excluded:
                        self._take(machine, record, delivery)
                elif time.monotonic() >= deadline:
                    silent = machine.expected
                    self._note_dropped(machine, record, silent)
                    self._tell_given_up(record, silent)
                    self._present -= silent
                    self._deliver(machine, record, machine.close_phase())
            record.seconds[type(phase).__name__] = time.monotonic() - began

    def _allowed_seconds(self, machine: Coordinator, purpose: Purpose) -> float:
        deadlines = self._manifest.deadlines
        # The sites train while keys and shares are exchanged, so this phase is the one that waits for them.
        training = purpose == "train" and isinstance(machine.phase, CollectingMaskedInputs)
        return deadlines.training_seconds if training else deadlines.phase_seconds

    def _take(self, machine: Coordinator, record: RoundRecord, delivery: Delivery) -> None:
        site = SiteId(str(delivery.peer))
        tag, *frames = delivery.frames
        if tag not in (control.ROUND, control.CHUNK):
            withdrawal = self._take_control(delivery)
            if withdrawal is not None and (withdrawal.run, withdrawal.round_number) == (record.run, record.number):
                self._give_up(machine, record, [site])
            return
        record.bytes_received[site] = record.bytes_received.get(site, 0) + sum(map(len, delivery.frames))
        try:
            if tag == control.CHUNK:
                outbound = self._take_chunk(machine, record, site, *control.decode_chunk(frames))
            else:
                outbound = machine.receive(round_codec.decode_from_site(frames, streamed=True), sender=site)
        except RemoteProtocolError as error:
            # One bad message does not end the round for the others.
            self._notify(f"refused: {error}")
            record.refused.setdefault(site, []).append(error.code)
            # A late message of an earlier round is nobody's fault; bytes that are none, or that do not verify, are.
            if isinstance(error, AuthenticationFailed | MalformedMessage):
                self._exclude(site, error.code)
                self._give_up(machine, record, [site])
            return
        self._deliver(machine, record, outbound)

    @staticmethod
    def _take_chunk(
        machine: Coordinator, record: RoundRecord, site: SiteId, context: bytes, chunk: bytes
    ) -> list[Outbound]:
        uploads = machine.phase.uploads if isinstance(machine.phase, CollectingMaskedInputs) else {}
        if context != machine.context or site not in uploads:
            return []  # late: of an earlier round, or of an upload that was given up
        outbound = machine.receive_chunk(chunk, sender=site)
        record.masked_sample.setdefault(site, chunk[:SAMPLE_BYTES].hex())
        return outbound

    def _deliver(self, machine: Coordinator, record: RoundRecord, outbound: Iterable[Outbound]) -> None:
        unreachable = []
        for item in outbound:
            if isinstance(item.message, RoundFailed):  # of a round that goes on: this site cannot be recovered
                self._note_dropped(machine, record, [item.recipient])
            if not self._send(item.recipient, [control.ROUND, *round_codec.encode(item.message)]):
                unreachable.append(item.recipient)
        self._give_up(machine, record, unreachable)

    def _give_up(self, machine: Coordinator, record: RoundRecord, sites: Iterable[SiteId]) -> None:
        for site in sites:
            self._note_dropped(machine, record, [site])
            if site not in self._excluded:
                self._tell_given_up(record, [site])
            self._deliver(machine, record, machine.drop(site))

    def _tell_given_up(self, record: RoundRecord, sites: Iterable[SiteId]) -> None:
        """Tell those who can be reached, now or when they come back; they join the next round by themselves."""
        message = control.encode(GivenUp(run=record.run, round_number=record.number))
        for site in sites:
            with suppress(TransportError):
                self._endpoint.send(PeerId(site), message)

    @staticmethod
    def _note_dropped(machine: Coordinator, record: RoundRecord, sites: Iterable[SiteId]) -> None:
        if not isinstance(machine.phase, CoordinatorFinished | Aborted):
            for site in sites:
                record.dropped.setdefault(site, type(machine.phase).__name__)

    def _exclude(self, site: SiteId, code: str) -> None:
        """Take ``site``, whose own messages prove that it misbehaved, into no further round, and tell it so."""
        self._present.discard(site)
        self._excluded[site] = code
        self._notify(f"{site} is excluded from this run ({code})")
        self._send(site, control.encode(Refused(code=code)))

    # --- output ---

    def _spool(self) -> IO[bytes]:
        # Not in the system's folder for temporary files, which may lie in memory.
        return TemporaryFile(dir=self._state)

    def _send(self, site: SiteId, frames: list[bytes]) -> bool:
        """Send to one site; whether it could be reached."""
        try:
            self._endpoint.send(PeerId(site), frames)
        except TransportError as error:
            self._present.discard(site)
            self._notify(str(error))
            return False
        return True

    def _tell_of_intruders(self) -> None:
        """Tell the operator what the transport has refused since the last time."""
        for what, counts in (
            ("another machine came with its transport key while it was there, and was refused", self._endpoint.rivals),
            ("sent what breaks the rules of the transport, which was dropped", self._endpoint.violations),
        ):
            for peer, count in counts.items():
                if count > self._told.get((what, peer), 0):
                    self._told[what, peer] = count
                    self._notify(f"{peer}: {what} ({count} times so far)")

    def _save_model(self) -> None:
        write_atomic(self._state / "model.safetensors", self._model)
