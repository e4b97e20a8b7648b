"""The coordinator's program: frames in, frames out, one round after another.

It drives ``secureagg.Coordinator`` with what arrives, turns the end of a time-out into the end of a phase, and moves
the global model by each released mean update.  All it ever holds of a site are its public keys, ciphertexts and masked
integers; what it learns are sums.  Where sums are for the sites only, it learns not even these: the sites hold the
model, and all it knows of it is a name (see ``held_model``).
"""

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
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
from secureagg.messages import MaskedInput, RoundFailed, RoundReceipt
from secureagg.phases import Aborted, CollectingMaskedInputs, CoordinatorFinished
from sites import census, control
from sites.control import CopyRequest, FederationOver, GivenUp, Hello, ModelCopy, Purpose, Refused, StartRound, Withdraw
from sites.errors import FederationFailed
from sites.evaluation import Metrics
from sites.files import write_atomic
from sites.held_model import next_name
from sites.manifest import Manifest
from sites.manifest_log import note_manifest
from sites.model_state import model_digest
from sites.rounds import mean_update, metrics_of, model_spec, personal_metrics_of, round_parameters
from sites.run_store import Model, RunStore
from sites.server_optimizer import ServerOptimizer
from transport import Delivery, Endpoint, PeerId, TransportError

SAMPLE_BYTES: Final = 12  # of a masked input, kept in the record to show what the coordinator saw
FAILURES_IN_A_ROW: Final = 3
CONFIRMING_SECONDS: Final = 0.02  # between two looks whether receipts have arrived
FINISHED: Final = "finished"
STATUS: Final = "status.json"
INTERRUPTED: Final = "interrupted"  # the coordinator went away in this round
UNCONFIRMED: Final = "unconfirmed"  # of a sum for the sites, which none of them has said to have
# Of one site, beside two uploads, and one more for each second; it needs one or two, and a hello each 2 s.
MESSAGES_PER_PHASE: Final = 100
TOO_MANY: Final = "too-many-messages"


@dataclass(slots=True, kw_only=True)
class RoundRecord:
    """What happened in one round, as far as the coordinator can know; one line of its log, filled in as it goes.

    ``dropped``: site -> phase in which it was given up; ``refused``: site -> error codes of what it sent and was
    refused for, or is to blame for; ``seconds``: phase -> wall time; ``masked_sample``: site -> first bytes of its
    masked input, whole or not, in hexadecimal; ``examples``: the survivors' summed weight; ``metrics``: of the model
    that the round started from; ``personal_metrics``: of the sites' own versions of it; ``error``: code of the error
    that ended it, or empty.
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
    personal_metrics: Metrics | None = None
    error: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What a coordinator is doing: in which ``phase`` of round ``number``, ``since`` when (seconds since 1970), with
    whom; ``phase`` is empty between rounds; ``over``: how the run ended; ``manifest``: digest in hexadecimal;
    ``process``: its number on this machine; ``last``: the last round that ended.
    """

    manifest: str
    process: int
    run: str
    number: int
    phase: str
    since: float
    present: list[str]
    waiting_for: list[str]
    excluded: dict[str, str]
    last: RoundRecord | None
    over: str = ""


class CoordinatorLoop:
    """Runs a whole federation over ``endpoint``, from the sites' joining to the final model.

    ``initial``: safetensors bytes of the model to start from; ``state``: folder for the model, the log and what a
    restarted coordinator goes on from, unless it is to begin a ``new_run``; ``report``: called after each round.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        endpoint: Endpoint,
        initial: bytes,
        state: Path,
        new_run: bool = False,
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
        self._model = initial  # empty once only the sites have it
        self._name = self._name_of_initial = model_digest(self._model)
        self._held_by_sites = manifest.policy.sites_hold_model
        self._receipted: set[SiteId] = set()  # of the current round
        self._up_to_date: set[SiteId] = set()  # who has the model that is named
        self._behind: dict[SiteId, CopyRequest] = {}
        self._state = state
        self._report = report
        self._notify = notify
        self._run = ""
        self._last: RoundRecord | None = None
        self._new_run = new_run
        self._present: set[SiteId] = set()
        self._excluded: dict[SiteId, str] = {}  # for the rest of the run: site -> code of the error that proves it
        self._told: dict[tuple[str, PeerId], int] = {}  # what the operator knows of refused intruders
        self._roster = manifest.roster
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="secureagg-masks")

    def run(self) -> None:
        """Run every round of the manifest and a last one that evaluates the final model, or those that an interrupted
        run has left.

        Raises FederationFailed when too few sites join or several rounds in a row end without a release; the last good
        model is on disk then, the sites are told, and the run can be gone on with.
        """
        with closing(RunStore(self._state)) as store:
            if (change := note_manifest(self._state, self._manifest)) is not None:
                for what, sites in (("revoked", change.revoked), ("new keys", change.rekeyed), ("added", change.added)):
                    if sites and change.revision > 1:
                        self._notify(f"manifest revision {change.revision}, {what}: {', '.join(sites)}")
            first = self._begin_or_go_on(store)
            try:
                self._rounds(store, first)
            except FederationFailed as error:
                self._say_over(error.code)
                raise
            finally:
                self._pool.shutdown()
            # In this order: who goes away while it tells the sites is started again to tell them, not to begin anew.
            self._say_over(FINISHED)
            store.end(self._run, FINISHED)

    def _begin_or_go_on(self, store: RunStore) -> int:
        """The number of the first round: 1 of a new run, or the next one of a run that was interrupted; above the last
        one of a run that is over."""
        found = None if self._new_run else store.unfinished(self._manifest)
        # Stops a run that is over from being trained again, at its price in privacy, when a machine is switched on.
        if over := found is None and not self._new_run:
            found = store.finished(self._manifest)
        if found is None:
            self._run = secrets.token_hex(8)
            store.start(self._run, self._manifest, self._stored_model)
        else:
            self._run, self._name, self._excluded = found.run, found.model.name, dict(found.excluded)
            self._up_to_date = set(map(SiteId, found.model.holders))
            if found.model.optimizer is not None:
                training, length = self._manifest.training, self._spec.length
                self._optimizer = ServerOptimizer.from_bytes(
                    *(found.model.optimizer, training.server_optimizer, training.server_learning_rate),
                    length=length,
                    who=f"model of run {self._run}",
                )
                if found.finished:
                    self._model = self._spec.to_bytes(self._optimizer.vector)
            elif found.model.name != self._name_of_initial:
                self._model = b""
            if found.begun > found.finished:
                # Its number is used up: the sites' journals, and perhaps their budgets, know of it.
                record = RoundRecord(run=self._run, number=found.begun, purpose=self._purpose(found.begun), cohort=())
                record.error = INTERRUPTED
                store.finish(self._run, found.begun, msgspec.json.encode(record))
            self._notify(
                f"run {self._run} is over, sites that have missed the end are told; --new-run begins another"
                if over
                else f"run {self._run} goes on with round {found.begun + 1}"
            )
        store.complete_log()
        if not self._held_by_sites:
            self._save_model()
        return 1 if found is None else found.begun + 1

    def _rounds(self, store: RunStore, first: int) -> None:
        self._write_status(first - 1)
        rounds = self._manifest.training.rounds
        # Where no round is left, those who have not heard of it may come, and nobody has to.
        self._wait_for_sites(self._manifest.policy.minimum_cohort if first <= rounds + 1 else 0)
        failures = 0
        for number in range(first, rounds + (2 if self._manifest.census is msgspec.UNSET else 3)):
            record, aggregate = self._play(store, number)
            moved = None
            if aggregate is not None and record.purpose == "train":
                self._move_model(aggregate)
                moved = self._stored_model
            store.finish(self._run, number, msgspec.json.encode(record), moved, self._excluded)
            if moved is not None and not self._held_by_sites:
                self._save_model()
            self._last = record
            self._write_status(number)
            self._report(record)
            self._tell_of_intruders()
            failures = 0 if aggregate is not None else failures + 1
            if record.purpose in ("census", "personalise"):  # whose failure takes nothing from the model
                if record.purpose == "census" and aggregate is not None and aggregate.totals:
                    self._notify(census.write_table(self._manifest, aggregate, run=self._run, state=self._state))
            elif failures == FAILURES_IN_A_ROW or (aggregate is None and number > rounds):
                raise FederationFailed(
                    f"coordinator: round {number} and {failures - 1} before it ended without a release, the last "
                    f"one with {record.error}; the model of the last finished round is in {self._state}"
                )

    @property
    def _stored_model(self) -> Model:
        optimizer = None if self._held_by_sites else self._optimizer.to_bytes()
        return Model(name=self._name, optimizer=optimizer, holders=tuple(self._up_to_date))

    def _purpose(self, number: int) -> Purpose:
        after = number - self._manifest.training.rounds
        last: Purpose = "personalise" if self._manifest.evaluation.personalised else "evaluate"
        return "train" if after <= 0 else last if after == 1 else "census"

    def _write_status(self, number: int, machine: Coordinator | None = None, *, over: str = "") -> None:
        status = Status(
            manifest=self._manifest.digest.hex(),
            process=os.getpid(),
            run=self._run,
            number=number,
            phase="" if machine is None else type(machine.phase).__name__,
            since=time.time(),
            present=sorted(self._present),
            waiting_for=[] if machine is None else sorted(machine.expected),
            excluded={str(site): code for site, code in self._excluded.items()},
            last=self._last,
            over=over,
        )
        # For people to look at: an old one after a crash does no harm.
        write_atomic(self._state / STATUS, msgspec.json.encode(status), durable=False)

    def _say_over(self, code: str) -> None:
        self._write_status(self._manifest.training.rounds + 1 if code == FINISHED else 0, over=code)
        self._bring_up_to_date()
        name = self._name if self._held_by_sites else b""
        over = control.encode(FederationOver(code=code, model_name=name, payload=self._model))
        told = [PeerId(site) for site in self._present.copy() if self._send(site, over)]
        self._endpoint.flush(told, patience=self._manifest.deadlines.phase_seconds)

    # --- presence ---

    def _wait_for_sites(self, minimum: int) -> None:
        """Return once every site of the roster is present, or ``minimum`` are and the time to join is over."""
        deadline = time.monotonic() + self._manifest.deadlines.join_seconds
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
        match message:
            case Withdraw():
                if message.leaving:
                    self._present.discard(site)
                return message
            case CopyRequest():
                self._note_behind(site, message)
            case ModelCopy():
                self._pass_on(site, message)
            case Hello():
                self._welcome(site, message)
        return None

    def _welcome(self, site: SiteId, message: Hello) -> None:
        if message.manifest_digest != self._manifest.digest:
            self._notify(f"{site} holds another manifest than the coordinator; it was told so")
            self._send(site, control.encode(Refused(code=control.MANIFEST_DIFFERS)))
        elif site in self._excluded:
            self._send(site, control.encode(Refused(code=self._excluded[site])))
        elif site not in self._present and site not in self._behind:
            self._present.add(site)
            self._notify(f"{site} is present ({len(self._present)} of {len(self._roster)})")

    # --- the model that the sites hold ---

    def _note_behind(self, site: SiteId, request: CopyRequest) -> None:
        if request.site == site and request.run == self._run and site not in self._excluded:
            self._present.discard(site)
            self._behind[site] = request
            self._notify(f"{site} has missed a sum and asks the others for the model")

    def _bring_up_to_date(self) -> None:
        """Have those who are behind given the model by a site that has it, before a round begins."""
        deadline = time.monotonic() + self._manifest.deadlines.phase_seconds
        for site, request in self._behind.copy().items():
            donor = min(self._up_to_date & self._present, default=None)
            if donor is None or not self._send(donor, control.encode(request)):
                del self._behind[site]
        while self._behind and (left := deadline - time.monotonic()) > 0:
            delivery = self._endpoint.receive(left)
            if delivery is not None:
                self._take_control(delivery)
        self._behind.clear()  # whoever got nothing will ask again

    def _pass_on(self, donor: SiteId, copy: ModelCopy) -> None:
        site = SiteId(copy.site)
        if copy.donor == donor and self._behind.pop(site, None) is not None and self._send(site, control.encode(copy)):
            self._present.add(site)
            self._up_to_date.add(site)
            self._notify(f"{site} has the model from {donor}")

    def _move_model(self, aggregate: Aggregate) -> None:
        if self._held_by_sites:
            self._model, self._name = b"", next_name(self._name, aggregate.digest)
            self._up_to_date = self._receipted
            return
        self._model = self._spec.to_bytes(self._optimizer.step(mean_update(self._manifest, aggregate)))
        self._name = model_digest(self._model)

    # --- one round ---

    def _play(self, store: RunStore, number: int) -> tuple[RoundRecord, Aggregate | None]:
        """One round from its start to a release or an abort; the record says which, the aggregate is None for the
        latter."""
        self._bring_up_to_date()
        if len(self._present) < self._manifest.policy.minimum_cohort:
            self._wait_for_sites(self._manifest.policy.minimum_cohort)
        self._receipted = set()
        purpose = self._purpose(number)
        record = RoundRecord(run=self._run, number=number, purpose=purpose, cohort=tuple(sorted(self._present)))
        parameters = round_parameters(
            self._manifest,
            run=self._run,
            round_number=number,
            purpose=purpose,
            cohort=record.cohort,
            model_digest=self._name,
        )
        store.begin(self._run, number)
        machine = Coordinator(parameters=parameters, spread=self._pool.map, spool=self._spool)
        start = control.encode(
            StartRound(
                run=self._run,
                round_number=number,
                purpose=purpose,
                cohort=record.cohort,
                model_name=self._name if self._held_by_sites else b"",
                payload=self._model,
            )
        )
        for site in parameters.cohort:
            if not self._send(site, start):
                self._give_up(machine, record, [site])
        chunks = -(-parameters.input_bytes // MaskedInput.CHUNK_BYTES)
        self._drive(machine, record, most=MESSAGES_PER_PHASE + 2 * chunks)
        if isinstance(machine.phase, CoordinatorFinished):
            aggregate = machine.phase.aggregate
            if self._held_by_sites and purpose == "train" and not self._confirm_receipts():
                record.error = UNCONFIRMED
                return record, None
            record.survivors = aggregate.survivors
            totals = aggregate.totals
            record.metrics, record.personal_metrics = metrics_of(aggregate), personal_metrics_of(aggregate)
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
            self._write_status(record.number, machine)
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

    def _confirm_receipts(self) -> bool:
        """Wait until as many sites as a sum needs, or all who can, have the receipt by which they move their model;
        whether any has.  Stops a model that nobody has from being the one that the run goes on from."""
        deadline = time.monotonic() + self._manifest.deadlines.phase_seconds
        asked = self._receipted
        while (left := deadline - time.monotonic()) > 0:
            self._receipted = {site for site in asked if not self._endpoint.pending(PeerId(site))}
            if len(self._receipted) >= min(len(asked), self._manifest.policy.minimum_survivors):
                break
            delivery = self._endpoint.receive(min(left, CONFIRMING_SECONDS))
            if delivery is not None:
                self._take_control(delivery)
        return bool(self._receipted)

    def _allowed_seconds(self, machine: Coordinator, purpose: Purpose) -> float:
        deadlines = self._manifest.deadlines
        # The sites train while keys and shares are exchanged, so this phase is the one that waits for them.
        training = purpose in ("train", "personalise") and isinstance(machine.phase, CollectingMaskedInputs)
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
            header, *chunks = round_codec.encode(item.message)
            frames = [[control.ROUND, header], *(control.encode_chunk(machine.context, chunk) for chunk in chunks)]
            if not all(self._send(item.recipient, message) for message in frames):
                unreachable.append(item.recipient)
            elif isinstance(item.message, RoundReceipt):
                self._receipted.add(item.recipient)
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
