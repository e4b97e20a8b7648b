"""The program that reads and decodes files for a site: `python -m sites.datasets.dicom.worker`.

It reads requests from standard input and writes answers to standard output, each a msgpack message after its length as
8 bytes, little-endian.  Files come from scanners, and decoders are written in C, so the program holds no secret, limits
its own memory, and ends itself soon after a task's time is up, even inside a decoder, also when nobody waits any more.
"""

import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from sites.datasets.dicom.headers import read_header
from sites.datasets.dicom.pixels import make_images
from sites.datasets.dicom.records import Answer, Headers, MakeImages, ReadHeaders
from sites.datasets.dicom.workers import LENGTH_BYTES, READY, Request


def answer(task: ReadHeaders | MakeImages) -> Answer:
    """What a task asks for."""
    if isinstance(task, MakeImages):
        return make_images(task)
    return Headers([read_header(path, task.limits) for path in task.paths])


def main() -> None:
    """Answer until standard input ends."""
    # Decoders print what they find in a file: neither among the answers nor, by whoever started this, on the screen.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    requests = sys.stdin.buffer
    replies.write(READY)
    replies.flush()
    while (message := _next(requests)) is not None:
        request = msgspec.msgpack.decode(message, type=Request)
        _limit_memory(request.memory_bytes)
        signal.setitimer(signal.ITIMER_REAL, request.seconds + 5)  # SIGALRM ends the process unless it is caught
        reply = msgspec.msgpack.encode(answer(request.task))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(len(reply).to_bytes(LENGTH_BYTES, "little") + reply)
        replies.flush()


def _next(requests: BinaryIO) -> bytes | None:
    length = requests.read(LENGTH_BYTES)
    return requests.read(int.from_bytes(length, "little")) if len(length) == LENGTH_BYTES else None


def _limit_memory(size: int) -> None:
    """Stops a file of a few kilobytes that unpacks to more memory than the machine has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))


if __name__ == "__main__":
    main()
