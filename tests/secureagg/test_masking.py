"""Keys, keystreams and masks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from support.keystreams import keystream
from support.rounds import StoppedRound

from secureagg import AuthenticationFailed, LocalProtocolError, SiteId
from secureagg.agreement import KeyPair, open_shares, pairwise_mask_key, seal_shares, self_mask_key
from secureagg.keystream import STRETCH_BLOCKS, STRETCH_BYTES, Keystream, Room, _gcm_is_faster
from secureagg.masking import apply_masks, masks_of_input
from secureagg.testing import CountingEntropy

ROUND = StoppedRound(3)
PARAMETERS = ROUND.parameters
A, B, C = ROUND.sites

LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


def test_rfc_7748_vector() -> None:
    """Key agreement is X25519: with the base point u = 9 iterated once, as RFC 7748, section 5.2, has it."""
    nine = (9).to_bytes(32, "little")
    once = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert KeyPair(nine).agree(nine, who="x").hex() == once
    assert KeyPair(nine).public.hex() == once


@pytest.mark.parametrize("key", LOW_ORDER, ids=lambda key: key[:2].hex())
def test_keys_of_low_order_are_refused(key: bytes) -> None:
    """A public key with which the agreed secret would be known to everyone is refused, naming its owner."""
    with pytest.raises(AuthenticationFailed, match="key of b: not an X25519 key"):
        KeyPair(b"s" * 32).agree(key, who="key of b")


def test_a_key_has_one_form() -> None:
    """The same point with its unused bit set, or above the field's prime, is no second key; other lengths are none."""
    key = KeyPair(b"k" * 32).public
    KeyPair(b"s" * 32).agree(key, who="b")
    for other in (key[:31] + bytes([key[31] | 0x80]), (2**255 - 19 + 9).to_bytes(32, "little"), key[:31], key + b"\0"):
        with pytest.raises(AuthenticationFailed, match="b: not an X25519 key in its one form"):
            KeyPair(b"s" * 32).agree(other, who="b")


def counter_mode(key: bytes, length: int) -> bytes:
    """The first bytes of the stream, block by block: the stretch's number and 2, 3, 4, ... within it."""
    counters = (divmod(block, STRETCH_BLOCKS) for block in range(-(-length // 16)))
    blocks = b"".join(stretch.to_bytes(12, "big") + (2 + within).to_bytes(4, "big") for stretch, within in counters)
    return Cipher(AES256(key), ECB()).encryptor().update(blocks)[:length]  # noqa: S305


@pytest.mark.parametrize("gcm", [True, False])
@pytest.mark.parametrize("size", [STRETCH_BYTES, 3 * STRETCH_BYTES + 16, STRETCH_BYTES // 2 - 16, 16])
def test_keystream_is_aes_256_ctr(size: int, gcm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is AES-256 of its counter blocks, whatever sizes it is read in, over the ends of its stretches, by
    whichever of OpenSSL's codes."""
    monkeypatch.setattr("secureagg.keystream._gcm_is_faster", lambda: gcm)
    key, stream, room = bytes(range(32)), Keystream(bytes(range(32))), Room(np.dtype("<u4"), size // 4)
    times = min(9, -(-3 * STRETCH_BYTES // size))
    whole = b"".join(stream.next(room, size // 4).tobytes() for _ in range(times))
    assert whole == counter_mode(key, len(whole))


@pytest.mark.parametrize(
    ("cpuinfo", "gcm"),
    [
        ("flags : fpu aes avx512vl vaes vpclmulqdq sha_ni", True),
        ("flags : fpu aes avx2 vaes vpclmulqdq", False),
        ("Features : fp asimd aes pmull", False),
        (OSError("no such file"), False),
    ],
)
def test_which_code_makes_keystreams(cpuinfo: str | OSError, gcm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GCM's code is taken only where the system names all that makes it fast; elsewhere that of CTR is faster."""
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=[cpuinfo]))
    assert _gcm_is_faster.__wrapped__() == gcm


def test_a_reading_that_ends_in_a_block_is_the_last() -> None:
    """No byte of a keystream is given out twice: after a part of a block there is no next reading."""
    stream, room = Keystream(bytes(32)), Room(np.dtype("<u4"), 5)
    stream.next(room, 5)
    with pytest.raises(LocalProtocolError, match="byte 20, expected a multiple of 16"):
        stream.next(room, 1)


@pytest.mark.parametrize("offset", [0, 16, STRETCH_BYTES // 2, STRETCH_BYTES - 16, STRETCH_BYTES, STRETCH_BYTES + 48])
def test_keystream_from_the_middle(offset: int) -> None:
    """A stream that begins at any block goes on as the whole one does."""
    key, size = bytes(range(32)), STRETCH_BYTES + 96
    assert keystream(key, "<u4", size // 4, offset=offset).tobytes() == counter_mode(key, offset + size)[offset:]


@pytest.mark.parametrize("length", [1, 5, 70_000, 140_001])
@pytest.mark.parametrize("word", ["<u1", "<u2", "<u4", "<u8"])
def test_masks_cancel_in_the_sum(length: int, word: str) -> None:
    """Over all sites, pairwise masks add up to zero; only the self masks remain, whatever length and word."""
    seeds = {site: site.encode().ljust(32) for site in (A, B, C)}
    secrets = {pair: bytes([index]) * 32 for index, pair in enumerate([(A, B), (A, C), (B, C)])}
    total = np.zeros(length, word)
    for site in (A, B, C):
        agreed = {other: secrets[min(site, other), max(site, other)] for other in (A, B, C) if other != site}
        words = np.zeros(length, word)
        apply_masks(words, masks_of_input(PARAMETERS, site=site, lane="update", self_seed=seeds[site], secrets=agreed))
        assert length < 5 or words.any()
        total += words
    apply_masks(total, [(self_mask_key(PARAMETERS, seeds[s], lane="update", site=s), -1) for s in (A, B, C)])
    assert not total.any()


@pytest.mark.parametrize("length", [1, 65_537, 3_000_001])
def test_masks_do_not_depend_on_how_they_are_spread(length: int) -> None:
    """On several threads, and in any order of the parts, the result is the same as from beginning to end."""
    keys = [(bytes([index]) * 32, 1 if index % 2 else -1) for index in range(3)]
    one, threads, backwards = (np.arange(length).astype("<u4") for _ in range(3))
    apply_masks(one, keys)
    with ThreadPoolExecutor(4) as pool:
        apply_masks(threads, keys, spread=pool.map)
    apply_masks(backwards, keys, spread=lambda function, parts: map(function, list(parts)[::-1]))
    np.testing.assert_array_equal(one, threads)
    np.testing.assert_array_equal(one, backwards)
    straight = np.zeros(length, "<u4")
    for key, sign in keys:
        stream = np.frombuffer(counter_mode(key, 4 * length), "<u4")
        straight = straight + stream if sign > 0 else straight - stream
    np.testing.assert_array_equal(one, straight + np.arange(length).astype("<u4"))


def test_every_purpose_has_a_key_of_its_own() -> None:
    """From one secret, each lane, pair, site, purpose and round gets a different key; a pair's key has no direction."""
    secret = b"x" * 32
    other_round = StoppedRound(3, round_number=2).parameters
    keys = [
        pairwise_mask_key(PARAMETERS, secret, lane="update", one=A, other=B),
        pairwise_mask_key(PARAMETERS, secret, lane="weight", one=A, other=B),
        pairwise_mask_key(PARAMETERS, secret, lane="update", one=A, other=C),
        pairwise_mask_key(other_round, secret, lane="update", one=A, other=B),
        self_mask_key(PARAMETERS, secret, lane="update", site=A),
        self_mask_key(PARAMETERS, secret, lane="update", site=B),
        self_mask_key(PARAMETERS, secret, lane="weight", site=A),
        self_mask_key(other_round, secret, lane="update", site=A),
    ]
    assert len(set(keys)) == len(keys)
    assert pairwise_mask_key(PARAMETERS, secret, lane="update", one=B, other=A) == keys[0]


@pytest.mark.parametrize("wrong", ["sender", "recipient", "swap", "round", "secret", "bit", "cut", "empty"])
def test_shares_open_for_their_recipient_in_their_round_only(wrong: str) -> None:
    """A ciphertext that is moved, turned around, replayed or altered does not open."""
    one, other = KeyPair.generate(CountingEntropy(1)), KeyPair.generate(CountingEntropy(2))
    secret = one.agree(other.public, who="x")
    assert secret == other.agree(one.public, who="x")
    sealed = seal_shares(PARAMETERS, secret, b"shares", sender=A, recipient=B)
    assert open_shares(PARAMETERS, secret, sealed, sender=A, recipient=B) == b"shares"
    arguments = {
        "sender": (PARAMETERS, secret, sealed, C, B),
        "recipient": (PARAMETERS, secret, sealed, A, C),
        "swap": (PARAMETERS, secret, sealed, B, A),
        "round": (StoppedRound(3, round_number=2).parameters, secret, sealed, A, B),
        "secret": (PARAMETERS, bytes(32), sealed, A, B),
        "bit": (PARAMETERS, secret, bytes([sealed[0] ^ 1]) + sealed[1:], A, B),
        "cut": (PARAMETERS, secret, sealed[:-1], A, B),
        "empty": (PARAMETERS, secret, b"", A, B),
    }
    parameters, key, ciphertext, sender, recipient = arguments[wrong]
    with pytest.raises(AuthenticationFailed, match=f"shares from {sender} to {recipient}"):
        open_shares(parameters, key, ciphertext, sender=SiteId(sender), recipient=SiteId(recipient))
