"""How long to wait before the next attempt to reach a peer that is gone."""

from collections.abc import Callable
from secrets import SystemRandom
from typing import Final

_uniform: Final = SystemRandom().uniform


class Backoff:
    """Doubles the wait with each failure, from ``first`` to ``most`` seconds, and draws it from the upper half of that.

    Without the draw all sites would come back at the same moments after a coordinator's restart, and again after each
    refusal.  ``uniform``: as ``random.uniform``.
    """

    def __init__(self, *, first: float, most: float, uniform: Callable[[float, float], float] = _uniform) -> None:
        self._first, self._most, self._uniform = first, most, uniform
        self._failures = 0

    def failed(self) -> float:
        """Seconds until the next attempt."""
        longest = self._first
        for _ in range(self._failures):
            longest = min(self._most, 2 * longest)
            if longest == self._most:
                break
        self._failures += 1
        return self._uniform(longest / 2, longest)

    def succeeded(self) -> None:
        """The peer was reached: begin with short waits again."""
        self._failures = 0
