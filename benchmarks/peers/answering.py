"""What the scripts beside this one share: each runs in the environment of the system that it drives and answers one
JSON line per question.

A script stays alive between questions, so that its measurements alternate with ours without importing anything again.
Only the standard library is used here.
"""

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version

Answer = dict[str, object]


class Spent:
    """Seconds of wall and processor time (of all threads), added up over ``with spent:`` blocks."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> "Spent":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.processor += time.process_time() - self._began[1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside ``with spent:``, time that is not counted."""
        other = Spent()
        with other:
            yield
        self.wall -= other.wall
        self.processor -= other.processor

    def each(self, count: int) -> dict[str, float]:
        """As an answer, for one of ``count`` that took the time together."""
        return {"wall": self.wall / count, "processor": self.processor / count}


def said(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def answer(packages: Sequence[str], commands: Mapping[str, Callable[..., Answer]]) -> None:
    """Say that all is imported, then answer until the questions end.

    A question is {"command": name, ...arguments}; an answer {"answer": {...}} or {"error": text}.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the system prints itself must not be taken for an answer
    ready = {name: version(name) for name in packages} | {"python": platform.python_version()}
    print(json.dumps({"ready": ready}), file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            reply = {"answer": commands[question.pop("command")](**question)}
        except Exception as error:  # whatever it was, the one who asked must hear of it
            traceback.print_exc()
            reply = {"error": said(error)}
        print(json.dumps(reply), file=replies, flush=True)
