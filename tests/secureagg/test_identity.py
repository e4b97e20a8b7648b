"""Identities, cards and the roster."""

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secureagg import AuthenticationFailed, Card, Identity, ParameterError, Roster, SiteId, labels, site_id
from secureagg.identity import verify
from secureagg.testing import CountingEntropy

ENTROPY = CountingEntropy(3)
KEYS = {name: Identity.generate(ENTROPY) for name in ("a", "b", "c")}
CARDS = {name: Card.issue(SiteId(name), key, ENTROPY(32)) for name, key in KEYS.items()}


@pytest.mark.parametrize("name", ["a", "hospital-1", "x.y_z", "0" * 64])
def test_good_names(name: str) -> None:
    """These are names of sites."""
    assert site_id(name) == name


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", "-a", "a-", "a b", "ä", "a" * 65, "a\n"])
def test_bad_names(name: str) -> None:
    """A name that could surprise a file system, a log or a derivation is refused."""
    with pytest.raises(ParameterError, match="site name"):
        site_id(name)


def test_rfc_8032_vector() -> None:
    """Keys are Ed25519 as RFC 8032, section 7.1, test 1 has it."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert Identity.from_private_bytes(seed).public_key.hex() == public


@pytest.mark.parametrize("length", [0, 31, 33])
def test_private_keys_have_32_bytes(length: int) -> None:
    """A seed of another length is refused with both numbers."""
    with pytest.raises(ParameterError, match=f"identity key: {length} bytes, expected 32"):
        Identity.from_private_bytes(bytes(length))


def test_private_key_is_not_shown() -> None:
    """Neither repr nor str of an identity holds its secret."""
    key = KEYS["a"]
    assert key.private_bytes().hex() not in f"{key!r} {key}"


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_frame_tells_lists_apart(one: list[bytes], other: list[bytes]) -> None:
    """Different lists of parts never give the same bytes."""
    assert (labels.frame(*one) == labels.frame(*other)) == (one == other)


@given(st.lists(st.binary(max_size=9), max_size=4))
def test_a_digest_is_the_hash_of_the_frame(parts: list[bytes]) -> None:
    """Hashing piece by piece gives the SHA-256 of the framed parts, also for arrays."""
    assert labels.digest(*parts) == sha256(labels.frame(*parts)).digest()
    assert labels.digest(memoryview(bytes(16)).cast("Q")) == labels.digest(bytes(16))


def test_labels_differ() -> None:
    """No two purposes share a label, and none is a prefix of another's frame."""
    values = [value for name, value in vars(labels).items() if name.isupper() and name != "VERSION"]
    assert len(set(values)) == len(values) >= 11
    assert all(value.startswith(labels.VERSION + b"/") for value in values)


@pytest.mark.parametrize("what", ["label", "part", "signature", "key", "split"])
def test_signatures_bind_label_and_parts(what: str) -> None:
    """A signature verifies for exactly its label and list of parts, by exactly its key."""
    key = KEYS["a"]
    signature = key.sign(b"label", b"one", b"two")
    verify(key.public_key, signature, b"label", b"one", b"two", who="a")
    cases = {
        "label": (key.public_key, signature, b"other", b"one", b"two"),
        "part": (key.public_key, signature, b"label", b"one", b"twO"),
        "signature": (key.public_key, signature[:-1] + bytes([signature[-1] ^ 1]), b"label", b"one", b"two"),
        "key": (KEYS["b"].public_key, signature, b"label", b"one", b"two"),
        "split": (key.public_key, signature, b"label", b"onet", b"wo"),
    }
    with pytest.raises(AuthenticationFailed, match="a: the signature does not verify"):
        verify(*cases[what], who="a")


def test_a_card_with_another_transport_key_is_refused() -> None:
    """Whoever exchanges the transport key of a card cannot sign the result."""
    with pytest.raises(AuthenticationFailed, match="card of a"):
        replace(CARDS["a"], transport_key=CARDS["b"].transport_key).check()


def test_a_roster_checks_its_cards() -> None:
    """A roster with a card that its site did not sign like this cannot be built."""
    altered = replace(CARDS["a"], transport_key=bytes(range(32)))
    with pytest.raises(AuthenticationFailed, match="card of a"):
        Roster([altered, CARDS["b"], CARDS["c"]])


def test_a_card_has_keys_of_the_right_size() -> None:
    """Key sizes are checked before they are used."""
    with pytest.raises(ParameterError, match="transport key has 31 bytes"):
        replace(CARDS["a"], transport_key=bytes(31)).check()


def test_roster_is_ordered_and_independent_of_input_order() -> None:
    """The roster's order and digest come from the names."""
    one, other = Roster(CARDS.values()), Roster(list(CARDS.values())[::-1])
    assert list(one) == ["a", "b", "c"]
    assert one.digest == other.digest
    assert one.digest != Roster([CARDS["a"], CARDS["b"]]).digest


@pytest.mark.parametrize("what", ["name", "signing key", "transport key"])
def test_one_machine_is_one_site(what: str) -> None:
    """A name or key that appears twice is refused: it would count twice towards every threshold."""
    twin = {
        "name": Card.issue(SiteId("a"), KEYS["c"], bytes(32)),
        "signing key": Card.issue(SiteId("z"), KEYS["a"], bytes(32)),
        "transport key": Card.issue(SiteId("z"), KEYS["c"], CARDS["a"].transport_key),
    }[what]
    with pytest.raises(ParameterError, match=what):
        Roster([CARDS["a"], CARDS["b"], twin])
