"""Shamir secret sharing."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secureagg import AuthenticationFailed, MalformedMessage
from secureagg.shamir import PRIME, SHARE_BYTES, check_share, lagrange_coefficients, reconstruct, share
from secureagg.testing import CountingEntropy


def test_the_modulus_is_prime() -> None:
    """2^256 + 297 passes 40 rounds of Miller and Rabin, and every 32-byte string is below it."""
    assert PRIME > 2**256 - 1
    odd, power = PRIME - 1, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    for base in range(2, 42):
        value = pow(base, odd, PRIME)
        assert value in (1, PRIME - 1) or any((value := value * value % PRIME) == PRIME - 1 for _ in range(power - 1))


@given(st.binary(min_size=32, max_size=32), st.integers(1, 7), st.integers(0, 3))
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, threshold: int, more: int) -> None:
    """Every set of ``threshold`` shares, and of more, reconstructs the secret exactly."""
    positions = range(1, threshold + more + 1)
    shares = share(secret, threshold=threshold, positions=positions, entropy=CountingEntropy(secret))
    for size in (threshold, threshold + more):
        for holders in combinations(positions, size):
            coefficients = lagrange_coefficients(holders)
            assert reconstruct({at: shares[at] for at in holders}, coefficients, owner="b", who="x") == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With one share missing, any secret at all is consistent with the others: they say nothing."""
    shares = share(b"s" * 32, threshold=3, positions=range(1, 6), entropy=CountingEntropy(1))
    two = {at: int.from_bytes(shares[at], "little") for at in (2, 5)}
    for other in (0, 1, 2**255):
        points = {0: other, **two}
        fourth = (
            sum(value * prod_ratio(at, points, 4) for at, value in points.items()) % PRIME
        )  # the polynomial through (0, other) and the two shares, at position 4
        forged = {2: shares[2], 5: shares[5], 4: fourth.to_bytes(SHARE_BYTES, "little")}
        rebuilt = reconstruct(forged, lagrange_coefficients((2, 4, 5)), owner="b", who="x")
        assert int.from_bytes(rebuilt, "little") == other


def prod_ratio(at: int, points: dict[int, int], target: int) -> int:
    """The Lagrange basis polynomial of one point, at ``target``."""
    result = 1
    for other in points:
        if other != at:
            result = result * (target - other) * pow(at - other, -1, PRIME) % PRIME
    return result


def test_known_polynomial() -> None:
    """With coefficients 5 and 7 behind the secret 3, the share at position x is 3 + 7x + 5x^2 (computed by hand)."""
    drawn = iter([5, 7])
    shares = share(
        (3).to_bytes(32, "little"),
        threshold=3,
        positions=(1, 2, 10),
        entropy=lambda n: next(drawn).to_bytes(n, "little"),
    )
    assert {at: int.from_bytes(value, "little") for at, value in shares.items()} == {1: 15, 2: 37, 10: 573}


def test_a_wrong_share_is_noticed_or_gives_another_secret() -> None:
    """A changed share never reconstructs the secret; a result beyond 32 bytes is an error naming whose it is."""
    shares = share(b"s" * 32, threshold=2, positions=(1, 2), entropy=CountingEntropy(2))
    coefficients = lagrange_coefficients((1, 2))
    top = PRIME - 1
    # chosen so that the interpolated value is exactly PRIME - 1, which no 32-byte secret has
    first = int.from_bytes(shares[1], "little")
    second = (top - first * coefficients[1]) * pow(coefficients[2], -1, PRIME) % PRIME
    with pytest.raises(AuthenticationFailed, match="seed of b") as caught:
        reconstruct({1: shares[1], 2: second.to_bytes(33, "little")}, coefficients, owner="b", who="seed of b")
    assert caught.value.blamed == "b"
    with_error = {1: shares[1], 2: ((int.from_bytes(shares[2], "little") + 1) % PRIME).to_bytes(33, "little")}
    assert reconstruct(with_error, coefficients, owner="b", who="x") != b"s" * 32


@pytest.mark.parametrize("value", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "little"), b"\xff" * 33])
def test_shares_are_field_elements(value: bytes) -> None:
    """A share of another length or not below the prime is refused, naming its sender."""
    with pytest.raises(MalformedMessage, match="share of b"):
        check_share(value, who="share of b")
