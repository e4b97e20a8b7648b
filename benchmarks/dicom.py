"""How fast a folder of DICOM files is indexed and decoded, and whether a cache trains as fast as a tensor in memory.

    python -m benchmarks dicom [--files 10000] [--repeats 5] [--workers 2] [--json dicom.json]

The files are X-rays of 64 x 64 pixels with some 60 attributes, four to a patient.  "Cold": no index, and the system is
asked to forget the files; "warm": the second run, which reads none.  Training is a small convolutional network on one
thread over 40 batches of 64 rows, from the memory-mapped cache and from a tensor in memory, by turns; a whole epoch
without a network shows the loading alone.  Figures are medians of wall-clock time.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from sites.datasets.dicom import ImageDataset, ImagePlan, build_cache, index_folder
from sites.datasets.dicom.workers import Workers

ROOT = "1.2.826.0.1.3680043.8.498."
SIZE = 64
PER_PATIENT = 4
BATCH, BATCHES = 64, 40


def make_files(folder: Path, count: int) -> None:
    """Write ``count`` X-rays of noise, 100 to a folder."""
    generator = np.random.default_rng(2026)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Modality, dataset.ImageType = "DX", ["DERIVED", "PRIMARY"]
    dataset.StudyDate, dataset.PatientBirthDate, dataset.PatientSex = "20200101", "19600101", "F"
    dataset.Manufacturer, dataset.KVP, dataset.PixelSpacing = "Siemens", "70", [0.14, 0.14]
    dataset.Rows = dataset.Columns = SIZE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    for number in range(40):  # what a real header holds besides
        dataset.add_new((0x0019, 0x1000 + number), "LO", f"a private attribute, number {number}")
    for number in range(count):
        dataset.PatientID = f"P{number // PER_PATIENT}"
        dataset.StudyInstanceUID = f"{ROOT}1.{number // PER_PATIENT}"
        dataset.SeriesInstanceUID = f"{ROOT}2.{number}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}3.{number}"
        dataset.add_new("PixelData", "OW", generator.integers(0, 4096, SIZE * SIZE, np.uint16).tobytes())
        place = folder / f"{number // 100}" / f"{number}.dcm"
        place.parent.mkdir(parents=True, exist_ok=True)
        dcmwrite(place, dataset, enforce_file_format=True)


def forget(folder: Path) -> None:
    """Ask the system to drop the files from memory."""
    os.sync()
    for path in folder.rglob("*.dcm"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(1),
    )


Rows = TorchDataset[tuple[torch.Tensor, torch.Tensor]]


def load(data: Rows) -> int:
    """Load an epoch in a random order; how many rows that were."""
    return sum(len(features) for features, _ in DataLoader(data, batch_size=BATCH, shuffle=True))


def train(data: Rows, model: nn.Module) -> int:
    """Train on some batches; how many rows that were."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = 0
    for features, _ in islice(DataLoader(data, batch_size=BATCH, shuffle=True), BATCHES):
        optimizer.zero_grad()
        model(features).square().mean().backward()
        optimizer.step()
        rows += len(features)
    return rows


def measure(count: int, repeats: int, processes: int) -> dict[str, float]:
    """The figures by name."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in ("cold", "warm", "decode")}
    plan = ImagePlan(shape=(SIZE, SIZE), held_out=0.0)
    with tempfile.TemporaryDirectory() as scratch:
        images, state, cache = (Path(scratch) / name for name in ("images", "state", "cache"))
        make_files(images, count)
        for _ in range(repeats):
            shutil.rmtree(state, ignore_errors=True)
            shutil.rmtree(cache, ignore_errors=True)
            for name in ("cold", "warm"):
                if name == "cold":
                    forget(images)
                with Workers(processes) as pool:
                    seconds[name].append(timed(lambda pool=pool: index_folder(images, state, workers=pool)))
            with Workers(processes) as pool:
                index = index_folder(images, state, workers=pool)
                seconds["decode"].append(
                    timed(lambda index=index, pool=pool: build_cache(index, plan, cache, workers=pool))
                )
        mapped = ImageDataset(cache)
        memory = TensorDataset(mapped.features.clone(), mapped.targets.clone())
        model = network()
        train(memory, model)
        rates = {name: count / statistics.median(found) for name, found in seconds.items()}
        for kind, work in (("training", partial(train, model=model)), ("loading", load)):
            by_turn: dict[str, list[float]] = {"cache": [], "memory": []}
            for turn in range(2 * repeats):
                order = (("cache", mapped), ("memory", memory))
                for name, data in order if turn % 2 else reversed(order):
                    start = time.perf_counter()
                    rows = work(data)
                    by_turn[name].append(rows / (time.perf_counter() - start))
            rates |= {f"{kind} from {name}": statistics.median(found) for name, found in by_turn.items()}
            ratios = (cache / memory for cache, memory in zip(by_turn["cache"], by_turn["memory"], strict=True))
            rates[f"{kind}: cache / memory"] = statistics.median(ratios)
    return rates


def main() -> None:
    """Measure and print; with ``--json`` also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    rates = measure(arguments.files, arguments.repeats, arguments.workers)
    for name, rate in rates.items():
        print(f"{name:28}{rate:12.2f}" if "/" in name else f"{name:28}{rate:12,.0f} files or rows a second")
    if arguments.json:
        arguments.json.write_text(json.dumps({"files": arguments.files, **rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
