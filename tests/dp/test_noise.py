"""Noise from a CSPRNG, on a grid.

Statistical tests have fixed entropy, and say what their false alarm would be for a random one.
"""

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp.errors import UnsupportedEvent
from dp.noise import GaussianNoise, csprng
from secureagg.testing import CountingEntropy

COUNT = 200_000
SCALES = [(1.0, 1.0, 100), (1e-6, 0.5, 1), (0.3, 20.0, 14), (1e6, 3.0, 10**9), (1.0, 1e-3, 5)]


def make(seed: int | None = 0, *, clip: float = 1.0, z: float = 1.0, d: int = COUNT) -> GaussianNoise:
    """A mechanism with fixed entropy, or with the system's where ``seed`` is None."""
    options = {} if seed is None else {"entropy": CountingEntropy(seed)}
    return GaussianNoise(clip_norm=clip, noise_multiplier=z, dimensions=d, **options)


def test_keystream_is_aes_in_counter_mode() -> None:
    """Known answer: the generator's words are AES-128 of 0, 1, 2, ... under the entropy's first 16 bytes."""
    key = CountingEntropy(1)(16)
    counters = b"".join(number.to_bytes(16, "little") for number in range(200))
    expected = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)  # noqa: S305  one block
    assert csprng(CountingEntropy(1)).bit_generator.random_raw(400).tobytes() == expected


@pytest.mark.parametrize("length", [0, 15, 17])
def test_entropy_that_has_run_dry_is_refused(length: int) -> None:
    """A source that gives fewer or more bytes than a key has is refused, and its own error comes through."""
    with pytest.raises(UnsupportedEvent, match=f"entropy: found {length} bytes, expected 16"):
        csprng(lambda _: bytes(length))

    def exhausted(_: int) -> bytes:
        raise BlockingIOError("no entropy")

    with pytest.raises(BlockingIOError, match="no entropy"):
        GaussianNoise(clip_norm=1.0, noise_multiplier=1.0, dimensions=1, entropy=exhausted)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "called"), [("clip", "clip norm"), ("z", "noise multiplier"), ("d", "dimensions")])
def test_no_noise_is_refused(name: str, called: str, wrong: float) -> None:
    """A clip norm, noise multiplier or dimension that is zero, negative or not finite is refused by name."""
    with pytest.raises(UnsupportedEvent, match=f"found {called}"):
        make(**{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(("clip", "z", "d"), [(1e-300, 1.0, 1), (1e300, 1.0, 1), (1.0, 1e5, 2**60)])
def test_scales_without_a_grid_are_refused(clip: float, z: float, d: int) -> None:
    """Where float64 could not add without rounding, nothing is promised."""
    with pytest.raises(UnsupportedEvent, match="adds without rounding"):
        make(clip=clip, z=z, d=d)


@pytest.mark.parametrize(("clip", "z", "d"), SCALES)
def test_grid_and_deviation(clip: float, z: float, d: int) -> None:
    """The grid is a power of two, as coarse as allowed; the deviation is z times the sensitivity after rounding, at
    most 1 part in 4096 above z C."""
    noise = make(clip=clip, z=z, d=d)
    assert np.frexp(noise.grid)[0] == 0.5
    finest = min(clip / np.sqrt(d), z * clip) / 4096
    assert noise.grid <= finest < 2 * noise.grid
    assert noise.deviation == pytest.approx(z * (clip + noise.grid * np.sqrt(d)), rel=1e-12)
    assert z * clip < noise.deviation <= z * clip * (1 + 1 / 4096)
    assert noise.largest_sum == 2**52 * noise.grid


@pytest.mark.parametrize(("clip", "z", "d"), SCALES)
def test_distribution(clip: float, z: float, d: int) -> None:
    """Draws at any scale are normal with the deviation promised: Kolmogorov-Smirnov, chi-square of the variance, mean;
    false alarms below 1e-6 each."""
    noise = make(3, clip=clip, z=z, d=d)
    draws = noise.release(np.zeros(COUNT)) / noise.deviation
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], COUNT)
    assert low < (draws**2).sum() < high
    assert abs(draws.mean()) < 5 / np.sqrt(COUNT)


SUMS = {
    "zeros": np.zeros(COUNT),
    "a third": np.full(COUNT, 1 / 3),
    "tiny": np.full(COUNT, -1e-13),
    "float32": np.linspace(-7, 7, COUNT, dtype=np.float32).astype(np.float64),
    "just off the grid": np.full(COUNT, 2.0**-20 * (1 + 2**-30)),
}


@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
def test_low_bits_say_nothing_of_the_sum(total: np.ndarray) -> None:
    """Whatever was added up, a release lies on the grid, and its last 6 bits there are uniform; false alarm 1e-6."""
    noise = make(4)
    steps = noise.release(total) / noise.grid
    assert np.array_equal(steps, np.rint(steps))
    counts = np.bincount(steps.astype(np.int64) % 64, minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-6


def test_a_zero_has_no_sign() -> None:
    """A released 0 is +0 for sums just above and just below 0: the sign of a zero would tell which."""
    for sign in (1, -1):
        released = make(5, d=1).release(np.full(10 * COUNT, sign * 1e-12))
        zeros = released[released == 0]
        assert len(zeros) > 10
        assert not np.signbit(zeros).any()


@given(st.integers(-(2**51), 2**51), st.floats(-1000, 1000), st.sampled_from(SCALES))
@settings(max_examples=50, deadline=None)
def test_a_release_is_the_rounded_sum_plus_the_same_noise(steps: int, offset: float, scale) -> None:
    """With the same key, what is released differs by exactly what the sums differ by once they are on the grid: the
    addition never rounds."""
    clip, z, d = scale
    noise, again = (make(6, clip=clip, z=z, d=d) for _ in range(2))
    total = (np.full(5, float(steps)) + offset) * noise.grid
    difference = (again.release(total) - noise.release(np.zeros(5))) / noise.grid
    assert np.array_equal(difference, np.rint(total / noise.grid))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300])
@pytest.mark.parametrize("place", [0, 20_000])
def test_sums_off_the_range_are_refused(wrong: float, place: int) -> None:
    """A coordinate that is no number, or so large that adding noise would round it, is refused wherever it is."""
    total = np.zeros(30_000)
    total[place] = wrong
    with pytest.raises(UnsupportedEvent, match="not finite or too large"):
        make().release(total)


def test_the_largest_sum_is_released() -> None:
    """A coordinate of exactly the largest sum passes, the next one on the grid does not."""
    noise = make()
    noise.release(np.array([noise.largest_sum, -noise.largest_sum]))
    for sign in (1, -1):
        with pytest.raises(UnsupportedEvent):
            noise.release(np.array([sign * (noise.largest_sum + noise.grid)]))


def test_shape_order_and_input() -> None:
    """A release has its sum's shape in any memory order and for one number, is float64, and leaves the sum alone."""
    total = np.arange(12.0).reshape(3, 4)
    copy = total.copy()
    released = make(7).release(total)
    assert (released.shape, released.dtype) == ((3, 4), np.float64)
    assert np.array_equal(total, copy)
    assert np.array_equal(make(7).release(np.asfortranarray(total)), released)
    assert make(7).release(np.array(0.0)).shape == ()
    assert make(7).release(np.zeros((0, 3))).shape == (0, 3)


def test_injected_entropy_repeats_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entropy gives the same draws, block by block or release by release; other entropy gives others."""
    whole = make(8).release(np.zeros(50_000))
    pieces = make(8)
    assert np.array_equal(np.concatenate([pieces.release(np.zeros(n)) for n in (1, 20_000, 29_999)]), whole)
    monkeypatch.setattr("dp.noise._BLOCK", 1000)
    assert np.array_equal(make(8).release(np.zeros(50_000)), whole)
    assert np.mean(make(9).release(np.zeros(50_000)) == whole) < 0.01


def test_noise_is_independent_of_all_other_noise() -> None:
    """Neighbouring draws, successive releases and two sites' releases are uncorrelated, in values and in magnitudes;
    within 5 standard errors, below 1e-6 each."""
    one, other = make(10), make(11)
    first, second, theirs = one.release(np.zeros(COUNT)), one.release(np.zeros(COUNT)), other.release(np.zeros(COUNT))
    for a, b in ((first, second), (first, theirs), (second, theirs), (first[:-1], first[1:])):
        for x, y in ((a, b), (np.abs(a), np.abs(b))):
            assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(COUNT)


def test_global_seeds_do_not_matter() -> None:
    """Two sites that set the same seeds, as careful engineers do, draw uncorrelated noise."""
    draws = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            np.random.seed(1)
            draws.append(make(None).release(np.zeros(COUNT)))
    assert abs(np.corrcoef(*draws)[0, 1]) < 5 / np.sqrt(COUNT)


def test_coins_are_fair() -> None:
    """A sampling coin of rate q falls q of the time, within 5 standard deviations (below 1e-6)."""
    hits = int((csprng(CountingEntropy(6)).random(COUNT) < 0.3).sum())
    assert abs(hits - 0.3 * COUNT) < 5 * np.sqrt(COUNT * 0.21)
