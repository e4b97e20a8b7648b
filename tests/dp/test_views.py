"""Views of rows: more rows of the same patient, averaged before that patient is clipped."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dp.errors import UnsupportedEvent
from dp.events import PoissonSampledGaussian
from dp.training import Plan, clipped_gradient_sum, train_plain, train_private
from dp.views import Augmentation, Views
from secureagg.testing import CountingEntropy

CLIP = 0.5
FEATURES = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
PATIENTS = ["a", "a", "b", "c", "c", "c", "d"]


def loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Summed squared error."""
    return ((predictions.squeeze(1) - targets) ** 2).sum()


def model() -> nn.Linear:
    """A linear model, the same each time."""
    made = nn.Linear(3, 1).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        made.bias.fill_(0.25)
    return made


def summed(
    augmentation: Augmentation | None, *, patients=PATIENTS, features=FEATURES, targets=TARGETS, most=3, **options
):
    """The clipped sum over everybody."""
    return clipped_gradient_sum(
        model(),
        loss,
        features,
        targets,
        patients=patients,
        sampling_rate=1.0,
        clip_norm=CLIP,
        max_rows_per_patient=most,
        augmentation=augmentation,
        entropy=CountingEntropy(b"x"),
        **options,
    ).values


class Numbered:
    """A transform that adds 1, 2, 3, ... to successive rows, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, row: Tensor) -> Tensor:
        """One view."""
        self.given.append(row)
        return row + len(self.given)


def test_views_of_one_image_are_rows_of_its_patient() -> None:
    """The sum with views is that of a patient who really has these rows, to the last bit."""
    views = Numbered()
    found = summed(Augmentation(otherwise=Views(transform=views, count=2)))
    assert len(views.given) == 14
    rows = np.repeat(np.arange(7), 2)
    real = FEATURES[rows] + torch.arange(1, 15, dtype=torch.float64)[:, None]
    expected = summed(None, patients=[PATIENTS[row] for row in rows], features=real, targets=TARGETS[rows], most=6)
    assert np.array_equal(found, expected)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 8), rare=st.integers(1, 8), scale=st.floats(0.1, 1e3))
def test_a_patient_moves_the_sum_by_the_clip_norm_however_many_views(count: int, rare: int, scale: float) -> None:
    """However many views, of whichever class, and whatever they do to the image, one patient is worth at most the clip
    norm."""
    views = Augmentation(
        of_class={1.0: Views(transform=lambda row: row * scale, count=rare)},
        otherwise=Views(transform=lambda row: row - scale, count=count),
    )
    alone = summed(views, patients=["a"] * 7, most=7)
    assert np.linalg.norm(alone) <= CLIP


def test_views_by_class() -> None:
    """Only rows of a declared class are transformed, so often; a class that is not named stays as it is."""
    views = Numbered()
    summed(Augmentation(of_class={1.0: Views(transform=views, count=3)}))
    given = [tuple(row.tolist()) for row in views.given]
    expected = [tuple(FEATURES[row].tolist()) for row in (1, 3, 4) for _ in range(3)]
    assert given == expected


def test_identical_views_change_nothing() -> None:
    """Views that are all the same weigh no more than one."""
    same = Augmentation(otherwise=Views(transform=lambda row: row, count=4))
    assert summed(same) == pytest.approx(summed(None), abs=1e-6)


def test_a_patient_s_views_fit_into_a_batch() -> None:
    """A patient's rows times their views are one patient's, who is never split: too many are refused."""
    views = Augmentation(otherwise=Views(transform=lambda row: row, count=4))
    with pytest.raises(UnsupportedEvent, match=r"found at most 3 rows of a patient and 8 of a batch, .* with 4 views"):
        summed(views, max_batch_rows=8)


def test_views_of_another_shape() -> None:
    """A transform that cuts rows is refused, with both shapes."""
    views = Augmentation(otherwise=Views(transform=lambda row: row[:2]))
    with pytest.raises(UnsupportedEvent, match=r"a view of shape \(2,\), expected \(3,\)"):
        summed(views)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Views(transform=lambda row: row, count=0), "found 0 views"),
        (lambda: Augmentation(column=1).counts(TARGETS), "column 1 of 1 targets"),
    ],
)
def test_declarations_that_are_none(make, match: str) -> None:
    """No view, or a target that is not there, is refused."""
    with pytest.raises(UnsupportedEvent, match=match):
        make()


@pytest.mark.parametrize("private", [True, False])
def test_training_sees_views(private: bool) -> None:
    """Private and plain training train on the views."""
    seen = Numbered()
    views = Augmentation(otherwise=Views(transform=seen, count=2))
    plan = Plan(steps=2, learning_rate=1e-9, sampling_rate=1.0)
    common = {"plan": plan, "augmentation": views, "entropy": CountingEntropy(b"y")}
    if private:
        event = PoissonSampledGaussian(sampling_rate=1.0, noise_multiplier=1.0, steps=2)
        options = {"patients": PATIENTS, "event": event, "clip_norm": CLIP, "max_rows_per_patient": 3}
        train_private(model(), loss, FEATURES, TARGETS, **options, **common)
        assert len(seen.given) == 2 * 14
    else:
        train_plain(model(), loss, FEATURES, TARGETS, **common)
        assert len(seen.given) == 2 * 7
