"""Shamir secret sharing of 32-byte secrets over the prime field of 2^256 + 297 (Shamir, CACM 1979).

Any ``threshold`` shares determine the secret, fewer say nothing about it.  The prime is the least above 2^256, so
every 32-byte string is a field element; shares need 33 bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from secureagg.errors import AuthenticationFailed, MalformedMessage
from secureagg.identity import Entropy

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def share(secret: bytes, *, threshold: int, positions: Iterable[int], entropy: Entropy) -> dict[int, bytes]:
    """Shares of a 32-byte ``secret``, one per position (distinct, at least 1): position -> 33 bytes."""
    # 48 bytes modulo a 257-bit prime are uniform to within 2^-127.
    coefficients = [int.from_bytes(entropy(48), "little") % PRIME for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "little"))  # highest power first, the secret is the constant term
    shares = {}
    for position in positions:
        value = 0
        for coefficient in coefficients:
            value = (value * position + coefficient) % PRIME
        shares[position] = value.to_bytes(SHARE_BYTES, "little")
    return shares


def lagrange_coefficients(positions: Sequence[int]) -> dict[int, int]:
    """Position -> its Lagrange coefficient at 0; all secrets that the same holders reconstruct share these."""
    coefficients = {}
    for position in positions:
        numerator = denominator = 1
        for other in positions:
            if other != position:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - position) % PRIME
        coefficients[position] = numerator * pow(denominator, -1, PRIME) % PRIME
    return coefficients


def reconstruct(shares: Mapping[int, bytes], coefficients: Mapping[int, int], *, owner: str, who: str) -> bytes:
    """The 32-byte secret of ``shares`` (position -> share), at exactly the positions of ``coefficients``.

    Raises AuthenticationFailed naming ``who``, and blaming the ``owner`` who dealt them, if the shares fit no 32-byte
    secret; that they fit the right one is for the caller to check against a public key or a commitment.
    """
    total = (
        sum(int.from_bytes(shares[position], "little") * factor for position, factor in coefficients.items()) % PRIME
    )
    if total >= 1 << (8 * SECRET_BYTES):
        raise AuthenticationFailed(f"{who}: the shares do not fit a {SECRET_BYTES}-byte secret", blamed=owner)
    return total.to_bytes(SECRET_BYTES, "little")


def check_share(value: bytes, *, who: str) -> None:
    """Raise MalformedMessage naming ``who`` unless ``value`` is the encoding of a field element."""
    if len(value) != SHARE_BYTES or int.from_bytes(value, "little") >= PRIME:
        raise MalformedMessage(f"{who}: not a share of {SHARE_BYTES} bytes below the field's prime")
