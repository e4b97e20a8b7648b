"""Several endpoints in one thread, as if each had its own: while one waits, the others move what they have."""

import time

from transport import Delivery, Endpoint

PATIENCE = 10.0  # seconds; what arrives at all arrives in milliseconds


def arrival(at: Endpoint, *others: Endpoint, patience: float = PATIENCE) -> Delivery | None:
    """The next message at ``at``, or None when patience ends; at the others none may arrive meanwhile."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if (delivery := at.receive(0.002)) is not None:
            return delivery
        for other in others:
            assert other.receive(0.0) is None
    return None
