"""The documented in-process helper, as an embedder uses it."""

import numpy as np
import pytest

from secureagg import ParameterError, RoundAborted, RoundReplayed, ShapeMismatch, ThresholdNotMet, ValueOutOfRange
from secureagg.testing import HOMOMORPHIC_PHASES, PHASES, CountingEntropy, MemoryJournal, run_round

UPDATES = {name: np.full(1000, value) for name, value in zip("abcd", (0.1, 0.2, 0.3, 0.9), strict=True)}


def test_mean_and_sum() -> None:
    """The aggregate is the mean within one step, the total the exact sum of what was encoded."""
    outcome = run_round(UPDATES, value_range=1.0)
    assert outcome.survivors == ("a", "b", "c", "d")
    np.testing.assert_allclose(outcome.aggregate, 0.375, atol=1 / 32767)
    np.testing.assert_array_equal(outcome.total, sum(outcome.encoded.values()))
    assert outcome.bytes_sent.keys() == UPDATES.keys()


def test_weighted_mean() -> None:
    """Weights count, also weight 0; max_weight defaults to the largest given."""
    outcome = run_round(UPDATES, value_range=1.0, weights={"a": 0, "b": 3, "c": 1, "d": 0})
    np.testing.assert_allclose(outcome.aggregate, (3 * 0.2 + 0.3) / 4, atol=1 / 32767)


@pytest.mark.parametrize("phase", PHASES)
def test_a_dropout_in_each_phase(phase: str) -> None:
    """Whoever stops before its masked input is sent is not in the sum, whoever stops afterwards is."""
    outcome = run_round(UPDATES, value_range=1.0, dropouts={"d": phase})
    sent = phase in ("CheckingConsistency", "Unmasking")
    assert outcome.survivors == (("a", "b", "c", "d") if sent else ("a", "b", "c"))
    np.testing.assert_allclose(outcome.aggregate, 0.375 if sent else 0.2, atol=1 / 32767)
    np.testing.assert_array_equal(outcome.total, sum(outcome.encoded.values()))


@pytest.mark.parametrize("phase", PHASES)
def test_too_many_dropouts_release_nothing(phase: str) -> None:
    """Below the threshold the round is aborted, whatever the phase."""
    with pytest.raises(ThresholdNotMet, match=f"coordinator, {phase}: 2 of 4"):
        run_round(UPDATES, value_range=1.0, dropouts={"c": phase, "d": phase})


@pytest.mark.parametrize("release_to", ["sites", "coordinator"])
@pytest.mark.parametrize("phase", HOMOMORPHIC_PHASES)
def test_a_dropout_in_each_phase_of_a_homomorphic_round(phase: str, release_to: str) -> None:
    """The same with the homomorphic backend, for the first site too, of whose secret the key is made; and one site too
    few in any phase releases nothing to anybody."""
    pytest.importorskip("tenseal")
    options = {"value_range": 1.0, "backend": "homomorphic", "release_to": release_to}
    for gone in "ad":
        outcome = run_round(UPDATES, **options, dropouts={gone: phase})
        sent = phase not in PHASES[:3]
        assert outcome.survivors == tuple(site for site in "abcd" if sent or site != gone)
        np.testing.assert_array_equal(outcome.total, sum(outcome.encoded.values()))
    with pytest.raises(ThresholdNotMet, match=f"coordinator, {phase}: 2 of 4"):
        run_round(UPDATES, **options, dropouts={"c": phase, "d": phase})


@pytest.mark.parametrize("weights", [None, {"a": 0, "b": 3, "c": 1, "d": 1_000_000}])
@pytest.mark.parametrize("length", [1, 8191, 20_000])
def test_the_backends_agree(length: int, weights: dict[str, int] | None) -> None:
    """For one value and for many ciphertexts, weighted or not, both backends give the same integers and means; a site
    sends seven messages in place of five."""
    pytest.importorskip("tenseal")
    updates = {name: np.linspace(-1, value[0], length) for name, value in UPDATES.items()}
    masked, homomorphic = (
        run_round(updates, value_range=1.0, weights=weights, backend=backend, entropy=CountingEntropy(3))
        for backend in ("masked", "homomorphic")
    )
    np.testing.assert_array_equal(masked.total, homomorphic.total)
    np.testing.assert_array_equal(masked.aggregate, homomorphic.aggregate)
    assert [len(outcome.transcript["a"]) for outcome in (masked, homomorphic)] == [5, 7]


def test_same_entropy_same_round() -> None:
    """With the same entropy every byte is the same; without, none that matters is."""
    one, other = (run_round(UPDATES, value_range=1.0, entropy=CountingEntropy(1)) for _ in range(2))
    assert one.transcript == other.transcript
    assert run_round(UPDATES, value_range=1.0).transcript != one.transcript


def test_numbers_of_numpy_are_numbers() -> None:
    """Weights and ranges that are numpy scalars work like Python's, with the same bytes."""
    plain = {"value_range": 1.0, "value_bits": 12, "weights": {"a": 1, "b": 2, "c": 3, "d": 4}}
    numpy = {
        "value_range": np.float64(1.0),
        "value_bits": np.int64(12),
        "weights": {name: np.uint8(weight) for name, weight in plain["weights"].items()},
    }
    one, other = (run_round(UPDATES, **kind, entropy=CountingEntropy(2)) for kind in (plain, numpy))
    assert one.transcript == other.transcript


def test_the_transcript_has_what_the_coordinator_received() -> None:
    """Five messages per site, and the bytes add up."""
    outcome = run_round(UPDATES, value_range=1.0)
    for site, sent in outcome.transcript.items():
        assert len(sent) == 5
        assert sum(len(frame) for frames in sent for frame in frames) == outcome.bytes_sent[site]


def test_no_clear_value_weight_or_count_in_the_transcript() -> None:
    """Neither an encoded update, nor a packed one, nor a weight is anywhere in what the coordinator received.

    Patterns of at least 8 bytes are looked for; a chance hit in these few thousand bytes has probability below 1e-14.
    """
    weights = {name: 0x1122334455 + index for index, name in enumerate("abcd")}
    outcome = run_round(UPDATES, value_range=1.0, value_bits=8, weights=weights)
    received = b"".join(frame for sent in outcome.transcript.values() for frames in sent for frame in frames)
    for name, encoded in outcome.encoded.items():
        for kind in ("<i8", "<i4", ">i8"):
            assert encoded[:4].astype(kind).tobytes()[:16] not in received
        for order in ("little", "big"):
            assert weights[name].to_bytes(8, order) not in received
            assert weights[name].to_bytes(8, order).strip(b"\0") not in received
        assert UPDATES[name][:2].tobytes() not in received


def test_masked_inputs_look_uniform() -> None:
    """Zero updates give masked bytes that a chi-square test cannot tell from noise (fixed entropy, p > 1e-6)."""
    zeros = {name: np.zeros(50_000) for name in "abc"}
    outcome = run_round(zeros, value_range=1.0, value_bits=7, entropy=CountingEntropy(8))
    for sent in outcome.transcript.values():
        masked = np.frombuffer(sent[2][1], np.uint8)[100:]
        counts = np.bincount(masked, minlength=256)
        expected = len(masked) / 256
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert abs(statistic - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"updates": {}}, ParameterError, "expected 1"),
        ({"updates": {"a": [0.0], "b": [0.0]}}, ParameterError, "cohort: found 2 sites, expected 3"),
        ({"updates": {"A": [0.0], "b": [0.0], "c": [0.0]}}, ParameterError, "site name 'A'"),
        ({"updates": {"a": [0.0], "b": [0.0], "c": [0.0, 1.0]}}, ShapeMismatch, "1-D arrays of one length"),
        ({"updates": {"a": [[0.0]], "b": [[0.0]], "c": [[0.0]]}}, ShapeMismatch, "1-D arrays"),
        ({"updates": {"a": [0.0], "b": [np.nan], "c": [0.0]}}, ValueOutOfRange, "not finite"),
        ({"updates": {"a": [0.0], "b": [1.1], "c": [0.0]}}, ValueOutOfRange, "above the range"),
        ({"weights": {"a": 1}}, ParameterError, "weights: none for b, c"),
        ({"weights": {"a": 1, "b": 1, "c": 1, "z": 1}}, ParameterError, "weights: z not among"),
        ({"weights": {"a": 1, "b": 1, "c": 9}, "max_weight": 8}, ValueOutOfRange, "above 8"),
        ({"weights": {"a": 0, "b": 0, "c": 0}}, RoundAborted, "add up to 0"),
        ({"dropouts": {"z": "Unmasking"}}, ParameterError, "dropouts: z not among"),
        ({"dropouts": {"a": "Sleeping"}}, ParameterError, "dropouts: a in phase 'Sleeping'"),
        ({"threshold": 1}, ParameterError, r"2t = 2 x 1 = 2, expected above n \+ c = 3 \+ 0"),
        ({"max_corrupt": 3}, ParameterError, "2t = "),
        ({"minimum_survivors": 4}, ParameterError, "at most the cohort size 3"),
        ({"weights": {"a": 1, "b": 1.5, "c": 1}}, ParameterError, "weight of b: found 1.5, expected an integer"),
        ({"weights": {"a": 1, "b": True, "c": 1}}, ParameterError, "weight of b: found True, expected an integer"),
        ({"weights": {"a": 1, "b": 1, "c": "1"}}, ParameterError, "weight of c: found '1', expected an integer"),
        ({"weights": {"a": 1, "b": 1, "c": 1}, "max_weight": 2.0}, ParameterError, "max_weight: found 2.0"),
        ({"threshold": 3.0}, ParameterError, "threshold: found 3.0, expected an integer"),
        ({"value_bits": 16.0}, ParameterError, "value_bits: found 16.0, expected an integer"),
        ({"value_range": "1"}, ParameterError, "value_range: found '1'"),
        ({"value_range": -1.0}, ParameterError, "value_range: found -1.0"),
        ({"backend": "clear"}, ParameterError, "backend: found 'clear', expected one of masked"),
    ],
)
def test_unfit_rounds(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    """Each unfit argument is an error that says who, what was found and what was expected."""
    defaults = {"updates": {"a": [0.0], "b": [0.0], "c": [0.0]}, "value_range": 1.0}
    with pytest.raises(error, match=text):
        run_round(**{**defaults, **arguments})


def test_journal_in_memory() -> None:
    """The journal that tests use keeps the promise of every journal: rounds go up, answers are given once."""
    journal = MemoryJournal()
    journal.begin("run", 2)
    journal.begin("other", 1)
    for number in (2, 1):
        with pytest.raises(RoundReplayed):
            journal.begin("run", number)
    journal.answer("run", 2)
    with pytest.raises(RoundReplayed):
        journal.answer("run", 2)


@pytest.mark.parametrize("phase", PHASES)
def test_sparse_round_with_dropouts_in_each_phase(phase: str) -> None:
    """On the sparse graph, too, a tenth of the sites may stop in any phase, and the sum is exact."""
    updates = {f"site-{index:02d}": np.full(3, index / 100) for index in range(30)}
    gone = dict.fromkeys(list(updates)[::10], phase)
    outcome = run_round(updates, value_range=1.0, graph="sparse", dropouts=gone)
    sent = phase in ("CheckingConsistency", "Unmasking")
    assert set(outcome.survivors) == updates.keys() - (set() if sent else gone.keys())
    np.testing.assert_array_equal(outcome.total, sum(outcome.encoded.values()))


@pytest.mark.parametrize("phase", PHASES)
def test_too_many_dropouts_on_the_sparse_graph(phase: str) -> None:
    """Where too few holders are left for somebody, nothing is released."""
    updates = {f"site-{index:02d}": np.zeros(3) for index in range(12)}
    gone = dict.fromkeys(list(updates)[:6], phase)
    with pytest.raises(ThresholdNotMet, match=f"coordinator, {phase}"):
        run_round(updates, value_range=1.0, graph="sparse", max_corrupt=0, max_dropouts=1, dropouts=gone)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("phase", PHASES)
def test_a_thousand_sites(phase: str) -> None:
    """Of a thousand sites a tenth stops in one phase: the sum is exact, and a site sends what its neighbours need."""
    updates = {f"site-{index:03d}": np.full(4, index / 1000) for index in range(1000)}
    gone = dict.fromkeys(list(updates)[::10], phase)
    outcome = run_round(updates, value_range=1.0, dropouts=gone)
    assert len(outcome.survivors) == (1000 if phase in ("CheckingConsistency", "Unmasking") else 900)
    np.testing.assert_array_equal(outcome.total, sum(outcome.encoded.values()))
    assert max(outcome.bytes_sent.values()) < 40_000
