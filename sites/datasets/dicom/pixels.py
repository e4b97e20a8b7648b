"""From the file's pixels to a tensor, in a worker.

The order is part of the meaning: decode; find padding; modality LUT or rescale; window; inversion; resampling to mm;
padding to the shape; constants of the plan.

- Padding is a value as it is stored, and must be found before the rescale; afterwards it is the background.
- CT has units, so that one window of Hounsfield units serves all; X-rays have the window or table that the device chose
  for each (PS3.3 C.11.2).  MR, PET and the rest have neither: the image's, or the volume's, own 0.5th and 99.5th
  percentile, so that a row depends on its own patient only.
- MONOCHROME1 shows its least value white.  PresentationLUTShape INVERSE says the same of the same image; both together
  invert once.
"""

from importlib.metadata import version
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom import Dataset, config, dcmread
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from sites.datasets.dicom.headers import frame_attributes
from sites.datasets.dicom.records import ImagePlan, Images, MakeImages, Reason, Refusal, Refused

config.settings.reading_validation_mode = config.IGNORE

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Stored = npt.NDArray[Any]  # whatever whole numbers a file has

# Decoders differ by a grey level on lossy files, so that the one is named, for each syntax, and what it is is recorded.
PLUGIN_OF: Final[dict[str, str]] = {
    RLELossless: "pydicom",
    **dict.fromkeys((JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), "gdcm"),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), "pyjpegls"),
    **dict.fromkeys((JPEG2000Lossless, JPEG2000, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL), "pylibjpeg"),
}
_PACKAGE_OF: Final = {
    "": "pydicom",
    "pydicom": "pydicom",
    "gdcm": "python-gdcm",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg-openjpeg",
}
# PS3.3 gives these a VOI LUT module that says how the device means them to be seen.
_SEEN_THROUGH_VOI: Final = {"CR", "DX", "MG", "IO", "PX", "XA", "RF"}
_PERCENTILES: Final = (0.5, 99.5)
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
MOST_ALONG_AN_AXIS: Final = 8192  # of a resampled image; a spacing of metres would ask for more


def make_images(task: MakeImages) -> Images | Refused:
    """The examples that ``task`` asks for, or why there are none; never raises, and never says what was in a file."""
    try:
        return _make(task)
    except Refusal as refusal:
        return Refused(refusal.reason)
    except OSError:
        return Refused(Reason.UNREADABLE)
    except MemoryError:
        return Refused(Reason.MEMORY)
    except Exception:
        # Whatever else the attributes of a file that anybody may have made lead to.
        return Refused(Reason.BAD_ATTRIBUTES)


def _make(task: MakeImages) -> Images:
    plan, limits = task.plan, task.limits
    slices: list[Floats] = []
    masks: list[Mask] = []
    decoder = ""
    room = limits.volume_voxels
    attributes = Dataset()
    for path, frames in task.files:
        with open(path, "rb") as file:  # noqa: PTH123  not every name of a file is text
            dataset = dcmread(file)
        # The file may be another one than was indexed.
        plane = int(dataset.Rows) * int(dataset.Columns)
        room -= plane * int(dataset.get("SamplesPerPixel") or 1) * len(frames)
        if plane > limits.pixels or room < 0:
            raise Refusal(Reason.TOO_MANY_PIXELS)
        decoder, stored = _decoded(dataset, frames)
        for frame, pixels in zip(frames, stored, strict=True):
            attributes = frame_attributes(dataset, frame)
            values, padding = rescaled(pixels, attributes)
            slices.append(values)
            masks.append(padding)
    spacing = _spacing(attributes)
    if plan.makes_volumes:
        if len({one.shape for one in slices}) != 1:
            raise Refusal(Reason.MIXED_SERIES)
        volume = shown(np.stack(slices), np.stack(masks), attributes, plan)
        examples = [_fitted(volume, (task.distance, *spacing) if spacing else None, plan)]
    else:
        examples = [
            _fitted(shown(one[None], mask[None], attributes, plan), (None, *spacing) if spacing else None, plan)
            for one, mask in zip(slices, masks, strict=True)
        ]
    rows = np.stack([(one - plan.mean) / plan.deviation for one in examples]).astype("<f4")
    if not np.isfinite(rows).all():
        raise Refusal(Reason.BAD_ATTRIBUTES)
    return Images(count=len(rows), values=rows.tobytes(), decoder=decoder)


def _decoded(dataset: Dataset, frames: list[int]) -> tuple[str, list[Stored]]:
    """Who decodes, with version, and the stored pixels of ``frames``."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    plugin = PLUGIN_OF.get(syntax, "")
    if syntax.is_encapsulated and (not plugin or plugin not in get_decoder(syntax).available_plugins):
        raise Refusal(Reason.NO_DECODER)
    if "PixelData" not in dataset:
        raise Refusal(Reason.NO_PIXELS)
    try:
        # A copy of each, since a decoder may use its buffer again.
        stored = [np.array(one) for one in iter_pixels(dataset, indices=frames, decoding_plugin=plugin)]
    except MemoryError:
        raise
    except Exception as error:
        short = isinstance(error, ValueError) and "less than expected" in str(error)
        raise Refusal(Reason.TRUNCATED if short else Reason.DECODER_FAILED) from None
    package = _PACKAGE_OF[plugin]
    return f"{package} {version(package)}", stored


def rescaled(pixels: Stored, attributes: Dataset) -> tuple[Floats, Mask]:
    """Values (rows, columns), or (rows, columns, 3) in [0, 1] for colour, and where there is only padding."""
    if str(attributes.PhotometricInterpretation) == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, attributes)
        return _share(pixels, int(attributes.RedPaletteColorLookupTableDescriptor[2])), np.zeros(pixels.shape[:2], bool)
    if pixels.ndim == 3:
        return _share(pixels, int(attributes.BitsStored)), np.zeros(pixels.shape[:2], bool)
    padding = np.zeros(pixels.shape, bool)
    if (first := attributes.get("PixelPaddingValue")) is not None:
        last = attributes.get("PixelPaddingRangeLimit")
        low, high = sorted((int(first), int(first if last is None else last)))
        padding = (pixels >= low) & (pixels <= high)
    return apply_modality_lut(pixels, attributes).astype(np.float32), padding


def _share(values: Stored, bits: int) -> Floats:
    """``values`` of so many bits in [0, 1]."""
    return (values / (2.0**bits - 1)).astype(np.float32)


def shown(values: Floats, padding: Mask, attributes: Dataset, plan: ImagePlan) -> Floats:
    """Slices (n, rows, columns[, 3]) in [0, 1], windowed and as they are meant to be seen; padding is 0."""
    if values.ndim == 4:
        return values
    modality = str(attributes.get("Modality", "")).strip().upper()
    if modality == "CT":
        seen = _windowed(values, plan.hu_centre, plan.hu_width, "LINEAR_EXACT")
    elif modality in _SEEN_THROUGH_VOI:
        seen = _through_voi(values, attributes)
    else:
        kept = values[~padding]
        low, high = np.percentile(kept, _PERCENTILES) if kept.size else (0.0, 1.0)
        seen = _between(values, float(low), float(high))
    inverse = str(attributes.get("PresentationLUTShape", "")) == "INVERSE"
    if inverse or str(attributes.PhotometricInterpretation) == "MONOCHROME1":
        seen = 1 - seen
    seen[padding] = 0.0
    return seen


def _windowed(values: Floats, centre: float, width: float, function: str) -> Floats:
    view = Dataset()
    view.PhotometricInterpretation = "MONOCHROME2"
    view.BitsStored, view.PixelRepresentation = 16, 0
    view.WindowCenter, view.WindowWidth, view.VOILUTFunction = centre, width, function
    with np.errstate(over="ignore"):  # far below the centre of a sigmoid
        return _share(apply_windowing(values, view), 16)


def _through_voi(values: Floats, attributes: Dataset) -> Floats:
    """Through the file's own table or, without, its first window; without either the whole range of stored values."""
    if attributes.get("VOILUTSequence"):
        seen = apply_voi(np.rint(values).astype(np.int64), attributes)
        return _share(seen, int(attributes.VOILUTSequence[0].LUTDescriptor[2]))
    if not {None, ""}.intersection({_first(attributes, "WindowCenter"), _first(attributes, "WindowWidth")}):
        centre, width = (float(_first(attributes, keyword)) for keyword in ("WindowCenter", "WindowWidth"))
        return _windowed(values, centre, width, str(attributes.get("VOILUTFunction") or "LINEAR"))
    stored, signed = int(attributes.BitsStored), int(attributes.PixelRepresentation)
    least = -(2 ** (stored - 1)) if signed else 0
    ends = apply_modality_lut(np.array([least, least + 2**stored - 1], np.int64), attributes)
    return _between(values, float(min(ends)), float(max(ends)))


def _first(attributes: Dataset, keyword: str) -> Any:  # noqa: ANN401  whatever pydicom makes of the text
    """The first value of an attribute; None or blank where it has none."""
    value = attributes.get(keyword)
    return next(iter(value), None) if isinstance(value, list | MultiValue) else value


def _between(values: Floats, low: float, high: float) -> Floats:
    return _share(np.clip((values - low) / max(high - low, 1e-12), 0, 1), 1)


def _spacing(attributes: Dataset) -> tuple[float, float] | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = [float(value) for value in attributes.get(keyword) or ()]
        if len(found) == 2 and min(found) > 0:
            return found[0], found[1]
    return None


def _fitted(volume: Floats, spacing: tuple[float | None, float, float] | None, plan: ImagePlan) -> Floats:
    """``volume`` (n, rows, columns[, 3]), with mm along its axes, resampled, cropped or padded by zeros around its
    middle, with the plan's channels first."""
    colours = np.moveaxis(volume, -1, 0) if volume.ndim == 4 else volume[None]
    if len(colours) != plan.channels:
        mixed = np.tensordot(_LUMA, colours, axes=1)[None] if plan.channels == 1 else None
        colours = np.repeat(colours, plan.channels, axis=0) if mixed is None else mixed
    goal = plan.shape if plan.makes_volumes else (1, *plan.shape)
    sizes = _sizes(colours.shape[1:], spacing, goal, plan)
    if max(sizes) > MOST_ALONG_AN_AXIS:
        raise Refusal(Reason.BAD_ATTRIBUTES)
    whole = np.stack([_centred(_resampled(one, sizes), goal) for one in colours])
    return whole if plan.makes_volumes else whole[:, 0]


def _sizes(
    found: tuple[int, ...], spacing: tuple[float | None, float, float] | None, goal: tuple[int, ...], plan: ImagePlan
) -> tuple[int, int, int]:
    """Slices, rows and columns after resampling."""
    if plan.spacing is not None:
        wanted = plan.spacing if plan.makes_volumes else (1.0, *plan.spacing)
        if spacing is None:
            raise Refusal(Reason.NO_SPACING)
        given = (wanted[0] if spacing[0] is None else spacing[0], *spacing[1:])
        scaled = [max(1, round(n * mm / to)) for n, mm, to in zip(found, given, wanted, strict=True)]
        return scaled[0], scaled[1], scaled[2]
    tall, wide = (n * mm for n, mm in zip(found[1:], (spacing or (None, 1.0, 1.0))[1:], strict=True))
    scale = min(goal[1] / tall, goal[2] / wide)
    return goal[0], max(1, round(tall * scale)), max(1, round(wide * scale))


def _resampled(volume: Floats, sizes: tuple[int, int, int]) -> Floats:
    """Bilinear along each axis, with the support of the larger pixel, so that nothing aliases."""
    plane = (sizes[2], sizes[1])
    flat = np.stack([_resized(one, plane) for one in volume])
    if len(flat) == sizes[0]:
        return flat
    columns = flat.reshape(len(flat), -1)
    return _resized(columns, (columns.shape[1], sizes[0])).reshape(sizes)


def _resized(image: Floats, size: tuple[int, int]) -> Floats:
    if image.shape == size[::-1]:
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), np.float32)


def _centred(volume: Floats, goal: tuple[int, ...]) -> Floats:
    for axis, (found, wanted) in enumerate(zip(volume.shape, goal, strict=True)):
        spare = wanted - found
        if spare < 0:
            start = -spare // 2
            volume = volume.take(range(start, start + wanted), axis=axis)
        else:
            widths = [(0, 0)] * volume.ndim
            widths[axis] = (spare // 2, spare - spare // 2)
            volume = np.pad(volume, widths)
    return volume
