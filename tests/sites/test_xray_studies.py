"""X-rays as DICOM studies: what the data layer reads of them is what was in MedMNIST's file."""

import numpy as np
import pytest
from support.xray_studies import PLAN, write_npz

from sites.datasets.dicom import ImageDataset, build_cache, index_folder, load_labels
from sites.datasets.dicom.workers import Workers
from sites.errors import DatasetError
from sites.xray_studies import FINDING, HOSPITALS, load_xrays, write_hospitals


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """All hospitals' images."""
    return load_xrays(write_npz(tmp_path_factory.mktemp("npz") / "x.npz"))


def test_hospitals(parts):
    """Every training image is at one hospital; they differ in size and in the share of pneumonia; a patient has at most
    three images, of one class."""
    assert list(parts) == [*HOSPITALS, "test"]
    sizes = [len(parts[name].labels) for name in HOSPITALS]
    assert (sum(sizes), len(parts["test"].labels)) == (400, 60)
    assert len(set(sizes)) > 4
    shares = [parts[name].labels.mean() for name in HOSPITALS]
    assert max(shares) - min(shares) > 0.3
    for part in parts.values():
        for patient in np.unique(part.patients):
            mine = part.labels[part.patients == patient]
            assert len(mine) <= 3
            assert len(set(mine.tolist())) == 1
        assert (np.bincount(part.patients) == 3).mean() > 0.6


def test_whatever_the_device_the_images_are_the_same(parts, tmp_path):
    """Through seven vendors' bits, windows, inversions and compressions come the file's own grey levels, with the right
    label and patient; makers differ; no two hospitals share a UID or a patient."""
    write_hospitals(parts, tmp_path, names=HOSPITALS)
    makers, instances = set(), set()
    with Workers(2) as workers:
        for name in HOSPITALS:
            part, state = parts[name], tmp_path / name / "state"
            # One secret for all, so that whatever two hospitals had in common would show.
            state.mkdir()
            (state / "dicom.secret").write_bytes(bytes(32))
            (state / "dicom.secret").chmod(0o600)
            index = index_folder(tmp_path / name / "images", state, workers=workers)
            assert (index.patients, not index.refused) == (len(np.unique(part.patients)), True)
            makers |= {image.header.descriptors.manufacturer for image in index.images}
            found = {identity for image in index.images for identity in (image.instance, image.study, image.patient)}
            assert not instances & found
            instances |= found
            labels = load_labels(tmp_path / name / "labels.csv", (FINDING,), index)
            build_cache(index, PLAN, state / "cache", labels=labels, workers=workers)
            rows = [ImageDataset(state / "cache", each) for each in ("train", "held out")]
            seen = [
                (image.numpy().tobytes(), float(target))
                for data in rows
                for image, target in zip((data.features * 255).round(), data.targets, strict=True)
            ]
            expected = zip(part.images.astype(np.float32), part.labels, strict=True)
            assert sorted(seen) == sorted((image.tobytes(), float(label)) for image, label in expected)
    assert len(makers) == 7


def test_a_file_that_is_none(tmp_path):
    """A missing file, and another archive, are told with the file that was expected."""
    with pytest.raises(DatasetError, match=r"none\.npz: No such file .* expected pneumoniamnist\.npz"):
        load_xrays(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DatasetError, match="not the file pneumoniamnist"):
        load_xrays(tmp_path / "other.npz")
