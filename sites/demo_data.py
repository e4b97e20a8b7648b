"""What `secureagg demo` can train on: four hospitals' heart data, or X-rays as the DICOM studies of seven hospitals.

The recipes for X-rays are also what `python -m benchmarks xray` measures; docs/dicom.md says how they were chosen.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from sites.config import DicomData, HeartData, OwnData
from sites.datasets.dicom import ImagePlan, build_cache, index_folder, load_labels
from sites.datasets.dicom.training import ImageDataset
from sites.datasets.heart import HOSPITALS, load_hospitals
from sites.errors import ConfigurationError
from sites.manifest import Encoding, Images, Privacy, Training
from sites.models import initial_image_model
from sites.recipe import ENCODING, recipe_of
from sites.site_data import CACHE, SiteData
from sites.trainer import Examples, initial_heart_model
from sites.xray_studies import (
    FINDING,
    IMAGES_FOLDER,
    IMAGES_PER_PATIENT,
    LABELS_FILE,
    load_xrays,
    write_hospitals,
)
from sites.xray_studies import (
    HOSPITALS as XRAY_HOSPITALS,
)

Tables = dict[str, msgspec.Struct]
TEST: Final = "test"

XRAY_PLAN: Final = ImagePlan(
    shape=(28, 28), modalities=("CR",), images_per_patient=IMAGES_PER_PATIENT, held_out=0.1, mean=0.5, deviation=0.25
)
# Few parameters and a convex loss: under differential privacy it does better than a convolutional network.
XRAY_IMAGES: Final = Images(model="filter-bank", plan=XRAY_PLAN, targets=[FINDING])
XRAY_PRIVACY: Final = Privacy(mode="shared", epsilon=8.0, delta=1e-4, clip_norm=8.0)
EVERYBODY: Final = 1_000_000  # as batch size: all patients of a site are in each step
XRAY_TRAINING: Final[Mapping[str, Training]] = {
    "none": Training(
        rounds=40,
        local_steps=5,
        batch_size=EVERYBODY,
        learning_rate=0.03,
        server_optimizer="momentum",
        server_learning_rate=1.0,
    ),
    "local": Training(
        rounds=40,
        local_steps=1,
        batch_size=EVERYBODY,
        learning_rate=0.05,
        server_optimizer="momentum",
        server_learning_rate=1.0,
    ),
    "shared": Training(
        rounds=40,
        local_steps=1,
        batch_size=1298,
        learning_rate=0.05,
        server_optimizer="momentum",
        server_learning_rate=1.0,
    ),
    "site": Training(
        rounds=2,
        local_steps=10,
        batch_size=64,
        learning_rate=1.0,
        server_optimizer="average",
        server_learning_rate=1.0,
    ),
}
XRAY_ENCODING: Final[Encoding] = msgspec.structs.replace(ENCODING, value_range=4.0)


def xray_recipe(mode: str) -> tuple[Training, Privacy]:
    """Training and privacy of an X-ray consortium in a privacy mode."""
    unit = "site" if mode == "site" else "patient"
    return XRAY_TRAINING[mode], msgspec.convert(
        {**msgspec.to_builtins(XRAY_PRIVACY), "mode": mode, "unit": unit}, Privacy
    )


class DemoData(ABC):
    """Data of several hospitals that a demonstration may put beside each other; ``title``: how many there are;
    ``tested_on``: what the rows of ``test`` are; ``noise``: options of ``sites.recipe.shared_noise``."""

    name: str
    title: str
    tested_on: str
    sites: tuple[str, ...]
    noise: Mapping[str, Any]

    @abstractmethod
    def recipe(self, mode: str) -> tuple[Training, Privacy]:
        """How models of this data are trained in a privacy mode."""

    @abstractmethod
    def tables(self, mode: str) -> Tables:
        """What else the manifest says differently because of this data."""

    @abstractmethod
    def initial(self, mode: str) -> bytes:
        """The safetensors bytes of the model to start from."""

    @abstractmethod
    def prepare(self, folder: Path) -> dict[str, OwnData]:
        """Put the data of each hospital where its program will look for it, below ``folder``; what its SITE.toml
        says."""

    @abstractmethod
    def test(self, folder: Path, found: Mapping[str, SiteData]) -> Examples:
        """The rows that all models are compared on, which nobody has trained on."""


class HeartDemo(DemoData):
    """Four hospitals' heart data, from ``folder`` or the wheel."""

    name, title, sites = "heart", "Four hospitals", HOSPITALS
    tested_on = "held-out patients of all hospitals"
    noise: Mapping[str, Any] = {}

    def __init__(self, folder: Path | None = None) -> None:
        load_hospitals(folder)  # before anything starts: a missing file is told at once
        self._folder = folder

    def recipe(self, mode: str) -> tuple[Training, Privacy]:
        """See ``DemoData``."""
        return recipe_of(mode)

    def tables(self, mode: str) -> Tables:
        """See ``DemoData``."""
        del mode
        return {}

    def initial(self, mode: str) -> bytes:
        """See ``DemoData``."""
        del mode
        return initial_heart_model()

    def prepare(self, folder: Path) -> dict[str, OwnData]:
        """See ``DemoData``."""
        del folder
        source = "" if self._folder is None else str(self._folder.resolve())
        return {name: HeartData(hospital=name, folder=source) for name in self.sites}

    def test(self, folder: Path, found: Mapping[str, SiteData]) -> Examples:
        """See ``DemoData``."""
        del folder
        parts = [one.held_out for one in found.values() if one.held_out is not None]
        return Examples(
            features=torch.cat([part.features for part in parts]), targets=torch.cat([part.targets for part in parts])
        )


class XrayDemo(DemoData):
    """PneumoniaMNIST as the DICOM studies of seven hospitals; the 624 test images are studies of nobody's."""

    name, title, sites = "xray", "Seven hospitals", XRAY_HOSPITALS
    tested_on = "test images, which are no hospital's"
    noise: Mapping[str, Any] = {"max_dropouts": 1, "sampling_rate": 1.0}

    def __init__(self, npz: Path) -> None:
        self._parts = load_xrays(npz)

    def recipe(self, mode: str) -> tuple[Training, Privacy]:
        """See ``DemoData``."""
        return xray_recipe(mode)

    def tables(self, mode: str) -> Tables:
        """See ``DemoData``."""
        del mode
        return {"images": XRAY_IMAGES, "encoding": XRAY_ENCODING}

    def initial(self, mode: str) -> bytes:
        """See ``DemoData``."""
        del mode
        return initial_image_model(XRAY_IMAGES)

    def prepare(self, folder: Path) -> dict[str, OwnData]:
        """See ``DemoData``."""
        write_hospitals(self._parts, folder / "studies")
        # Relative to each SITE.toml, so that the folder can be moved.
        places = {name: f"../studies/{name}" for name in self.sites}
        return {
            name: DicomData(folder=f"{place}/{IMAGES_FOLDER}", labels=f"{place}/{LABELS_FILE}")
            for name, place in places.items()
        }

    def test(self, folder: Path, found: Mapping[str, SiteData]) -> Examples:
        """See ``DemoData``."""
        del found
        studies, state = folder / "studies" / TEST, folder / TEST
        index = index_folder(studies / IMAGES_FOLDER, state)
        labels = load_labels(studies / LABELS_FILE, (FINDING,), index)
        plan = msgspec.structs.replace(XRAY_PLAN, held_out=0.0)
        build_cache(index, plan, state / CACHE, labels=labels)
        return ImageDataset(state / CACHE).examples()


def demo_data(name: str, *, folder: Path | None = None, npz: Path | None = None) -> DemoData:
    """The data of this name; ConfigurationError for options that are not its own, DatasetError for missing files."""
    if name == "heart":
        if npz is not None:
            raise ConfigurationError("demo: --npz is for --data xray")
        return HeartDemo(folder)
    if npz is None or folder is not None:
        raise ConfigurationError(
            "demo: --data xray needs --npz with MedMNIST's pneumoniamnist.npz, and no other folder"
        )
    return XrayDemo(npz)
