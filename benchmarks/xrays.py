"""Chest X-rays as seven hospitals, which differ in size and in the share of pneumonia.

PneumoniaMNIST of MedMNIST v2 (CC BY 4.0; Kermany et al., Cell 2018; Yang et al., Scientific Data 2023): 28 x 28 pixels,
3,882 images to train on and 624 to test on.  The file names no patients, so that each image counts as one here; in a
hospital it must not.  Nine tenths of the training images show pneumonia, so that a model does well by calling all ill;
the loss counts each of these a ninth, a constant that is declared as the network is.  The file is
``pneumoniamnist.npz`` in the folder that SECAGG_SHARED_DATA names, by default ``../shared/data`` beside this
repository.
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
PNEUMONIA_WEIGHT = 1 / 9
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


def weighted_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed logistic loss of logits (n, 1) against 0/1 targets (n,), where pneumonia counts ``PNEUMONIA_WEIGHT``."""
    weights = 1 - (1 - PNEUMONIA_WEIGHT) * targets
    return nn.functional.binary_cross_entropy_with_logits(
        predictions.squeeze(1), targets, weight=weights, reduction="sum"
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


def load(file: Path | None = None, *, seed: int = 2026) -> Task:
    """The seven hospitals."""
    with np.load(data_file() if file is None else file) as arrays:
        images = {part: arrays[f"{part}_images"] for part in ("train", "test")}
        labels = {part: arrays[f"{part}_labels"].reshape(-1).astype(np.int64) for part in ("train", "test")}
    parts = {}
    for part in ("train", "test"):
        parts[part] = {}
        for number, chosen in enumerate(split(labels[part], seed), 1):
            pixels = images[part][chosen].astype(np.float32) / 127.5 - 1.0
            parts[part][f"hospital-{number}"] = Examples(
                features=torch.from_numpy(pixels[:, None]),
                targets=torch.from_numpy(labels[part][chosen].astype(np.float32)),
            )
    return Task(
        sites=parts["train"],
        held_out=parts["test"],
        model=network,
        delta=DELTA,
        local_steps=5,
        loss=weighted_loss,
    )
