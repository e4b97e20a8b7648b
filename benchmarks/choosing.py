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

from benchmarks.federations import Configuration, Task
from benchmarks.images import Images
from benchmarks.selection import Splits, judged, train

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
    "xray": {"steps": [60, 120], "learning_rate": [0.25, 0.5, 1.0], "clip_norm": [2.0, 4.0], "share": [1 / 15]},
}
# Nothing is clipped without privacy: as many configurations by more learning rates.
PLAIN = {
    "heart": [0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0],
    "xray": [0.1, 0.25, 0.5, 1.0, 2.0, 4.0],
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


def write(data: str, task: Task, epsilons: list[float | None]) -> None:
    """Choose for every column of ``data``, and write what was chosen into ``choices.json`` as it is found."""
    rows = Splits.of(task, splits=8, draws=4) if data == "heart" else Images.of(task, splits=2, draws=1)
    for column in dict.fromkeys(CHOSEN_BY.values()):
        for epsilon in epsilons:
            if column == "unshared" and epsilon is None:  # nothing to share
                continue

            def measure(each: Configuration, column=column, epsilon=epsilon) -> tuple[float, float]:
                return judged(rows, train(column, task, rows, each, epsilon, seed=7))

            found = choose(data, column, epsilon, measure)
            everything = json.loads(FILE.read_text()) if FILE.exists() else {}
            everything.setdefault(data, {}).setdefault(column, {})[name_of(epsilon)] = found
            FILE.write_text(json.dumps(everything, indent=1) + "\n")
