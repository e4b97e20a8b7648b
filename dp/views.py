"""Several random views of one row (an image shifted, turned, noised) as more rows of the same patient.

A patient's gradient is the mean over all views of the patient's rows, and is clipped after that mean is taken.  So
views cost no privacy, however many there are, and they make the mean steadier (De, Berrada, Hayes, Smith, Balle 2022,
"augmentation multiplicity").  A rare class may have more views, or wilder ones, than a common one; it does not weigh
more by that, since the mean is over the patient's own views.  What must not be is a view that depends on another
patient: a transform is given one row, and must keep nothing of the rows before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp.errors import UnsupportedEvent

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """``count`` views of a row in each step, each made by ``transform``: one row's features to as many of the same
    shape, with randomness of its own, as torchvision's v2 transforms do."""

    transform: Transform
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UnsupportedEvent(f"augmentation: found {self.count} views of a row, expected 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Which views rows have by their class, the number in ``column`` of their targets; ``otherwise``: those of all
    other rows, which are used once and as they are without it."""

    of_class: Mapping[float, Views] = field(default_factory=dict)
    otherwise: Views | None = None
    column: int = 0

    def counts(self, targets: Tensor) -> npt.NDArray[np.int64]:
        """How many views each row has (rows,)."""
        return np.array([1 if views is None else views.count for views in self._of_rows(targets)], np.int64)

    def view(self, features: Tensor, targets: Tensor) -> Tensor:
        """One view of each row; UnsupportedEvent for a transform that gives another shape."""
        seen = []
        for row, views in zip(features, self._of_rows(targets), strict=True):
            one = row if views is None else views.transform(row)
            if one.shape != row.shape:
                raise UnsupportedEvent(
                    f"augmentation: found a view of shape {tuple(one.shape)}, expected {tuple(row.shape)} like its row"
                )
            seen.append(one)
        return torch.stack(seen) if seen else features

    def _of_rows(self, targets: Tensor) -> list[Views | None]:
        columns = targets.reshape(len(targets), -1)
        if not -columns.shape[1] <= self.column < columns.shape[1]:
            raise UnsupportedEvent(
                f"augmentation: found column {self.column} of {columns.shape[1]} targets, expected one of them"
            )
        return [self.of_class.get(value, self.otherwise) for value in columns[:, self.column].tolist()]
