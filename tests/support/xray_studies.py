"""A few X-rays in the form of MedMNIST's file, and hospitals' DICOM studies made of them."""

from pathlib import Path

import numpy as np

from sites.datasets.dicom import ImagePlan
from sites.manifest import ClassViews, Images
from sites.xray_studies import FINDING, HOSPITALS, load_xrays, write_hospitals

PLAN = ImagePlan(shape=(28, 28), modalities=("CR",), images_per_patient=3, held_out=0.25)
IMAGES = Images(model="filter-bank", plan=PLAN, targets=[FINDING])
VIEWS = [ClassViews(of="no", views=2, shift=1)]


def write_npz(path: Path, *, rows: int = 400, seed: int = 1) -> Path:
    """Images of which those with pneumonia are brighter below, half of them, in the file's form."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for part, count in (("train", rows), ("val", 20), ("test", 60)):
        labels = np.arange(count) % 2
        images = generator.integers(0, 120, (count, 28, 28))
        images[:, 14:] += (100 * labels)[:, None, None]
        arrays[f"{part}_images"] = images.astype(np.uint8)
        arrays[f"{part}_labels"] = labels.astype(np.uint8)[:, None]
    np.savez(path, **arrays)
    return path


def write_some(folder: Path, *names: str, rows: int = 400) -> Path:
    """The studies of the hospitals of these names, all by default, below ``folder``."""
    parts = load_xrays(write_npz(folder / "xrays.npz", rows=rows))
    write_hospitals(parts, folder, names=names or HOSPITALS)
    return folder
