"""A site's own training: from the global model to a private local one, within the site's budget."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from torch import nn

from dp.accountants import noise_multiplier_for
from dp.budget import BudgetGuard, PrivacyBudget
from dp.errors import BudgetExhausted
from dp.events import PoissonSampledGaussian
from dp.ledger import Ledger, Release
from dp.training import Plan, train_plain, train_private
from secureagg.identity import Entropy
from sites.config import OpenSite
from sites.datasets.heart import HOSPITALS, Hospital, load_hospitals
from sites.errors import ConfigurationError, DatasetError
from sites.manifest import Privacy, Training
from sites.model_state import State

LEDGER: Final = "ledger.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingResult:
    """The trained ``state``, its weight, and the epsilon spent so far (None without differential privacy)."""

    state: State = field(repr=False)
    examples: int
    epsilon: float | None


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


class LocalTrainer:
    """One hospital's trainer over all rounds of a run.

    With a ``ledger`` it trains by DP-SGD: each round is booked before a patient is sampled, and refused
    (BudgetExhausted) when the budget has no room.  The noise is chosen once per run, so that the planned rounds
    spend what the budget and the ledger leave.  With ``privacy.mode == "none"`` it trains without privacy.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data: Hospital,
        training: Training,
        privacy: Privacy,
        ledger: Ledger | None = None,
        entropy: Entropy = os.urandom,
    ) -> None:
        """Raise ConfigurationError if the privacy mode is "local" and there is no ledger."""
        self._model = model
        self._data = data
        self._entropy = entropy
        self._planned_steps = training.rounds * training.local_steps
        self._clip_norm = privacy.clip_norm
        self._guard: BudgetGuard | None = None
        self.patients = len(data.train_labels)
        self.noise_multiplier: float | None = None
        self.epsilon: float | None = None
        self._plan = Plan(
            steps=training.local_steps,
            learning_rate=training.learning_rate,
            sampling_rate=min(1.0, training.batch_size / self.patients),
        )
        if privacy.mode == "local":
            if ledger is None:
                raise ConfigurationError(
                    f"trainer of {data.name}: privacy mode local, but no ledger to book releases in"
                )
            self._guard = BudgetGuard(PrivacyBudget(privacy.epsilon, privacy.delta), ledger)
            self.epsilon = self._guard.spent
            with suppress(BudgetExhausted):  # a run that continues has its noise, another is refused when it trains
                self._least_noise(self._guard)  # takes seconds once, which the first round must not wait for

    def train(self, state: State, *, run: str, round_number: int) -> TrainingResult:
        """Train from ``state`` for one round; returns the result, ``state`` stays as it is.

        Raises BudgetExhausted before anything is sampled if this round does not fit the budget.
        """
        self._model.load_state_dict(state)
        features, targets = torch.from_numpy(self._data.train_features), torch.from_numpy(self._data.train_labels)
        if self._guard is None:
            train_plain(self._model, binary_loss, features, targets, plan=self._plan, entropy=self._entropy)
        else:
            event = self._event(self._guard, run)
            self.epsilon = self._guard.authorize(Release(run=run, round_number=round_number, event=event))
            train_private(
                self._model,
                binary_loss,
                features,
                targets,
                patients=range(self.patients),
                plan=self._plan,
                event=event,
                clip_norm=self._clip_norm,
                entropy=self._entropy,
            )
        trained = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        return TrainingResult(state=trained, examples=self.patients, epsilon=self.epsilon)

    def evaluate(self, state: State) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
        """Scores in [0, 1] and 0/1 labels of the held-out patients."""
        return predict(self._model, state, self._data.test_features), self._data.test_labels.astype(np.int64)

    def _event(self, guard: BudgetGuard, run: str) -> PoissonSampledGaussian:
        """One round's release.  A run that continues after a restart keeps the noise that it began with."""
        releases = guard.ledger.releases
        begun = next((release.event.noise_multiplier for release in releases if release.run == run), None)
        self.noise_multiplier = self._least_noise(guard) if begun is None else begun
        return PoissonSampledGaussian(
            sampling_rate=self._plan.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self._plan.steps
        )

    def _least_noise(self, guard: BudgetGuard) -> float:
        """The least noise with which all planned rounds fit what is left of the budget."""
        return noise_multiplier_for(
            epsilon=guard.budget.epsilon,
            delta=guard.budget.delta,
            sampling_rate=self._plan.sampling_rate,
            steps=self._planned_steps,
            spent=guard.ledger.events,
        )


def predict(model: nn.Module, state: State, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities (n,) that ``model`` with ``state`` gives for ``features`` (n, ...)."""
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        return torch.sigmoid(model(torch.from_numpy(features)).squeeze(1)).numpy()


def trainer_for(site: OpenSite) -> LocalTrainer:
    """The trainer that a site's configuration describes; ConfigurationError or DatasetError if it describes none."""
    data = site.config.data
    if data is None:
        raise ConfigurationError(
            f"site {site.name}: no [data] in its configuration; the site program needs it, `sites.join` does not"
        )
    if data.hospital not in HOSPITALS:
        raise DatasetError(f"heart data: found hospital {data.hospital!r}, expected one of {', '.join(HOSPITALS)}")
    hospital = load_hospitals(site.folder / data.folder if data.folder else None)[data.hospital]
    privacy = site.manifest.privacy
    ledger = None
    if privacy.mode == "local":
        site.state.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(site.state / LEDGER)
    # The manifest's bounds are the budget: a site's own policy was wider, or `open_site` would have refused them.
    return LocalTrainer(
        model=heart_model(), data=hospital, training=site.manifest.training, privacy=privacy, ledger=ledger
    )
