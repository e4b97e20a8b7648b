"""Taking times of several functions by turns, so that a busy machine slows all of them."""

import time
from collections.abc import Callable


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, by ``clock``."""
    began = clock()
    function()
    return clock() - began


def by_turns(
    repeats: int, functions: dict[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """``repeats`` times of each function; the first turn, which finds no memory and no code yet, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            spent = seconds(function, clock)
            if turn:
                times[name].append(spent)
    return times
