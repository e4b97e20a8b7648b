"""What a federation is compared with: each hospital alone under the same budget, and all data in one place.

Both need data that no party of a federation has together; they serve demonstrations and benchmarks only.
"""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from dp.ledger import Ledger
from secureagg.identity import Entropy, Identity
from sites.datasets.heart import Hospital
from sites.evaluation import Metrics, evaluate_scores
from sites.manifest import Privacy, Training
from sites.model_state import State
from sites.trainer import Examples, LocalTrainer, fingerprint, heart_model, predict


def pool(hospitals: Iterable[Hospital]) -> Hospital:
    """All hospitals' patients as those of one."""
    several = list(hospitals)
    return Hospital(
        name="pooled",
        train_features=np.concatenate([hospital.train_features for hospital in several]),
        train_labels=np.concatenate([hospital.train_labels for hospital in several]),
        test_features=np.concatenate([hospital.test_features for hospital in several]),
        test_labels=np.concatenate([hospital.test_labels for hospital in several]),
    )


def throwaway_ledger(data: Hospital, folder: Path) -> Ledger:
    """A ledger for ``data`` in a temporary folder, under an identity that nobody keeps."""
    identity = Identity.generate()
    path = folder / f"{data.name}.sqlite"
    return Ledger(path, dataset=fingerprint(Examples.of_hospital(data), identity), site=data.name, signer=identity)


def evaluate_heart(state: State, test: Hospital, bins: int) -> Metrics:
    """The metrics of a state of the heart model on the held-out patients of ``test``."""
    scores = predict(heart_model(), state, Examples.of_hospital(test, held_out=True).features)
    return evaluate_scores(scores, test.test_labels, bins)


def train_alone(
    data: Hospital, *, test: Hospital, training: Training, privacy: Privacy, bins: int, entropy: Entropy = os.urandom
) -> Metrics:
    """The metrics, on the held-out patients of ``test``, of a model trained on ``data`` alone by the same recipe."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = throwaway_ledger(data, Path(folder)) if privacy.mode == "local" else None
        trainer = LocalTrainer(
            name=data.name,
            model=heart_model(),
            data=Examples.of_hospital(data),
            training=training,
            privacy=privacy,
            ledger=ledger,
            entropy=entropy,
        )
        state = heart_model().state_dict()
        for number in range(1, training.rounds + 1):
            state = trainer.train(state, run="alone", round_number=number).state
    return evaluate_heart(state, test, bins)


def train_pooled(
    pooled: Hospital, *, sites: int, training: Training, privacy: Privacy, bins: int, entropy: Entropy = os.urandom
) -> Metrics:
    """The metrics of the same recipe on all data in one place, without differential privacy."""
    whole = msgspec.structs.replace(training, batch_size=training.batch_size * sites)
    plain = msgspec.structs.replace(privacy, mode="none")
    return train_alone(pooled, test=pooled, training=whole, privacy=plain, bins=bins, entropy=entropy)
