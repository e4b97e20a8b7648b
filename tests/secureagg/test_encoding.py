"""Floats to ring integers and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.rounds import StoppedRound

from secureagg import (
    Counts,
    FixedPoint,
    Lane,
    ParameterError,
    RingElements,
    RoundParameters,
    ShapeMismatch,
    ValueOutOfRange,
    encode_input,
)
from secureagg.encoding import decode_total
from secureagg.testing import CountingEntropy


def build(lanes: tuple[Lane, ...], max_weight: int | None) -> RoundParameters:
    """Parameters of a round of three with these lanes."""
    base = StoppedRound(3).options
    return RoundParameters.create(**{**base, "lanes": lanes, "max_weight": max_weight})


def fixed(length: int, **options: object) -> Lane:
    """A fixed-point lane called update."""
    return Lane(name="update", length=length, encoding=FixedPoint(**{"value_range": 1.0, **options}))


def lifted(made: RoundParameters, values: Mapping[str, object], lane: str = "update", **options: object) -> np.ndarray:
    """One lane of an encoded input as integers."""
    encoded = encode_input(made, values, **options)
    return made.lanes[lane].lift(encoded.vectors[lane])


@given(arrays(np.float64, 20, elements=st.floats(-3, 3)), st.integers(2, 32))
def test_encoding_is_within_one_step(values: np.ndarray, bits: int) -> None:
    """Each decoded value differs from the original by less than one quantisation step, never by more."""
    made = build((fixed(20, value_range=3.0, value_bits=bits),), None)
    integers = lifted(made, {"update": values})
    encoding = made.lanes["update"].lane.encoding
    assert isinstance(encoding, FixedPoint)
    assert (np.abs(integers * encoding.step - values) < encoding.step * (1 + 1e-9)).all()
    assert (np.abs(integers) <= encoding.levels).all()


def test_rounding_is_unbiased() -> None:
    """A value a quarter of a step above an integer is rounded up a quarter of the time.

    100,000 fixed coins; the bound of 6 standard deviations has a false-alarm probability below 1e-8.
    """
    count = 100_000
    made = build((fixed(count, value_range=127.0, value_bits=8),), None)
    integers = lifted(made, {"update": np.full(count, -5.75)}, entropy=CountingEntropy(7))
    assert set(integers.tolist()) == {-6, -5}
    ups = int((integers == -5).sum())
    assert abs(ups - count / 4) < 6 * np.sqrt(count * 3 / 16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [False, True])
def test_values_that_are_not_finite_are_refused(value: float, clip: bool) -> None:
    """NaN and infinity are refused with lane and index, also where the lane clips."""
    made = build((fixed(70_000, clip=clip),), None)
    update = np.zeros(70_000)
    update[66_000] = value
    with pytest.raises(ValueOutOfRange, match="lane update, index 66000: found a value that is not finite") as caught:
        encode_input(made, {"update": update})
    assert (caught.value.lane, caught.value.index) == ("update", 66_000)


def test_out_of_range_is_refused_without_the_value() -> None:
    """A value beyond the range is refused with index, excess and range; the value itself is not in the text."""
    made = build((fixed(4),), None)
    with pytest.raises(ValueOutOfRange, match=r"index 2: found a magnitude 0\.25 above the range, expected at most 1"):
        encode_input(made, {"update": np.array([0, 1, -1.25, 9.0])})


def test_clipping_counts() -> None:
    """A clipping lane moves values to the edge and reports how many in a lane of its own."""
    made = build((fixed(4, clip=True),), None)
    encoded = encode_input(made, {"update": np.array([0.0, 5.0, -7.0, 1.0])})
    levels = made.lanes["update"].lane.encoding.levels
    assert made.lanes["update"].lift(encoded.vectors["update"]).tolist() == [0, levels, -levels, levels]
    assert encoded.vectors["update/clipped"].tolist() == [2]


def test_weights_multiply_and_travel_hidden() -> None:
    """A weighted lane holds weight times the encoded value, and the weight is a lane itself."""
    lane = Lane(name="update", length=2, encoding=FixedPoint(value_range=1.0, value_bits=8), weighted=True)
    made = build((lane,), 50)
    encoded = encode_input(made, {"update": np.array([1.0, -1.0])}, weight=37)
    assert made.lanes["update"].lift(encoded.vectors["update"]).tolist() == [37 * 127, -37 * 127]
    assert encoded.vectors["weight"].tolist() == [37]
    assert encoded.vectors["canary"].tolist() == [1]


@pytest.mark.parametrize("weight", [-1, 51])
def test_weights_outside_the_bound_are_refused_unnamed(weight: int) -> None:
    """A weight outside 0..max is refused; the text says on which side, not the number."""
    lane = Lane(name="update", length=1, encoding=FixedPoint(value_range=1.0), weighted=True)
    with pytest.raises(ValueOutOfRange, match="expected 0 to 50") as caught:
        encode_input(build((lane,), 50), {"update": np.zeros(1)}, weight=weight)
    assert str(weight) not in str(caught.value).replace("above 50", "").replace("below 0", "")


def test_a_weight_is_given_exactly_when_the_round_has_one() -> None:
    """A missing weight is not taken as 1, and a superfluous one is not ignored."""
    lane = Lane(name="update", length=1, encoding=FixedPoint(value_range=1.0))
    with pytest.raises(ParameterError, match="weight: found none"):
        encode_input(build((lane,), 5), {"update": np.zeros(1)})
    with pytest.raises(ParameterError, match="expected no weight"):
        encode_input(build((lane,), None), {"update": np.zeros(1)}, weight=1)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"update": np.zeros(3)}, ShapeMismatch, r"found shape \(3,\), expected \(4,\)"),
        ({"update": np.zeros((2, 2))}, ShapeMismatch, r"found shape \(2, 2\)"),
        ({}, ParameterError, "lanes: found"),
        ({"update": np.zeros(4), "extra": np.zeros(4)}, ParameterError, "lanes: found"),
        ({"update": np.zeros(4, complex)}, ParameterError, "complex"),
    ],
)
def test_wrong_shapes_and_lanes(values: dict[str, np.ndarray], error: type[Exception], text: str) -> None:
    """Each unfit input is an error that says what was found and what was expected."""
    with pytest.raises(error, match=text):
        encode_input(build((fixed(4),), None), values)


@pytest.mark.parametrize(("value", "side"), [(-1, "below 0"), (101, "above 100")])
def test_counts_outside_their_bound(value: int, side: str) -> None:
    """A count outside 0..maximum is refused with lane and index."""
    made = build((Lane(name="hits", length=3, encoding=Counts(maximum=100)),), None)
    with pytest.raises(ValueOutOfRange, match=f"lane hits, index 1: found an integer {side}"):
        encode_input(made, {"hits": np.array([0, value, 100])})


def test_counts_are_integers() -> None:
    """Floats are no counts."""
    made = build((Lane(name="hits", length=1, encoding=Counts(maximum=100)),), None)
    with pytest.raises(ParameterError, match="float64, expected integers"):
        encode_input(made, {"hits": np.array([1.0])})


def test_mean_of_no_weight_is_undefined() -> None:
    """Survivors whose weights add up to 0 have no weighted mean: an error, not a NaN."""
    lane = Lane(name="update", length=1, encoding=FixedPoint(value_range=1.0), weighted=True)
    ring_lane = build((lane,), 5).lanes["update"]
    with pytest.raises(ParameterError, match="weights add up to 0"):
        decode_total(ring_lane, np.zeros(1, np.int64), survivors=3, weight=0)
    assert decode_total(ring_lane, np.array([10], np.int64), survivors=3, weight=5)[0] == pytest.approx(2 / 32767)


def ring_elements(bits: int, length: int = 3) -> Lane:
    """A lane of elements that the caller has encoded."""
    return Lane(name="noised", length=length, encoding=RingElements(ring_bits=bits))


@given(st.integers(8, 63), st.data())
def test_ring_elements_travel_as_they_are(bits: int, data: Any) -> None:
    """Elements that the caller has encoded are neither rounded nor clipped, in the lane's own ring whatever the cohort,
    and their total is centred around 0."""
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=3, max_size=3))
    made = build((ring_elements(bits),), None)
    assert made.lanes["noised"].ring_bits == bits
    encoded = encode_input(made, {"noised": np.array(values, np.uint64)})
    assert encoded.vectors["noised"].tolist() == values
    centred = [value - 2**bits * (value >= 2 ** (bits - 1)) for value in values]
    assert made.lanes["noised"].lift(encoded.vectors["noised"]).tolist() == centred


@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_ring_elements_are_of_their_ring(value: int) -> None:
    """An integer outside the ring is refused, not reduced."""
    with pytest.raises(ValueOutOfRange, match="lane noised, index 1: found an integer"):
        encode_input(build((ring_elements(20),), None), {"noised": np.array([0, value, 0])})


@pytest.mark.parametrize("options", [{"weighted": True}, {"minimum_ring_bits": 30}])
def test_ring_elements_have_no_weight_and_one_ring(options: dict[str, Any]) -> None:
    """A weight would multiply the noise, and another ring would not wrap where its parts did."""
    with pytest.raises(ParameterError, match="have their own ring and no weight"):
        Lane(name="noised", length=3, encoding=RingElements(ring_bits=20), **options)


@pytest.mark.parametrize("bits", [7, 64])
def test_ring_elements_fit_a_total(bits: int) -> None:
    """Rings of 8 to 63 bits, whose totals a signed word of 64 bits holds."""
    with pytest.raises(ParameterError, match=f"found {bits} ring bits, expected 8 to 63"):
        RingElements(ring_bits=bits)
