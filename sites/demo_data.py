"""What `secureagg demo` can train on: four hospitals' heart data, X-rays as the DICOM studies of seven hospitals, or
made-up studies of four.

The recipes for X-rays are also what `python -m benchmarks xray` measures; docs/dicom.md says how they were chosen.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from sites.config import DicomData, HeartData, OwnData
from sites.datasets.dicom import ImagePlan, Target, build_cache, index_folder, load_labels
from sites.datasets.dicom.training import ImageDataset
from sites.datasets.heart import HOSPITALS, load_hospitals
from sites.datasets.phantoms import PhantomPlan, write_phantoms
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
PHANTOM_PATIENTS: Final = 150  # of each hospital
PHANTOM_IMAGES: Final = Images(
    model="filter-bank",
    # None held out: the models are compared on another hospital.
    plan=ImagePlan(
        shape=(32, 32), hu_width=500.0, images_per_patient=3, held_out=0.0, modalities=("CT",), mean=0.5, deviation=0.25
    ),
    targets=[Target("disease", "classification", ("no", "yes"))],
)
XRAY_PRIVACY: Final = Privacy(mode="shared", epsilon=8.0, delta=1e-4, clip_norm=8.0)
EVERYBODY: Final = 1_000_000  # as batch size: all patients of a site are in each step
_XRAY_STEPS: Final = Training(
    rounds=40,
    local_steps=1,
    batch_size=EVERYBODY,
    learning_rate=0.05,
    server_optimizer="momentum",
    server_learning_rate=1.0,
)
XRAY_TRAINING: Final[Mapping[str, Training]] = {
    "none": msgspec.structs.replace(_XRAY_STEPS, local_steps=5, learning_rate=0.03),
    "local": _XRAY_STEPS,
    "shared": msgspec.structs.replace(_XRAY_STEPS, batch_size=1298),
    "site": msgspec.structs.replace(
        _XRAY_STEPS, rounds=2, local_steps=10, batch_size=64, learning_rate=1.0, server_optimizer="average"
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


class StudiesDemo(DemoData):
    """Folders of DICOM studies, one for each hospital and one whose patients are nobody's."""

    noise: Mapping[str, Any] = {"max_dropouts": 1, "sampling_rate": 1.0}
    images: Images
    tested: str  # the folder of studies that is nobody's

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the studies: `images` and `labels.csv` in a folder of ``folder`` for each hospital and ``tested``."""

    def tables(self, mode: str) -> Tables:
        """See ``DemoData``."""
        del mode
        return {"images": self.images, "encoding": XRAY_ENCODING}

    def initial(self, mode: str) -> bytes:
        """See ``DemoData``."""
        del mode
        return initial_image_model(self.images)

    def prepare(self, folder: Path) -> dict[str, OwnData]:
        """See ``DemoData``."""
        self.write(folder / "studies")
        # Relative to each SITE.toml, so that the folder can be moved.
        places = {name: f"../studies/{name}" for name in self.sites}
        return {
            name: DicomData(folder=f"{place}/{IMAGES_FOLDER}", labels=f"{place}/{LABELS_FILE}")
            for name, place in places.items()
        }

    def test(self, folder: Path, found: Mapping[str, SiteData]) -> Examples:
        """See ``DemoData``."""
        del found
        studies, state = folder / "studies" / self.tested, folder / TEST
        index = index_folder(studies / IMAGES_FOLDER, state)
        labels = load_labels(studies / LABELS_FILE, tuple(self.images.targets), index)
        build_cache(index, msgspec.structs.replace(self.images.plan, held_out=0.0), state / CACHE, labels=labels)
        return ImageDataset(state / CACHE).examples()


class XrayDemo(StudiesDemo):
    """PneumoniaMNIST as the DICOM studies of seven hospitals; the 624 test images are studies of nobody's."""

    name, title, sites = "xray", "Seven hospitals", XRAY_HOSPITALS
    tested_on = "test images, which are no hospital's"
    images, tested = XRAY_IMAGES, TEST

    def __init__(self, npz: Path) -> None:
        self._parts = load_xrays(npz)

    def recipe(self, mode: str) -> tuple[Training, Privacy]:
        """See ``DemoData``."""
        return xray_recipe(mode)

    def write(self, folder: Path) -> None:
        """See ``StudiesDemo``."""
        write_hospitals(self._parts, folder)


class PhantomDemo(StudiesDemo):
    """Made-up hospitals that anybody can have: four with scanners of their own, and a fifth that the models are tested
    on."""

    name, title = "phantom", "Four made-up hospitals"
    sites = tuple(f"hospital-{number}" for number in range(1, 5))
    tested_on, tested = "images of a fifth hospital, which takes no part", "hospital-5"
    images = PHANTOM_IMAGES

    def recipe(self, mode: str) -> tuple[Training, Privacy]:
        """See ``DemoData``."""
        training, privacy = xray_recipe(mode)
        if mode == "site":
            return training, privacy
        batch = len(self.sites) * PHANTOM_PATIENTS if mode == "shared" else EVERYBODY
        rate = 0.005 if mode == "none" else 0.01
        return msgspec.structs.replace(
            training, server_optimizer="average", learning_rate=rate, batch_size=batch
        ), privacy

    def write(self, folder: Path) -> None:
        """See ``StudiesDemo``."""
        write_phantoms(
            folder, PhantomPlan(sites=len(self.sites) + 1, patients=PHANTOM_PATIENTS, disease=2.0, site_effect=0.5)
        )


def demo_data(name: str, *, folder: Path | None = None, npz: Path | None = None) -> DemoData:
    """The data of this name; ConfigurationError for options that are not its own, DatasetError for missing files."""
    if npz is not None and name != "xray":
        raise ConfigurationError("demo: --npz is for --data xray")
    if folder is not None and name != "heart":
        raise ConfigurationError("demo: --data-folder is for --data heart")
    if name == "heart":
        return HeartDemo(folder)
    if name == "phantom":
        return PhantomDemo()
    if npz is None:
        raise ConfigurationError("demo: --data xray needs --npz with MedMNIST's pneumoniamnist.npz")
    return XrayDemo(npz)
