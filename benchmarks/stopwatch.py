"""Where a process spends its processor time: each thread's, split among the functions that it is in.

A function's time is its own without that of other named functions that it calls.  What it hands to a thread pool counts
as its own.  Naming functions changes the running program, so it is done in a process that measures nothing else.
"""

import inspect
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGES = ("secureagg", "sites", "transport", "benchmarks")
IO_THREADS = "ZMQbg/IO"  # what libzmq calls the threads that encrypt and write to sockets

_Function = Callable[..., Any]


class Stopwatch:
    """Names functions of the running program; ``spent`` tells the processor seconds of each name so far."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._local = threading.local()
        self._lock = threading.Lock()
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._replaced: list[tuple[dict[str, Any] | type, Any, Any]] = []

    @property
    def spent(self) -> dict[str, float]:
        """Of each name, in seconds."""
        with self._lock:
            return dict(self._spent)

    # --- one function ---

    def wrap(self, function: _Function, name: str) -> _Function:
        """``function``, or what each step of a generator takes, under ``name``."""
        if inspect.isgeneratorfunction(function):

            @wraps(function)
            def steps(*arguments: Any, **named: Any) -> Any:
                inner = function(*arguments, **named)
                while True:
                    self._enter(name)
                    try:
                        item = next(inner)
                    except StopIteration:
                        return
                    finally:
                        self._leave()
                    yield item

            return steps

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._enter(name)
            try:
                return function(*arguments, **named)
            finally:
                self._leave()

        return timed

    @property
    def _names(self) -> list[str]:
        if not hasattr(self._local, "names"):
            self._local.names, self._local.since = [], 0.0
        return self._local.names

    def _enter(self, name: str) -> None:
        self._count()
        self._names.append(name)

    def _leave(self) -> None:
        self._count()
        self._names.pop()

    def _count(self) -> None:
        names, now = self._names, self._clock()
        if names:
            with self._lock:
                self._spent[names[-1]] += now - self._local.since
        self._local.since = now

    # --- a whole program ---

    def install(self, names: Mapping[str, Sequence[str]]) -> None:
        """Name functions, given as name -> "module:function" or "module:Class.method", wherever the packages of this
        project hold them; and let thread pools work under the name of who hands them their work."""
        for name, places in names.items():
            for place in places:
                self._install(place, name)
        submit, watch = ThreadPoolExecutor.submit, self

        def submit_named(pool: ThreadPoolExecutor, function: _Function, /, *arguments: Any, **named: Any) -> Any:
            work = watch.wrap(function, watch._names[-1]) if watch._names else function
            return submit(pool, work, *arguments, **named)

        self._set(ThreadPoolExecutor, "submit", submit_named)

    def _install(self, place: str, name: str) -> None:
        module, _, path = place.partition(":")
        owner: Any = import_module(module)
        *classes, attribute = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        found = inspect.getattr_static(owner, attribute)
        original = found.__func__ if isinstance(found, staticmethod) else found
        timed = self.wrap(original, name)
        if classes:
            self._set(owner, attribute, staticmethod(timed) if isinstance(found, staticmethod) else timed)
        for module_name, loaded in list(sys.modules.items()):
            if module_name.partition(".")[0] not in PACKAGES or loaded is None:
                continue
            holders = [vars(loaded), *(value for value in vars(loaded).values() if isinstance(value, dict))]
            for holder in holders:
                for key in [key for key, value in holder.items() if value is original]:
                    self._set(holder, key, timed)

    def _set(self, holder: dict[Any, Any] | type, key: Any, value: Any) -> None:
        before = holder[key] if isinstance(holder, dict) else inspect.getattr_static(holder, key)
        self._replaced.append((holder, key, before))
        if isinstance(holder, dict):
            holder[key] = value
        else:
            setattr(holder, key, value)

    def remove(self) -> None:
        """Put everything back."""
        while self._replaced:
            holder, key, before = self._replaced.pop()
            if isinstance(holder, dict):
                holder[key] = before
            else:
                setattr(holder, key, before)


def io_seconds() -> float:
    """Processor seconds of this process's threads that encrypt and move frames, which run no Python."""
    total = 0.0
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().startswith(IO_THREADS):
                # Linux's clock of a thread by its number, in nanoseconds where /proc counts hundredths of seconds.
                total += time.clock_gettime(~int(task.name) << 3 | 6)
        except OSError:  # a thread that has just ended
            continue
    return total
