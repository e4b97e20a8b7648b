"""Processes that read and decode files, so that a crash or a hang costs one file.

Python's own pools do not do: one crash ends a `ProcessPoolExecutor` with all its tasks, a hang blocks it for good, and
answers are unpickled, which hands the site's process to whoever takes over a decoder.  Here an answer is msgpack of a
fixed type, a process that is late is killed, and only the task that it was at is lost.
"""

import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import msgspec

from sites.datasets.dicom.records import Answer, Reason, Refused, Task
from sites.errors import DatasetError

LENGTH_BYTES: Final = 8
LARGEST_ANSWER: Final = 1 << 31
START_SECONDS: Final = 60.0  # for Python and its imports on a busy machine
READY: Final = b"ready to read"
MOST_BY_DEFAULT: Final = 8
# -P: a folder of images that happens to be the working directory must not be where modules come from.
PROGRAM: Final = (sys.executable, "-P", "-m", "sites.datasets.dicom.worker")
_PIECE: Final = 1 << 20
_ANSWERS: Final[msgspec.msgpack.Decoder[Answer]] = msgspec.msgpack.Decoder(Answer)
_AHEAD: Final = 4  # tasks per worker that may be finished before their turn

_Key = TypeVar("_Key")


class Request(msgspec.Struct, frozen=True):
    """A task as a worker gets it, with its limits."""

    task: Task
    seconds: float
    memory_bytes: int


class _Lost(Exception):
    """A worker is gone, and why."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


class Workers:
    """A context manager: ``count`` processes, each of at most ``memory_bytes``, which are started when they are needed;
    by default one for each processor, up to 8.

    ``program``: what to run, for tests of what goes wrong there.  Raises DatasetError if what it needs is not
    installed.
    """

    def __init__(
        self, count: int | None = None, *, memory_bytes: int = 4 << 30, program: Sequence[str] = PROGRAM
    ) -> None:
        count = min(os.cpu_count() or 1, MOST_BY_DEFAULT) if count is None else count
        if count < 1:
            raise DatasetError(f"workers: found {count}, expected at least 1")
        if missing := [package for package in ("pydicom", "PIL") if find_spec(package) is None]:
            raise DatasetError(
                f"DICOM files: reading them needs {missing[0]}, which is not installed; "
                "pip install 'secureagg[dicom]' brings it"
            )
        self._count = count
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(program, memory_bytes) for _ in range(count)]
        for worker in self._all:
            self._free.put(worker)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.stop()

    def run(self, tasks: Iterable[tuple[_Key, Task, float]]) -> Iterator[tuple[_Key, Answer]]:
        """Each task's key and answer, in the order of the tasks, which come with the seconds that they may take.

        A task that its worker did not survive is answered by Refused(CRASHED) or Refused(TIMED_OUT).
        """
        waiting: deque[tuple[_Key, Future[Answer]]] = deque()
        try:
            with ThreadPoolExecutor(self._count) as threads:
                try:
                    for key, task, seconds in tasks:
                        waiting.append((key, threads.submit(self._ask, task, seconds)))
                        if len(waiting) >= _AHEAD * self._count:
                            yield _first(waiting)
                    while waiting:
                        yield _first(waiting)
                finally:
                    # Whoever stopped listening does not wait for a decoder that hangs.
                    for _, future in waiting:
                        future.cancel()
                    if waiting:
                        for worker in self._all:
                            worker.kill()
        finally:
            if waiting:
                for worker in self._all:
                    worker.stop()

    def _ask(self, task: Task, seconds: float) -> Answer:
        worker = self._free.get()
        try:
            return worker.ask(task, seconds)
        except _Lost as lost:
            worker.stop()
            return Refused(lost.reason)
        except BaseException:
            worker.stop()
            raise
        finally:
            self._free.put(worker)


def _first(waiting: "deque[tuple[_Key, Future[Answer]]]") -> tuple[_Key, Answer]:
    key, future = waiting[0]
    answer = future.result()
    waiting.popleft()
    return key, answer


class _Worker:
    """One process, started again after it was stopped."""

    def __init__(self, program: Sequence[str], memory_bytes: int) -> None:
        self._program, self._memory_bytes = program, memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task, seconds: float) -> Answer:
        """The answer; raises _Lost when the process ends, is late, or says what is none."""
        process = self._process or self._start()
        deadline = time.monotonic() + seconds
        request = msgspec.msgpack.encode(Request(task, seconds, self._memory_bytes))
        try:
            _pipe(process.stdin).write(len(request).to_bytes(LENGTH_BYTES, "little") + request)
            _pipe(process.stdin).flush()
            length = int.from_bytes(self._read(process, LENGTH_BYTES, deadline), "little")
            # Stops a decoder that was taken over from filling this process's memory.
            if length > LARGEST_ANSWER:
                raise _Lost(Reason.CRASHED)
            return _ANSWERS.decode(self._read(process, length, deadline))
        except (BrokenPipeError, msgspec.DecodeError):
            raise _Lost(Reason.CRASHED) from None

    def kill(self) -> None:
        """End the process while another thread waits for its answer."""
        if (process := self._process) is not None:
            process.kill()

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):  # what was not yet written to a process that is gone
                    _pipe(pipe).close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(folder or os.curdir for folder in sys.path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(  # noqa: S603  our own program, or a test's
            self._program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where pydicom and the decoders quote what they do not like
            env=environment,
            start_new_session=True,  # Ctrl-C is for the site's process, which then ends this one
        )
        try:
            hello = self._read(self._process, len(READY), time.monotonic() + START_SECONDS)
        except _Lost:
            hello = b""
        # Stops a broken installation from counting as broken files.
        if hello != READY:
            self.stop()
            raise DatasetError("DICOM files: the program that reads them does not start, expected a whole installation")
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        """Exactly ``size`` bytes of the answer."""
        descriptor, parts, missing = _pipe(process.stdout).fileno(), [], size
        arrivals = select.poll()
        arrivals.register(descriptor, select.POLLIN)
        while missing:
            if not arrivals.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Lost(Reason.TIMED_OUT)
            part = os.read(descriptor, min(_PIECE, missing))
            if not part:
                raise _Lost(Reason.CRASHED)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


def _pipe(found: Any) -> Any:  # noqa: ANN401  typeshed knows no pipe that is always there
    return found
