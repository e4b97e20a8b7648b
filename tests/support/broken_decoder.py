"""The worker, but its decoder is talkative, and some files bring it to a crash or a loop:
`python -m support.broken_decoder`."""

import os
import time

import msgspec

from sites.datasets.dicom import pixels, worker

CRASHING_ROWS, HANGING_ROWS, LYING_ROWS, SHORT_ROWS = 13, 17, 19, 23
CRASHING_FILE, HANGING_FILE = b"crash the parser", b"hang the parser!"
_decoded, _read_header, _make_images = pixels._decoded, worker.read_header, worker.make_images
_rows = [0]


def _broken_parser(path, limits):
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(16)
    if start == CRASHING_FILE:
        os.abort()
    while start == HANGING_FILE:
        time.sleep(1)
    return _read_header(path, limits)


def _broken(dataset, frames):
    _rows[0] = dataset.Rows
    for output in (1, 2):
        os.write(output, f"decoding {dataset.get('PatientName')}\n".encode())
    if dataset.Rows == CRASHING_ROWS:
        os.abort()
    while dataset.Rows == HANGING_ROWS:
        time.sleep(1)
    if dataset.Rows == LYING_ROWS:
        os.write(_answers, b"\xff" * 8 + b"not an answer")
    return _decoded(dataset, frames)


def _short(task):
    made = _make_images(task)
    return msgspec.structs.replace(made, values=made.values[:-4]) if _rows[0] == SHORT_ROWS else made


if __name__ == "__main__":
    _answers = os.dup(1)
    pixels._decoded, worker.read_header, worker.make_images = _broken, _broken_parser, _short
    worker.main()
