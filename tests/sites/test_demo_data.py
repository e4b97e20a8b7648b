"""What the demo can train on: options, and recipes that every mode has."""

import pytest
from support.xray_studies import write_npz

from sites import demo_data as demo_data_module
from sites.demo_data import XRAY_IMAGES, HeartDemo, PhantomDemo, XrayDemo, demo_data
from sites.errors import ConfigurationError, DatasetError
from sites.model_state import ModelSpec


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A small file of X-rays."""
    return write_npz(tmp_path_factory.mktemp("npz") / "x.npz", rows=60)


def test_the_data_of_a_name(npz, tmp_path):
    """Each data set takes its own options only, and a file that is missing is told before anything starts."""
    assert isinstance(demo_data("heart"), HeartDemo)
    assert isinstance(demo_data("xray", npz=npz), XrayDemo)
    with pytest.raises(ConfigurationError, match="--npz is for --data xray"):
        demo_data("heart", npz=npz)
    assert isinstance(demo_data("phantom"), PhantomDemo)
    with pytest.raises(ConfigurationError, match="--data xray needs --npz"):
        demo_data("xray")
    for name, options in (("xray", {"npz": npz}), ("phantom", {})):
        with pytest.raises(ConfigurationError, match="--data-folder is for --data heart"):
            demo_data(name, folder=tmp_path, **options)
    with pytest.raises(DatasetError, match=r"none\.npz"):
        demo_data("xray", npz=tmp_path / "none.npz")


@pytest.mark.parametrize("mode", ["none", "local", "shared", "site"])
def test_recipes(npz, mode):
    """Every mode has a recipe of its own name, with the unit that goes with it, and a model to start from."""
    for data in (HeartDemo(), XrayDemo(npz), PhantomDemo()):
        training, privacy = data.recipe(mode)
        assert (privacy.mode, privacy.unit) == (mode, "site" if mode == "site" else "patient")
        assert training.local_steps == 1 or mode != "shared"
        assert ModelSpec.of_bytes(data.initial(mode), who="x").length in (14, 785)
    assert XrayDemo(npz).tables(mode)["images"] == XRAY_IMAGES


def test_studies_of_all(npz, tmp_path):
    """Every hospital's SITE.toml finds its studies and labels beside the others', and nobody's are the test's."""
    found = XrayDemo(npz).prepare(tmp_path)
    assert list(found) == list(XrayDemo.sites)
    for name, data in found.items():
        assert list((tmp_path / name / data.folder).resolve().rglob("*.dcm"))
        assert (tmp_path / name / data.labels).resolve().exists()
    assert "studies/test" not in repr(found)
    assert (tmp_path / "studies" / "test" / "labels.csv").exists()


def test_phantoms_of_all(tmp_path, monkeypatch):
    """Four made-up hospitals have studies and labels of their own, and the fifth, which nobody trains on, is tested
    on."""
    monkeypatch.setattr(demo_data_module, "PHANTOM_PATIENTS", 2)
    demo = PhantomDemo()
    found = demo.prepare(tmp_path)
    assert list(found) == ["hospital-1", "hospital-2", "hospital-3", "hospital-4"]
    for name, data in found.items():
        assert len(list((tmp_path / name / data.folder).resolve().glob("*/*"))) == 2 * 3
        assert (tmp_path / name / data.labels).resolve().exists()
    assert "hospital-5" not in repr(found)
    assert len(demo.test(tmp_path, {}).features) == 2 * 3
