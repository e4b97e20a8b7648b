"""Ledgers for tests: a site's identity, releases that tell which they are, and a guard that lets everything pass."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dp.events import PoissonSampledGaussian
from dp.ledger import Claim, Ledger, Release, Reservation
from secureagg.identity import Identity

SITE = Identity.from_private_bytes(b"s" * 32)
OTHER = Identity.from_private_bytes(b"o" * 32)
DATASET = "d" * 64
EVENT = PoissonSampledGaussian(sampling_rate=0.25, noise_multiplier=3.5, steps=2)


def open_ledger(path: Path, *, dataset: str = DATASET, unit: str = "patient", signer: Identity = SITE) -> Ledger:
    """The ledger of one site's data in this file, opened or created."""
    return Ledger(path, dataset=dataset, unit=unit, site="a", signer=signer)


def release(number: int, *, run: str = "run", steps: int | None = None, model: str = "m") -> Release:
    """A release that tells by its steps which one it is."""
    event = replace(EVENT, steps=number if steps is None else steps)
    return Release(run=run, round_number=number, event=event, model_sha256=model * 64)


def allow(_: Sequence[Release]) -> Claim:
    """A decision that costs nothing and lets everything pass."""
    return Claim(delta=1e-3, epsilon=0.1, cumulative_epsilon=0.1, budget_epsilon=1.0)


def refuse(_: Sequence[Release]) -> Claim:
    """A decision that lets nothing pass."""
    return Claim(delta=1e-3, epsilon=float("inf"), cumulative_epsilon=2.0, budget_epsilon=1.0, refused="no room")


def reserve(ledger: Ledger, number: int, *, run: str = "run") -> Reservation:
    """Reserve ``release(number)``."""
    return ledger.reserve(release(number, run=run), allow)


def with_sqlite(path: Path, *statements: str) -> None:
    """Tamper with a file as anybody can who has the sqlite3 tool."""
    file = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            file.execute(statement)
    finally:
        file.close()


def bodies(path: Path) -> list[dict[str, object]]:
    """The rows' bodies in a ledger's file."""
    file = sqlite3.connect(path)
    try:
        return [json.loads(body) for (body,) in file.execute("SELECT body FROM rows ORDER BY sequence")]
    finally:
        file.close()
