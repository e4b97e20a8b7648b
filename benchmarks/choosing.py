"""Which hyper-parameters the quality of models is measured with: the best of a grid, on validation rows only.

Each column and epsilon has the same number of configurations tried, and the one with the highest mean of AUC and
balanced accuracy, on validation rows of all sites, is taken.  Held-out rows are not looked at.  ``choices.json`` has
what was taken; ``python -m benchmarks utility --choose`` takes it anew.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks import xrays
from benchmarks.federations import Configuration, Task, alone, central, own_noise, plan_of
from benchmarks.selection import Splits, judged, train
from sites.model_state import State

FILE = Path(__file__).parent / "choices.json"
CHOSEN_BY = {  # the columns that have a configuration of their own; the others take theirs from one of these
    "local only": "local only",
    "FedAvg": "local",
    "local": "local",
    "shared": "shared",
    "shared, no dropouts": "shared",
    "unshared": "unshared",
    "pooled": "shared",
    "central": "shared",
}
GRIDS: dict[str, dict[str, list[float]]] = {
    "heart": {
        "steps": [4, 10, 20, 40],
        "learning_rate": [0.1, 0.3, 1.0, 3.0],
        "clip_norm": [0.25, 0.5, 1.0, 2.0],
        "share": [0.25, 0.5, 1.0],
    },
    "xray": {"steps": [30, 60], "learning_rate": [1.0, 2.0, 4.0], "clip_norm": [1.0, 4.0], "share": [1 / 15]},
}
# Nothing is clipped without privacy: as many configurations by more learning rates.
PLAIN = {
    "heart": [0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0],
    "xray": [0.03, 0.1, 0.2, 0.4, 0.7, 1.0],
}


def configurations(data: str, *, private: bool) -> Iterator[Configuration]:
    """The grid."""
    grid = GRIDS[data] if private else {**GRIDS[data], "learning_rate": PLAIN[data], "clip_norm": [0.0]}
    for steps, learning_rate, clip_norm, share in itertools.product(*grid.values()):
        yield Configuration(steps=int(steps), learning_rate=learning_rate, clip_norm=clip_norm, share=share)


def read(data: str, column: str, epsilon: float | None) -> Configuration:
    """What ``choices.json`` has for a column."""
    found = json.loads(FILE.read_text())[data][CHOSEN_BY[column]][name_of(epsilon)]
    return Configuration(**found["configuration"])


def name_of(epsilon: float | None) -> str:
    """Of an epsilon, as key and in tables."""
    return "none" if epsilon is None else f"{epsilon:g}"


def choose(data: str, column: str, epsilon: float | None, measure: Callable[[Configuration], tuple[float, float]]):
    """The best of the grid, as a row of ``choices.json``."""
    tried = {each: measure(each) for each in configurations(data, private=epsilon is not None)}
    best = max(tried, key=lambda each: sum(tried[each]))
    auc, balanced = tried[best]
    print(f"{data}, {column}, epsilon {name_of(epsilon)}: {best}, AUC {auc:.4f}, balanced {balanced:.4f}", flush=True)
    return {
        "configuration": asdict(best),
        "tried": len(tried),
        "validation": {"auc": round(auc, 4), "balanced accuracy": round(balanced, 4)},
    }


def write(data: str, task: Task, epsilons: list[float | None], *, splits: int = 8, draws: int = 4) -> None:
    """Choose for every column of ``data``, and write what was chosen into ``choices.json`` as it is found."""
    if data == "heart":
        rows = Splits.of(task, splits=splits, draws=draws)

        def measure(column: str, chosen: Configuration, epsilon: float | None) -> tuple[float, float]:
            return judged(rows, train(column, task, rows, chosen, epsilon, seed=7))
    else:
        validation = xrays.load(validation=True)

        def measure(column: str, chosen: Configuration, epsilon: float | None) -> tuple[float, float]:
            return measured(column, validation, chosen, epsilon)

    for column in dict.fromkeys(CHOSEN_BY.values()):
        for epsilon in epsilons:
            if column == "unshared" and epsilon is None:  # nothing to share
                continue
            found = choose(data, column, epsilon, lambda c, column=column, eps=epsilon: measure(column, c, eps))
            everything = json.loads(FILE.read_text()) if FILE.exists() else {}
            everything.setdefault(data, {}).setdefault(column, {})[name_of(epsilon)] = found
            FILE.write_text(json.dumps(everything, indent=1) + "\n")


def measured(column: str, task: Task, chosen: Configuration, epsilon: float | None) -> tuple[float, float]:
    """AUC and balanced accuracy of one run on the held-out rows of ``task``, which are validation rows.

    Where the gradients of all sites are summed, the rows of all sites are sampled, clipped and noised in one place
    here, with the variance that the sum has: the same law, but for the rounding of the noise, in a tenth of the time.
    """
    states: dict[str, State]
    if column == "local only":
        states = alone(task, chosen, epsilon=epsilon, seed=0)
    elif column == "local":
        states = dict.fromkeys(task.sites, own_noise(task, chosen, epsilon=epsilon, seed=0))
    else:
        noise = None
        if epsilon is not None:
            dropouts = 1 if column == "shared" else len(task.sites) - 2
            noise = plan_of(task, chosen, epsilon=epsilon, dropouts=dropouts).error_of_sum / chosen.clip_norm
        states = dict.fromkeys(task.sites, central(task, chosen, epsilon=None, seed=0, noise_multiplier=noise))
    scores = np.concatenate([task.scores(task.model(0), states[name])[name] for name in task.sites])
    labels = np.concatenate([task.held_out[name].targets.numpy() for name in task.sites])
    return float(roc_auc_score(labels, scores)), float(balanced_accuracy_score(labels, scores >= 0.5))
