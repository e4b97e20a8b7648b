"""What a site and the coordinator spend on one round as the cohort grows, on the complete and on the sparse graph.

    python -m benchmarks graph [--quick] [--json FILE]

Whole rounds in process with a short lane, so that keys, shares and signatures are what is measured; a tenth of the
sites sends no masked input.  ``k``: holders of each site's shares; times are processor times of one thread.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import LANE, machines
from secureagg import encode_input
from secureagg.codec import encode
from secureagg.messages import MaskedInput
from secureagg.parameters import Graph
from secureagg.phases import Aborted, CollectingMaskedInputs, CoordinatorFinished

LENGTH = 16


def measure(cohort_size: int, graph: Graph) -> dict[str, float]:
    """One round; the sites' figures are the mean over those that stay to the end."""
    made = machines(cohort_size, LENGTH, graph=graph)
    parameters, participants, coordinator = made.parameters, made.participants, made.coordinator
    sites = list(participants)
    silent = set(sites[::10])
    spent = dict.fromkeys(sites, 0.0)
    sent, received = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)
    summing = 0.0
    pending = []
    for site, participant in participants.items():
        began = time.process_time()
        pending += [(site, message) for message in participant.start()]
        spent[site] += time.process_time() - began
        pending += [(site, m) for m in participant.submit(encode_input(parameters, {LANE: np.zeros(LENGTH)}))]
    while not isinstance(coordinator.phase, CoordinatorFinished | Aborted):
        outbound = []
        began = time.process_time()
        for site, message in pending:
            if site in silent and isinstance(message, MaskedInput):
                continue
            outbound += coordinator.receive(message, sender=site)
        if isinstance(coordinator.phase, CollectingMaskedInputs) and not outbound:
            outbound = coordinator.close_phase()
        summing += time.process_time() - began
        sent_now = [(site, sum(map(len, encode(message)))) for site, message in pending]
        for site, size in sent_now:
            sent[site] += size
        pending = []
        for item in outbound:
            received[item.recipient] += sum(map(len, encode(item.message)))
            began = time.process_time()
            pending += [(item.recipient, answer) for answer in participants[item.recipient].receive(item.message)]
            spent[item.recipient] += time.process_time() - began
    if isinstance(coordinator.phase, Aborted):
        raise coordinator.phase.error
    stayed = [site for site in sites if site not in silent]
    return {
        "sites": cohort_size,
        "k": parameters.neighbours or cohort_size - 1,
        "t": parameters.threshold,
        "site ms": 1000 * sum(spent[site] for site in stayed) / len(stayed),
        "sent KB": sum(sent[site] for site in stayed) / len(stayed) / 1000,
        "received KB": sum(received[site] for site in stayed) / len(stayed) / 1000,
        "coordinator s": summing,
    }


def main() -> None:
    """Measure, print a table, and with ``--json`` write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 200 sites")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases: list[tuple[int, Graph]] = [(50, "complete"), (100, "complete"), (100, "sparse"), (200, "sparse")]
    if not arguments.quick:
        cases += [(200, "complete"), (500, "sparse"), (1000, "sparse")]
    rows = []
    table = Table(title="One round, a tenth of the sites dropping out before its masked input", title_justify="left")
    for size, graph in cases:
        figures = measure(size, graph)
        figures["ms per k"] = figures["site ms"] / figures["k"]
        if not rows:
            table.add_column("graph")
            for name in figures:
                table.add_column(name, justify="right")
        rows.append({"graph": graph, **figures})
        table.add_row(
            graph, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in figures.values())
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
