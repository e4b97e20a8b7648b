"""From stored pixels to tensors: the order of the steps, and what each does."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydicom import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, HTJ2KLossless, JPEG2000Lossless, JPEGLSLossless, RLELossless
from support.dicom_files import image, save, slices

from sites.datasets.dicom.headers import read_header
from sites.datasets.dicom.pixels import PLUGIN_OF, make_images
from sites.datasets.dicom.records import Found, ImagePlan, Images, Limits, MakeImages, Reason, Refused, evenly_spaced

PLAN = ImagePlan(shape=(8, 8))
LIMITS = Limits()


def answered(dataset: Dataset, folder: Path, plan: ImagePlan = PLAN, *, limits: Limits = LIMITS) -> Images | Refused:
    """What becomes of a file of one frame."""
    path = save(dataset, folder / "image.dcm")
    return make_images(MakeImages([(bytes(path), [0])], plan, limits))


def made(dataset: Dataset, folder: Path, plan: ImagePlan = PLAN) -> np.ndarray:
    """The example (channels, rows, columns) that a file of one frame becomes."""
    found = answered(dataset, folder, plan)
    assert isinstance(found, Images), found
    return np.frombuffer(found.values, "<f4").reshape(plan.example_shape)


def ramp(least: int = 0, step: int = 1) -> np.ndarray:
    """64 different values (8, 8)."""
    return (least + step * np.arange(64)).reshape(8, 8)


def test_monochrome1_and_2_of_one_scene_are_equal(tmp_path: Path) -> None:
    """A scene stored with white as its least value gives the tensor that it gives stored the other way round."""
    scene = ramp().astype(np.uint8)
    plain = made(image(scene, BitsStored=8), tmp_path)
    inverse = made(image(255 - scene, PhotometricInterpretation="MONOCHROME1"), tmp_path)
    np.testing.assert_allclose(inverse, plain, atol=1e-6)
    np.testing.assert_allclose(plain[0], scene / 255, atol=1e-6)


@pytest.mark.parametrize("shape", [None, "IDENTITY", "INVERSE"])
def test_an_image_is_inverted_once(shape: str | None, tmp_path: Path) -> None:
    """PresentationLUTShape INVERSE beside MONOCHROME1 says the same thing again, and inverts no second time."""
    said = {} if shape is None else {"PresentationLUTShape": shape}
    scene = ramp().astype(np.uint8)
    found = made(image(scene, PhotometricInterpretation="MONOCHROME1", **said), tmp_path)
    np.testing.assert_allclose(found[0], 1 - scene / 255, atol=1e-6)


def test_the_presentation_alone_inverts(tmp_path: Path) -> None:
    """MONOCHROME2 with PresentationLUTShape INVERSE is inverted."""
    scene = ramp().astype(np.uint8)
    found = made(image(scene, PresentationLUTShape="INVERSE"), tmp_path)
    np.testing.assert_allclose(found[0], 1 - scene / 255, atol=1e-6)


def test_ct_is_rescaled_and_then_windowed(tmp_path: Path) -> None:
    """Stored values become Hounsfield units first, and the plan's window is in these, whatever the file's own says."""
    stored = ramp(least=0, step=20).astype(np.uint16)
    dataset = image(
        stored, modality="CT", RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=9, WindowWidth=9
    )  # -1024 to 1496 HU
    plan = ImagePlan(shape=(8, 8), hu_centre=50, hu_width=400)
    units = stored * 2.0 - 1024
    np.testing.assert_allclose(made(dataset, tmp_path, plan)[0], np.clip((units + 150) / 400, 0, 1), atol=1e-5)


def test_signed_pixels_are_signed(tmp_path: Path) -> None:
    """A CT stored as signed numbers keeps its sign."""
    stored = ramp(least=-200, step=10).astype(np.int16)
    plan = ImagePlan(shape=(8, 8), hu_centre=0, hu_width=1000)
    np.testing.assert_allclose(made(image(stored, modality="CT"), tmp_path, plan)[0], (stored + 500) / 1000, atol=1e-5)


def test_constants_of_the_plan_come_last(tmp_path: Path) -> None:
    """Mean and deviation of the plan are applied to what lies in [0, 1], padding of the shape included."""
    plain = made(image(ramp().astype(np.uint8)), tmp_path, ImagePlan(shape=(10, 8)))
    scaled = made(image(ramp().astype(np.uint8)), tmp_path, ImagePlan(shape=(10, 8), mean=0.5, deviation=0.25))
    np.testing.assert_allclose(scaled, (plain - 0.5) / 0.25, atol=1e-5)
    assert (plain[0, [0, -1]] == 0).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("modality", ["CT", "DX", "MR"])
def test_padding_is_background(photometric: str, modality: str, tmp_path: Path) -> None:
    """Pixels outside the scanned area are 0 in the end, whatever rescale, window and inversion would make of them, and
    do not move the range of an image that has its own."""
    stored = ramp(least=1000).astype(np.int16)
    stored[0] = -2000
    stored[1] = -1990
    dataset = image(
        stored,
        modality=modality,
        PhotometricInterpretation=photometric,
        RescaleIntercept=-1000,
        RescaleSlope=1,
        PixelPaddingRangeLimit=-1990,
        WindowCenter=32,
        WindowWidth=64,
    )
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    dataset["PixelPaddingRangeLimit"].VR = "SS"
    found = made(dataset, tmp_path, ImagePlan(shape=(8, 8), hu_centre=32, hu_width=64))[0]
    assert (found[:2] == 0).all()
    assert found[2:].min() >= 0
    assert np.ptp(found[2:]) > 0.5


def test_padding_is_a_stored_value(tmp_path: Path) -> None:
    """The padding value is compared before the rescale: a value that only becomes equal by it is no padding."""
    stored = ramp(least=0).astype(np.uint16)
    dataset = image(stored, modality="CT", RescaleSlope=1, RescaleIntercept=-10)
    dataset.add_new("PixelPaddingValue", "US", 50)
    found = made(dataset, tmp_path, ImagePlan(shape=(8, 8), hu_centre=0, hu_width=200))[0].ravel()
    assert found[50] == 0
    assert (np.delete(found, 50) > 0).all()


def test_x_rays_are_seen_through_their_first_window(tmp_path: Path) -> None:
    """The file's own window (PS3.3 C.11.2.1.2, LINEAR) maps to [0, 1]; of several the first one counts."""
    stored = ramp().astype(np.uint16)
    found = made(image(stored, WindowCenter=[32, 5], WindowWidth=[41, 5]), tmp_path)[0]
    np.testing.assert_allclose(found, np.clip((stored - 31.5) / 40 + 0.5, 0, 1), atol=1e-4)


def test_x_rays_are_seen_through_their_table(tmp_path: Path) -> None:
    """A VOI LUT decides where there is one, also beside a window, over its own number of bits."""
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [64, 0, 10])
    table.add_new("LUTData", "US", [int(1023 * (entry / 63) ** 2) for entry in range(64)])
    stored = ramp().astype(np.uint16)
    dataset = image(stored, VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(made(dataset, tmp_path)[0], (stored / 63) ** 2, atol=2e-3)


def test_a_sigmoid_is_a_sigmoid(tmp_path: Path) -> None:
    """VOILUTFunction SIGMOID is followed (PS3.3 C.11.2.1.3.1)."""
    stored = ramp().astype(np.uint16)
    found = made(image(stored, WindowCenter=32, WindowWidth=16, VOILUTFunction="SIGMOID"), tmp_path)[0]
    np.testing.assert_allclose(found, 1 / (1 + np.exp((32.0 - stored) / 4)), atol=1e-4)


@pytest.mark.parametrize("window", [{}, {"WindowCenter": "", "WindowWidth": ""}])
def test_x_rays_without_a_window_span_their_bits(window: dict[str, str], tmp_path: Path) -> None:
    """Without window and table, or with blank ones, the whole range of the stored bits is [0, 1]: no site's statistics
    are in it."""
    stored = ramp().astype(np.uint16)
    found = made(image(stored, BitsStored=12, HighBit=11, **window), tmp_path)
    np.testing.assert_allclose(found[0], stored / 4095, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    stored=hnp.arrays(np.uint16, (8, 8), elements=st.integers(0, 4000)),
    slope=st.integers(1, 50),
    intercept=st.integers(-5000, 5000),
)
def test_units_of_mr_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, stored: np.ndarray, slope: int, intercept: int
) -> None:
    """MR has no units: an image and the same one in other units give one tensor, in [0, 1]."""
    folder = tmp_path_factory.mktemp("mr")
    plain = made(image(stored, modality="MR"), folder)
    other = made(image(stored, modality="MR", RescaleSlope=slope, RescaleIntercept=intercept), folder)
    assert plain.min() >= 0
    assert plain.max() <= 1
    np.testing.assert_allclose(other, plain, atol=2e-3)


def test_resampling_is_in_millimetres(tmp_path: Path) -> None:
    """Of two images of one scene, of pixels of 0.5 mm and of 1 mm, both give the same rows at 1 mm."""
    coarse = ramp().astype(np.uint8)
    fine = np.kron(coarse, np.ones((2, 2), np.uint8))
    plan = ImagePlan(shape=(8, 8), spacing=(1.0, 1.0))
    from_coarse = made(image(coarse, PixelSpacing=[1, 1]), tmp_path, plan)
    from_fine = made(image(fine, PixelSpacing=[0.5, 0.5]), tmp_path, plan)
    np.testing.assert_allclose(from_fine, from_coarse, atol=0.01)


def test_rows_and_columns_are_not_mixed_up(tmp_path: Path) -> None:
    """PixelSpacing is between rows first (PS3.3 10.7.1.3): pixels twice as high as wide fill a square twice as high."""
    found = made(
        image(np.full((8, 8), 255, np.uint8), PixelSpacing=[2, 1]), tmp_path, ImagePlan(shape=(16, 16), spacing=(1, 1))
    )[0]
    assert (found > 0.5).sum(axis=0).max() == 16
    assert (found > 0.5).sum(axis=1).max() == 8
    fitted = made(image(np.full((8, 8), 255, np.uint8), PixelSpacing=[2, 1]), tmp_path, ImagePlan(shape=(16, 16)))[0]
    np.testing.assert_array_equal(fitted > 0.5, found > 0.5)


def test_what_does_not_fit_is_cropped_around_the_middle(tmp_path: Path) -> None:
    """Without a spacing the whole image is in the tensor; with one, its middle."""
    scene = np.zeros((9, 9), np.uint8)
    scene[4, 4] = 255
    plan = ImagePlan(shape=(3, 3), spacing=(1.0, 1.0))
    found = made(image(scene, PixelSpacing=[1, 1]), tmp_path, plan)[0]
    np.testing.assert_allclose(found, [[0, 0, 0], [0, 1, 0], [0, 0, 0]])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    spacing=st.none() | st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    channels=st.sampled_from([1, 3]),
)
def test_any_image_has_the_plans_shape(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    shape: tuple[int, int],
    spacing: tuple[float, float] | None,
    channels: int,
) -> None:
    """Whatever an image's size and spacing, the tensor has the plan's shape and lies in [0, 1]."""
    plan = ImagePlan(shape=shape, spacing=spacing, channels=channels)
    pixels = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)
    found = made(image(pixels, PixelSpacing=[0.7, 1.3]), tmp_path_factory.mktemp("any"), plan)
    assert found.shape == (channels, *shape)
    assert found.min() >= 0
    assert found.max() <= 1


def test_refusals_before_and_after_decoding(tmp_path: Path) -> None:
    """No spacing where one is needed, a spacing of kilometres, a file that grew since it was indexed, and one whose
    pixels went: each has its reason."""
    spaced = ImagePlan(shape=(8, 8), spacing=(1.0, 1.0))
    assert answered(image(), tmp_path, spaced) == Refused(Reason.NO_SPACING)
    assert answered(image(PixelSpacing=[1e6, 1e6]), tmp_path, spaced) == Refused(Reason.BAD_ATTRIBUTES)
    assert answered(image(), tmp_path, limits=Limits(pixels=63)) == Refused(Reason.TOO_MANY_PIXELS)
    assert answered(image(PixelData=None), tmp_path) == Refused(Reason.NO_PIXELS)
    assert make_images(MakeImages([(bytes(tmp_path / "gone"), [0])], PLAN, LIMITS)) == Refused(Reason.UNREADABLE)


def test_colour_becomes_luma_or_three_channels(tmp_path: Path) -> None:
    """A colour image gives its luma, or red, green and blue; a grey one gives three channels that are the same."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., 0] = 255
    dataset = image(
        np.zeros((8, 8), np.uint8), PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0
    )
    dataset.PixelData = pixels.tobytes()
    np.testing.assert_allclose(made(dataset, tmp_path), 0.299, atol=1e-6)
    three = made(dataset, tmp_path, ImagePlan(shape=(8, 8), channels=3))
    np.testing.assert_allclose(three.mean(axis=(1, 2)), [1, 0, 0], atol=1e-6)
    grey = made(image(ramp().astype(np.uint8)), tmp_path, ImagePlan(shape=(8, 8), channels=3))
    np.testing.assert_array_equal(grey[0], grey[2])


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_lossless_syntaxes_give_equal_tensors(syntax: str, tmp_path: Path) -> None:
    """Compressed without loss, an image gives the tensor that it gives uncompressed; the decoder is on record."""
    pixels = np.kron(ramp(least=50), np.ones((8, 8))).astype(np.uint16)  # JPEG 2000 halves an image five times
    dataset = image(pixels, WindowCenter=80, WindowWidth=64)
    plain = made(dataset, tmp_path)
    dataset.compress(syntax)
    found = answered(dataset, tmp_path)
    assert isinstance(found, Images)
    np.testing.assert_array_equal(np.frombuffer(found.values, "<f4").reshape(plain.shape), plain)
    name, version = found.decoder.split()
    assert name in {"pydicom", "pyjpegls", "pylibjpeg-openjpeg"}
    assert version[0].isdigit()


def test_every_syntax_has_one_decoder() -> None:
    """Which decoder reads a compressed syntax is decided here, and not by what happens to be installed."""
    assert len(PLUGIN_OF) == 12
    assert PLUGIN_OF[HTJ2KLossless] == "pylibjpeg"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(132, 10_000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    end=st.none() | st.integers(132, 10_000),
    source=st.sampled_from(["plain", "enhanced"]),
)
def test_no_bytes_raise(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], end: int | None, source: str
) -> None:
    """Whatever happens to the bytes of a file, its header and its pixels give an image or a reason, not an error."""
    path = tmp_path_factory.mktemp("bytes") / "file"
    data = bytearray(save(image() if source == "plain" else enhanced(), path).read_bytes())
    for place, written in changes:
        place %= len(data) - 132  # noqa: PLW2901
        data[132 + place : 132 + place + len(written)] = written
    path.write_bytes(data[:end])
    limits = Limits(pixels=1 << 12, frames=64)
    found = read_header(bytes(path), limits)
    assert isinstance(found, Found | Refused)
    answer = make_images(MakeImages([(bytes(path), [0])], PLAN, limits))
    if isinstance(answer, Images):
        values = np.frombuffer(answer.values, "<f4")
        assert values.shape == (64,)
        assert ((values >= 0) & (values <= 1)).all()


def enhanced(count: int = 4) -> Dataset:
    """A multi-frame CT whose geometry and rescale are in functional groups, the frames from the head down."""
    dataset = image(
        np.stack([np.full((8, 8), place, np.int16) for place in range(count)]),
        modality="CT",
        SOPClassUID=EnhancedCTImageStorage,
    )

    def group(keyword: str, **attributes: object) -> Dataset:
        outer, inner = Dataset(), Dataset()
        for name, value in attributes.items():
            setattr(inner, name, value)
        setattr(outer, keyword, Sequence([inner]))
        return outer

    shared = Dataset()
    shared.update(group("PixelMeasuresSequence", PixelSpacing=[1, 1], SliceThickness=3))
    shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    own = []
    for place in range(count):
        item = Dataset()
        item.update(group("PlanePositionSequence", ImagePositionPatient=[0, 0, 30 - 3 * place]))
        item.update(group("PixelValueTransformationSequence", RescaleSlope=10, RescaleIntercept=place))
        own.append(item)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(own)
    return dataset


def test_enhanced_files_are_read_through_their_groups(tmp_path: Path) -> None:
    """Spacing, orientation, each frame's position and each frame's rescale come from the functional groups."""
    path = save(enhanced(), tmp_path / "enhanced.dcm")
    found = read_header(bytes(path), LIMITS)
    assert isinstance(found, Found)
    assert found.header.spacing == (1, 1)
    assert found.header.positions == (30, 27, 24, 21)
    plan = ImagePlan(shape=(8, 8), hu_centre=0, hu_width=200)
    answer = make_images(MakeImages([(bytes(path), [3, 1])], plan, LIMITS))
    assert isinstance(answer, Images)
    frames = np.frombuffer(answer.values, "<f4").reshape(2, 8, 8)
    np.testing.assert_allclose(frames[:, 0, 0], [(100 + 33) / 200, (100 + 11) / 200], atol=1e-5)


def test_a_volume_is_stacked_and_resampled_along_its_normal(tmp_path: Path) -> None:
    """Slices in the order that is asked for become one volume, resampled in mm along all three axes."""
    files = [save(one, tmp_path / f"{place}") for place, one in enumerate(slices(9, distance=2.0))]
    plan = ImagePlan(shape=(17, 8, 8), spacing=(1.0, 1.0, 1.0), hu_centre=4, hu_width=8)
    answer = make_images(MakeImages([(bytes(path), [0]) for path in files], plan, LIMITS, 2.0))
    assert isinstance(answer, Images)
    column = np.frombuffer(answer.values, "<f4").reshape(17, 8, 8)[:, 4, 4]
    assert (np.diff(column) >= 0).all()
    np.testing.assert_allclose(column[8], 0.5, atol=0.04)


@settings(deadline=None)
@given(
    count=st.integers(2, 30),
    distance=st.floats(0.1, 10),
    start=st.floats(-500, 500),
    seed=st.randoms(use_true_random=False),
)
def test_slices_are_ordered_by_position(count: int, distance: float, start: float, seed: object) -> None:
    """Whatever the order of the files, slices come out from the least position up, with the distance between them."""
    places = list(range(count))
    seed.shuffle(places)
    found = evenly_spaced([start + distance * place for place in places])
    assert not isinstance(found, Reason)
    order, gap = found
    assert [places[one] for one in order] == list(range(count))
    assert gap == pytest.approx(distance)


def test_slices_that_are_no_volume() -> None:
    """One slice, two at one place, and a missing one in between: no volume, each for its own reason."""
    assert evenly_spaced([3.0]) == Reason.ONE_SLICE
    assert evenly_spaced([1.0, 2.0, 2.0, 3.0]) == Reason.REPEATED_POSITION
    assert evenly_spaced([1.0, 2.0, 4.0, 5.0]) == Reason.UNEVEN_SPACING
