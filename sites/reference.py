"""What a federation is compared with: each site alone under the same budget, and all data in one place.

Both need data that no party of a federation has together; they serve demonstrations and benchmarks only.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from dp.ledger import Ledger
from secureagg.identity import Entropy, Identity
from sites.datasets.heart import Hospital
from sites.evaluation import Metrics, evaluate_scores
from sites.manifest import Privacy, Training
from sites.model_state import ModelSpec, State
from sites.server_optimizer import ServerOptimizer
from sites.site_data import SiteData, heart_data, through
from sites.trainer import Examples, LocalTrainer, fingerprint, predict


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


def pool_sites(found: Mapping[str, SiteData]) -> SiteData:
    """All sites' rows as those of one; a patient of two sites counts as two."""
    several = list(found.items())
    owners = [(name, owner) for name, one in several for owner in one.data.owners]
    data = Examples(
        features=torch.cat([one.data.features for _, one in several]),
        targets=torch.cat([one.data.targets for _, one in several]),
        patients=owners,
    )
    return replace(several[0][1], dataset="pooled", data=data, held_out=None)


def throwaway_ledger(data: Hospital, folder: Path) -> Ledger:
    """A ledger for ``data`` in a temporary folder, under an identity that nobody keeps."""
    identity = Identity.generate()
    path = folder / f"{data.name}.sqlite"
    return Ledger(path, dataset=fingerprint(Examples.of_hospital(data), identity), site=data.name, signer=identity)


def evaluate_heart(state: State, test: Hospital, bins: int) -> Metrics:
    """The metrics of a state of the heart model on the held-out patients of ``test``."""
    return evaluate(heart_data(test), state, Examples.of_hospital(test, held_out=True), bins)


def evaluate(found: SiteData, state: State, test: Examples, bins: int) -> Metrics:
    """The metrics of a state of the site's model on the rows of ``test``."""
    scores = predict(found.model, state, through(found.front, test).features, output=found.scored)
    return evaluate_scores(scores, test.targets.numpy(), bins)


def train_alone(
    data: Hospital, *, test: Hospital, training: Training, privacy: Privacy, bins: int, entropy: Entropy = os.urandom
) -> Metrics:
    """The metrics, on the held-out patients of ``test``, of a model trained on ``data`` alone by the same recipe."""
    found, held_out = heart_data(data), Examples.of_hospital(test, held_out=True)
    return evaluate(found, state_alone(found, training=training, privacy=privacy, entropy=entropy), held_out, bins)


def state_alone(found: SiteData, *, training: Training, privacy: Privacy, entropy: Entropy = os.urandom) -> State:
    """The model of one site that trains by a recipe, the coordinator's part of it too, without anybody else."""
    model = found.model
    spec = ModelSpec.of({name: tensor.shape for name, tensor in model.state_dict().items()})
    vector = spec.flatten(model.state_dict(), who="initial model")
    server = ServerOptimizer(training.server_optimizer, training.server_learning_rate, vector)
    with tempfile.TemporaryDirectory() as folder:
        ledger = None
        if privacy.mode != "none":
            ledger = Ledger(
                Path(folder) / "alone.sqlite", dataset=found.dataset, site="alone", signer=Identity.generate()
            )
        trainer = LocalTrainer(
            name="alone", training=training, privacy=privacy, ledger=ledger, entropy=entropy, **found.options
        )
        for number in range(1, training.rounds + 1):
            result = trainer.train(spec.restore(server.vector), run="alone", round_number=number)
            trained = spec.flatten(result.state, who="trained model").astype(np.float64)
            server.step(trained - server.vector)
        trainer.close()
    model.load_state_dict(spec.restore(vector))  # as it was
    return spec.restore(server.vector)


def train_pooled(
    pooled: Hospital, *, sites: int, training: Training, privacy: Privacy, bins: int, entropy: Entropy = os.urandom
) -> Metrics:
    """The metrics of the same recipe on all data in one place, without differential privacy."""
    whole = msgspec.structs.replace(training, batch_size=training.batch_size * sites)
    plain = msgspec.structs.replace(privacy, mode="none")
    return train_alone(pooled, test=pooled, training=whole, privacy=plain, bins=bins, entropy=entropy)
