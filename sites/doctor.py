"""What can be wrong at a site before a run, each with what to do about it: `secureagg doctor SITE.toml`.

Nothing is changed and nothing about the site's data is read or sent; the coordinator sees a connection that comes and
goes.
"""

import importlib
import os
import platform
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlparse

import msgspec
import zmq

from sites.config import OpenSite, SiteConfig, load_config, open_site
from sites.errors import SiteError
from sites.keys import load_keys
from sites.manifest import Manifest
from sites.rounds import transport_limits
from transport import COORDINATOR, TransportError, connect

PACKAGES: Final = ("secureagg", "dp", "transport", "sites")
PATIENCE_SECONDS: Final = 10.0
_RIVAL_SECONDS: Final = 0.5  # for the coordinator to say that this key is in use


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found, and what to do if it is not ``good``."""

    check: str
    good: bool
    found: str
    advice: str = ""


class _Sick(Exception):
    """What a check found, and what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.found, self.advice = found, advice


def examine(path: Path, *, patience: float = PATIENCE_SECONDS) -> list[Finding]:
    """Every check of the site that the SITE.toml at ``path`` describes; those that need what is broken are left out.

    ``patience``: seconds to wait for the coordinator.
    """
    return list(_findings(path, patience))


def _findings(path: Path, patience: float) -> Iterator[Finding]:
    yield _try("versions", _versions)
    yield _try("packages", _packages)
    yield (read := _try("configuration", lambda: _configuration(path)))
    if not read.good:
        return
    config, folder = load_config(path), path.parent
    yield _try("keys", lambda: _keys(folder / config.keys))
    yield _try("manifest", lambda: _manifest(folder / config.manifest, config))
    yield _try("state folder", lambda: _state(folder / config.state))
    yield _try("clock", lambda: _clock(folder, config))
    yield (agreed := _try("agreement", lambda: _agreement(path)))
    if agreed.good:
        yield _try("coordinator", lambda: _coordinator(open_site(path), patience))


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, look())
    except _Sick as sick:
        return Finding(check, False, sick.found, sick.advice)
    except OSError as error:
        return Finding(
            check, False, f"{error.filename or 'system'}: {error.strerror}", "make it readable for this user"
        )


def _versions() -> str:
    if not zmq.has("curve"):
        raise _Sick(f"libzmq {zmq.zmq_version()} without CURVE", "install pyzmq from its wheel: pip install pyzmq")
    return f"{_installed().version}, Python {platform.python_version()}, libzmq {zmq.zmq_version()}"


def _installed() -> Distribution:
    try:
        return distribution("secureagg")
    except PackageNotFoundError as error:
        raise _Sick("secureagg is not installed, only found", "pip install secureagg, and run the installed") from error


def _packages() -> str:
    """Stops a folder of that name in the working directory, or on PYTHONPATH, from running in place of what was
    installed."""
    installed = _installed()
    origin = installed.read_text("direct_url.json")
    source = msgspec.json.decode(origin) if origin else {}
    editable = source.get("dir_info", {}).get("editable", False)
    for name in PACKAGES:
        imported = Path(importlib.import_module(name).__file__ or "").resolve()
        place = f"{name}/__init__.py"
        root = Path(unquote(urlparse(source["url"]).path)) if editable else None
        expected = (root / place if root else Path(str(installed.locate_file(place)))).resolve()
        if imported != expected:
            raise _Sick(
                f"{name} comes from {imported.parent}, expected {expected.parent}",
                "run it from another folder, and unset PYTHONPATH",
            )
    return f"{len(PACKAGES)} as installed{', from a source folder' if editable else ''}"


def _configuration(path: Path) -> str:
    try:
        config = load_config(path)
    except SiteError as error:
        raise _Sick(str(error), "`secureagg consortium sign --site-config` writes one") from error
    return f"site {config.name}"


def _keys(path: Path) -> str:
    try:
        keys = load_keys(path)
    except SiteError as error:
        raise _Sick(str(error), f"chmod 600 {path}, or restore the file from your own copy") from error
    return f"keys of {keys.site}, mode {stat.S_IMODE(path.stat().st_mode):o}"


def _manifest(path: Path, config: SiteConfig) -> str:
    try:
        manifest = Manifest.load(path)
        manifest.check()
    except SiteError as error:
        raise _Sick(str(error), "get the manifest that all sites have signed, or the missing signatures") from error
    if manifest.digest.hex() != config.manifest_sha256:
        raise _Sick(
            f"digest {manifest.digest.hex()[:16]}..., pinned is {config.manifest_sha256[:16]}...",
            "compare by telephone; sign the new manifest if the change is meant",
        )
    return f"signed by all {len(manifest.roster)} sites, digest {manifest.digest.hex()[:16]}..."


def _state(folder: Path) -> str:
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise _Sick(f"{place} cannot be written", "give this user the right to write there")
    if folder.exists() and folder.stat().st_mode & stat.S_IWOTH:
        raise _Sick(f"{folder} can be written by everybody", f"chmod o-w {folder}")
    return f"{folder} {'is there' if folder.exists() else 'will be made'}"


def _clock(folder: Path, config: SiteConfig) -> str:
    now = time.time()
    known = [folder / config.manifest, folder / config.keys, *sorted((folder / config.state).glob("*.sqlite"))]
    for path in known:
        if path.exists() and path.stat().st_mtime > now + 60:
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            raise _Sick(
                f"it is earlier than {written:%Y-%m-%d %H:%M} UTC, when {path.name} was written", "set the clock"
            )
    return f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC"


def _agreement(path: Path) -> str:
    try:
        site = open_site(path)
    except SiteError as error:
        raise _Sick(str(error), "see above; if all else is good, the manifest is weaker than your own rules") from error
    alone = site.manifest.evaluation.personalised and site.config.personalisation is None
    return f"{site.name} takes part under its own rules" + (
        ", but not in the evaluation, for want of [personalisation] in its SITE.toml" if alone else ""
    )


def _coordinator(site: OpenSite, patience: float) -> str:
    coordinator = site.manifest.coordinator
    try:
        endpoint = connect(
            coordinator.address,
            secret_key=site.keys.transport_secret,
            server_key=coordinator.card.transport_key,
            limits=transport_limits(site.manifest),
        )
    except TransportError as error:
        raise _Sick(str(error), "the manifest has to name a real address") from error
    with endpoint:
        began = time.monotonic()
        while (reason := endpoint.why_silent()) is not None and time.monotonic() - began < patience:
            endpoint.receive(0.05)
        seconds = time.monotonic() - began
        endpoint.receive(_RIVAL_SECONDS)
        reason = reason or endpoint.why_silent()
        endpoint.discard_waiting(COORDINATOR)
    if reason is not None:
        raise _Sick(reason, next((advice for words, advice in _ADVICE.items() if words in reason), _UNREACHABLE))
    return f"{coordinator.address} shakes hands, {seconds:.2f} s"


_UNREACHABLE: Final = "is it running, and does the firewall let this machine reach that port?"
_ADVICE: Final = {
    "does not admit": "the coordinator runs with another manifest, in which this site has other keys: compare digests",
    "handshake fails": "the coordinator runs with other keys than the manifest has, or something else listens there",
    "another machine": "this site's program is running already; if not, somebody has its keys: make new ones",
}
