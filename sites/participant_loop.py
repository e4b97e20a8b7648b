"""A site in a federation: join, train as before, submit.  The rest happens behind the engineer's back.

A session thread owns the connection and the round's machine, so that keys and shares are exchanged while the site
trains, and the engineer's own thread does nothing but iterate over rounds::

    with join("site.toml") as federation:
        for training_round in federation.rounds():
            model.load_state_dict(training_round.global_state)
            train(model)
            training_round.submit(model.state_dict(), examples=len(dataset))
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt

from secureagg import (
    EncodedInput,
    LocalProtocolError,
    ParameterError,
    Participant,
    RoundParameters,
    SecureAggregationError,
    ValueOutOfRange,
    encode_input,
)
from secureagg import codec as round_codec
from secureagg.homomorphic import check_installed
from secureagg.keystream import Spread
from secureagg.messages import ToCoordinator
from secureagg.phases import Aborted, ParticipantFinished
from sites import census, control
from sites.config import OpenSite, open_site
from sites.control import CopyRequest, FederationOver, GivenUp, Hello, ModelCopy, Purpose, Refused, StartRound, Withdraw
from sites.errors import ConfigurationError, FederationFailed, ManifestError, SiteError
from sites.evaluation import Metrics, count_correct, score_histogram
from sites.files import use_up
from sites.held_model import HeldModel
from sites.journal import SqliteJournal
from sites.manifest_log import note_manifest
from sites.model_state import State, model_digest
from sites.rounds import (
    CORRECT,
    HISTOGRAM,
    PERSONAL_CORRECT,
    PERSONAL_HISTOGRAM,
    TOTAL,
    UPDATE,
    metrics_of,
    model_spec,
    personal_metrics_of,
    round_parameters,
    transport_limits,
)
from transport import COORDINATOR, Endpoint, PeerUnreachable, TransportError, connect

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dp.gradients import Loss
    from dp.views import Augmentation
    from sites.trainer import Trainer, TrainingResult

log = logging.getLogger("secureagg.site")

POLL_SECONDS: Final = 0.02  # how long a submitted update may wait for the session thread to wake
HELLO_SECONDS: Final = 2.0
LEAVE_SECONDS: Final = 30.0
LOG: Final = "rounds.jsonl"  # in the state folder: a RoundResult a line
HELD_MODEL: Final = "held-model.bin"  # in the state folder, where only the sites have the model

EVALUATED: Final = "evaluated"  # in the state folder, and a manifest's digest: its personal evaluation was given

Evaluate = Callable[[State], tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]]
Personalise = Callable[[State, str], State | None]


class Round:
    """One training round, as the engineer sees it.

    ``run``: names the training run; ``number``: of the round, from 1; ``total``: how many the consortium planned;
    ``parameters``: all that its sites have agreed on; ``global_state``: the tensors to train from.
    """

    def __init__(self, *, session: "_Session", task: "_Task") -> None:
        self._session = session
        self._task = task
        self.parameters = task.parameters
        self.run = task.parameters.run
        self.number = task.parameters.round_number
        self.total = session.site.manifest.training.rounds
        self.global_state = session.spec.restore(task.vector)

    def submit(self, state: State, *, examples: int, epsilon: float | None = None) -> None:
        """Encode the difference of ``state`` to the global one, and hand it over to be masked and sent.

        ``state``: the trained tensors, named and shaped like ``global_state``; ``examples``: how many were trained on,
        this update's weight, seen by nobody but this site.  ``epsilon``: what this run has spent so far, at the
        manifest's delta; required where the manifest's privacy mode is "local".  With noise that sites share nothing
        else is private than what ``submit_trained`` takes.

        Returns at once.  Raises ShapeMismatch or ValueOutOfRange, naming the tensor, for a state that the consortium's
        encoding cannot carry, and ParameterError for a missing or too large epsilon; nothing is sent then, the state is
        untouched and another one may be submitted.  A submission after the round's deadline is dropped with a warning.
        """
        privacy = self._session.site.manifest.privacy
        # Stops an update without the noise that all sites rely on.
        if privacy.shares_noise:
            raise ParameterError(
                f"round {self.number}: found a state, expected what `federation.trainer` makes, since the consortium's "
                f"privacy mode is {privacy.mode}"
            )
        if privacy.mode == "local" and (epsilon is None or not 0 <= epsilon <= privacy.epsilon):
            found = "none" if epsilon is None else f"{epsilon:.4g}"
            raise ParameterError(
                f"round {self.number}: found {found} as the epsilon this run has spent, expected one up to "
                f"{privacy.epsilon:g}, since the consortium's privacy mode is local"
            )
        who = f"state submitted to round {self.number}"
        update = self._session.spec.flatten(state, who=who)
        update -= self._task.vector  # in float32: off by no more than the state itself is, and without another vector
        try:
            encoded = encode_input(
                self._task.parameters,
                {UPDATE: update, **self._task.counts},
                weight=examples,
                spread=self._session.spread,
            )
        except ValueOutOfRange as error:
            if error.index is None or error.lane != UPDATE:
                raise
            raise ValueOutOfRange(f"{who}, {self._session.spec.locate(error.index)}: {error}") from error
        self._session.hand_over(self._task, encoded)

    def submit_trained(self, result: "TrainingResult") -> None:
        """Hand over what a trainer made of this round, in whatever mode; see ``submit``."""
        if result.elements is None:
            self.submit(result.state, examples=result.examples, epsilon=result.epsilon)
        else:
            encoded = encode_input(
                self._task.parameters, {UPDATE: result.elements, **self._task.counts}, spread=self._session.spread
            )
            self._session.hand_over(self._task, encoded)


class Federation:
    """A site's membership, open while its ``with`` block runs; made by ``join``."""

    def __init__(
        self,
        site: OpenSite,
        *,
        endpoint: Endpoint | None = None,
        evaluate: Evaluate | None = None,
        personalise: Personalise | None = None,
    ) -> None:
        self._session = _Session(site, endpoint)
        self._evaluate, self._personalise = evaluate, personalise
        self._trainers: list[Trainer[Any]] = []
        self._final_state: State | None = None

    def __enter__(self) -> Self:
        self._session.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.leave(finish=error is None)
        with ExitStack() as closing_all:
            for trainer in self._trainers:
                closing_all.callback(trainer.close)
            self._note_sent()

    def trainer(
        self,
        model: "nn.Module",
        loss: "Loss",
        *,
        features: "Tensor",
        targets: "Tensor",
        patients: Sequence[Hashable] | None = None,
        max_rows_per_patient: int = 1,
        augmentation: "Augmentation | None" = None,
    ) -> "Trainer[Any]":
        """A trainer of ``model`` on this site's rows by the manifest's recipe; use one over all rounds.

        With differential privacy it trains by DP-SGD with the patient as the unit (or the site, in that mode) and keeps
        the site's ledger: a round is booked before a patient is sampled, and refused (BudgetExhausted) when the
        consortium's budget, or what SITE.toml allows over the data's lifetime, has no room.  ``loss``: predictions and
        targets of some rows to the SUM of their losses; ``patients``: whose each row is, each another's by default;
        ``max_rows_per_patient``: how many of one patient's rows are used in a step; ``augmentation``: in which random
        views (``dp.views``).  Raises UnsupportedEvent, naming the layer and what to put in its place, for a
        model that DP-SGD cannot train.
        """
        from sites.trainer import Examples, trainer_of  # noqa: PLC0415  brings Opacus, which not everybody trains with

        data = Examples(features=features, targets=targets, patients=patients)
        made = trainer_of(
            self._session.site,
            model,
            data,
            loss=loss,
            max_rows_per_patient=max_rows_per_patient,
            augmentation=augmentation,
        )
        self.attach(made)
        return made

    def attach(self, trainer: "Trainer[Any]") -> None:
        """Tell ``trainer`` which updates went out, and close it at the end."""
        self._trainers.append(trainer)

    def _note_sent(self) -> None:
        # A round that came to its end was sent; one that did not may have been, and its update stays in the outbox
        # until the run's next one takes its place.
        finished = {(past.run, past.number): past.survivors for past in self.history if past.result == "finished"}
        for trainer in self._trainers:
            trainer.mark_sent(finished)

    @property
    def final_state(self) -> State:
        """The global model after the last round; FederationFailed if the federation has not come to its end."""
        if self._final_state is None:
            raise FederationFailed("final model: asked for before the federation was over")
        return self._final_state

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to the coordinator so far."""
        return self._session.bytes_sent

    @property
    def history(self) -> tuple["RoundResult", ...]:
        """How each round of this site ended so far."""
        return tuple(self._session.history)

    def rounds(self) -> Iterator[Round]:
        """Each training round that the coordinator starts with this site, until the federation is over.

        Before each it evaluates the incoming global model on this site's held-out data, if ``join`` was given the
        means, or at the end the final one and this site's own version of it, where the manifest says so; only summed
        counts ever leave the consortium's masks.  Raises PeerUnreachable when the coordinator is
        gone and FederationFailed when it refuses this site or gives up; the engineer's own state is untouched.
        """
        while (item := self._session.next_task()) is not None:
            self._note_sent()
            if isinstance(item, FederationOver):
                self._final_state = self._session.spec.restore(self._session.final_vector(item))
                if item.code != "finished":
                    raise FederationFailed(
                        f"the coordinator ended the federation ({item.code}); see its own log for why"
                    )
                return
            if item.purpose in ("census", "personalise"):
                # A site that has nothing to give leaves the round: zeros of all but one would show that one's counts.
                personal = item.purpose == "personalise"
                counts = self._personal_counts(item) if personal else census.take_contribution(self._session.site)
                if counts is not None:
                    self._session.hand_over(item, encode_input(item.parameters, counts))
                self._session.withdraw_unless_submitted(item)
                continue
            if TOTAL in item.parameters.lanes:
                correct, total, histogram = self._counts(self._session.spec.restore(item.vector))
                item.counts.update({CORRECT: correct, TOTAL: total, HISTOGRAM: histogram})
            if item.purpose == "evaluate":
                self._session.hand_over(item, encode_input(item.parameters, item.counts))
            else:
                yield Round(session=self._session, task=item)
                self._session.withdraw_unless_submitted(item)

    def _counts(self, state: State) -> list[npt.NDArray[np.int64]]:
        """Right decisions, examples and histogram of ``state`` on this site's held-out data; zeros without the means to
        evaluate."""
        scores: npt.NDArray[np.floating] = np.zeros(0)
        labels: npt.NDArray[np.integer] = np.zeros(0, np.int64)
        if self._evaluate is not None:
            scores, labels = self._evaluate(state)
        histogram = score_histogram(scores, labels, self._session.site.manifest.evaluation.histogram_bins)
        return [np.array([count_correct(scores, labels)]), np.array([len(labels)]), histogram.reshape(-1)]

    def _personal_counts(self, task: "_Task") -> dict[str, npt.NDArray[np.int64]] | None:
        """Evaluation counts of the final model and of this site's own version of it; None without one, without
        held-out data, and where they were given already."""
        site = self._session.site
        given = site.state / f"{EVALUATED}.{site.manifest.digest.hex()}"
        if self._personalise is None or given.exists():
            return None
        final = self._session.spec.restore(task.vector)
        correct, total, histogram = self._counts(final)
        if not total[0] or (personal := self._personalise(final, task.parameters.run)) is None:
            return None
        personal_correct, _, personal_histogram = self._counts(personal)
        # Stops a second sum, over other sites, in this run or another one, whose difference to the first would be one
        # site's counts: on disk before anything is sent, whatever then becomes of the round.
        if not use_up(given):
            return None
        return {
            CORRECT: correct,
            TOTAL: total,
            HISTOGRAM: histogram,
            PERSONAL_CORRECT: personal_correct,
            PERSONAL_HISTOGRAM: personal_histogram,
        }


def join(config: str | Path, *, evaluate: Evaluate | None = None, personalise: Personalise | None = None) -> Federation:
    """The federation that ``config`` (a SITE.toml) describes, to be entered with ``with``.

    ``evaluate``: takes a global state and returns the held-out examples' scores in [0, 1] and their 0/1 labels, for the
    consortium's summed metrics; without it this site contributes zeros.  ``personalise``: takes the final state and the
    name of the run, and returns this site's own version of it; called where the manifest has personal models evaluated;
    without it, or if it returns None, this site is not in that sum.  Raises the errors of ``open_site``:
    keys, manifest and signatures are checked before anything is sent.
    """
    return Federation(open_site(Path(config)), evaluate=evaluate, personalise=personalise)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """How a round ended for this site: "finished", "withdrawn", "unfinished" or an error's code; ``phase``: of this
    site's machine then; ``at``: when it ended, in seconds since 1970, after how many ``seconds``.

    From the receipt of a finished round: ``survivors``, how many sites are in the sum, and ``aggregate``, its digest in
    hexadecimal.  ``metrics``: of the model it started from, and ``personal_metrics`` of the sites' own versions of it,
    where sites open the sums.
    """

    run: str
    number: int
    purpose: Purpose
    result: str
    phase: str
    at: float
    seconds: float
    survivors: int | None = None
    aggregate: str | None = None
    metrics: Metrics | None = None
    personal_metrics: Metrics | None = None


class _Task:
    """What the session asks the engineer's thread for: an input for this round."""

    def __init__(self, parameters: RoundParameters, purpose: Purpose, vector: npt.NDArray[np.float32]) -> None:
        self.parameters = parameters
        self.purpose = purpose
        self.vector = vector
        self.counts: dict[str, npt.ArrayLike] = {}
        self.submitted = False
        self.began = time.monotonic()


class _Session:
    """The thread that owns the connection and the current round's machine.

    ``_changed`` guards everything that both threads touch: ``_offer`` (what the engineer's thread shall take next),
    ``_inbox`` (what it hands over), ``_task``, ``_error`` and ``_over``.
    """

    def __init__(self, site: OpenSite, endpoint: Endpoint | None) -> None:
        self.site = site
        self.spec = model_spec(site.manifest)
        self._held = HeldModel(site.manifest, site.keys, site.state / HELD_MODEL)
        self.history: list[RoundResult] = []
        self._endpoint = endpoint
        self._journal: SqliteJournal | None = None
        self._participant: Participant | None = None
        self._changed = threading.Condition()
        self._offer: _Task | FederationOver | None = None
        self._inbox: list[tuple[_Task, EncodedInput | None]] = []
        self._task: _Task | None = None
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="secureagg-masks")
        self._over = False
        self._thread = threading.Thread(target=self._guarded_loop, name="secureagg-session", daemon=True)
        self._hello_due = 0.0
        self._silent_since = time.monotonic()

    # --- called by the engineer's thread ---

    def start(self) -> None:
        """Open the journal and the connection, and start the thread."""
        site = self.site
        if site.manifest.policy.backend == "homomorphic":
            check_installed()
        try:
            site.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"state folder {site.state}: {error.strerror}, expected a writable folder"
            ) from error
        self._journal = SqliteJournal(site.state / "journal.sqlite")
        note_manifest(site.state, site.manifest)
        with _logged("the model that this site held; it asks the others for theirs"):
            self._held.restore()
        if self._endpoint is None:
            self._endpoint = connect(
                site.manifest.coordinator.address,
                secret_key=site.keys.transport_secret,
                server_key=site.manifest.coordinator.card.transport_key,
                limits=transport_limits(site.manifest),
            )
        self._thread.start()

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to the coordinator so far."""
        return 0 if self._endpoint is None else self._endpoint.bytes_sent.get(COORDINATOR, 0)

    @property
    def _connection(self) -> Endpoint:
        if self._endpoint is None:
            raise LocalProtocolError("federation: used outside its `with` block")
        return self._endpoint

    @property
    def spread(self) -> Spread:
        """Puts work on the session's threads."""
        return self._pool.map

    def next_task(self) -> "_Task | FederationOver | None":
        """Wait for the next round or the end; raises what ended the session."""
        with self._changed:
            self._changed.wait_for(lambda: self._offer is not None or self._error is not None or self._over)
            if self._error is not None:
                raise self._error
            offer, self._offer = self._offer, None
            return offer

    def hand_over(self, task: _Task, encoded: EncodedInput) -> None:
        """Give the thread the input of ``task``; a task that is no longer the current one is only noted."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if task.submitted:
                raise LocalProtocolError(f"round {task.parameters.round_number}: a second submission, expected one")
            task.submitted = True
            self._inbox.append((task, encoded))

    def withdraw_unless_submitted(self, task: _Task) -> None:
        """Leave the round of ``task`` if the engineer's loop went on without submitting."""
        with self._changed:
            if not task.submitted and task is self._task:
                log.warning("round %d: nothing was submitted, so this site leaves it", task.parameters.round_number)
                task.submitted = True
                self._inbox.append((task, None))

    def leave(self, *, finish: bool) -> None:
        """Stop the thread; if ``finish``, first let a round whose input was submitted come to its end."""
        if self._thread.is_alive():
            with self._changed:
                if finish:
                    self._changed.wait_for(self._idle, timeout=LEAVE_SECONDS)
            self._stop.set()
            self._thread.join()
        self._pool.shutdown()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._journal is not None:
            self._journal.close()

    def _idle(self) -> bool:
        return self._over or self._error is not None or self._task is None or not self._task.submitted

    # --- the session thread ---

    def _guarded_loop(self) -> None:
        try:
            self._loop()
        except Exception as error:  # handed to the engineer's thread, which raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._say_hello()
            delivery = self._connection.receive(POLL_SECONDS)
            if delivery is None:
                self._check_silence()
            else:
                self._silent_since = time.monotonic()
                self._take(delivery.frames)
                del delivery  # it may be the model
            with self._changed:
                inbox, self._inbox = self._inbox, []
            for task, encoded in inbox:
                self._take_input(task, encoded)
        if not self._over:
            with suppress(TransportError):
                self._withdraw(leaving=True)

    def _take(self, frames: tuple[bytes, ...]) -> None:
        if frames[0] == control.ROUND:
            self._step(lambda participant: participant.receive(round_codec.decode_from_coordinator(frames[1:])))
            return
        if frames[0] == control.CHUNK:
            context, chunk = control.decode_chunk(frames[1:])
            if self._task is not None and self._task.parameters.context == context:
                self._step(lambda participant: participant.receive_chunk(chunk))
            return
        match control.decode_from_coordinator(frames[1:]):
            case StartRound() as start:
                self._begin(start)
            case GivenUp(run=run, round_number=number):
                task = self._task
                if task is not None and (task.parameters.run, task.parameters.round_number) == (run, number):
                    log.warning("round %d: too late for the coordinator, which goes on without this site", number)
                    self._leave_round("unfinished")
            case FederationOver() as over:
                self._end_round("unfinished")
                with self._changed:
                    self._over, self._offer = True, over
                    self._changed.notify_all()
                self._stop.set()
            case CopyRequest() as request:
                with _logged(f"request of {request.site}"):
                    if (copy := self._held.seal(request)) is not None:
                        self._send(copy)
            case ModelCopy() as copy:
                with _logged("model of another site"):
                    self._held.open(copy)
            case Refused(code=code):
                hint = f"; this site holds the one with digest {self.site.manifest.digest.hex()[:16]}..."
                raise FederationFailed(
                    f"coordinator at {self.site.manifest.coordinator.address}: it refuses site {self.site.name} "
                    f"({code}){hint if code == control.MANIFEST_DIFFERS else ''}"
                )

    def _begin(self, start: StartRound) -> None:
        """Build the round from this site's own manifest and roster, and advertise keys; refuse what they do not
        allow."""
        self._leave_round("unfinished")
        site = self.site
        try:
            vector, digest = self._model_of(start)
            if vector is None:
                # The others will have moved on by the time that this site has their model.
                self._send(self._held.request(start.run))
                self._send(Withdraw(run=start.run, round_number=start.round_number, leaving=False))
                return
            parameters = round_parameters(
                site.manifest,
                run=start.run,
                round_number=start.round_number,
                purpose=start.purpose,
                cohort=start.cohort,
                model_digest=digest,
            )
            participant = Participant(
                site=site.name,
                identity=site.keys.identity,
                parameters=parameters,
                journal=self._durable_journal,
                minimum_survivors=site.minimum_survivors,
                spread=self.spread,
            )
            messages = participant.start()
        except (SecureAggregationError, ManifestError) as error:
            log.error("round %d refused: %s", start.round_number, error)
            self._note(
                RoundResult(
                    run=start.run,
                    number=start.round_number,
                    purpose=start.purpose,
                    result=error.code,
                    phase="",
                    at=time.time(),
                    seconds=0.0,
                )
            )
            self._send(Withdraw(run=start.run, round_number=start.round_number, leaving=False))
            return
        self._participant = participant
        with self._changed:
            self._task = self._offer = _Task(parameters, start.purpose, vector)
            self._changed.notify_all()
        self._send_round(messages)

    def _model_of(self, start: StartRound) -> tuple[npt.NDArray[np.float32] | None, bytes]:
        """The global model that a round is about, None if this site has not got it, and its digest or name."""
        if not self.site.manifest.policy.sites_hold_model:
            who = f"global model of round {start.round_number}"
            return self.spec.from_bytes(start.payload, who=who), model_digest(start.payload)
        held = self._held
        if start.payload and held.run != start.run:
            held.begin(start.run, start.payload)
        return held.vector if held.is_at(start.run, start.model_name) else None, start.model_name

    def final_vector(self, over: FederationOver) -> npt.NDArray[np.float32]:
        """The final model; FederationFailed where only the others have it."""
        if not self.site.manifest.policy.sites_hold_model:
            return self.spec.from_bytes(over.payload, who="final model")
        if self._held.name != over.model_name:
            raise FederationFailed("final model: this site missed the last sum, and the others are gone")
        return self._held.vector

    def _step(self, step: Callable[[Participant], list[ToCoordinator]]) -> None:
        """Let the round's machine take what arrived, and send what it answers."""
        participant = self._participant
        if participant is None:
            return  # a late message of a round that this site has left
        try:
            self._send_round(step(participant))
        except SecureAggregationError as error:
            log.error("%s", error)
            self._withdraw(leaving=False)
            self._end_round(error.code)
            return
        if isinstance(participant.phase, ParticipantFinished):
            self._finish_round(participant.phase)
        elif isinstance(participant.phase, Aborted):
            log.warning("%s", participant.phase.error)
            self._end_round(participant.phase.error.code)

    def _take_input(self, task: _Task, encoded: EncodedInput | None) -> None:
        """Mask and send what the engineer's thread handed over, unless its round is over."""
        participant = self._participant
        if task is not self._task or participant is None:
            log.warning("round %d: submitted after the round was over; not sent", task.parameters.round_number)
        elif encoded is None:
            self._withdraw(leaving=False)
            self._end_round("withdrawn")
        else:
            self._send_round(participant.submit(encoded))

    def _leave_round(self, result: str) -> None:
        """End the round without the coordinator; what waits to be sent must not hold up the next one."""
        if self._task is not None:
            self._connection.discard_waiting(COORDINATOR)
        self._end_round(result)

    def _finish_round(self, phase: ParticipantFinished) -> None:
        aggregate, task = phase.aggregate, self._task
        training = task is not None and task.purpose == "train"
        if training and aggregate is not None and self.site.manifest.policy.sites_hold_model:
            self._held.move(aggregate)
        if task is not None and task.purpose == "census" and aggregate is not None:
            log.info(
                "%s", census.write_table(self.site.manifest, aggregate, run=task.parameters.run, state=self.site.state)
            )
        self._end_round("finished", phase)

    def _end_round(self, result: str, finished: ParticipantFinished | None = None) -> None:
        task, participant, self._participant = self._task, self._participant, None
        if task is not None:
            aggregate = None if finished is None else finished.aggregate
            self._note(
                RoundResult(
                    run=task.parameters.run,
                    number=task.parameters.round_number,
                    purpose=task.purpose,
                    result=result,
                    phase="" if participant is None else type(participant.phase).__name__,
                    at=time.time(),
                    seconds=time.monotonic() - task.began,
                    survivors=None if finished is None else finished.receipt.survivors,
                    aggregate=None if finished is None else finished.receipt.aggregate_digest.hex(),
                    metrics=None if aggregate is None else metrics_of(aggregate),
                    personal_metrics=None if aggregate is None else personal_metrics_of(aggregate),
                )
            )
        with self._changed:
            self._task = None
            self._changed.notify_all()

    def _note(self, result: RoundResult) -> None:
        self.history.append(result)
        with (self.site.state / LOG).open("ab") as lines:
            lines.write(msgspec.json.encode(result) + b"\n")

    def _withdraw(self, *, leaving: bool) -> None:
        task = self._task
        run, number = ("", 0) if task is None else (task.parameters.run, task.parameters.round_number)
        self._send(Withdraw(run=run, round_number=number, leaving=leaving))

    def _say_hello(self) -> None:
        """Tell the coordinator every few seconds that this site is there: it may have come later, or given it up.

        Not while something else waits to be heard, so that nothing piles up over a connection that is slow or gone.
        """
        now = time.monotonic()
        if now >= self._hello_due and not self._connection.pending(COORDINATOR):
            self._hello_due = now + HELLO_SECONDS
            self._send(Hello(manifest_digest=self.site.manifest.digest))

    def _check_silence(self) -> None:
        """Raise PeerUnreachable once the coordinator has been gone for as long as it lets sites be gone."""
        limit = self.site.manifest.deadlines.join_seconds
        reason = self._connection.why_silent()
        if reason is None:
            self._silent_since = time.monotonic()
        elif time.monotonic() - self._silent_since > limit:
            raise PeerUnreachable(
                f"coordinator at {self.site.manifest.coordinator.address}: gone for {limit:g} s; {reason}"
            )

    @property
    def _durable_journal(self) -> SqliteJournal:
        if self._journal is None:
            raise LocalProtocolError("federation: used outside its `with` block")
        return self._journal

    def _send(self, message: control.FromSite) -> None:
        self._connection.send(COORDINATOR, control.encode(message))

    def _send_round(self, messages: list[ToCoordinator]) -> None:
        """Send ``messages`` and empty the list: each chunk of a masked input is given free once it is handed over."""
        while messages:
            context = messages[0].context
            header, *chunks = round_codec.encode(messages.pop(0))
            self._connection.send(COORDINATOR, [control.ROUND, header])
            while chunks:
                self._connection.send(COORDINATOR, control.encode_chunk(context, chunks.pop(0)))


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Note in the log, instead of raising, that what another site sent is of no use."""
    try:
        yield
    except (SecureAggregationError, SiteError) as error:
        log.error("%s: %s", what, error)
