"""What a coordinator is doing, for its operator: a small file that it keeps, and how that is shown."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from rich.table import Table

from sites.coordinator_loop import STATUS, Status
from sites.errors import ConfigurationError
from sites.manifest import Manifest

DOING: Final = {
    "": "waiting for sites",
    "AdvertisingKeys": "collecting keys",
    "SharingKeys": "collecting shares",
    "CollectingMaskedInputs": "waiting for masked inputs while sites train",
    "CheckingConsistency": "checking that all saw the same survivors",
    "Unmasking": "collecting what takes the masks off",
    "Decrypting": "agreeing on the encrypted sum",
    "Opening": "sites open the sum",
}


def read_status(manifest: Manifest, state: Path) -> Status:
    """The status of the coordinator whose state folder this is; ConfigurationError if there is none of this
    consortium."""
    path = state / STATUS
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Status)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror}, expected the state folder of a coordinator that was started once"
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path}: not a coordinator's status: {error}") from error
    if found.manifest != manifest.digest.hex():
        raise ConfigurationError(
            f"{path}: of the manifest with digest {found.manifest[:16]}..., expected {manifest.digest.hex()[:16]}..."
        )
    return found


def is_running(status: Status) -> bool:
    """Whether the process that wrote the status still is, as far as this machine can tell."""
    if status.over:
        return False
    with suppress(PermissionError):
        try:
            os.kill(status.process, 0)
        except ProcessLookupError:
            return False
    return True


def status_table(status: Status, manifest: Manifest) -> Table:
    """The status as people read it."""
    table = Table(title=f"Consortium {manifest.consortium.name}, run {status.run}", title_justify="left")
    table.show_header = False
    now = time.time()
    running = is_running(status)
    if status.over:
        doing = f"over: {status.over}"
    elif running:
        doing = f"{DOING[status.phase]}, for {_ago(now - status.since)}"
    else:
        doing = f"not running, since it was {DOING[status.phase]}; start it again to go on"
    rounds = manifest.training.rounds
    number = "the final evaluation" if status.number > rounds else f"round {status.number} of {rounds}"
    table.add_row("doing", doing)
    table.add_row("round", number if status.number else "none yet")
    table.add_row("sites present", f"{len(status.present)} of {len(manifest.sites)}: {', '.join(status.present)}")
    if running and status.waiting_for:
        table.add_row("waiting for", ", ".join(status.waiting_for))
    if missing := sorted({entry.name for entry in manifest.sites} - {*status.present, *status.excluded}):
        table.add_row("missing", ", ".join(missing))
    for site, code in status.excluded.items():
        table.add_row("excluded", f"{site} ({code})")
    if (last := status.last) is not None:
        result = last.error or f"summed {len(last.survivors)} sites"
        table.add_row("last round", f"{last.number}, {last.purpose}: {result}, {sum(last.seconds.values()):.1f} s")
        for phase, seconds in last.seconds.items():
            table.add_row(f"  {DOING[phase]}", f"{seconds:.2f} s")
        for site, phase in last.dropped.items():
            table.add_row("  dropped", f"{site} while {DOING[phase]}")
    return table


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
