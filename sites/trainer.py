"""A site's own training: from the global model to a private local one, within the site's budget."""

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from math import prod
from typing import TYPE_CHECKING, Any, Final, Generic, Required, TypedDict, TypeVar, Unpack

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from safetensors.torch import load as load_state
from torch import nn

from dp.budget import BudgetGuard, PrivacyBudget
from dp.errors import BudgetExhausted
from dp.events import Event, IntegerEvent, PoissonSampledGaussian
from dp.gradients import Loss
from dp.layers import refuse_layers
from dp.ledger import Ledger, Release
from dp.shared import ADVERSARIES, ClippedSum, SharedNoisePlan, clipped_update, opened_variance
from dp.shared import encode as encode_shared
from dp.training import BATCH_ROWS, Plan, clipped_gradient_sum, train_plain, train_private
from dp.views import Augmentation
from secureagg import RoundParameters, ShapeMismatch
from secureagg.identity import Entropy, Identity
from sites.config import OpenSite
from sites.datasets.heart import Hospital
from sites.errors import ConfigurationError, DatasetError
from sites.manifest import Privacy, Training
from sites.model_state import ModelSpec, State
from sites.rounds import model_spec

if TYPE_CHECKING:
    from sites.participant_loop import Round

DATASET_LABEL: Final = b"secureagg/v1/dataset"  # of whatever protocol: data keeps its name, and with it its budget
RANDOM_GENERATOR: Final = "AES-128-CTR (randomgen), keyed from the operating system"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """A site's rows: ``features`` (rows, ...), ``targets`` (rows, ...), and in ``patients`` whose each row is; without
    it each is another patient's."""

    features: torch.Tensor = field(repr=False)
    targets: torch.Tensor = field(repr=False)
    patients: Sequence[Hashable] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        found = (len(self.features), len(self.targets), len(self.features if self.patients is None else self.patients))
        if not 0 < found[0] == found[1] == found[2]:
            raise DatasetError(
                f"examples: found {found[0]} rows of features, {found[1]} of targets and {found[2]} patients' keys, "
                "expected as many of each, and some"
            )

    @property
    def owners(self) -> Sequence[Hashable]:
        """Whose each row is."""
        return range(len(self.features)) if self.patients is None else self.patients

    @classmethod
    def of_hospital(cls, hospital: Hospital, *, held_out: bool = False) -> "Examples":
        """The patients of a heart hospital that are trained on, or those that are held out."""
        if held_out:
            return cls(
                features=torch.from_numpy(hospital.test_features), targets=torch.from_numpy(hospital.test_labels)
            )
        return cls(features=torch.from_numpy(hospital.train_features), targets=torch.from_numpy(hospital.train_labels))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingResult:
    """What a round made, to be submitted: the trained ``state``, or with shared noise ring ``elements`` (d,), its
    weight, and the epsilon that this run has spent so far, at the manifest's delta (None without differential
    privacy)."""

    examples: int
    epsilon: float | None
    state: State = field(default_factory=dict, repr=False)
    elements: npt.NDArray[np.uint64] | None = field(default=None, repr=False)


def heart_model() -> nn.Module:
    """Logistic regression on the 13 features of the heart data, from zero weights."""
    model = nn.Linear(13, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def initial_heart_model() -> bytes:
    """The safetensors bytes of ``heart_model``: where the heart federation starts."""
    return save({name: tensor.numpy() for name, tensor in heart_model().state_dict().items()})


def binary_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed logistic loss of logits (n, 1) against 0/1 targets (n,)."""
    return nn.functional.binary_cross_entropy_with_logits(predictions.squeeze(1), targets, reduction="sum")


def fingerprint(data: Examples, identity: Identity) -> str:
    """What names a site's training data in its ledger: SHA-256, the same for the same rows in any order.

    It is taken of the site's signature over the data's own SHA-256.  Ed25519 signatures are deterministic, so the same
    data gives the same name; and without the site's secret nobody can try out whether a guessed patient is in it.
    """
    columns = [np.ascontiguousarray(part.detach().cpu().numpy()) for part in (data.features, data.targets)]
    form = ";".join(f"{column.dtype.str} {column.shape}" for column in columns).encode()
    rows = sorted(sha256(one.tobytes() + other.tobytes()).digest() for one, other in zip(*columns, strict=True))
    return sha256(identity.sign(DATASET_LABEL, sha256(form + b":" + b"".join(rows)).digest())).hexdigest()


class LearningOptions(TypedDict):
    """What a trainer can be given about rows and how they are learnt from."""

    model: nn.Module
    data: Examples
    loss: Loss
    held_out: Examples | None
    scored: int
    max_rows_per_patient: int
    augmentation: Augmentation | None


class TrainerOptions(TypedDict, total=False):
    """The arguments of ``Trainer``."""

    name: Required[str]
    model: Required[nn.Module]
    data: Required[Examples]
    training: Required[Training]
    privacy: Required[Privacy]
    ledger: Ledger | None
    budget: PrivacyBudget | None
    loss: Loss
    held_out: Examples | None
    scored: int
    max_rows_per_patient: int
    augmentation: Augmentation | None
    consortium: str | None
    manifest_sha256: str | None
    purpose: str
    entropy: Entropy


_Event = TypeVar("_Event", bound=Event)


class Trainer(ABC, Generic[_Event]):
    """One site's trainer over all rounds of a run, behind its budget.

    With differential privacy each round is reserved in the ledger before a patient is sampled, and refused
    (BudgetExhausted) when a budget has no room; what is released is in the ledger before it is returned.
    """

    def __init__(
        self,
        *,
        name: str,
        model: nn.Module,
        data: Examples,
        training: Training,
        privacy: Privacy,
        ledger: Ledger | None = None,
        budget: PrivacyBudget | None = None,
        loss: Loss = binary_loss,
        held_out: Examples | None = None,
        scored: int = 0,
        max_rows_per_patient: int = 1,
        augmentation: Augmentation | None = None,
        consortium: str | None = None,
        manifest_sha256: str | None = None,
        purpose: str = "train",
        entropy: Entropy = os.urandom,
    ) -> None:
        """``name``: of the site; ``privacy``: what a run may spend; ``budget``: what all runs on this data may spend,
        the same by default; ``loss``: predictions and targets of some rows to the SUM of their losses; ``held_out``:
        for ``evaluate``, by the model's output ``scored``; ``augmentation``: views of rows that are trained on;
        ``purpose``: of releases, for the ledger.

        Raises ConfigurationError if there is a privacy mode and no ledger, UnsupportedEvent for a model that patients'
        gradients cannot be taken of.
        """
        if privacy.mode in ("local", "shared"):
            refuse_layers(model.train())
        self._model = model
        self._loss, self._data, self._held_out = loss, data, held_out
        self._scored, self._augmentation = scored, augmentation
        self._max_rows_per_patient = max_rows_per_patient
        self._entropy = entropy
        self._privacy = privacy
        self._consortium, self._purpose = consortium, purpose
        self._manifest_sha256 = manifest_sha256
        self._guard: BudgetGuard | None = None
        self.patients = len(set(data.owners))
        self._plan = Plan(
            steps=training.local_steps,
            learning_rate=training.learning_rate,
            sampling_rate=min(1.0, training.batch_size / self.patients),
        )
        self.noise_multiplier: float | None = None
        self.delta = privacy.delta
        if privacy.mode != "none":
            if ledger is None:
                raise ConfigurationError(
                    f"trainer of {name}: privacy mode {privacy.mode}, but no ledger to book releases in"
                )
            of_a_run = PrivacyBudget(privacy.epsilon, privacy.delta)
            self._guard = BudgetGuard(of_a_run if budget is None else budget, ledger, run_budget=of_a_run)
            self.delta = self._guard.budget.delta

    @property
    def epsilon(self) -> float | None:
        """What all runs on this data have spent so far, at ``delta``; None without differential privacy."""
        return None if self._guard is None else self._guard.spent

    @property
    def ledger_head(self) -> str | None:
        """Hash of the ledger's last row; None without differential privacy."""
        return None if self._guard is None else self._guard.ledger.head

    def train(
        self, state: State, *, run: str, round_number: int, parameters: RoundParameters | None = None
    ) -> TrainingResult:
        """Train from ``state`` for one round; returns the result, ``state`` stays as it is.

        A round whose update is in the ledger's outbox is not trained again: the same update is returned.  One whose
        update was sent is refused (ReservationMisused).
        ``parameters``: of the round, for the ledger, where the caller has them.  Raises BudgetExhausted before anything
        is sampled if this round does not fit the budget.
        """
        if self._guard is None:
            return self._result(self._update(state, None), epsilon=None)
        model_sha256 = sha256(_bytes_of(state)).hexdigest()
        ledger = self._guard.ledger
        committed = ledger.committed(run=run, round_number=round_number, model_sha256=model_sha256)
        if committed is None:
            event = self._event(self._guard, run=run, round_number=round_number)
            release = Release(
                run=run,
                round_number=round_number,
                event=event,
                purpose=self._purpose,
                unit=self._privacy.unit,
                mode=self._privacy.mode,
                consortium=self._consortium,
                library_version=version("secureagg"),
                model_sha256=model_sha256,
                manifest_sha256=self._manifest_sha256,
                cohort=None if parameters is None else len(parameters.cohort),
                threshold=None if parameters is None else parameters.threshold,
                max_corrupt=None if parameters is None else parameters.max_corrupt,
                clip_norm=self._privacy.clip_norm,
                random_generator=RANDOM_GENERATOR,
            )
            reservation = self._guard.authorize(self._described(release))
            committed = ledger.commit(reservation, self._update(state, event))
        # What is sent is read back from the outbox, so that it is what would be sent again.
        return self._result(ledger.update(committed), epsilon=self._guard.spent_by(run))

    def train_round(self, training_round: "Round") -> TrainingResult:
        """Train from a round's global state; what to submit to it."""
        return self.train(
            training_round.global_state,
            run=training_round.run,
            round_number=training_round.number,
            parameters=training_round.parameters,
        )

    def evaluate(self, state: State) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
        """Scores in [0, 1] and 0/1 labels of the held-out patients; none without them."""
        if self._held_out is None:
            return np.zeros(0), np.zeros(0, np.int64)
        scores = predict(self._model, state, self._held_out.features, output=self._scored)
        return scores, self._held_out.targets.numpy().astype(np.int64)

    def close(self) -> None:
        """Close the ledger."""
        if self._guard is not None:
            self._guard.ledger.close()

    def mark_sent(self, rounds: Mapping[tuple[str, int], int | None]) -> None:
        """Note that the updates of these rounds, each a run and a number, went out; they leave the outbox.

        With each round: how many sites' updates are in its sum, if that is known.
        """
        if self._guard is not None:
            ledger = self._guard.ledger
            for committed in ledger.unsent:
                key = (committed.release.run, committed.release.round_number)
                if key in rounds:
                    survivors = rounds[key]
                    ledger.mark_sent(committed, {} if survivors is None else self._realised(survivors))

    @abstractmethod
    def _event(self, guard: BudgetGuard, *, run: str, round_number: int) -> _Event:
        """What one round releases."""

    @abstractmethod
    def _update(self, state: State, event: _Event | None) -> bytes:
        """What one round makes of ``state``, by the mechanism of ``event`` if there is one, which must be reserved."""

    @abstractmethod
    def _result(self, update: bytes, *, epsilon: float | None) -> TrainingResult:
        """What ``_update`` gave, to be submitted."""

    def _described(self, release: Release) -> Release:
        """``release`` with what else the ledger should know of it."""
        return release

    def _realised(self, survivors: int) -> dict[str, object]:
        """What a sum of so many sites turned out to be, for the ledger."""
        return {"survivors": survivors}

    def _train_plain(self) -> None:
        """Train the model as it is, without privacy."""
        data = self._data
        train_plain(
            self._model,
            self._loss,
            data.features,
            data.targets,
            plan=self._plan,
            augmentation=self._augmentation,
            entropy=self._entropy,
        )


class LocalTrainer(Trainer[PoissonSampledGaussian]):
    """Trains by DP-SGD with noise of the site's own, chosen once per run, so that the planned rounds spend what the
    budgets and the ledger leave; with ``privacy.mode == "none"`` without privacy."""

    def __init__(self, **options: Unpack[TrainerOptions]) -> None:
        """See ``Trainer``."""
        super().__init__(**options)
        self._planned_steps = options["training"].rounds * self._plan.steps
        if self._guard is not None:
            with suppress(BudgetExhausted):  # a run that continues has its noise, another is refused when it trains
                self._least_noise(self._guard)  # takes seconds once, which the first round must not wait for

    def _event(self, guard: BudgetGuard, *, run: str, round_number: int) -> PoissonSampledGaussian:
        # A run that continues after a restart keeps the noise that it began with.
        releases = guard.ledger.releases
        begun = next((release.event.noise_multiplier for release in releases if release.run == run), None)
        try:
            self.noise_multiplier = self._least_noise(guard) if begun is None else begun
        except BudgetExhausted as error:
            refusal = {"refused": str(error), "run": run, "round_number": round_number}
            guard.ledger.record("note", refusal)
            raise
        return PoissonSampledGaussian(
            sampling_rate=self._plan.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self._plan.steps
        )

    def _least_noise(self, guard: BudgetGuard) -> float:
        """The least noise with which all planned rounds of a new run fit what is left."""
        return guard.least_noise(sampling_rate=self._plan.sampling_rate, steps=self._planned_steps)

    def _update(self, state: State, event: PoissonSampledGaussian | None) -> bytes:
        self._model.load_state_dict(state)
        if event is None:
            self._train_plain()
        else:
            train_private(
                self._model,
                self._loss,
                self._data.features,
                self._data.targets,
                patients=self._data.owners,
                plan=self._plan,
                event=event,
                clip_norm=self._privacy.clip_norm,
                max_rows_per_patient=self._max_rows_per_patient,
                augmentation=self._augmentation,
                entropy=self._entropy,
            )
        return _bytes_of(self._model.state_dict())

    def _result(self, update: bytes, *, epsilon: float | None) -> TrainingResult:
        return TrainingResult(state=load_state(update), examples=self.patients, epsilon=epsilon)


class SharedTrainer(Trainer[IntegerEvent]):
    """Makes what is private in the sum of all sites only: per round one clipped gradient sum (``privacy.mode ==
    "shared"``) or the whole site's clipped update ("site"), with this site's part of the noise, as ring elements."""

    def __init__(self, *, noise: SharedNoisePlan, spec: ModelSpec, **options: Unpack[TrainerOptions]) -> None:
        """``noise``: as all sites have signed it; ``spec``: the order in which the consortium sums the tensors; for the
        rest see ``Trainer``."""
        super().__init__(**options)
        self._noise, self._spec = noise, spec
        self._sampling_rate = max(noise.sampling_rates)
        self.noise_multiplier = noise.noise_multiplier

    def _event(self, guard: BudgetGuard, *, run: str, round_number: int) -> IntegerEvent:
        del guard, run, round_number  # the plan was made for all of them
        return self._noise.event(sampling_rate=self._sampling_rate, steps=1)

    def _update(self, state: State, event: IntegerEvent | None) -> bytes:
        del event  # is the plan's
        self._model.load_state_dict(state)
        clipped = self._gradient_sum() if self._noise.unit == "patient" else self._whole_update(state)
        return encode_shared(clipped, self._noise, entropy=self._entropy).astype("<u8").tobytes()

    def _gradient_sum(self) -> ClippedSum:
        """The sum of one Poisson sample's gradients at the model, in the consortium's order."""
        found = clipped_gradient_sum(
            self._model,
            self._loss,
            self._data.features,
            self._data.targets,
            patients=self._data.owners,
            sampling_rate=self._sampling_rate,
            clip_norm=self._privacy.clip_norm,
            max_rows_per_patient=self._max_rows_per_patient,
            augmentation=self._augmentation,
            entropy=self._entropy,
        )
        trained = [(name, tensor.numel()) for name, tensor in self._model.named_parameters() if tensor.requires_grad]
        ends = np.cumsum([size for _, size in trained])[:-1]
        by_name = dict(zip([name for name, _ in trained], np.split(found.values, ends), strict=True))
        # What is not trained has no gradient.
        parts = [by_name.pop(name, np.zeros(prod(shape))) for name, shape in self._spec.tensors]
        if by_name:
            raise ShapeMismatch(f"model: tensor {min(by_name)} is trained but not part of the consortium's model")
        return ClippedSum(np.concatenate(parts))

    def _whole_update(self, state: State) -> ClippedSum:
        """What training moves the model by, clipped."""
        self._train_plain()
        before, after = (
            self._spec.flatten(one, who="trained model").astype(np.float64) for one in (state, self._model.state_dict())
        )
        return clipped_update(after - before, self._noise)

    def _result(self, update: bytes, *, epsilon: float | None) -> TrainingResult:
        elements = np.frombuffer(update, "<u8")
        return TrainingResult(elements=elements, examples=self.patients, epsilon=epsilon)

    def _described(self, release: Release) -> Release:
        noise = self._noise
        return replace(
            release,
            neighbouring="add or remove one" if noise.unit == "patient" else "replace a site's update by zeros",
            sites=noise.sites,
            max_dropouts=noise.dropouts,
            honest=noise.honest,
            dimensions=noise.dimensions,
            ring_bits=noise.ring_bits,
            scale=noise.scale,
            local_deviation=noise.local_deviation,
        )

    def _realised(self, survivors: int) -> dict[str, object]:
        variance = {
            adversary: opened_variance(
                adversary,
                survivors=survivors,
                colluders=self._noise.colluders,
                local_deviation=self._noise.local_deviation,
            )
            for adversary in ADVERSARIES
        }
        return {"survivors": survivors, "noise_variance": variance}


def _bytes_of(state: State) -> bytes:
    """A state as safetensors bytes: they name each tensor, hold no code, and are the same for the same state."""
    return save({name: tensor.detach().cpu().numpy() for name, tensor in state.items()})


def predict(model: nn.Module, state: State, features: torch.Tensor, *, output: int = 0) -> npt.NDArray[np.float32]:
    """Probabilities (n,) that ``model`` with ``state`` gives for ``features`` (n, ...), where its ``output`` is their
    logit; a few rows at a time."""
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        pieces = [torch.sigmoid(model(rows)[:, output]) for rows in torch.split(features, BATCH_ROWS)]
    return torch.cat(pieces).numpy()


def ledger_of(site: OpenSite, dataset: str) -> Ledger:
    """The site's ledger of releases from the data of this name, opened or created."""
    site.ledger.parent.mkdir(parents=True, exist_ok=True)
    return Ledger(
        site.ledger,
        dataset=dataset,
        unit=site.manifest.privacy.unit,
        site=site.name,
        signer=site.keys.identity,
    )


def trainer_for(site: OpenSite) -> Trainer[Any]:
    """The trainer that a site's configuration describes; ConfigurationError or DatasetError if it describes none."""
    from sites.site_data import site_data  # noqa: PLC0415  which is made of what is here

    found = site_data(site)
    return trainer_of(site, dataset=found.dataset, **found.options)


def trainer_of(
    site: OpenSite,
    model: nn.Module,
    data: Examples,
    *,
    dataset: str | None = None,
    loss: Loss = binary_loss,
    held_out: Examples | None = None,
    scored: int = 0,
    max_rows_per_patient: int = 1,
    augmentation: Augmentation | None = None,
) -> Trainer[Any]:
    """A trainer of ``model`` on a site's own ``data`` in the manifest's privacy mode, behind the site's budget; see
    ``Trainer``.  ``dataset``: what the data is called in the ledger, by default its fingerprint."""
    dataset = fingerprint(data, site.keys.identity) if dataset is None else dataset
    privacy, noise = site.manifest.privacy, site.manifest.noise_plan
    options: TrainerOptions = {
        "name": site.name,
        "model": model,
        "data": data,
        "loss": loss,
        "held_out": held_out,
        "scored": scored,
        "max_rows_per_patient": max_rows_per_patient,
        "augmentation": augmentation,
        "training": site.manifest.training,
        "privacy": privacy,
        "ledger": None if privacy.mode == "none" else ledger_of(site, dataset),
        "budget": site.budget,
        "consortium": site.manifest.consortium.name,
        "manifest_sha256": site.manifest.digest.hex(),
    }
    if noise is None:
        return LocalTrainer(**options)
    return SharedTrainer(noise=noise, spec=model_spec(site.manifest), **options)
