"""The two long-running programs behind `secureagg coordinator` and `secureagg site`."""

import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from dp.errors import PrivacyError
from secureagg import codec as round_codec
from secureagg.coordinator import MESSAGE_OF_PHASE
from secureagg.homomorphic import check_installed
from secureagg.messages import KeyAdvertisement
from sites import control
from sites.config import OpenSite, open_site
from sites.coordinator_loop import CoordinatorLoop, RoundRecord
from sites.datasets.dicom.cache import CARD_FILE, PARTS
from sites.errors import ConfigurationError
from sites.files import write_atomic, write_json
from sites.keys import load_keys
from sites.manifest import Manifest
from sites.model_state import State, model_digest
from sites.participant_loop import LOG, Federation, RoundResult
from sites.personalisation import PERSONAL_MODEL, Personalised, personalise
from sites.rounds import MEMORY_BYTES, model_spec, transport_limits
from sites.site_data import prepare_images
from sites.trainer import Trainer, trainer_for
from transport import DealerEndpoint, Endpoint, PeerId, listen

log = logging.getLogger("secureagg.site")

DROPPED_EXIT_STATUS: Final = 70
MODEL: Final = "model.safetensors"  # in the state folder of a site: the final global model


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSummary:
    """What a site writes down for its own people, in `summary.json` of its state folder.

    ``epsilon`` at ``delta``: spent on this data so far; ``ledger_head``: what its ledger ended with, to be noted
    elsewhere too; ``training_seconds``: per training round; ``rounds``: how each round of this run ended;
    ``personalised``: what the site's own version of the model is worth.
    """

    name: str
    patients: int
    epsilon: float | None
    delta: float
    noise_multiplier: float | None
    ledger_head: str | None
    bytes_sent: int
    training_seconds: list[float]
    rounds: list[RoundResult]
    personalised: Personalised | None = None


def run_coordinator(
    manifest_path: Path,
    *,
    keys: Path,
    initial: Path,
    state: Path,
    new_run: bool = False,
    report: Callable[[RoundRecord], None],
    notify: Callable[[str], None],
    memory_bytes: int = MEMORY_BYTES,
) -> None:
    """Coordinate one whole run of the consortium, or go on with one that was interrupted; the final model is in
    ``state``/model.safetensors.  Of one that is over, sites are told the end.

    ``memory_bytes``: the most that messages under way may take, over all sites.
    """
    manifest = Manifest.load(manifest_path)
    manifest.check()
    if manifest.policy.backend == "homomorphic":
        check_installed()
    own = load_keys(keys)
    if own.identity.public_key.hex() != manifest.coordinator.signing_key:
        raise ConfigurationError(f"{keys}: not the keys of the coordinator that {manifest_path} names")
    try:
        model = initial.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"initial model {initial}: {error.strerror}") from error
    if model_digest(model).hex() != manifest.model.initial_sha256:
        raise ConfigurationError(f"initial model {initial}: not the file whose SHA-256 {manifest_path} names")
    peers = {PeerId(site): card.transport_key for site, card in manifest.roster.items()}
    allow_many_connections()
    limits = transport_limits(manifest, memory_bytes=memory_bytes)
    with listen(manifest.coordinator.address, secret_key=own.transport_secret, peers=peers, limits=limits) as endpoint:
        notify(f"listening at {manifest.coordinator.address} for {len(peers)} sites")
        CoordinatorLoop(
            manifest=manifest,
            endpoint=endpoint,
            initial=model,
            state=state,
            new_run=new_run,
            report=report,
            notify=notify,
        ).run()


def allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may: silent connections of strangers take one each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prepare_site(config: Path) -> str:
    """Read and decode a site's images before any run; how many rows of how many patients there are, part by part."""
    card = prepare_images(open_site(config))
    parts = (
        f"{part} {card.rows[part]:,} images of {card.patients[part]:,} patients" for part in PARTS if card.rows[part]
    )
    return f"{', '.join(parts)}; {sum(card.refused.values()):,} files or images left out, see {CARD_FILE}"


def run_site(
    config: Path, *, report: Callable[[str], None], stop_answering: tuple[str, int] | None = None
) -> SiteSummary:
    """Take part in one whole run with the data that the site's configuration names.

    ``stop_answering``: (coordinator phase, round) in which this process ends as if the machine had failed; for trying
    out what a dropout does.
    """
    site = open_site(config)
    own = _OwnVersion(site)
    with closing(trainer_for(site)) as trainer:
        summary, final = _run_site(site, trainer, own, report=report, stop_answering=stop_answering)
    for past in summary.rounds:
        if past.metrics is not None and past.personal_metrics is not None:
            report(
                f"personal models of {past.survivors} sites: AUC on their held-out data {_number(past.metrics.auc)} "
                f"before, {_number(past.personal_metrics.auc)} after"
            )
    if site.config.personalisation is None:
        return summary
    personalised = own.of(final, _last_run(site))
    report(
        f"personal model: AUC on this site's held-out data {_number(personalised.before.auc)} before, "
        f"{_number(personalised.after.auc)} after; it is {site.state / PERSONAL_MODEL}"
    )
    with closing(trainer_for(site)) as trainer:  # the ledger has grown
        summary = replace(summary, personalised=personalised, epsilon=trainer.epsilon, ledger_head=trainer.ledger_head)
    _write_summary(site, summary)
    return summary


class _OwnVersion:
    """A site's own version of the final model, made once in a process: for the sum of all, or after the run."""

    def __init__(self, site: OpenSite) -> None:
        self._site = site
        self._made: dict[tuple[str, bytes], Personalised] = {}

    def of(self, final: State, run: str) -> Personalised:
        """What ``personalise`` makes of the ``final`` model of ``run``; raises its errors."""
        key = (run, model_spec(self._site.manifest).flatten(final, who="final model").tobytes())
        if key not in self._made:
            self._made[key] = personalise(self._site, final, run=run)
        return self._made[key]

    def for_the_sum(self, final: State, run: str) -> State | None:
        """The version itself; None where SITE.toml asks for none, or there is no budget for it."""
        if self._site.config.personalisation is None:
            log.warning("evaluation of personal models: SITE.toml has no [personalisation], so this site leaves it")
            return None
        try:
            self.of(final, run)
        except PrivacyError as error:
            log.warning("evaluation of personal models: this site leaves it; %s", error)
            return None
        spec = model_spec(self._site.manifest)
        return spec.restore(spec.from_bytes((self._site.state / PERSONAL_MODEL).read_bytes(), who=PERSONAL_MODEL))


def _last_run(site: OpenSite) -> str:
    """The run that this site took part in last, also before it was started anew; "" for none."""
    try:
        *_, last = (site.state / LOG).read_bytes().splitlines()
    except (FileNotFoundError, ValueError):
        return ""
    return msgspec.json.decode(last, type=RoundResult).run


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _write_summary(site: OpenSite, summary: SiteSummary) -> None:
    write_json(site.state / "summary.json", summary)


def _run_site(
    site: OpenSite,
    trainer: Trainer[Any],
    own: _OwnVersion,
    *,
    report: Callable[[str], None],
    stop_answering: tuple[str, int] | None,
) -> tuple[SiteSummary, State]:
    endpoint: Endpoint | None = None
    if stop_answering is not None:
        phase, number = stop_answering
        endpoint = _FailingEndpoint(site, phase=phase, round_number=number)
    seconds: list[float] = []
    federation = Federation(site, endpoint=endpoint, evaluate=trainer.evaluate, personalise=own.for_the_sum)
    federation.attach(trainer)

    def summarise() -> SiteSummary:
        summary = SiteSummary(
            name=site.name,
            patients=trainer.patients,
            epsilon=trainer.epsilon,
            delta=trainer.delta,
            noise_multiplier=trainer.noise_multiplier,
            ledger_head=trainer.ledger_head,
            bytes_sent=federation.bytes_sent,
            training_seconds=seconds,
            rounds=list(federation.history),
        )
        _write_summary(site, summary)
        return summary

    summarise()  # whatever happens in the first round, there is one
    with federation:
        for training_round in federation.rounds():
            began = time.monotonic()
            result = trainer.train_round(training_round)
            seconds.append(time.monotonic() - began)
            summarise()
            spent = (
                "no differential privacy" if trainer.epsilon is None else f"epsilon {trainer.epsilon:.3f} spent so far"
            )
            report(f"round {training_round.number} of {training_round.total}: {seconds[-1]:.2f} s of training, {spent}")
            training_round.submit_trained(result)
        spec = model_spec(site.manifest)
        final = spec.flatten(federation.final_state, who="final model")
        write_atomic(site.state / MODEL, spec.to_bytes(final))
        return summarise(), federation.final_state


def stop_at(text: str) -> tuple[str, int]:
    """The phase and round of "PHASE:ROUND"; ConfigurationError for anything else."""
    phase, _, number = text.partition(":")
    if phase not in MESSAGE_OF_PHASE or not number.isdigit():
        raise ConfigurationError(
            f"stop-answering: found {text!r}, expected one of {', '.join(MESSAGE_OF_PHASE)}, a colon and a round"
        )
    return phase, int(number)


class _FailingEndpoint(DealerEndpoint):
    """A site's endpoint whose process ends at once instead of sending one particular message of the protocol."""

    def __init__(self, site: OpenSite, *, phase: str, round_number: int) -> None:
        super().__init__(
            site.manifest.coordinator.address,
            secret_key=site.keys.transport_secret,
            server_key=site.manifest.coordinator.card.transport_key,
            limits=transport_limits(site.manifest),
        )
        self._message = MESSAGE_OF_PHASE[phase]
        self._rounds_left = round_number

    def send(self, peer: PeerId, frames: Sequence[bytes | memoryview]) -> None:
        """See ``Endpoint.send``."""
        if bytes(frames[0]) == control.ROUND:
            message = round_codec.decode_from_site([bytes(frame) for frame in frames[1:]], streamed=True)
            self._rounds_left -= isinstance(message, KeyAdvertisement)
            if self._rounds_left <= 0 and isinstance(message, self._message):
                os._exit(DROPPED_EXIT_STATUS)
        super().send(peer, frames)
