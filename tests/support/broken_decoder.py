"""The worker, but its decoder is talkative, and some files bring it to a crash or a loop:
`python -m support.broken_decoder`."""

import os
import time

from sites.datasets.dicom import pixels, worker

CRASHING_ROWS, HANGING_ROWS, LYING_ROWS = 13, 17, 19
_decoded = pixels._decoded


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
    pixels._decoded = _broken
    worker.main()
