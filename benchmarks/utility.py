"""How good the models are, with and without differential privacy, on real data over many seeds.

    python -m benchmarks utility [--quick | --full] [--data heart|xray|all] [--seeds N] [--other-seeds N]
                                 [--json FILE] [--plots FOLDER]
    python -m benchmarks utility --choose --data heart|xray|all

``heart``: the four hospitals' heart data; ``xray``: chest X-rays as seven hospitals (``benchmarks.xrays``).  Columns:

- local only: each hospital trains alone, by DP-SGD of its own;
- FedAvg: all together without privacy;
- local: all together, each with its own noise (``privacy.mode = "local"``);
- shared: all together with noise that is theirs together, planned for one dropout and one colluder
  (``privacy.mode = "shared"``), and the same planned for no dropout;
- unshared: the same steps, where each hospital's noise is enough for it alone;
- pooled, central: all patients in one place, without privacy and with central DP-SGD.

Training is that of the sites' own parts (``benchmarks.federations``), by the hyper-parameters in ``choices.json``,
which ``--choose`` takes anew on validation patients (``benchmarks.choosing``).  ``--quick``: two seeds at epsilon 1.
``--seeds`` is how many the two columns have that are claimed to match, central and shared for no dropout.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks import choosing, xrays
from benchmarks.choosing import CHOSEN_BY, name_of
from benchmarks.federations import Configuration, Task, alone, central, own_noise, plan_of, shared_gradients
from benchmarks.record import commit
from sites.datasets.heart import load_hospitals
from sites.model_state import State
from sites.plots import comparison_plot
from sites.trainer import Examples, heart_model, predict

COLUMNS = tuple(CHOSEN_BY)
PLAIN_ONLY = ("FedAvg", "pooled")
EPSILONS: dict[str, list[float | None]] = {"heart": [0.1, 0.25, 0.5, 1.0, 2.0, None], "xray": [1.0, 2.0, 8.0, None]}
SEEDS = 20
OTHER_SEEDS = {"heart": 20, "xray": 5}
CLAIMED = ("shared, no dropouts", "central")  # to match: these are worth most seeds
METRICS = ("accuracy", "balanced accuracy", "AUC")
HEART_DELTA = 1e-3


def heart() -> Task:
    """The four heart hospitals."""
    hospitals = load_hospitals()
    return Task(
        sites={name: Examples.of_hospital(hospital) for name, hospital in hospitals.items()},
        held_out={name: Examples.of_hospital(hospital, held_out=True) for name, hospital in hospitals.items()},
        model=lambda _: heart_model(),
        delta=HEART_DELTA,
        local_steps=2,
    )


def columns_at(epsilon: float | None) -> list[str]:
    """Those that are run at ``epsilon``: without it what differs only by its noise is the same."""
    if epsilon is None:
        return [column for column in COLUMNS if column not in ("local", "shared, no dropouts", "unshared", "central")]
    return [column for column in COLUMNS if column not in PLAIN_ONLY]


def trained(column: str, task: Task, chosen: Configuration, epsilon: float | None, seed: int) -> dict[str, State]:
    """Each site's model after one run of ``column``."""
    if column == "local only":
        return alone(task, chosen, epsilon=epsilon, seed=seed)
    if column in ("FedAvg", "local"):
        state = own_noise(task, chosen, epsilon=epsilon, seed=seed)
    elif column in ("pooled", "central"):
        state = central(task, chosen, epsilon=epsilon, seed=seed)
    else:
        # With all but two missing, one part of the noise is what nobody knows: enough for a site by itself.
        dropouts = {"shared": 1, "shared, no dropouts": 0, "unshared": len(task.sites) - 2}[column]
        plan = None if epsilon is None else plan_of(task, chosen, epsilon=epsilon, dropouts=dropouts)
        state = shared_gradients(task, chosen, plan=plan, seed=seed, entropy_of=column)
    return dict.fromkeys(task.sites, state)


def judge(task: Task, states: Mapping[str, State]) -> dict[str, float]:
    """Accuracy: the mean over hospitals of each one's model on its own held-out rows.  Balanced accuracy and AUC: of
    each hospital's model on all hospitals' held-out rows together, the mean over hospitals, which is one number where
    they have one model.  "own ...": of all those rows together, each scored by its own hospital's model."""
    model = task.model(0)
    labels = {name: data.targets.numpy() for name, data in task.held_out.items()}
    every = np.concatenate(list(labels.values()))
    features = torch.cat([data.features for data in task.held_out.values()])
    own = {name: predict(model, states[name], data.features) for name, data in task.held_out.items()}
    distinct = list({id(state): state for state in states.values()}.values())
    pooled = [predict(model, state, features) for state in distinct]
    together = np.concatenate(list(own.values()))
    return {
        "accuracy": statistics.fmean(float(((own[name] >= 0.5) == labels[name]).mean()) for name in own),
        "balanced accuracy": statistics.fmean(balanced_accuracy_score(every, one >= 0.5) for one in pooled),
        "AUC": statistics.fmean(roc_auc_score(every, one) for one in pooled),
        "own balanced accuracy": float(balanced_accuracy_score(every, together >= 0.5)),
        "own AUC": float(roc_auc_score(every, together)),
    }


def measure(
    data: str, task: Task, *, seeds: int, other_seeds: int, epsilons: Sequence[float | None], json_file: Path | None
) -> dict:
    """The columns of ``CLAIMED`` over ``seeds``, all others over ``other_seeds``; written to ``json_file`` after each
    seed."""
    report: dict = {
        "data": data,
        "commit": commit(),
        "delta": task.delta,
        "seeds": 0,
        "other_seeds": 0,
        "local_steps": task.local_steps,
        "cells": [
            {
                "column": column,
                "epsilon": epsilon,
                "configuration": asdict(choosing.read(data, column, epsilon)),
                "values": {},
            }
            for epsilon in epsilons
            for column in columns_at(epsilon)
        ],
    }
    began = time.monotonic()
    for seed in range(seeds):
        for cell in report["cells"]:
            if seed >= other_seeds and cell["column"] not in CLAIMED:
                continue
            chosen = Configuration(**cell["configuration"])
            for name, value in judge(task, trained(cell["column"], task, chosen, cell["epsilon"], seed)).items():
                cell["values"].setdefault(name, []).append(round(value, 6))
        report |= {"seeds": seed + 1, "other_seeds": min(seed + 1, other_seeds)}
        report["seconds"] = round(time.monotonic() - began)
        for cell in report["cells"]:
            cell["summary"] = {name: summary(values) for name, values in cell["values"].items()}
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation over seeds, and standard error of the mean."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "se": deviation / len(values) ** 0.5}


def differences(report: dict, one: str, other: str, metric: str) -> list[tuple[str, float, float, float]]:
    """For each epsilon: by how much column ``one`` is above ``other``, the standard error of the difference, and their
    quotient."""
    cells = {(cell["column"], cell["epsilon"]): cell["summary"][metric] for cell in report["cells"]}
    found = []
    for epsilon in dict.fromkeys(cell["epsilon"] for cell in report["cells"]):
        if (one, epsilon) in cells and (other, epsilon) in cells:
            a, b = cells[one, epsilon], cells[other, epsilon]
            above, error = a["mean"] - b["mean"], (a["se"] ** 2 + b["se"] ** 2) ** 0.5
            found.append((name_of(epsilon), above, error, above / error if error else 0.0))
    return found


PAIRS = (
    ("shared", "central"),
    ("shared, no dropouts", "central"),
    ("shared", "local"),
    ("shared, no dropouts", "local"),
    ("shared", "unshared"),
)


def text_of(found: Mapping[str, float]) -> str:
    """A cell of a table."""
    return f"{found['mean']:.3f} ± {found['sd']:.3f} ({found['se']:.3f})"


def show(report: dict) -> None:
    """Tables for a terminal, which are markdown."""
    console = Console(width=230)
    cells = {(cell["column"], cell["epsilon"]): cell["summary"] for cell in report["cells"]}
    epsilons = list(dict.fromkeys(cell["epsilon"] for cell in report["cells"]))
    for metric in (*METRICS, "own AUC"):
        columns = COLUMNS if metric != "own AUC" else ("local only",)
        seeds = f"{report['seeds']} seeds ({report['other_seeds']} of other columns than {' and '.join(CLAIMED)})"
        table = Table(title=f"{report['data']}: {metric}, {seeds}: mean ± sd (se)", title_justify="left")
        table.add_column("epsilon")
        for column in columns:
            table.add_column(column, justify="right")
        for epsilon in epsilons:
            row = [cells.get((column, epsilon)) for column in columns]
            texts = ["" if one is None else text_of(one[metric]) for one in row]
            table.add_row(name_of(epsilon), *texts)
        console.print(table)
    for one, other in PAIRS:
        for metric in METRICS:
            rows = differences(report, one, other, metric)
            texts = [f"{name}: {above:+.4f} ({quotient:+.1f} se)" for name, above, _, quotient in rows]
            print(f"{one} - {other}, {metric}: " + ", ".join(texts))


def plot(report: dict, metric: str) -> str:
    """SVG of ``metric`` by epsilon."""
    private = [epsilon for epsilon in EPSILONS[report["data"]] if epsilon is not None]
    series, levels = {}, {}
    for cell in report["cells"]:
        found = cell["summary"][metric]
        if cell["epsilon"] is not None:
            place = private.index(cell["epsilon"])
            series.setdefault(cell["column"], []).append((place, found["mean"], found["se"]))
        elif cell["column"] in PLAIN_ONLY:
            levels[cell["column"]] = found["mean"]
    return comparison_plot(
        series,
        levels=levels,
        places=[name_of(epsilon) for epsilon in private],
        across="epsilon",
        up=metric,
        title=f"{report['data']}: {metric} by epsilon; bars are standard errors",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two seeds at epsilon 1, in seconds for the heart data")
    size.add_argument("--full", action="store_true", help="all epsilons; the default")
    size.add_argument("--choose", action="store_true", help="choose the hyper-parameters anew, on validation patients")
    parser.add_argument("--data", choices=("heart", "xray", "all"), default="heart")
    parser.add_argument("--seeds", type=int, help="by default 20")
    parser.add_argument("--other-seeds", type=int, help="by default 20 for heart, 5 for xray; never more than --seeds")
    parser.add_argument("--json", type=Path, help="with --data all, -heart and -xray are put before the suffix")
    parser.add_argument("--plots", type=Path)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for data in ("heart", "xray") if asked.data == "all" else (asked.data,):
        if data == "xray" and not xrays.data_file().exists():
            parser.error(f"{xrays.data_file()} does not exist; name the folder of the data in SECAGG_SHARED_DATA")
        task = heart() if data == "heart" else xrays.load()
        if asked.choose:
            choosing.write(data, task, EPSILONS[data])
            continue
        file = asked.json
        if file is not None and asked.data == "all":
            file = file.with_name(f"{file.stem}-{data}{file.suffix}")
        usual, others = (2, 2) if asked.quick else (SEEDS, OTHER_SEEDS[data])
        seeds = usual if asked.seeds is None else asked.seeds
        others = min(seeds, others if asked.other_seeds is None else asked.other_seeds)
        epsilons = [1.0, None] if asked.quick else EPSILONS[data]
        report = measure(data, task, seeds=seeds, other_seeds=others, epsilons=epsilons, json_file=file)
        show(report)
        if asked.plots is not None:
            asked.plots.mkdir(parents=True, exist_ok=True)
            for metric in METRICS:
                name = f"utility-{data}-{metric.lower().replace(' ', '-')}.svg"
                (asked.plots / name).write_text(plot(report, metric), encoding="utf-8")


if __name__ == "__main__":
    main()
