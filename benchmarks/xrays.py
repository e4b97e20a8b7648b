"""Chest X-rays as seven hospitals, which differ in size and in the share of pneumonia.

PneumoniaMNIST of MedMNIST v2 (CC BY 4.0; Kermany et al., Cell 2018; Yang et al., Scientific Data 2023): 28 x 28 pixels,
3,882 images to train on and 624 to test on.  The file names no patients, so that each image counts as one here; in a
hospital it must not.  The file is ``pneumoniamnist.npz`` in the folder that SECAGG_SHARED_DATA names, by default
``../shared/data`` beside this repository.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.federations import Task
from sites.trainer import Examples

SITES = 7
ROOT = Path(__file__).resolve().parents[1]
# Of all images with pneumonia and of all without, in hundredths: sizes from 3 % to 30 %, pneumonia in 57 to 98 %.
PNEUMONIA = (30, 24, 18, 12, 8, 5, 3)
NORMAL = (14, 27, 8, 29, 2, 17, 3)
DELTA = 1e-5


def data_file() -> Path:
    """Where the X-rays are, or should be."""
    return ROOT / os.environ.get("SECAGG_SHARED_DATA", "../shared/data") / "pneumoniamnist.npz"


def network(seed: int) -> nn.Module:
    """2,945 parameters: two convolutions with GroupNorm and a linear layer, initialised from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(144, 1),
        )


def split(labels: npt.NDArray[np.int64], seed: int) -> list[npt.NDArray[np.int64]]:
    """The images of each hospital: of each class, shuffled, the hospital's hundredths."""
    generator = np.random.default_rng(seed)
    parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(SITES)]
    for label, hundredths in ((0, NORMAL), (1, PNEUMONIA)):
        images = generator.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(hundredths) / 100 * len(images)).astype(int)[:-1]
        for part, chosen in zip(parts, np.split(images, ends), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def load(file: Path | None = None, *, validation: bool = False, share: float = 0.2, seed: int = 2026) -> Task:
    """The seven hospitals; with ``validation`` their held-out images are that ``share`` of their training images, which
    are then not trained on."""
    with np.load(data_file() if file is None else file) as arrays:
        images = {part: arrays[f"{part}_images"] for part in ("train", "test")}
        labels = {part: arrays[f"{part}_labels"].reshape(-1).astype(np.int64) for part in ("train", "test")}
    pieces = {part: split(labels[part], seed) for part in ("train", "test")}

    def examples(part: str, chosen: npt.NDArray[np.int64]) -> Examples:
        pixels = images[part][chosen].astype(np.float32) / 127.5 - 1.0
        return Examples(
            features=torch.from_numpy(pixels[:, None]),
            targets=torch.from_numpy(labels[part][chosen].astype(np.float32)),
        )

    sites, held_out = {}, {}
    generator = np.random.default_rng(seed)
    for number in range(SITES):
        name, own = f"hospital-{number + 1}", pieces["train"][number]
        if validation:
            shuffled = generator.permutation(own)
            cut = round(share * len(own))
            held_out[name] = examples("train", np.sort(shuffled[:cut]))
            own = np.sort(shuffled[cut:])
        else:
            held_out[name] = examples("test", pieces["test"][number])
        sites[name] = examples("train", own)
    return Task(sites=sites, held_out=held_out, model=network, delta=DELTA, local_steps=5)
