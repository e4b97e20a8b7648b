"""The implementation against the plain second one: every byte that any machine sends, and every released total."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference.protocol_reference as plain
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed import elements

from secureagg import (
    Card,
    Coordinator,
    Counts,
    FixedPoint,
    Identity,
    Lane,
    ParameterError,
    Participant,
    RingElements,
    Roster,
    RoundParameters,
    ThresholdNotMet,
)
from secureagg import SiteId as Name
from secureagg.codec import decode_from_coordinator, decode_from_site, encode
from secureagg.encoding import encode_input
from secureagg.graph import least_honest_survivors
from secureagg.lanes import RingLane
from secureagg.packing import add_packed, pack
from secureagg.parameters import choose_thresholds
from secureagg.phases import Aborted, CoordinatorFinished
from secureagg.testing import CountingEntropy, MemoryJournal

Case = tuple[plain.Round, dict[str, plain.SiteInput], dict[str, str]]


def site_names(n: int) -> list[str]:
    """Names in order, of different lengths, the last one as long as a name may be."""
    return sorted([f"h{index}" for index in range(n - 2)] + ["ab-clinic.example_7", "z" * 64])


def case(
    *,
    n: int,
    lanes: tuple[plain.Lane, ...],
    values: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, int] | None = None,
    max_weight: int | None = None,
    thresholds: tuple[int, int, int] | None = None,
    silent_from: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Case:
    """One round of the reference with all its inputs; ``thresholds``: t, c, h, by default those of the document."""
    names = site_names(n)
    entropy = plain.counting_entropy(f"setup-{seed}".encode())
    seeds = {name: entropy(32) for name in names}
    # One member of the consortium stays outside of the cohort.
    members = [plain.Member(name, plain.ed25519_public(seeds[name]), entropy(32)) for name in names]
    members.append(plain.Member("outsider", plain.ed25519_public(entropy(32)), entropy(32)))
    if thresholds is None:
        t = 2 * n // 3 + 1
        c = min(2 * t - n - 1, t - 2)
        thresholds = (t, c, max(t, c + 2))
    spec = plain.Round(
        consortium="consortium ä",
        run=f"run-{seed}",
        number=1 + seed,
        members=tuple(members),
        cohort=tuple(names),
        own_lanes=lanes,
        threshold=thresholds[0],
        max_corrupt=thresholds[1],
        minimum_survivors=thresholds[2],
        model_digest=entropy(32),
        max_weight=max_weight,
    )
    inputs = {
        name: plain.SiteInput(
            identity_seed=seeds[name],
            entropy=plain.counting_entropy(f"{seed}-{name}".encode()),
            coins=plain.counting_entropy(f"{seed}-{name}-coins".encode()),
            values=values[name],
            weight=None if weights is None else weights[name],
        )
        for name in names
    }
    return spec, inputs, dict(silent_from or {})


def sparse_case(c: int, d: int, **options: Any) -> Case:
    """As ``case``, on the sparse graph that is planned for c colluding sites and d dropouts."""
    planned = plain.plan(options["n"], c, d)
    assert planned is not None
    k, t, h = planned
    spec, inputs, silent_from = case(thresholds=(t, c, h), **options)
    return replace(spec, neighbours=k, max_dropouts=d), inputs, silent_from


def parameters_of(spec: plain.Round, seeds: Mapping[str, bytes]) -> RoundParameters:
    """The implementation's parameters of the reference's round."""
    outsider = plain.counting_entropy(f"setup-{spec.number - 1}".encode())
    for _ in range(2 * len(spec.cohort)):
        outsider(32)
    identities = {name: Identity.from_private_bytes(seed) for name, seed in seeds.items()}
    identities["outsider"] = Identity.generate(outsider)
    lanes = []
    for lane in reversed(spec.own_lanes):
        match lane.encoding:
            case plain.FixedPoint(value_range, value_bits, clip):
                encoding: FixedPoint | Counts = FixedPoint(value_range=value_range, value_bits=value_bits, clip=clip)
            case plain.Counts(maximum):
                encoding = Counts(maximum=maximum)
        lanes.append(Lane(name=lane.name, length=lane.length, encoding=encoding, weighted=lane.weighted))
    # The implementation finds k and t of a sparse graph by itself.
    sparse = spec.neighbours is not None
    parameters = RoundParameters.create(
        consortium=spec.consortium,
        run=spec.run,
        round_number=spec.number,
        roster=Roster(Card.issue(Name(item.name), identities[item.name], item.transport_key) for item in spec.members),
        cohort=[Name(name) for name in reversed(spec.cohort)],
        lanes=lanes,
        model_digest=spec.model_digest,
        max_weight=spec.max_weight,
        threshold=None if sparse else spec.threshold,
        max_corrupt=spec.max_corrupt,
        minimum_survivors=spec.minimum_survivors,
        graph="sparse" if sparse else "complete",
        max_dropouts=spec.max_dropouts,
    )
    assert (parameters.neighbours, parameters.threshold) == (spec.neighbours, spec.threshold)
    return parameters


def run_implementation(given_case: Case, parameters: RoundParameters) -> plain.Transcript:
    """The same round by the real machines and the real codec; raises the error that the coordinator ends it with."""
    spec, inputs, silent_from = given_case
    participants, encoded, pending = {}, {}, []
    for name, item in inputs.items():
        participants[name] = Participant(
            site=Name(name),
            identity=Identity.from_private_bytes(item.identity_seed),
            parameters=parameters,
            journal=MemoryJournal(),
            entropy=CountingEntropy(f"{spec.number - 1}-{name}".encode()),
        )
        encoded[name] = encode_input(
            parameters,
            {lane: np.asarray(values) for lane, values in item.values.items()},
            weight=item.weight,
            entropy=CountingEntropy(f"{spec.number - 1}-{name}-coins".encode()),
        )
        pending += [(name, message) for message in participants[name].start()]
        pending += [(name, message) for message in participants[name].submit(encoded[name])]
    coordinator = Coordinator(parameters=parameters)
    from_sites: dict[str, dict[str, list[bytes]]] = {phase: {} for phase in plain.PHASES}
    to_sites: dict[str, dict[str, list[bytes]]] = {phase: {} for phase in plain.PHASES}
    for index, phase in enumerate(plain.PHASES):
        before = coordinator.phase
        assert type(before).__name__ == phase
        outbound = []
        for name, message in pending:
            if name in silent_from and plain.PHASES.index(silent_from[name]) <= index:
                continue
            from_sites[phase][name] = encode(message)
            outbound += coordinator.receive(decode_from_site(encode(message)), sender=Name(name))
        if coordinator.phase is before:
            outbound += coordinator.close_phase()
        if isinstance(coordinator.phase, Aborted):
            raise coordinator.phase.error
        pending = []
        for item in outbound:
            frames = encode(item.message)
            to_sites[phase][item.recipient] = frames
            answers = participants[item.recipient].receive(decode_from_coordinator(frames))
            pending += [(item.recipient, answer) for answer in answers]
    assert isinstance(coordinator.phase, CoordinatorFinished)
    aggregate = coordinator.phase.aggregate
    return plain.Transcript(
        from_sites=from_sites,
        to_sites=to_sites,
        encoded={name: elements(item, parameters) for name, item in encoded.items()},
        totals={lane: total.tolist() for lane, total in aggregate.totals.items()},
        survivors=aggregate.survivors,
        digest=aggregate.digest,
    )


def check(given_case: Case) -> plain.Transcript:
    """Both implementations agree on the parameters, each message, the encoded inputs and the release.

    If too few sites are left for a release, both say so, and TooFewSites is raised.
    """
    spec, inputs, silent_from = given_case
    parameters = parameters_of(spec, {name: item.identity_seed for name, item in inputs.items()})
    assert parameters.roster.digest == spec.roster
    assert {name: lane.ring_bits for name, lane in parameters.lanes.items()} == {
        lane.name: spec.bits(lane) for lane in spec.lanes
    }
    assert [*parameters.lanes] == [lane.name for lane in spec.lanes]
    assert parameters.digest == spec.parameters
    assert parameters.context == spec.context
    try:
        expected = plain.run_round(spec, inputs, silent_from)
    except plain.TooFewSites:
        with pytest.raises(ThresholdNotMet):
            run_implementation(given_case, parameters)
        raise
    found = run_implementation(given_case, parameters)
    assert found.encoded == expected.encoded
    for phase in plain.PHASES:
        assert found.from_sites[phase] == expected.from_sites[phase], phase
        assert found.to_sites[phase] == expected.to_sites[phase], phase
    assert found.totals == expected.totals
    assert found.survivors == expected.survivors
    assert found.digest == expected.digest
    # What both release is also what the survivors put in.
    for lane in spec.lanes:
        modulus = 2 ** spec.bits(lane)
        sums = [
            sum(column) for column in zip(*(found.encoded[name][lane.name] for name in found.survivors), strict=True)
        ]
        assert [total % modulus for total in found.totals[lane.name]] == [total % modulus for total in sums]
    return found


@st.composite
def thresholds_and_silence(draw: st.DrawFn, n: int) -> tuple[tuple[int, int, int], dict[str, str]]:
    """Safe t, c, h for ``n`` sites, and dropouts that leave enough of them."""
    t = draw(st.integers(n // 2 + 1, n), label="t")
    c = draw(st.integers(0, max(0, min(2 * t - n - 1, n - 2))), label="c")
    h = draw(st.integers(min(n, max(t, c + 2)), n), label="h")
    silent: dict[str, str] = {}
    for index, phase in enumerate(plain.PHASES):
        spare = n - len(silent) - (h if index < 3 else t)
        # Most dropouts come where they matter to the masks: after the shares, before the input.
        most = spare if phase == "CollectingMaskedInputs" else min(1, spare)
        remaining = [name for name in site_names(n) if name not in silent]
        for name in draw(st.lists(st.sampled_from(remaining), max_size=max(0, most), unique=True), label=phase):
            silent[name] = phase
    return (t, c, h), silent


@st.composite
def random_lanes(draw: st.DrawFn) -> tuple[plain.Lane, ...]:
    """One to three lanes of any kind, under names before, between and behind those of the protocol."""
    names = draw(st.lists(st.sampled_from(["a", "c0", "update", "x.y_z-0", "zz"]), min_size=1, max_size=3, unique=True))
    lanes = []
    for name in names:
        length = draw(st.integers(1, 9))
        if draw(st.booleans()):
            ranges = st.one_of(st.sampled_from([1.0, 0.1, 3.0]), st.floats(1e-6, 1e6))
            encoding: plain.FixedPoint | plain.Counts = plain.FixedPoint(
                draw(ranges), draw(st.integers(2, 32)), draw(st.booleans())
            )
        else:
            encoding = plain.Counts(draw(st.one_of(st.integers(1, 300), st.integers(1, 2**40))))
        lanes.append(plain.Lane(name, length, encoding, draw(st.booleans())))
    return tuple(lanes)


@st.composite
def random_inputs(draw: st.DrawFn, n: int) -> dict[str, Any]:
    """Lanes, and values and weights of ``n`` sites for them."""
    lanes = draw(random_lanes())
    weighted = any(lane.weighted for lane in lanes) or draw(st.booleans())
    max_weight = draw(st.one_of(st.integers(1, 300), st.integers(1, 100_000))) if weighted else None
    values: dict[str, dict[str, list]] = {}
    for name in site_names(n):
        values[name] = {}
        for lane in lanes:
            match lane.encoding:
                case plain.FixedPoint(value_range, _, clip):
                    bound = 2 * value_range if clip else value_range
                    element: st.SearchStrategy = st.floats(-bound, bound) | st.sampled_from([-bound, bound, -0.0])
                case plain.Counts(maximum):
                    element = st.integers(0, maximum)
            values[name][lane.name] = draw(st.lists(element, min_size=lane.length, max_size=lane.length))
    weights = None
    if max_weight is not None:
        # At least 1: a mean over a total weight of 0 is not defined, and the implementation releases none.
        weights = {name: draw(st.integers(1, max_weight)) for name in site_names(n)}
    seed = draw(st.integers(0, 2**32))
    return {"n": n, "lanes": lanes, "values": values, "weights": weights, "max_weight": max_weight, "seed": seed}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random rounds of three to six sites."""
    n = draw(st.integers(3, 6), label="n")
    thresholds, silent = draw(thresholds_and_silence(n))
    return case(**draw(random_inputs(n)), thresholds=thresholds, silent_from=silent)


@st.composite
def sparse_cases(draw: st.DrawFn) -> Case:
    """Random rounds of 8 to 20 sites on the sparse graph, in which up to one site too many falls silent."""
    n, c, d = draw(st.sampled_from([(8, 1, 2), (12, 0, 1), (12, 1, 2), (14, 1, 1), (16, 2, 3), (20, 1, 2), (20, 3, 5)]))
    names = draw(st.lists(st.sampled_from(site_names(n)), max_size=d + 1, unique=True), label="silent")
    silent = {name: draw(st.sampled_from(plain.PHASES)) for name in names}
    return sparse_case(c, d, **draw(random_inputs(n)), silent_from=silent)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_random_rounds(random_case: Case) -> None:
    """Any round of three to six sites is the same, bit for bit, in both implementations."""
    check(random_case)


@given(sparse_cases())
@settings(max_examples=15, deadline=None)
def test_random_sparse_rounds(random_case: Case) -> None:
    """Any round on the sparse graph is the same, bit for bit, in both implementations, or ends in both without a
    release."""
    with suppress(plain.TooFewSites):
        check(random_case)


def ramp(n: int, length: int) -> dict[str, dict[str, list[float]]]:
    """Different values at each site, from edge to edge of [-1, 1]."""
    return {
        name: {"update": [value * (index + 1) / n for value in np.linspace(-1, 1, length).tolist()]}
        for index, name in enumerate(site_names(n))
    }


@pytest.mark.parametrize("value_bits", [2, 8, 15, 16, 17, 24, 31, 32])
def test_ring_widths(value_bits: int) -> None:
    """Rings below, at and above each machine word give the same messages."""
    lanes = (plain.Lane("update", 7, plain.FixedPoint(1.0, value_bits)),)
    check(case(n=4, lanes=lanes, values=ramp(4, 7), seed=value_bits))


@pytest.mark.parametrize("dropouts", [0, 1, 2])
def test_dropouts_before_the_input(dropouts: int) -> None:
    """With sites that shared keys and sent no input, the messages and the totals are the same."""
    names = site_names(6)
    values = {name: {**ramp(6, 5)[name], "histogram": [3, 0, 100]} for name in names}
    lanes = (
        plain.Lane("update", 5, plain.FixedPoint(1.0), weighted=True),
        plain.Lane("histogram", 3, plain.Counts(100)),
    )
    transcript = check(
        case(
            n=6,
            lanes=lanes,
            values=values,
            weights={name: index * 10 for index, name in enumerate(names)},
            max_weight=50,
            thresholds=(4, 1, 4),
            silent_from=dict.fromkeys(names[1 : 1 + 2 * dropouts : 2], "CollectingMaskedInputs"),
        )
    )
    assert len(transcript.survivors) == 6 - dropouts
    assert transcript.totals["histogram"] == [3 * (6 - dropouts), 0, 100 * (6 - dropouts)]


def test_one_silent_site_in_each_phase() -> None:
    """Sites that fall silent in five different phases leave the same messages behind."""
    names = site_names(11)
    silent = dict(zip(names[::2], plain.PHASES, strict=False))
    lanes = (plain.Lane("update", 3, plain.FixedPoint(1.0)),)
    check(case(n=11, lanes=lanes, values=ramp(11, 3), thresholds=(6, 0, 6), silent_from=silent))


def test_one_silent_site_in_each_phase_of_a_sparse_round() -> None:
    """On the sparse graph too, sites that fall silent in five different phases leave the same messages behind."""
    names = site_names(20)
    silent = dict(zip(names[::4], plain.PHASES, strict=True))
    lanes = (plain.Lane("update", 3, plain.FixedPoint(1.0)),)
    transcript = check(sparse_case(1, 6, n=20, lanes=lanes, values=ramp(20, 3), silent_from=silent))
    assert len(transcript.survivors) == 17


@pytest.mark.parametrize("phase", ["AdvertisingKeys", "SharingKeys"])
def test_a_site_without_enough_holders(phase: str) -> None:
    """A site of whose holders too many fell silent is told so and left out; the round goes on without it."""
    lost = site_names(20)[-1]
    silent = dict.fromkeys(["h13", "h15", "h5"], phase)
    lanes = (plain.Lane("update", 3, plain.FixedPoint(1.0)),)
    transcript = check(sparse_case(1, 2, n=20, lanes=lanes, values=ramp(20, 3), silent_from=silent))
    told = [name for name, frames in transcript.to_sites[phase].items() if b"round-failed" in frames[0]]
    assert told == [lost]
    assert sorted([*transcript.survivors, *told, *silent]) == site_names(20)


@pytest.mark.parametrize("phase", plain.PHASES)
def test_a_sparse_round_that_ends_without_a_release(phase: str) -> None:
    """Where more than half of the sites are silent from some phase on, neither implementation releases anything."""
    silent = dict.fromkeys(site_names(12)[:7], phase)
    lanes = (plain.Lane("update", 3, plain.FixedPoint(1.0)),)
    with pytest.raises(plain.TooFewSites):
        check(sparse_case(0, 1, n=12, lanes=lanes, values=ramp(12, 3), silent_from=silent))


@pytest.mark.parametrize("n", [12, 13, 16, 20, 27, 40, 64, 90, 118])
def test_the_plan_of_a_sparse_graph(n: int) -> None:
    """Neighbours, threshold and the least honest sites in a sum are those of the document's formulas; where these find
    no safe graph, none is given."""
    shares = sorted({0, 1, n // 20, n // 10, n // 5})
    for c, d in ((c, d) for c in shares for d in shares):
        planned = plain.plan(n, c, d)
        if planned is None:
            with pytest.raises(ParameterError, match="no sparse one is safe"):
                choose_thresholds(n, graph="sparse", max_corrupt=c, max_dropouts=d)
            continue
        k, t, honest = planned
        found = choose_thresholds(n, graph="sparse", max_corrupt=c, max_dropouts=d)
        assert (found.neighbours, found.threshold, found.max_corrupt) == (k, t, c)
        assert least_honest_survivors(n, k, t, c) == found.minimum_survivors == honest


@pytest.mark.parametrize(
    ("n", "c", "d", "k", "t", "honest"),
    [(101, 10, 10, 32, 22, 52), (200, 20, 20, 56, 39, 111), (500, 50, 50, 82, 57, 284)],
)
def test_the_table_of_the_document(n: int, c: int, d: int, k: int, t: int, honest: int) -> None:
    """The rows of the table in docs/protocol.md that this code reaches in a second are what its formulas give."""
    row = "| " + " | ".join(map(str, (n, c, d, k, t, honest))) + " |"
    assert row in (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8").splitlines()
    assert plain.plan(n, c, d) == (k, t, honest)


def test_clipped_values() -> None:
    """Values outside the range are moved and counted alike, the values at the edge are not."""
    values = {name: {"update": [2.0, -1.0, -1.5, 1.0, 0.1, -0.0]} for name in site_names(3)}
    lanes = (plain.Lane("update", 6, plain.FixedPoint(1.0, 16, clip=True)),)
    transcript = check(case(n=3, lanes=lanes, values=values))
    assert transcript.totals["update/clipped"] == [6]


def test_a_cohort_beyond_the_short_array() -> None:
    """With more than 15 sites, where MessagePack arrays change their head, the messages are the same."""
    lanes = (plain.Lane("update", 2, plain.FixedPoint(1.0)),)
    check(case(n=17, lanes=lanes, values=ramp(17, 2)))


def test_an_input_of_several_chunks() -> None:
    """An input of more than 1 MiB is masked and cut into chunks alike, with a lane that ends inside a chunk."""
    length = 140_000
    values = {
        name: {"big": [index * 2**58 + at for at in range(length)], **ramp(3, 20_000)[name]}
        for index, name in enumerate(site_names(3))
    }
    lanes = (plain.Lane("big", length, plain.Counts(2**60)), plain.Lane("update", 20_000, plain.FixedPoint(1.0)))
    transcript = check(case(n=3, lanes=lanes, values=values))
    assert [len(frames) for frames in transcript.from_sites["CollectingMaskedInputs"].values()] == [3, 3, 3]


@pytest.mark.parametrize("bits", [9, 20, 33, 57, 63])
def test_long_packed_vectors(bits: int) -> None:
    """A vector longer than any block that the implementation works in packs to the same bytes, and unpacks again."""
    length = 66_001
    values = plain.unpack(plain.keystream(bytes(32), length * 8), length, bits)
    packed = plain.pack(values, bits)
    lane = RingLane(lane=Lane(name="x", length=length, encoding=RingElements(ring_bits=bits)), ring_bits=bits)
    assert pack(lane, np.array(values, lane.word)) == packed
    total = np.ones(length, lane.masked_word)
    add_packed(total, lane, lambda offset, size: packed[offset : offset + size])
    assert lane.reduce(total - lane.masked_word.type(1)).tolist() == values


def test_the_entropy_of_the_reference() -> None:
    """The reference's stream of test randomness is the one of secureagg.testing."""
    ours, theirs = plain.counting_entropy(b"seed"), CountingEntropy(b"seed")
    assert [ours(length) for length in (32, 48, 0, 1, 100)] == [theirs(length) for length in (32, 48, 0, 1, 100)]
