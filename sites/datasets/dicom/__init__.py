"""A folder of DICOM files as rows that a site trains on, with the patient as the unit from end to end.

``index_folder`` finds out what is usable, ``build_cache`` decodes it once into a memory-mapped file by an
``ImagePlan`` that all sites share, and ``ImageDataset`` gives its rows to torch, or as ``Examples`` to the trainers.

Of a header only bands and sizes are kept; patients, studies, series, files and their paths are kept as HMACs under a
secret of the site's own.  Files are read and decoded in processes of their own (``workers``), with limits: a file that
crashes or hangs its decoder costs itself, never the run.  No path, name or UID is in any message.
"""

from typing import TYPE_CHECKING, Any

from sites.datasets.dicom.cache import build_cache, load_card
from sites.datasets.dicom.index import DicomIndex, index_folder
from sites.datasets.dicom.labels import Labels, Target, load_labels
from sites.datasets.dicom.records import ImagePlan, Limits, Reason

if TYPE_CHECKING:
    from sites.datasets.dicom.training import ImageDataset, TargetLoss

__all__ = [
    "DicomIndex",
    "ImageDataset",
    "ImagePlan",
    "Labels",
    "Limits",
    "Reason",
    "Target",
    "TargetLoss",
    "build_cache",
    "index_folder",
    "load_card",
    "load_labels",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  whatever the name stands for
    # Imported on first use: torch takes seconds to load, which indexing must not wait for.
    if name in {"ImageDataset", "TargetLoss"}:
        from sites.datasets.dicom import training  # noqa: PLC0415

        return getattr(training, name)
    raise AttributeError(f"module 'sites.datasets.dicom' has no attribute {name!r}")
