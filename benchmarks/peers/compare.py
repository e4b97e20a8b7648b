"""The same updates through this library and through its peers, in one run: what it costs, what survives, who can read.

Each peer runs its own code in an environment of its own (``make bench-peers``; the scripts ``drive_*.py`` say what each
was given) and is asked by turns with a round of ours over the same file, so that a busy machine slows both.  Times are
processor times of all threads, without the network; wall times, which others' work disturbs, are in the JSON too.
What a peer cannot do stands in its place as a text.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.masking import SITES, Round
from benchmarks.peers.answering import Answer, Spent
from benchmarks.peers.asking import Peer, PeerRefused, PeerUnavailable
from benchmarks.peers.ours import whole_round
from benchmarks.record import Figure, Grid, Record, ratios, shown
from secureagg.parameters import Backend, choose_thresholds
from secureagg.shamir import lagrange_coefficients, reconstruct, share

ROWS = 4  # updates in the file; site i sends row i modulo this
OURS: Mapping[Backend, str] = {"masked": "ours masked", "homomorphic": "ours homomorphic"}
TRIAL_SITES = 8  # of rounds that only show whether they survive
HOLDERS, THRESHOLD, SECRETS = 100, 67, 20

BEFORE, AFTER = "a site is gone before it shares its keys", "a site is gone after keys are shared"
SURVIVES = "survives"
EXACT, READS = "exactness of the sum", "who can read one site's update"

# What of an answer is a figure: name -> unit and where it stands.
QUANTITIES: Mapping[str, tuple[str, Callable[[Answer], Any]]] = {
    "client": ("s", lambda one: one["client"]["processor"]),
    "client, until its input is sent": ("s", lambda one: one["input"]["processor"]),
    "server, for each site": ("s", lambda one: one["server"]["processor"]),
    "bytes up per parameter": ("", lambda one: one["bytes"]),
    "largest error of the mean": ("", lambda one: one["error"]),
    "client, wall time": ("s", lambda one: one["client"]["wall"]),
    "server, for each site, wall time": ("s", lambda one: one["server"]["wall"]),
}
COMPARED = {
    "client": "client / ours",
    "client, until its input is sent": "client until its input is sent / ours",
    "server, for each site": "server / ours",
    "bytes up per parameter": "our bytes up / theirs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    sites: int
    values: int
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A peer's scheme, what of ours it is compared with, and what was found by reading and trying it.

    ``asked``: arguments of every round; ``trial``: values of rounds that only show whether they survive; ``gone``:
    question -> arguments that make the last of TRIAL_SITES disappear, or why that is not tried; ``tried``: figure ->
    command and key of its answer, of attempts to read one site's update.
    """

    name: str
    peer: str
    against: Backend
    full: Size
    quick: Size
    exact: str
    reads: str
    gone: Mapping[str, Mapping[str, object] | str]
    asked: Mapping[str, object] = field(default_factory=dict)
    trial: int = 1000
    tried: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    wanted: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, sites: int) -> dict[str, object]:
        """Of a round among ``sites``.  Flower gets the threshold that ours has: it has no default."""
        given = dict(self.asked)
        if self.peer == "flower":
            given |= {"threshold": choose_thresholds(sites).threshold, "silent": {}}
        return given | {"sites": sites}


NO_SHARES = "none: keys are fixed before the first round and nothing is shared"
SYSTEMS = (
    System(
        name="Flower SecAgg+",
        peer="flower",
        against="masked",
        full=Size(sites=SITES, values=10_000_000, repeats=3),
        quick=Size(sites=SITES, values=100_000, repeats=2),
        exact="exact sum modulo 2^32 of values rounded at random to 22 bits over [-8, 8]; a warning if it may overflow",
        reads=(
            "the server: keys are unsigned and pass through it (secaggplus_mod.py); whoever sees an upload: masks are "
            "MT19937 with the seeds below (secaggplus_utils.py)"
        ),
        gone={BEFORE: {"silent": {TRIAL_SITES: 1}}, AFTER: {"silent": {TRIAL_SITES: 2}}},
        tried={
            "bits of a self mask's seed that vary": ("seed bits", "self mask"),
            "bits of a pairwise mask's seed that vary": ("seed bits", "pairwise mask"),
        },
        wanted={"client / ours": ">= 8", "our bytes up / theirs": "<= 0.334"},
    ),
    System(
        name="NVFlare HE",
        peer="nvflare",
        against="homomorphic",
        full=Size(sites=SITES, values=1_000_000, repeats=3),
        quick=Size(sites=TRIAL_SITES, values=50_000, repeats=2),
        exact="approximate (CKKS, scale 2^40)",
        reads=(
            "every site: CKKS of N = 8192 and 140 bits is secure, but all kits hold the one secret key; so the server "
            "with any one site (lighter/impl/he.py)"
        ),
        gone={BEFORE: "none: nothing is shared, the key is in the kit", AFTER: {"missing": 1}},
        tried={"error of one site's upload, opened with another site's kit": ("round", "opened by another site")},
        wanted={
            "client / ours": ">= 8",
            "client until its input is sent / ours": ">= 8",
            "server / ours": ">= 8",
            "our bytes up / theirs": "<= 0.1",
        },
    ),
    System(
        name="Fed-BioMed LOM",
        peer="fedbiomed",
        against="masked",
        asked={"scheme": "LOM"},
        full=Size(sites=SITES, values=100_000, repeats=5),
        quick=Size(sites=SITES, values=10_000, repeats=2),
        exact="exact sum of values cut to 13 bits over [-3, 3]; a warning if they are clipped",
        reads=(
            "ChaCha20 with 128 bits of key, but one keystream masks all vectors of a round (_lom.py): the researcher, "
            "who knows the check value, reads the first value of each; who relays the nodes' keys can replace them: "
            "they are agreed under a private key in the package (node/requests/_overlay.py), not tried"
        ),
        gone={BEFORE: NO_SHARES, AFTER: {"missing": 1}},
        tried={
            "error of the first value, opened by the researcher": ("repeated keystream", "error of the first value")
        },
    ),
    System(
        name="Fed-BioMed Joye-Libert",
        peer="fedbiomed",
        against="masked",
        asked={"scheme": "Joye-Libert"},
        trial=20,
        full=Size(sites=8, values=20_000, repeats=3),
        quick=Size(sites=8, values=1000, repeats=2),
        exact="exact sum of values cut to 13 bits over [-3, 3]; a warning if they are clipped",
        reads=(
            "whoever factors its modulus: 1,024 bits, one for all, in the package (get_default_biprime); who drew it "
            "may know the factors"
        ),
        gone={BEFORE: NO_SHARES, AFTER: {"missing": 1}},
    ),
    System(
        name="DecLearn masking",
        peer="declearn",
        against="masked",
        asked={"scheme": "masking"},
        full=Size(sites=SITES, values=100_000, repeats=5),
        quick=Size(sites=SITES, values=10_000, repeats=2),
        exact="exact sum modulo 2^64 of values rounded to 60 bits (for 16 sites) over [-10^5, 10^5]",
        reads=(
            "masks are PCG64 (masking/_encrypt.py), which is no cipher and goes on from round to round; keys are X3DH "
            "with pinned Ed25519 identities (x3dh/_setup.py); not tried"
        ),
        gone={BEFORE: NO_SHARES, AFTER: {"missing": 1}},
    ),
    System(
        name="DecLearn Joye-Libert",
        peer="declearn",
        against="masked",
        asked={"scheme": "Joye-Libert"},
        trial=20,
        full=Size(sites=4, values=1000, repeats=3),
        quick=Size(sites=4, values=100, repeats=2),
        exact="exact sum of values rounded to 64 bits over [-10^5, 10^5]",
        reads=(
            "the server, if it knows one value, such as the number of steps: the factors of the default modulus of "
            "1,023 bits are in the source (joye_libert/_primitives.py)"
        ),
        gone={BEFORE: NO_SHARES, AFTER: {"missing": 1}},
        tried={"error of one site's upload, opened with the factors in the source": ("opened", "error")},
    ),
)


class Inputs:
    """Files of ROWS updates each, uniform in [-1, 1] as float32: nothing is clipped anywhere."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, values: int) -> Path:
        """The file of this length, made when first asked for."""
        path = self._folder / f"{values}.npy"
        if not path.exists():
            np.save(path, np.random.default_rng(0).uniform(-1, 1, (ROWS, values)).astype(np.float32))
        return path

    def rows(self, values: int) -> np.ndarray:
        """What is in it."""
        return np.load(self.path(values), mmap_mode="r")


def by_turns(
    peer: Peer,
    command: str,
    inputs: Inputs,
    size: Size,
    arguments: Mapping[str, object],
    ours: Callable[[], Answer],
    *,
    trial: int = 1000,
) -> tuple[list[Answer], list[Answer]]:
    """Theirs and ours, after a round of ``trial`` values with which they load their code."""
    peer.ask(command, path=str(inputs.path(trial)), **arguments)
    theirs, own = [], []
    for _ in range(size.repeats):
        own.append(ours())
        theirs.append(peer.ask(command, path=str(inputs.path(size.values)), **arguments))
    return theirs, own


def costs(system: System, peer: Peer, inputs: Inputs, *, full: bool) -> Iterator[Figure]:
    """Whole rounds by turns: theirs, ours beside them, and the ratios of each turn."""
    size = system.full if full else system.quick
    at: dict[str, Any] = {"sites": size.sites, "values": size.values}
    rows = inputs.rows(size.values)
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:

        def ours_twice() -> Answer:
            alone = whole_round(rows, size.sites, backend=system.against)
            if system.peer != "flower":
                return alone
            spread = whole_round(rows, size.sites, backend=system.against, spread=pool.map)
            return alone | {"spread": spread["client"]["wall"]}

        answers, own = by_turns(
            peer, "round", inputs, size, system.arguments(size.sites), ours_twice, trial=system.trial
        )
    beside = f"{OURS[system.against]} beside {system.name}"
    for name, (unit, value) in QUANTITIES.items():
        if name == "client, until its input is sent" and "input" not in answers[0]:
            continue  # it has nothing to do afterwards
        theirs, ours = ([value(one) for one in each] for each in (answers, own))
        yield Figure(name, theirs, unit, at={"system": system.name, **at})
        yield Figure(name, ours, unit, at={"system": beside, **at})
        if name in COMPARED:
            compared = COMPARED[name]
            pair = (ours, theirs) if compared.startswith("our") else (theirs, ours)
            wanted = system.wanted.get(compared, "")
            yield Figure(compared, ratios(*pair), wanted=wanted, at={"system": system.name, **at})

    if "spread" in own[0]:  # as a site does it, which uses all cores
        theirs, ours = [one["client"]["wall"] for one in answers], [one["spread"] for one in own]
        yield Figure(f"client, wall time, {threads} threads", ours, "s", at={"system": beside, **at})
        name = f"client, wall time / ours on {threads} threads"
        yield Figure(name, ratios(theirs, ours), wanted=">= 8", at={"system": system.name, **at})


def protection(system: System, peer: Peer, inputs: Inputs) -> Iterator[Figure]:
    """What dropouts do to a round, tried; who can read what, read in its source and partly tried."""
    at = {"system": system.name}
    path = str(inputs.path(system.trial))
    for name, how in system.gone.items():
        if isinstance(how, str):
            yield Figure(name, text=how, at=at)
            continue
        found = peer.ask("round", path=path, **{**system.arguments(TRIAL_SITES), **how})
        why = "; ".join([found.get("failed", "a wrong sum"), *found.get("errors", [])])
        yield Figure(name, text=SURVIVES if found["survived"] else f"fails: {why}", at=at)
    yield Figure(EXACT, text=system.exact, at=at)
    yield Figure(READS, text=system.reads, at=at)
    for name, (command, key) in system.tried.items():
        arguments = {"path": path, **system.arguments(TRIAL_SITES)} if command == "round" else {}
        yield Figure(name, [peer.ask(command, **arguments)[key]], at=at)


def our_protection(inputs: Inputs) -> Iterator[Figure]:
    """The same of ours."""
    rows = inputs.rows(1000)
    corrupt = choose_thresholds(SITES).max_corrupt
    for backend, name in OURS.items():
        at = {"system": name}
        for question, phase in ((BEFORE, "SharingKeys"), (AFTER, "CollectingMaskedInputs")):
            found = whole_round(rows, TRIAL_SITES, backend=backend, silent={TRIAL_SITES - 1: phase})
            yield Figure(question, text=SURVIVES if found["survived"] else f"fails: {found['failed']}", at=at)
        yield Figure(EXACT, text="exact sum of values rounded at random to 16 bits over [-1, 1]", at=at)
        sealed = "" if backend == "masked" else "; the coordinator alone not even the sum"
        who = f"the coordinator with more than {corrupt} of {SITES} sites (AES-256-CTR, X25519, signed and pinned keys)"
        yield Figure(READS, text=who + sealed, at=at)


def flowers_functions(peer: Peer, inputs: Inputs, *, full: bool) -> Iterator[Figure]:
    """A masked input of Flower's functions alone, without its messages, beside ours, and its secret sharing."""
    size = Size(sites=SITES, values=10_000_000 if full else 100_000, repeats=5 if full else 3)
    at: dict[str, Any] = {"system": "Flower's functions alone", "sites": SITES, "values": size.values}
    prepared, update = Round(size.values), inputs.rows(size.values)[0].copy()

    def ours() -> Answer:
        with Spent() as client:
            prepared.masked_input(update)
        return {"client": client.each(1)}

    arguments = {"neighbours": SITES - 1}
    answers, own = by_turns(peer, "functions", inputs, size, arguments, ours)
    theirs, ours_spent = ([one["client"]["processor"] for one in each] for each in (answers, own))
    yield Figure("masked input", theirs, "s", at=at)
    yield Figure("masked input", ours_spent, "s", at={**at, "system": "ours beside Flower's functions alone"})
    yield Figure("masked input / ours", ratios(theirs, ours_spent), wanted=">= 8", at=at)
    found = peer.ask("peak", path=str(inputs.path(size.values)), **arguments)
    yield Figure("peak memory of a masked input / float32", [found["peak"]], at=at)


def secret_sharing(peer: Peer, *, full: bool) -> Iterator[Figure]:
    """Flower's Shamir functions for one 32-byte secret, beside ours; reconstructing is that of SECRETS by one set of
    holders, who have one set of coefficients."""
    at: dict[str, Any] = {"system": "Flower's functions alone", "holders": HOLDERS, "threshold": THRESHOLD}
    secrets = [os.urandom(32) for _ in range(SECRETS)]
    theirs, ours = {"share": [], "reconstruct": []}, {"share": [], "reconstruct": []}
    for _ in range(5 if full else 1):
        with (sharing := Spent()):
            dealt = [
                share(each, threshold=THRESHOLD, positions=range(1, HOLDERS + 1), entropy=os.urandom)
                for each in secrets
            ]
        with (rebuilding := Spent()):
            coefficients = lagrange_coefficients(range(1, THRESHOLD + 1))
            found = [
                reconstruct({at: each[at] for at in coefficients}, coefficients, owner="x", who="x") for each in dealt
            ]
        if found != secrets:
            raise SystemExit("a secret was not reconstructed")
        answer = peer.ask("secrets", holders=HOLDERS, threshold=THRESHOLD)
        for name, spent in (("share", sharing), ("reconstruct", rebuilding)):
            ours[name].append(spent.each(SECRETS)["processor"])
            theirs[name].append(answer[name]["processor"])
    for name, what in (("share", "sharing a secret"), ("reconstruct", "reconstructing a secret")):
        yield Figure(what, theirs[name], "s", at=at)
        yield Figure(what, ours[name], "s", at={**at, "system": "ours beside Flower's functions alone"})
        yield Figure(f"{what} / ours", ratios(theirs[name], ours[name]), wanted=">= 50", at=at)


def unmasking(system: System, peer: Peer, inputs: Inputs, *, full: bool) -> Iterator[Figure]:
    """The coordinator's last step with a tenth of the sites gone after keys are shared, against Flower's workflow."""
    size = Size(sites=50, values=1_000_000, repeats=3) if full else Size(sites=10, values=50_000, repeats=1)
    gone = range(size.sites - size.sites // 10, size.sites)
    at: dict[str, Any] = {"sites": size.sites, "gone": len(gone), "values": size.values}
    rows = inputs.rows(size.values)
    silent = dict.fromkeys(gone, "CollectingMaskedInputs")
    arguments = system.arguments(size.sites) | {"silent": {site + 1: 2 for site in gone}}
    answers, own = by_turns(
        peer, "round", inputs, size, arguments, lambda: whole_round(rows, size.sites, silent=silent)
    )
    if not all(one["survived"] for one in (*answers, *own)):
        raise PeerRefused("a round with a tenth of the sites gone did not survive")
    theirs, ours = ([one["unmask"]["processor"] for one in each] for each in (answers, own))
    yield Figure("unmasking", theirs, "s", at={"system": system.name, **at})
    yield Figure("unmasking", ours, "s", at={"system": OURS["masked"], **at})
    yield Figure("unmasking / ours", ratios(theirs, ours), wanted=">= 15", at={"system": system.name, **at})


def compared(
    peer_name: str, systems: Sequence[System], inputs: Inputs, *, full: bool, ask: Callable[[str], Peer] = Peer
) -> list[Figure]:
    """All figures of the systems of one peer; where it cannot be asked, one for each that says why."""
    figures: list[Figure] = []
    left = list(systems)
    try:
        with ask(peer_name) as peer:
            while left:
                at = {"system": left[0].name}
                figures.append(Figure("versions", text=_listed(peer.versions), at=at))
                for what, part in _parts(left[0], peer, inputs, full=full).items():
                    try:
                        figures.extend(part)
                    except PeerRefused as error:
                        figures.append(Figure(what, text=f"fails: {error}", at=at))
                left.pop(0)
    except PeerUnavailable as error:
        figures += [Figure("not measured", text=str(error), at={"system": system.name}) for system in left]
    return figures


def _parts(system: System, peer: Peer, inputs: Inputs, *, full: bool) -> dict[str, Iterator[Figure]]:
    parts = {"costs": costs(system, peer, inputs, full=full)}
    if system.peer == "flower":
        parts["functions alone"] = flowers_functions(peer, inputs, full=full)
        parts["secret sharing"] = secret_sharing(peer, full=full)
        parts["unmasking"] = unmasking(system, peer, inputs, full=full)
    return parts | {"protection": protection(system, peer, inputs)}


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def measure(*, full: bool) -> Record:
    """Each system by turns with ours, then what each protects."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        figures = []
        for name, systems in groupby(SYSTEMS, key=lambda system: system.peer):
            figures += compared(name, list(systems), inputs, full=full)
        figures += our_protection(inputs)
    order = {name: number for number, name in enumerate(dict.fromkeys(figure.name for figure in figures))}
    title = "The same updates through each system: processor time of all threads, without the network"
    return Record("peers", title, sorted(figures, key=lambda figure: order[figure.name]), full)


# --- at a glance ---


def tables(record: Record) -> list[Grid]:
    """What each system costs beside ours, and what each survives and protects."""
    names = [system.name for system in SYSTEMS]
    costs, protected = [], []
    for system in SYSTEMS:
        found = {each.name: each for each in record.figures if each.at.get("system") == system.name}
        beside = f"{OURS[system.against]} beside {system.name}"
        own = {each.name: each for each in record.figures if each.at.get("system") == beside}
        if "client" not in found:
            why = next((each.text for each in found.values() if each.name in ("not measured", "costs")), "not measured")
            costs.append([system.name, why, *[""] * 5])
            continue
        at = found["client"].at
        pairs = [f"{_cell(found[name])} ({_cell(own[name])})" for name in ("client", *_IN_PAIRS)]
        costs.append(
            [
                system.name,
                f"{at['sites']} x {at['values']:,}",
                pairs[0],
                _cell(found["client / ours"]),
                _cell(found["server / ours"]),
                *pairs[1:],
            ]
        )
    for name in (*names, *OURS.values()):
        found = {each.name: each.text for each in record.figures if each.at.get("system") == name}
        if BEFORE in found:
            protected.append([name, *(found[each] for each in (BEFORE, AFTER, EXACT, READS))])
    return [
        Grid(
            "Processor time of a client in a round, s, bytes up per parameter, and error, each with ours beside it",
            ["system", "sites x values", "client (ours)", "client / ours", "server / ours", *_IN_PAIRS.values()],
            costs,
        ),
        record.aims(),
        Grid("What it survives, and who can read", ["system", BEFORE, AFTER, EXACT, READS], protected),
    ]


_IN_PAIRS = {"bytes up per parameter": "bytes (ours)", "largest error of the mean": "error (ours)"}


def _cell(figure: Figure) -> str:
    return shown(figure.median)
