"""Waiting before the next attempt: doubled, bounded, drawn."""

import pytest

from transport.backoff import Backoff


def waits(count: int, uniform) -> list[float]:
    """The waits after so many failures in a row."""
    backoff = Backoff(first=0.5, most=8.0, uniform=uniform)
    return [backoff.failed() for _ in range(count)]


def test_doubles_up_to_the_most() -> None:
    """The longest wait doubles with each failure and stays at the most; the shortest is half of it."""
    assert waits(7, lambda _low, high: high) == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert waits(7, lambda low, _high: low) == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_begins_again_after_success() -> None:
    """Once the peer was reached the next wait is short again."""
    backoff = Backoff(first=0.5, most=8.0, uniform=lambda _low, high: high)
    assert [backoff.failed(), backoff.failed()] == [0.5, 1.0]
    backoff.succeeded()
    assert backoff.failed() == 0.5


def test_two_sites_do_not_wait_alike() -> None:
    """Waits are drawn from the system's randomness: twenty of two sites are not the same."""
    one, other = (Backoff(first=0.5, most=8.0) for _ in range(2))
    pairs = [(one.failed(), other.failed()) for _ in range(20)]
    assert all(first != second for first, second in pairs)
    assert all(0.25 <= wait <= 8.0 for pair in pairs for wait in pair)


@pytest.mark.parametrize("failures", [1_000])
def test_many_failures(failures: int) -> None:
    """After any number of failures the wait is the most, computed at once."""
    assert waits(failures, lambda _low, high: high)[-1] == 8.0
