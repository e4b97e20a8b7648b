"""Lanes and the rings that their sums cannot leave."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.packed import integers

from secureagg import Counts, FixedPoint, Lane, ParameterError, RingElements
from secureagg.lanes import RingLane


@given(st.integers(3, 1000), st.integers(1, 10**6), st.integers(2, 32), st.booleans(), st.sampled_from([-1, 1]))
def test_the_largest_sum_of_the_cohort_fits_and_a_narrower_ring_would_not(
    sites: int, weight: int, bits: int, weighted: bool, sign: int
) -> None:
    """Every site at the edge of the range with the largest weight: the sum survives the ring; one bit less and it
    would not."""
    lane = Lane(name="x", length=1, encoding=FixedPoint(value_range=1.0, value_bits=bits), weighted=weighted)
    ring_lane = RingLane.for_cohort(lane, cohort_size=sites, max_weight=weight)
    total = sign * sites * (weight if weighted else 1) * (2 ** (bits - 1) - 1)
    assert ring_lane.lift(np.array([total % 2**ring_lane.ring_bits], ring_lane.word)).tolist() == [total]
    assert ring_lane.lift(np.array([total % 2**64], "<u8").astype(ring_lane.word)).tolist() == [total]
    assert 2 * abs(total) + 1 > 2 ** (ring_lane.ring_bits - 1) or ring_lane.ring_bits == 8


@given(st.integers(3, 1000), st.integers(1, 2**40))
def test_counts_fit(sites: int, maximum: int) -> None:
    """The same for counts, which only go upwards."""
    ring_lane = RingLane.for_cohort(
        Lane(name="x", length=1, encoding=Counts(maximum=maximum)), cohort_size=sites, max_weight=1
    )
    assert sites * maximum < 2**ring_lane.ring_bits
    assert ring_lane.ring_bits == 8 or sites * maximum >= 2 ** (ring_lane.ring_bits - 1)
    words = np.array([sites * maximum], ring_lane.word)
    assert ring_lane.lift(words).tolist() == [sites * maximum]


def test_sixteen_bits_of_sixteen_sites_take_20_bits() -> None:
    """The figure of the documentation: 2.5 bytes per 16-bit value at 16 sites, three values in each word of 60 bits."""
    lane = Lane(name="x", length=1000, encoding=FixedPoint(value_range=1.0, value_bits=16))
    ring_lane = RingLane.for_cohort(lane, cohort_size=16, max_weight=1)
    assert (ring_lane.ring_bits, ring_lane.digits, ring_lane.masked_length) == (20, 3, 334)
    assert (ring_lane.masked_bits, ring_lane.packed_bytes) == (60, 2505)


@st.composite
def inputs_of_sites(draw: st.DrawFn) -> tuple[RingLane, list[list[int]]]:
    """A lane over a cohort, and integers of each site that its encoding can give, the edges among them."""
    sites, weight = draw(st.integers(3, 12)), draw(st.sampled_from([1, 1, 1000]))
    encoding = draw(
        st.one_of(
            st.builds(FixedPoint, value_range=st.just(1.0), value_bits=st.integers(2, 32)),
            st.builds(Counts, maximum=st.integers(1, 2**40)),
        )
    )
    lane = Lane(
        name="x",
        length=draw(st.integers(1, 20)),
        encoding=encoding,
        weighted=True,
        minimum_ring_bits=draw(st.sampled_from([8, 8, 21, 64])),
    )
    most = weight * (encoding.levels if isinstance(encoding, FixedPoint) else encoding.maximum)
    least = -most if lane.signed else 0
    value = st.one_of(st.integers(least, most), st.sampled_from([least, most]))
    values = st.lists(value, min_size=lane.length, max_size=lane.length)
    ring_lane = RingLane.for_cohort(lane, cohort_size=sites, max_weight=weight)
    return ring_lane, draw(st.lists(values, min_size=sites, max_size=sites))


@given(inputs_of_sites())
def test_sums_of_words_are_words_of_sums(case: tuple[RingLane, list[list[int]]]) -> None:
    """Whatever the sites' integers are, the digits of their words' sum, modulo the words, are the integers' sums: none
    runs over into the next."""
    ring_lane, sites = case
    total = np.zeros(ring_lane.masked_length, ring_lane.masked_word)
    for values in sites:
        words = ring_lane.join(np.array([value % 2**64 for value in values], "<u8").astype(ring_lane.word))
        assert words.dtype == ring_lane.masked_word
        total += ring_lane.reduce(words)
    found = integers(ring_lane, ring_lane.reduce(total))
    assert found.tolist() == [sum(column) for column in zip(*sites, strict=True)]


@given(st.integers(8, 63), st.data())
def test_ring_elements_have_words_of_their_own(bits: int, data: st.DataObject) -> None:
    """Ring elements may wrap in their sum, so no word has two of them: the sum is right modulo the ring."""
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=2, max_size=9))
    lane = Lane(name="x", length=len(values), encoding=RingElements(ring_bits=bits))
    ring_lane = RingLane.for_cohort(lane, cohort_size=3, max_weight=1)
    words = np.array(values, ring_lane.word)
    total = ring_lane.join(words) + words + words
    found = integers(ring_lane, total)
    assert [integer % 2**bits for integer in found.tolist()] == [3 * value % 2**bits for value in values]
    assert all(-(2 ** (bits - 1)) <= integer < 2 ** (bits - 1) for integer in found.tolist())


def test_a_sum_that_could_wrap_is_refused_when_the_round_is_built() -> None:
    """No ring holds it, no 64-bit integer either: refused with the product written out."""
    lane = Lane(name="x", length=1, encoding=FixedPoint(value_range=1.0, value_bits=32), weighted=True)
    RingLane.for_cohort(lane, cohort_size=4, max_weight=2**30)
    with pytest.raises(ParameterError, match=r"4 x 2147483648 x 2147483647 .* below 2\^63"):
        RingLane.for_cohort(lane, cohort_size=4, max_weight=2**31)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FixedPoint(value_range=0.0), "value_range: found 0.0"),
        (lambda: FixedPoint(value_range=float("inf")), "value_range: found inf"),
        (lambda: FixedPoint(value_range=float("nan")), "value_range: found nan"),
        (lambda: FixedPoint(value_range=1e-308), "value_range: found 1e-308, expected a number from"),
        (lambda: FixedPoint(value_range=1e300), r"value_range: found 1e\+300"),
        (lambda: FixedPoint(value_range=1.0, value_bits=1), "value_bits: found 1"),
        (lambda: FixedPoint(value_range=1.0, value_bits=33), "value_bits: found 33"),
        (lambda: Counts(maximum=0), "maximum of 0"),
        (lambda: Lane(name="Update", length=1, encoding=Counts(maximum=1)), "lane name 'Update'"),
        (lambda: Lane(name="x", length=0, encoding=Counts(maximum=1)), "length 0"),
        (lambda: Lane(name="x", length=1, encoding=Counts(maximum=1), minimum_ring_bits=65), "65 minimum ring bits"),
        (lambda: Lane(name="x", length=1, encoding=Counts(maximum=1), minimum_ring_bits=7), "7 minimum ring bits"),
    ],
)
def test_unfit_lanes_are_refused(make: object, text: str) -> None:
    """An encoding or lane that makes no sense is refused with what was found."""
    with pytest.raises(ParameterError, match=text):
        make()  # type: ignore[operator]
