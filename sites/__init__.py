"""A hospital in a federation: its trainer, its budget, its connection; and the coordinator's program.

``join`` is the way in for code that has a training loop of its own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sites.participant_loop import Federation, Round, join

__all__ = ["Federation", "Round", "join"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  whatever the name stands for
    # Imported on first use: torch takes seconds to load, which the command line must not wait for.
    if name in __all__:
        from sites import participant_loop  # noqa: PLC0415

        return getattr(participant_loop, name)
    raise AttributeError(f"module 'sites' has no attribute {name!r}")
