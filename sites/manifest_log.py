"""Which manifests were in force at a machine, and what changed each time: a line each in its state folder."""

import time
from pathlib import Path
from typing import Final

import msgspec

from sites.errors import ManifestError
from sites.manifest import Manifest

LOG: Final = "manifests.jsonl"
LAST: Final = "manifest.toml"


class ManifestChange(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest came into force: ``at`` seconds since 1970, its digest in hexadecimal, which revision it is, and the
    names of the sites that the one before had and this one has not, and so on."""

    at: float
    digest: str
    revision: int
    revoked: list[str]
    added: list[str]
    rekeyed: list[str]


def note_manifest(state: Path, manifest: Manifest) -> ManifestChange | None:
    """Write down in the folder ``state`` that ``manifest`` is in force; returns what changed, None if nothing did."""
    last = state / LAST
    try:
        before = Manifest.load(last) if last.exists() else None
    except ManifestError:
        before = None  # damaged: the next one is written down as if it were the first
    if before is not None and before.digest == manifest.digest:
        return None
    changes: dict[str, list[str]] = {"revoked": [], "added": [*manifest.roster], "rekeyed": []}
    if before is not None:
        changes = manifest.changes_from(before)
    change = ManifestChange(
        at=time.time(), digest=manifest.digest.hex(), revision=manifest.consortium.revision, **changes
    )
    with (state / LOG).open("ab") as log:
        log.write(msgspec.json.encode(change) + b"\n")
    manifest.save(last)
    return change
