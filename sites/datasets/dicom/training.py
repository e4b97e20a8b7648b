"""A cache's rows for torch, and the loss of several targets of which some are missing."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sites.datasets.dicom.cache import Part, load_arrays, load_card
from sites.datasets.dicom.labels import Target
from sites.errors import DatasetError
from sites.trainer import Examples


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """One part of a cache: an image (channels, rows, columns), or volume (channels, slices, rows, columns), and its
    targets (targets,), NaN where one is missing; of a single target a number ().

    ``features`` are mapped from the file, so that they need no memory but the system's own cache of files; ``patients``
    has a number for each row, the same for all rows of a person.  Raises DatasetError for a part without rows.
    """

    def __init__(self, folder: Path, part: Part = "train") -> None:
        self.card = load_card(folder)
        features, targets, patients = load_arrays(folder, self.card)
        rows = self.card.part(part)
        if rows.start == rows.stop:
            raise DatasetError(f"DICOM cache: found no row in the part {part!r}, expected some")
        self.features = torch.from_numpy(features[rows])
        values = torch.from_numpy(targets[rows])
        self.targets = values[:, 0] if values.shape[1] == 1 else values
        self.patients: Sequence[int] = patients[rows].tolist()

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.features[row], self.targets[row]

    def examples(self) -> Examples:
        """The rows as a site's trainer takes them, with the patient as the unit; without a copy."""
        return Examples(features=self.features, targets=self.targets, patients=self.patients)


class TargetLoss:
    """The summed loss of some rows over all targets that they have: a loss for the trainers.

    Predictions (rows, outputs) hold each target's outputs one after the other (``Target.outputs``).  A number has the
    squared error; two classes the logistic loss; more the cross entropy; an ordinal the logistic loss of being above
    each of its classes but the last (Frank and Hall, ECML 2001).  A missing target adds nothing, nor does a row without
    any: rows stay independent.  Raises DatasetError for other shapes.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = tuple(targets)
        self.outputs = sum(target.outputs for target in targets)

    def __call__(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """The sum, a number ()."""
        columns = targets.reshape(len(targets), -1)
        if predictions.shape != (len(targets), self.outputs) or columns.shape[1] != len(self._targets):
            raise DatasetError(
                f"loss: found predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)}, expected "
                f"(rows, {self.outputs}) and (rows, {len(self._targets)})"
            )
        total = predictions.sum() * 0.0  # has a gradient even where nothing is known
        parts = torch.split(predictions, [target.outputs for target in self._targets], dim=1)
        for target, outputs, column in zip(self._targets, parts, columns.unbind(dim=1), strict=True):
            known = torch.isfinite(column)
            total = total + _loss(target, outputs[known], column[known])
        return total


def _loss(target: Target, outputs: Tensor, values: Tensor) -> Tensor:
    functions = nn.functional
    if target.kind == "regression":
        return functions.mse_loss(outputs.squeeze(1), values, reduction="sum")
    if target.kind == "classification" and target.outputs > 1:
        return functions.cross_entropy(outputs, values.long(), reduction="sum")
    above = (values.unsqueeze(1) > torch.arange(target.outputs)).to(outputs.dtype)
    return functions.binary_cross_entropy_with_logits(outputs, above, reduction="sum")
