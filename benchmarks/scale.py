"""Time, bytes and memory of a site and of the coordinator, against the length of the vector and the number of sites.

*Length*: one site's input among 16, and what the coordinator does for it, with every physical byte: from the values to
chunks that are hashed, and from chunks through the spool file into the sum.  *Sites*: whole rounds in process, once
with a lane of 16 values, so that keys, shares and signatures are what is measured, and once with 100,000; a tenth of
the sites sends no masked input where so many may drop out.  All on one thread, in processor time.

*Cost model* (``cost_model``): constants from one length and some cohorts, checked against all other measurements, then
used for what cannot be measured here.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from tempfile import TemporaryFile

import numpy as np

from benchmarks import cost_model, limits, memory
from benchmarks.cost_model import Constants, Shape
from benchmarks.masking import MASK_BYTES, SITES, Round, raw_cipher
from benchmarks.record import Figure, Grid, Record, across
from benchmarks.rounds import LANE, machines
from benchmarks.turns import by_turns, seconds
from secureagg import encode_input
from secureagg.aggregate import aggregate_of
from secureagg.codec import encode
from secureagg.homomorphic import CiphertextSum, SumReader, masked_and_encrypted, round_key, unmask_sum
from secureagg.lanes import CANARY
from secureagg.masking import apply_masks, masked_and_packed, unmasked_total
from secureagg.messages import MaskedInput
from secureagg.parameters import Backend, Graph
from secureagg.participant import _cut, chunk_digests
from secureagg.phases import Aborted, CollectingMaskedInputs, CoordinatorFinished
from secureagg.upload import Upload, empty_sums

BACKENDS: tuple[Backend, ...] = ("masked", "homomorphic")
SHORT, LONG = 16, 100_000  # values of a lane in whole rounds
FITTED_LENGTH: dict[Backend, int] = {"masked": 1_000_000, "homomorphic": 100_000}
MEMORY_FROM = 1_000_000  # values, below which a process's own ups and downs are as large
LINKS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9}
SITE_SECONDS, COORDINATOR_SECONDS = "processor time of a site", "processor time of the coordinator"
UP, DOWN = "up from a site", "down to a site"
INPUT, FOR_EACH = "processor time of a site's input", "processor time of the coordinator for each input"


# --- the length of the vector ---


class Part:
    """A site's input of one length, and the coordinator's part in it."""

    def __init__(self, backend: Backend, length: int) -> None:
        self._round = Round(length, backend=backend)
        self.parameters = self._round.parameters
        self.update = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
        self.sums = empty_sums(self.parameters)
        self.message: MaskedInput | None = None

    def site(self) -> None:
        """Encode, mask, pack or encrypt, hash and sign."""
        self.message = None  # of the time before
        self.message = self._round.masked_input(self.update)

    def take(self) -> None:
        """Hash, spool, read back and add."""
        upload = Upload(self.message.chunk_digests, parameters=self.parameters, spool=TemporaryFile, who="site")
        for chunk in self.message.chunks:
            upload.take(chunk, who="site")
        upload.add_to(self.sums)
        upload.close()

    def release(self) -> None:
        """Take the self masks of all sites off the sum, and decode it; of an encrypted one, serialise it.  Once."""
        masks = [(bytes([number]) * 32, -1) for number in range(SITES)]
        if isinstance(self.sums, CiphertextSum):
            unmask_sum(self.sums, self.parameters.slot_layout, masks)
            self.sums.chunks()
            return
        _decoded(self.parameters, {LANE: unmasked_total(self.parameters.lanes[LANE], self.sums[LANE], masks)})


def _decoded(parameters: object, totals: dict[str, np.ndarray]) -> None:
    everything = {name: totals.get(name, np.array([SITES])) for name in parameters.lanes}
    assert everything[CANARY][0] == SITES
    aggregate_of(parameters, everything, survivors=tuple(parameters.cohort), who="benchmark")


def lengths(backend: Backend, length: int, repeats: int) -> list[Figure]:
    """One length: times, bytes, memory."""
    part = Part(backend, length)
    work: dict[str, Callable[[], None]] = {
        "site": part.site,
        "take": part.take,
        "aes": lambda: raw_cipher(SITES * length * MASK_BYTES),
    }
    times = by_turns(repeats, work, clock=time.process_time)
    released = seconds(part.release, time.process_time)
    at = {"system": backend, "values": length}
    figures = [
        Figure(INPUT, times["site"], "s", at=at),
        Figure(FOR_EACH, [each + released / SITES for each in times["take"]], "s", at=at),
        Figure("bytes up for each value", [sum(map(len, encode(part.message))) / length], "B", at=at),
    ]
    if backend == "masked":
        figures.append(Figure(f"{SITES} keystreams at the rate of AES alone", times["aes"], "s", at={"values": length}))
    if length >= MEMORY_FROM:
        del part
        found = peaks(backend, length)
        figures += [Figure(f"peak memory of {who} / float32", [peak], at=at) for who, peak in found.items()]
    return figures


def peaks(backend: Backend, length: int) -> dict[str, float]:
    """Peak memory of a site's input and of the coordinator's part, each in a process of its own, beyond what was there
    before, of the float32 vector."""
    found = {}
    for who in ("a site", "the coordinator"):
        code = f"from benchmarks.scale import _peak; _peak({backend!r}, {length}, {who!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[who] = json.loads(done.stdout)
    return found


def _peak(backend: Backend, length: int, who: str) -> None:
    part = Part(backend, length)
    work = [part.site]
    if who != "a site":
        part.site()
        work = [part.take, part.take, part.release]
    memory.forget_peak()
    before = memory.resident()
    for each in work:
        each()
    print(max(0, memory.peak() - before) / part.update.nbytes)


# --- the number of sites ---


@dataclass(frozen=True, slots=True)
class Cohort:
    """A round to be run: so many sites on a graph, each with so many values, so often."""

    sites: int
    values: int
    graph: Graph
    backend: Backend = "masked"
    repeats: int = 1

    @property
    def at(self) -> dict[str, str | int]:
        """What its figures are measured at."""
        system = self.backend if self.backend == "homomorphic" else f"masked, {self.graph}"
        return {"system": system, "sites": self.sites, "values": self.values}

    @property
    def shape(self) -> Shape:
        """As the cost model sees it."""
        return Shape.of(self.sites, self.values, graph=self.graph, backend=self.backend)


def whole_round(cohort: Cohort) -> dict[str, float]:
    """Run one round; a site's figures are the mean over those that stay to the end."""
    made = machines(cohort.sites, cohort.values, graph=cohort.graph, backend=cohort.backend)
    parameters, participants, coordinator = made.parameters, made.participants, made.coordinator
    sites = list(participants)
    silent = set(sites[:: len(sites) // cohort.shape.s][: cohort.shape.s] if cohort.shape.s else ())
    spent = dict.fromkeys(sites, 0.0)
    sent, received = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)
    summing = 0.0
    update = np.zeros(cohort.values)
    pending = []
    for site, participant in participants.items():
        began = time.process_time()
        messages = [*participant.start(), *participant.submit(encode_input(parameters, {LANE: update}))]
        spent[site] += time.process_time() - began
        pending += [(site, message) for message in messages]
    while not isinstance(coordinator.phase, CoordinatorFinished | Aborted):
        outbound = []
        began = time.process_time()
        for site, message in pending:
            if not (site in silent and isinstance(message, MaskedInput)):
                outbound += coordinator.receive(message, sender=site)
        if isinstance(coordinator.phase, CollectingMaskedInputs) and not outbound:
            outbound = coordinator.close_phase()
        summing += time.process_time() - began
        for site, message in pending:
            sent[site] += sum(map(len, encode(message)))
        pending = []
        for item in outbound:
            received[item.recipient] += sum(map(len, encode(item.message)))
            began = time.process_time()
            replies = participants[item.recipient].receive(item.message)
            spent[item.recipient] += time.process_time() - began
            pending += [(item.recipient, reply) for reply in replies]
    if isinstance(coordinator.phase, Aborted):
        raise coordinator.phase.error
    stayed = [site for site in sites if site not in silent]
    assert coordinator.phase.aggregate.survivors == tuple(stayed)
    return {
        SITE_SECONDS: fmean(spent[site] for site in stayed),
        COORDINATOR_SECONDS: summing,
        UP: fmean(sent[site] for site in stayed) / 1000,
        DOWN: fmean(received[site] for site in stayed) / 1000,
    }


def cohorts(wanted: Sequence[Cohort]) -> dict[Cohort, list[Figure]]:
    """Rounds of each cohort."""
    found = {}
    for cohort in wanted:
        rounds = [whole_round(cohort) for _ in range(cohort.repeats)]
        found[cohort] = [
            Figure(name, [each[name] for each in rounds], "s" if "time" in name else "KB", at=cohort.at)
            for name in rounds[0]
        ]
    return found


# --- the cost model ---


# What the model gives, in units of the figures: so many bytes, the constants that are fitted, and the formula.
MODELLED: dict[str, tuple[float, cost_model.Terms, Callable[[Constants, Shape], float]]] = {
    SITE_SECONDS: (1, cost_model.SITE, cost_model.site_seconds),
    COORDINATOR_SECONDS: (1, cost_model.COORDINATOR, cost_model.coordinator_seconds),
    UP: (1000, cost_model.UP, cost_model.bytes_up),
    DOWN: (1000, cost_model.DOWN, cost_model.bytes_down),
}


def constants(measured: Mapping[Cohort, list[Figure]], fit: Sequence[Cohort], repeats: int) -> Constants:
    """The constants of values and bytes from steps at one length, and those of messages from whole rounds ``fit`` with
    short lanes."""
    found = cost_model.zeros() | _of_values(repeats) | _of_ciphertexts(repeats)
    _, send, receive = zip(*(limits.encrypted(32 << 20) for _ in range(repeats)), strict=True)
    found |= {"send": median(send) / (32 << 20), "receive": median(receive) / (32 << 20)}
    for name, (unit, terms, of_values) in MODELLED.items():
        known = Constants(**found)  # without those that are looked for, which are still zero
        points = [
            (cohort.shape, unit * figure.median - of_values(known, cohort.shape))
            for cohort in fit
            for figure in measured[cohort]
            if figure.name == name
        ]
        found |= cost_model.fitted(terms, points)
    return Constants(**found)


def _of_values(repeats: int) -> dict[str, float]:
    length = FITTED_LENGTH["masked"]
    part = Part("masked", length)
    part.site()
    ring = part.parameters.lanes[LANE]
    vectors = encode_input(part.parameters, {LANE: part.update}).vectors
    words, keys = ring.join(vectors[LANE]), [(bytes([number]) * 32, 1) for number in range(SITES)]
    chunks, sums = part.message.chunks, empty_sums(part.parameters)
    packed = sum(map(len, chunks))
    upload: list[Upload] = []

    def take() -> None:
        upload[:] = [Upload(part.message.chunk_digests, parameters=part.parameters, spool=TemporaryFile, who="site")]
        for chunk in chunks:
            upload[0].take(chunk, who="site")

    short = Part("masked", SHORT)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "setup": (SITES, short.site),
        "encode": (length, lambda: encode_input(part.parameters, {LANE: part.update})),
        "pack": (
            length,
            lambda: list(_cut(masked_and_packed(ring, vectors[LANE], []), MaskedInput.CHUNK_BYTES)),
        ),
        "mask": (SITES * words.nbytes, lambda: apply_masks(words, keys)),
        "hash": (packed, lambda: chunk_digests(chunks)),
        "take": (packed, take),
        "add": (length, lambda: upload[0].add_to(sums)),
        "release": (
            length,
            lambda: _decoded(part.parameters, {LANE: unmasked_total(ring, sums[LANE], [])}),
        ),
    }
    times = by_turns(repeats, {name: each for name, (_, each) in work.items()}, clock=time.process_time)
    return {name: median(times[name]) / count for name, (count, _) in work.items()}


def _of_ciphertexts(repeats: int) -> dict[str, float]:
    part = Part("homomorphic", FITTED_LENGTH["homomorphic"])
    part.site()
    key, layout = round_key(part.parameters, bytes(32)), part.parameters.slot_layout
    vectors = encode_input(part.parameters, {LANE: part.update}).vectors

    def released() -> list[bytes]:
        total = empty_sums(part.parameters)
        part.sums = total
        part.take()
        began = time.process_time()
        unmask_sum(total, layout, [])
        chunks = total.chunks()
        release.append(time.process_time() - began)
        return chunks

    release: list[float] = []
    chunks = released()

    def opened() -> None:
        reader = SumReader(key, layout)
        for chunk in chunks:
            reader.take(chunk, who="sum")
        reader.totals(survivors=SITES)

    work: dict[str, Callable[[], object]] = {
        "encrypt": lambda: list(masked_and_encrypted(key, layout, vectors, [])),
        "open": opened,
        "load": lambda: (setattr(part, "sums", empty_sums(part.parameters)), part.take()),
        "release": released,
    }
    times = by_turns(repeats, work, clock=time.process_time)
    found = {name: median(times[name]) / layout.ciphertexts for name in ("encrypt", "open", "load")}
    return found | {"release_ciphertext": median(release) / layout.ciphertexts}


def checks(
    known: Constants, measured: Mapping[Cohort, list[Figure]], fit: Sequence[Cohort], by_length: Sequence[Figure]
) -> list[Figure]:
    """The relative error of each prediction, (predicted - measured) / measured; then all of them where nothing was
    fitted, without their sign."""
    figures = []
    for cohort, found in measured.items():
        used = "fitted" if cohort in fit else "checked"
        for each in found:
            unit, _, predict = MODELLED[each.name]
            error = predict(known, cohort.shape) / (unit * each.median) - 1
            figures.append(Figure(f"model, {used}: {each.name}", [error], at=cohort.at))
    for each in by_length:
        if each.name == INPUT and each.at["values"] != FITTED_LENGTH[each.at["system"]]:
            x = Shape.of(SITES, int(each.at["values"]), backend=each.at["system"])
            error = cost_model.input_seconds(known, x) / each.median - 1
            figures.append(Figure(f"model, checked: {INPUT}", [error], at=each.at))
    for name in dict.fromkeys(each.name for each in figures if "checked" in each.name):
        errors = [abs(each.median) for each in figures if each.name == name]
        figures.append(Figure(f"{name}, errors without their sign", errors))
    return figures


def predictions(known: Constants, *, most_sites: int, most_values: int) -> list[Figure]:
    """Rounds over links, most of them beyond what was measured, which their figures say."""
    figures = []
    for sites in (16, 100, 1000, 10_000):
        for values in (10**6, 10**7, 10**8, 10**9):
            shape = Shape.of(sites, values)
            within = sites <= most_sites and (values <= LONG or (sites <= SITES and values <= most_values))
            at = {"sites": sites, "values": values, "range": "measured" if within else "beyond what was measured"}
            figures += [
                Figure("predicted: up from a site", [cost_model.bytes_up(known, shape) / 1e6], "MB", at=at),
                Figure(f"predicted: {SITE_SECONDS}", [cost_model.site_seconds(known, shape)], "s", at=at),
                Figure(f"predicted: {COORDINATOR_SECONDS}", [cost_model.coordinator_seconds(known, shape)], "s", at=at),
            ]
            for link, speed in LINKS.items():
                site, coordinator = cost_model.round_seconds(known, shape, bits_per_second=speed)
                on = {**at, "link": link}
                figures += [
                    Figure("predicted: a site's time, model and input included", [site], "s", at=on),
                    Figure("predicted: the coordinator's time, for all sites", [coordinator], "s", at=on),
                ]
    return figures


# --- everything ---


def _cohorts(*, full: bool) -> tuple[list[Cohort], list[Cohort]]:
    """The rounds that are run, and those of them that constants are fitted on."""

    def repeats(sites: int) -> int:
        return (3 if sites <= 50 else 2 if sites <= 100 else 1) if full else 1

    complete = (3, 5, 10, 20, 50, 100, 200) if full else (3, 10, 30, 100)
    sparse = (100, 200, 500, 1000) if full else (100,)
    wanted = [
        Cohort(sites, values, graph, repeats=repeats(sites))
        for values in (SHORT, LONG)
        for graph, sizes in (("complete", complete), ("sparse", sparse))
        for sites in sizes
    ]
    fitted = {"complete": (3, 20, 100), "sparse": (100, 500)} if full else {"complete": (3, 10, 100), "sparse": (100,)}
    fit = [each for each in wanted if each.values == SHORT and each.sites in fitted[each.graph]]
    homomorphic = [Cohort(sites, LONG, "complete", "homomorphic", repeats(sites)) for sites in complete if sites <= 20]
    return wanted + homomorphic, fit


def measure(*, full: bool) -> Record:
    """Lengths, cohorts, and the model."""
    decades = range(4, 9 if full else 7)
    by_length = []
    for backend in BACKENDS:
        for length in (10**decade for decade in decades if backend == "masked" or decade <= (7 if full else 5)):
            by_length += lengths(
                backend, length, (5 if length <= 10**6 else 3 if length <= 10**7 else 2) if full else 2
            )
    wanted, fit = _cohorts(full=full)
    measured = cohorts(wanted)
    known = constants(measured, fit, 5 if full else 2)
    figures = [
        *by_length,
        *(figure for found in measured.values() for figure in found),
        *(Figure(f"constant: {name}", [getattr(known, name)], at={}) for name in cost_model.zeros()),
        *checks(known, measured, fit, by_length),
        *predictions(known, most_sites=max(each.sites for each in wanted), most_values=10 ** decades[-1]),
    ]
    return Record(
        "scale",
        f"Time and bytes as vectors and cohorts grow, values of 16 bits, {SITES} sites where one input is measured",
        figures,
        full,
    )


def tables(record: Record) -> list[Grid]:
    """Against the length and the number of sites, how far the cost model is off, and what it predicts."""
    lengths, cohorts, predicted, rest = [], [], [], []
    for each in record.figures:
        if each.name.startswith("predicted: "):
            predicted.append(each)
        elif each.name.startswith(("model", "constant")):
            rest.append(each)
        else:
            (cohorts if "sites" in each.at else lengths).append(each)
    constants = [each for each in rest if each.name.startswith("constant")]
    errors = [
        replace(each, name=each.name.removeprefix("model, checked: "))
        for each in rest
        if not each.at and each not in constants
    ]
    return [
        across(f"Values in the vector, {SITES} sites", _rows(lengths, "values"), "values"),
        across("Sites in a whole round, a tenth of them gone where so many may be", _rows(cohorts, "sites"), "sites"),
        replace(record, title="How far the cost model is off where it is checked", figures=errors).grid(),
        across("Predicted, by values in the vector", _rows(predicted, "values"), "values"),
        replace(record, title="Its constants, in seconds or bytes", figures=constants).grid(),
    ]


def _rows(figures: Sequence[Figure], key: str) -> list[Figure]:
    """The figures, with all that they are measured at in their names but ``key``."""
    return [
        replace(
            each,
            name=replace(each, at={name: value for name, value in each.at.items() if name not in (key, "range")}).label,
            at={key: f"{each.at[key]:,}"},
        )
        for each in figures
    ]
