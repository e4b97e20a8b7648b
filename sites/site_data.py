"""What a site trains on, as its SITE.toml and the manifest describe it: rows, model, loss, and who is held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch
from torch import nn

from dp.gradients import Loss
from dp.training import BATCH_ROWS
from dp.views import Augmentation, Views
from secureagg.identity import Identity
from sites.config import DicomData, HeartData, OpenSite
from sites.datasets.dicom import Limits, Target, build_cache, index_folder, load_labels
from sites.datasets.dicom.cache import CacheCard
from sites.datasets.dicom.index import Progress
from sites.datasets.dicom.pseudonyms import Pseudonyms
from sites.datasets.dicom.training import ImageDataset, TargetLoss
from sites.datasets.dicom.workers import Workers
from sites.datasets.heart import HOSPITALS, Hospital, load_hospitals
from sites.errors import ConfigurationError, DatasetError, ManifestError
from sites.manifest import OTHERS, Images
from sites.model_state import ModelSpec
from sites.models import RandomShift, image_model, without_front
from sites.rounds import model_spec
from sites.trainer import DATASET_LABEL, Examples, LearningOptions, binary_loss, fingerprint, heart_model

CACHE: Final = "images.cache"  # in the state folder
COLLECTION: Final = b"DICOM collection:"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteData:
    """A site's rows, those that are held out for evaluation by the model's output ``scored``, and how they are learnt
    from; ``dataset``: what they are called in the site's ledger; ``front``: a fixed part of the model that the rows
    have been through already, and that ``model`` does without."""

    dataset: str
    model: nn.Module
    loss: Loss
    data: Examples
    held_out: Examples | None
    scored: int = 0
    max_rows_per_patient: int = 1
    augmentation: Augmentation | None = None
    front: nn.Module | None = None

    @property
    def options(self) -> LearningOptions:
        """What a trainer of these rows is given."""
        return {
            "model": self.model,
            "data": self.data,
            "loss": self.loss,
            "held_out": self.held_out,
            "scored": self.scored,
            "max_rows_per_patient": self.max_rows_per_patient,
            "augmentation": self.augmentation,
        }


def site_data(site: OpenSite) -> SiteData:
    """The data that a site's configuration names; ConfigurationError or DatasetError if it names none."""
    data = site.config.data
    if isinstance(data, DicomData):
        return _image_data(site, data)
    found = heart_data(hospital_of(site))
    return replace(found, dataset=fingerprint(found.data, site.keys.identity))


def heart_data(hospital: Hospital) -> SiteData:
    """A heart hospital's rows, called by its name."""
    return SiteData(
        dataset=hospital.name,
        model=heart_model(),
        loss=binary_loss,
        data=Examples.of_hospital(hospital),
        held_out=Examples.of_hospital(hospital, held_out=True),
    )


def hospital_of(site: OpenSite) -> Hospital:
    """The part of the heart data that a site's configuration names."""
    data = site.config.data
    if not isinstance(data, HeartData):
        raise ConfigurationError(
            f"site {site.name}: no [data] in its configuration; the site program needs it, `sites.join` does not"
        )
    if data.hospital not in HOSPITALS:
        raise DatasetError(f"heart data: found hospital {data.hospital!r}, expected one of {', '.join(HOSPITALS)}")
    return load_hospitals(site.folder / data.folder if data.folder else None)[data.hospital]


def _image_data(site: OpenSite, data: DicomData) -> SiteData:
    images = images_of(site)
    model, rows = image_model(images), images.plan.images_per_patient
    found = ModelSpec.of({name: tensor.shape for name, tensor in sorted(model.state_dict().items())})
    if sorted(found.tensors) != sorted(model_spec(site.manifest).tensors):
        raise ManifestError(
            f"manifest of {site.manifest.consortium.name}: the tensors in [model] are not those of {images.model} for "
            "the shape and targets in [images]"
        )
    most_views = max((views.views for views in images.augmentation), default=1)
    if rows * most_views > BATCH_ROWS:
        raise ManifestError(
            f"manifest of {site.manifest.consortium.name}: found {rows} images of a patient in {most_views} views, "
            f"expected at most {BATCH_ROWS} together"
        )
    prepare_images(site)
    cache = site.state / CACHE
    return learnt_from(
        images,
        model,
        dataset=collection(index_of(site, data), site.keys.identity),
        data=ImageDataset(cache, "train").examples(),
        held_out=held_out_of(cache, images.targets),
    )


def learnt_from(
    images: Images, model: nn.Module, *, dataset: str, data: Examples, held_out: Examples | None
) -> SiteData:
    """Images (rows, channels, ...) of ``data`` and ``held_out`` as ``model`` is trained on them."""
    augmentation = augmentation_of(images)
    # Views are of images, so that with them everything has to be computed anew in each step.
    front, rest = without_front(model) if augmentation is None else (None, model)
    return SiteData(
        dataset=dataset,
        model=rest,
        loss=TargetLoss(images.targets),
        data=through(front, data),
        held_out=None if held_out is None else through(front, held_out),
        scored=scored(images.targets)[1],
        max_rows_per_patient=images.plan.images_per_patient,
        augmentation=augmentation,
        front=front,
    )


def through(front: nn.Module | None, data: Examples) -> Examples:
    """``data`` with what ``front`` makes of its rows in place of them."""
    if front is None:
        return data
    with torch.no_grad():
        features = torch.cat([front(rows) for rows in torch.split(data.features, BATCH_ROWS)])
    return replace(data, features=features)


def images_of(site: OpenSite) -> Images:
    """The manifest's [images]; ManifestError if it has none."""
    images = site.manifest.images
    if not isinstance(images, Images):
        raise ManifestError(
            f"manifest of {site.manifest.consortium.name}: found no [images], which says how all sites see theirs; "
            f"site {site.name} has data of kind dicom"
        )
    return images


def prepare_images(
    site: OpenSite, *, workers: Workers | None = None, progress: tuple[Progress, Progress] | None = None
) -> CacheCard:
    """Index a site's folder and decode its images into the cache beside its state, as far as that is not done yet.

    ``progress``: of reading and of decoding.  Raises ManifestError, ConfigurationError or DatasetError.
    """
    data, images = site.config.data, images_of(site)
    if not isinstance(data, DicomData):
        raise ConfigurationError(f"site {site.name}: its [data] is not of kind dicom; there is nothing to prepare")
    reading, decoding = progress or (None, None)
    index = index_folder(
        site.folder / data.folder,
        index_of(site, data),
        limits=Limits(keep_derived=data.keep_derived, keep_suspected_text=data.keep_suspected_text),
        merges=site.folder / data.merges if data.merges else None,
        workers=workers,
        progress=reading,
    )
    labels = load_labels(site.folder / data.labels, tuple(images.targets), index)
    site.state.mkdir(parents=True, exist_ok=True)
    return build_cache(index, images.plan, site.state / CACHE, labels=labels, workers=workers, progress=decoding)


def index_of(site: OpenSite, data: DicomData) -> Path:
    """Folder of a site's index, and of the secret behind its pseudonyms."""
    return site.folder / data.index if data.index else site.state


def collection(index: Path, identity: Identity) -> str:
    """What names a site's images in its ledger: all that are known under one secret, whichever there are today.

    Named by its content, a collection would be another one as soon as an image is added, and what its patients have
    lost before would be forgotten.  So a patient who came later is taken to have lost as much as the first ones.
    """
    of_secret = COLLECTION + Pseudonyms.of_site(index).fingerprint.encode()
    return sha256(identity.sign(DATASET_LABEL, of_secret)).hexdigest()


def scored(targets: Sequence[Target]) -> tuple[int | None, int]:
    """Which of ``targets`` evaluation is about, the first that has two classes, and which of the model's outputs is its
    logit."""
    output = 0
    for place, target in enumerate(targets):
        if target.kind != "regression" and len(target.classes) == 2:
            return place, output
        output += target.outputs
    return None, 0


def held_out_of(cache: Path, targets: Sequence[Target]) -> Examples | None:
    """The held-out rows whose scored target is known; None if there are none."""
    place, _ = scored(targets)
    try:
        held_out = ImageDataset(cache, "held out")
    except DatasetError:  # a small site may have nobody there
        return None
    values = held_out.targets.reshape(len(held_out), -1)
    if place is None or not (known := torch.isfinite(values[:, place])).any():
        return None
    owners = [owner for owner, is_known in zip(held_out.patients, known.tolist(), strict=True) if is_known]
    return Examples(features=held_out.features[known], targets=values[known, place], patients=owners)


def augmentation_of(images: Images) -> Augmentation | None:
    """The views that the manifest declares for the classes of its first target."""
    first, otherwise, of_class = images.targets[0], None, {}
    for declared in images.augmentation:
        views = Views(transform=RandomShift(declared.shift), count=declared.views)
        if declared.of == OTHERS:
            otherwise = views
        else:
            of_class[float(first.classes.index(declared.of))] = views
    return Augmentation(of_class=of_class, otherwise=otherwise) if images.augmentation else None
