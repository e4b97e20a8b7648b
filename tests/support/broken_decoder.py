"""The worker, but its decoder is talkative, and some files bring it to a crash or a loop:
`python -m support.broken_decoder`."""

import os
import time

from sites.datasets.dicom import pixels, worker

CRASHING_ROWS, HANGING_ROWS, LYING_ROWS = 13, 17, 19
CRASHING_FILE, HANGING_FILE = b"crash the parser", b"hang the parser!"
_decoded, _read_header = pixels._decoded, worker.read_header


def _broken_parser(path, limits):
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(16)
    if start == CRASHING_FILE:
        os.abort()
    while start == HANGING_FILE:
        time.sleep(1)
    return _read_header(path, limits)


def _broken(dataset, frames):
    for output in (1, 2):
        os.write(output, f"decoding {dataset.get('PatientName')}\n".encode())
    if dataset.Rows == CRASHING_ROWS:
        os.abort()
    while dataset.Rows == HANGING_ROWS:
        time.sleep(1)
    if dataset.Rows == LYING_ROWS:
        os.write(_answers, b"\xff" * 8 + b"not an answer")
    return _decoded(dataset, frames)


if __name__ == "__main__":
    _answers = os.dup(1)
    pixels._decoded, worker.read_header = _broken, _broken_parser
    worker.main()
