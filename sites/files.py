"""Writing files so that a crash leaves the old or the new content, and keeping private ones private."""

import os
import secrets
import stat
from pathlib import Path
from typing import Final

import msgspec

from sites.errors import ConfigurationError, KeyFileError

PRIVATE_MODE: Final = 0o600


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace ``path`` by ``data`` in one step, if ``durable`` on disk when this returns; ConfigurationError naming it
    if that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from error


def write_json(path: Path, value: object, *, mode: int = 0o644) -> None:
    """``write_atomic`` of ``value`` as JSON that people can read."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value)) + b"\n", mode=mode)


def sync_folder(path: Path) -> None:
    """Return once it is on disk which files are in a folder, and under what names."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def use_up(path: Path) -> bool:
    """Whether the mark ``path`` was not there; now it is, on disk.  Of several who ask, one is told so."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from error
    sync_folder(path.parent)
    return True


def create_private(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read; KeyFileError if it exists, so that no key is ever overwritten."""
    if path.exists():
        raise KeyFileError(f"{path}: exists already; keys are never overwritten, so move it away first")
    write_atomic(path, data, mode=PRIVATE_MODE)


def read_private(path: Path) -> bytes:
    """The content of a file that only its owner may read; KeyFileError, with the remedy, if others may too."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        # Stops a key that another account of the machine, or a backup that copies modes, can read.
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyFileError(f"{path}: file mode {mode:03o}, expected {PRIVATE_MODE:03o}; run `chmod 600 {path}`")
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from error
