"""The state diagrams of docs/protocol.md, made from the machines' own tables.

PYTHONPATH=tests .venv/bin/python -m support.diagrams        writes them into the document
"""

import re
import typing
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from secureagg import coordinator, participant
from secureagg.participant import Participant
from secureagg.phases import Aborted, AwaitingInput, CoordinatorFinished, Created, OpeningAggregate

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
BEGIN, END = "<!-- diagrams: made by tests/support/diagrams.py -->\n", "<!-- end of diagrams -->\n"


def target(handler: object) -> str:
    """The phase that a handler of the participant leads to, from its checked annotation."""
    phase, _ = typing.get_args(typing.get_type_hints(handler)["return"])
    return str(phase.__name__)


def of_the_participant(table: Mapping[tuple[type, type], object]) -> str:
    """The site's phases: what it waits for, and what it gets there."""
    lines = [f"    [*] --> {Created.__name__}", f"    {Created.__name__} --> AwaitingCohortKeys: start"]
    for (phase, message), handler in table.items():
        if target(handler) != Aborted.__name__:
            lines.append(f"    {phase.__name__} --> {target(handler)}: {message.__name__}")
    lines.append(f"    {AwaitingInput.__name__} --> {target(Participant._send_masked_input)}: own input")
    if any(phase is OpeningAggregate for phase, _ in table):
        lines.append(f"    {OpeningAggregate.__name__} --> {target(Participant._sign_ciphertexts)}: last chunk")
    return diagram(lines, "ParticipantFinished")


def of_the_coordinator(table: Iterable[tuple[type, type]]) -> str:
    """The coordinator's phases: what it collects in each, until all have answered or time is up."""
    collected: dict[type, str] = {}
    for phase, message in table:
        collected[phase] = f"{collected[phase]} or {message.__name__}" if phase in collected else message.__name__
    phases = [*collected, CoordinatorFinished]
    lines = [f"    [*] --> {phases[0].__name__}"]
    for phase, following in pairwise(phases):
        lines.append(f"    {phase.__name__} --> {following.__name__}: each {collected[phase]}, or time is up")
    return diagram(lines, CoordinatorFinished.__name__)


def diagram(lines: list[str], last: str) -> str:
    """A Mermaid diagram."""
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, f"    {last} --> [*]", "```", ""])


def text() -> str:
    """The diagrams as they stand in the document."""
    return (
        f"{BEGIN}\nA site on the complete graph; anything else that arrives leads to `Aborted`, and so does "
        f"`RoundFailed`:\n\n{of_the_participant(participant.COMPLETE)}\n"
        f"A site on the sparse graph:\n\n{of_the_participant(participant.SPARSE)}\n"
        "The coordinator on the complete graph; too few answers lead to `Aborted`:\n\n"
        f"{of_the_coordinator(coordinator.COMPLETE)}\n"
        f"The coordinator on the sparse graph:\n\n{of_the_coordinator(coordinator.SPARSE)}\n"
        f"A site with the homomorphic backend:\n\n{of_the_participant(participant.HOMOMORPHIC)}\n"
        "The coordinator with the homomorphic backend; its last phase collects the one or the other, as the round says "
        f"who is given the sum:\n\n{of_the_coordinator(coordinator.HOMOMORPHIC)}\n{END}"
    )


def main() -> None:
    """Put the diagrams into the document."""
    found = re.search(re.escape(BEGIN) + ".*" + re.escape(END), DOCUMENT.read_text(), re.DOTALL)
    assert found, f"{DOCUMENT} has no place for the diagrams"
    DOCUMENT.write_text(DOCUMENT.read_text().replace(found[0], text()))


if __name__ == "__main__":
    main()
