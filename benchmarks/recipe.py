"""How well the heart recipe does: AUC on the pooled held-out patients over seeds, with and without privacy.

Each run trains with the sites' own trainer (DP-SGD under a ledger) and aggregates through whole rounds of the real
protocol in process.  Noise, sampling and rounding come from a seeded stream here, so that a run can be repeated.
"""

import tempfile
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.record import Figure, Record
from secureagg.testing import CountingEntropy, run_round
from sites.datasets.heart import Hospital, load_hospitals
from sites.evaluation import Metrics
from sites.manifest import Privacy
from sites.model_state import ModelSpec
from sites.recipe import ENCODING, EVALUATION, PRIVACY, TRAINING
from sites.reference import evaluate_heart, pool, throwaway_ledger, train_alone, train_pooled
from sites.server_optimizer import ServerOptimizer
from sites.trainer import Examples, LocalTrainer, heart_model, initial_heart_model

NAMES = {"auc": "AUC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
SPEC = ModelSpec.of_bytes(initial_heart_model(), who="heart model")


def federated(hospitals: dict[str, Hospital], privacy: Privacy, seed: int) -> tuple[Metrics, float]:
    """The metrics of the federated model of one seed, and the largest coordinate of any update."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: LocalTrainer(
                name=name,
                model=heart_model(),
                data=Examples.of_hospital(hospital),
                training=TRAINING,
                privacy=privacy,
                ledger=throwaway_ledger(hospital, Path(folder)) if privacy.mode == "local" else None,
                entropy=CountingEntropy(f"{seed}-{name}".encode()),
            )
            for name, hospital in hospitals.items()
        }
        start = SPEC.from_bytes(initial_heart_model(), who="initial model")
        server = ServerOptimizer(TRAINING.server_optimizer, TRAINING.server_learning_rate, start)
        largest = 0.0
        for number in range(1, TRAINING.rounds + 1):
            vector, updates = server.vector, {}
            for name, trainer in trainers.items():
                result = trainer.train(SPEC.restore(vector), run=str(seed), round_number=number)
                updates[name] = SPEC.flatten(result.state, who=name).astype(np.float64) - vector
            largest = max(largest, *(float(np.abs(update).max()) for update in updates.values()))
            outcome = run_round(
                updates,
                value_range=ENCODING.value_range,
                value_bits=ENCODING.value_bits,
                weights={name: trainer.patients for name, trainer in trainers.items()},
                max_weight=ENCODING.max_examples,
                entropy=CountingEntropy(f"{seed}-round-{number}".encode()),
            )
            server.step(outcome.aggregate)
    test = pool(hospitals.values())
    return evaluate_heart(SPEC.restore(server.vector), test, EVALUATION.histogram_bins), largest


def measure(*, full: bool) -> Record:
    """20 seeds of each model, or 2."""
    hospitals = load_hospitals()
    test, bins, seeds = pool(hospitals.values()), EVALUATION.histogram_bins, range(20 if full else 2)
    found: dict[str, list[Metrics]] = {}
    largest = []
    for name, privacy in {
        "federated at epsilon 0.5": msgspec.structs.replace(PRIVACY, epsilon=0.5),
        "federated at epsilon 1": PRIVACY,
        "federated at epsilon 2": msgspec.structs.replace(PRIVACY, epsilon=2.0),
        "federated without privacy": msgspec.structs.replace(PRIVACY, mode="none"),
    }.items():
        runs = [federated(hospitals, privacy, seed) for seed in seeds]
        found[name] = [metrics for metrics, _ in runs]
        largest += [value for _, value in runs]
    common = {"training": TRAINING, "privacy": PRIVACY, "bins": bins}
    found["pooled without privacy"] = [
        train_pooled(test, sites=len(hospitals), entropy=CountingEntropy(seed), **common) for seed in seeds
    ]
    for name, hospital in hospitals.items():
        found[f"{name} alone at epsilon 1"] = [
            train_alone(hospital, test=test, entropy=CountingEntropy(seed), **common) for seed in seeds
        ]
    figures = [
        Figure(NAMES[metric], [getattr(each, metric) for each in results], at={"model": name})
        for name, results in found.items()
        for metric in NAMES
    ]
    figures.append(Figure("largest update coordinate", [max(largest)]))
    title = f"The heart recipe, {len(seeds)} seeds, delta {PRIVACY.delta:g}"
    return Record("recipe", title, figures, full)
