"""Memory of a process, as Linux tells it, in bytes."""

from pathlib import Path


def resident(pid: int | str = "self") -> int:
    """That a process has now."""
    return _status(pid, "VmRSS")


def peak() -> int:
    """The most that this process had since it began, or since ``forget_peak``."""
    return _status("self", "VmHWM")


def forget_peak() -> None:
    """From now on, the peak is beyond what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(pid: int | str, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024
