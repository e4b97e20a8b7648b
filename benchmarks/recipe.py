"""How well the heart recipe does: AUC on the pooled held-out patients over many seeds, with and without privacy.

    python -m benchmarks recipe [--seeds 20] [--json recipe.json]

Each run trains with the sites' own trainer (DP-SGD under a ledger) and aggregates through whole rounds of the real
protocol in process.  Noise, sampling and rounding come from a seeded stream here, so that a run can be repeated.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from secureagg.testing import CountingEntropy, run_round
from sites.datasets.heart import Hospital, load_hospitals
from sites.evaluation import Metrics
from sites.manifest import Privacy
from sites.model_state import ModelSpec
from sites.recipe import ENCODING, EVALUATION, PRIVACY, TRAINING
from sites.reference import evaluate_heart, pool, throwaway_ledger, train_alone, train_pooled
from sites.server_optimizer import ServerOptimizer
from sites.trainer import Examples, LocalTrainer, heart_model, initial_heart_model

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


def summary(results: list[Metrics]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each metric."""
    columns = {name: [getattr(result, name) for result in results] for name in Metrics.__slots__}
    return {
        name: {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
        for name, values in columns.items()
    }


def main() -> None:
    """Measure and print; with ``--json`` also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data-folder", type=Path, help="UCI's original files; without it, the installed copy")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    hospitals = load_hospitals(arguments.data_folder)
    test, bins, seeds = pool(hospitals.values()), EVALUATION.histogram_bins, range(arguments.seeds)
    report: dict[str, object] = {"seeds": arguments.seeds, "delta": PRIVACY.delta}
    largest = 0.0
    for name, privacy in {
        "federated, epsilon 0.5": msgspec.structs.replace(PRIVACY, epsilon=0.5),
        "federated, epsilon 1": PRIVACY,
        "federated, epsilon 2": msgspec.structs.replace(PRIVACY, epsilon=2.0),
        "federated, no privacy": msgspec.structs.replace(PRIVACY, mode="none"),
    }.items():
        runs = [federated(hospitals, privacy, seed) for seed in seeds]
        report[name] = summary([metrics for metrics, _ in runs])
        largest = max(largest, *(value for _, value in runs))
    common = {"training": TRAINING, "privacy": PRIVACY, "bins": bins}
    report["pooled, no privacy"] = summary(
        [train_pooled(test, sites=len(hospitals), entropy=CountingEntropy(seed), **common) for seed in seeds]
    )
    for name, hospital in hospitals.items():
        runs_alone = [train_alone(hospital, test=test, entropy=CountingEntropy(seed), **common) for seed in seeds]
        report[f"{name} alone, epsilon 1"] = summary(runs_alone)
    report["largest update coordinate"] = largest
    for name, values in report.items():
        if isinstance(values, dict):
            print(f"{name:32}" + "   ".join(f"{m} {v['mean']:.3f} +- {v['sd']:.3f}" for m, v in values.items()))
        else:
            print(f"{name:32}{values}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
