"""The model that only the sites hold: how it moves, and how one site gives it to another, whatever the coordinator
does in between."""

from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from support.consortium import Consortium, make_consortium
from support.federation import INITIAL, PLAIN

from secureagg import Aggregate, AuthenticationFailed, MalformedMessage, ShapeMismatch
from secureagg.labels import frame
from sites import held_model
from sites.errors import ConfigurationError, ManifestError
from sites.held_model import HeldModel, next_name
from sites.model_state import model_digest
from sites.recipe import HOMOMORPHIC, TRAINING
from sites.rounds import UPDATE, model_spec

replace = msgspec.structs.replace
RUN = "run"


def aggregate(value: float, digest: bytes = b"\x07" * 32) -> Aggregate:
    """A sum by which every number of the model of four moves by ``value``."""
    return Aggregate(totals={}, means={UPDATE: np.full(4, value)}, survivors=(), digest=digest)


@pytest.fixture(scope="module", params=["average", "momentum", "adam"])
def consortium(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Consortium:
    """Four sites that alone may see the model."""
    training = replace(TRAINING, server_optimizer=request.param, server_learning_rate=0.5)
    folder = tmp_path_factory.mktemp("consortium")
    return make_consortium(folder, initial=INITIAL, privacy=PLAIN, policy=HOMOMORPHIC, training=training)


def own_file(consortium: Consortium, name: str) -> Path:
    """Where a site keeps its copy."""
    return consortium.manifest_path.with_name(f"{name}.held")


def fresh(consortium: Consortium, name: str) -> HeldModel:
    """A site called ``name`` that has no copy."""
    own_file(consortium, name).unlink(missing_ok=True)
    return HeldModel(consortium.manifest, consortium.keys[name], own_file(consortium, name))


def held(consortium: Consortium, name: str, *moves: float) -> HeldModel:
    """The copy of the site called ``name`` after these sums."""
    model = fresh(consortium, name)
    model.begin(RUN, INITIAL)
    for value in moves:
        model.move(aggregate(value))
    return model


def test_it_begins_with_what_all_have_signed(consortium: Consortium) -> None:
    """The initial model is the manifest's or none; its name is its digest."""
    model = held(consortium, "a")
    assert model.name == model_digest(INITIAL)
    np.testing.assert_array_equal(model.vector, np.zeros(4, np.float32))
    other = model_spec(consortium.manifest).to_bytes(np.ones(4, np.float32))
    with pytest.raises(ManifestError, match="another initial model"):
        fresh(consortium, "a").begin(RUN, other)


def test_it_has_no_model_before_it_begins(consortium: Consortium) -> None:
    """A site without a copy has no model to train from, not one of zeros."""
    with pytest.raises(ManifestError, match="before this site has a copy"):
        _ = fresh(consortium, "a").vector


def test_names_follow_from_the_sums_and_from_nothing_else(consortium: Consortium) -> None:
    """Two sites that opened the same sums have the same name and model; any other sum, or order, makes another name."""
    one, other = held(consortium, "a", 0.25, -1.0), held(consortium, "b", 0.25, -1.0)
    assert one.name == other.name
    np.testing.assert_array_equal(one.vector, other.vector)
    initial, first, second = model_digest(INITIAL), b"\x01" * 32, b"\x02" * 32
    names = {
        initial,
        next_name(initial, first),
        next_name(initial, second),
        next_name(next_name(initial, first), second),
        next_name(next_name(initial, second), first),
    }
    assert len(names) == 5
    assert next_name(initial, first) == sha256(frame(b"secureagg/v1/model-name", initial, first)).digest()


def test_a_copy_goes_on_as_the_original_does(consortium: Consortium) -> None:
    """A site that had nothing has the other's model, name and optimizer: after the next sum both are the same still."""
    donor, late = held(consortium, "a", 0.25, -1.0, 0.5), fresh(consortium, "d")
    late.open(donor.seal(late.request(RUN)))
    assert (late.run, late.name) == (donor.run, donor.name)
    np.testing.assert_array_equal(late.vector, donor.vector)
    for model in (donor, late):
        model.move(aggregate(0.125))
    np.testing.assert_array_equal(late.vector, donor.vector)
    assert late.name == donor.name


def test_the_coordinator_cannot_read_a_copy(consortium: Consortium) -> None:
    """Neither the model's numbers nor its name are in what passes the coordinator, and no two copies look alike."""
    donor, late = held(consortium, "a", 0.123456), fresh(consortium, "d")
    request = late.request(RUN)
    copies = [donor.seal(request) for _ in range(2)]
    for copy in copies:
        sent = msgspec.msgpack.encode(copy) + copy.payload
        assert donor.vector[:2].tobytes() not in sent
        assert donor.name not in sent
    assert copies[0].payload[:64] != copies[1].payload[:64]


def test_a_request_of_another_run_is_not_answered(consortium: Consortium) -> None:
    """A site has copies of its own run only."""
    late = fresh(consortium, "d")
    assert held(consortium, "a").seal(late.request("another")) is None


@pytest.mark.parametrize("change", ["key", "site", "run", "signature", "stranger"])
def test_a_request_that_no_site_made(consortium: Consortium, change: str) -> None:
    """The model is sealed to keys that a site of the consortium signed for, as its own and in this run: the coordinator
    cannot put in a key of its own."""
    request = fresh(consortium, "d").request("old" if change == "run" else RUN)
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()
    changes = {
        "key": {"key": own},
        "site": {"site": "c"},
        "run": {"run": RUN},
        "signature": {"signature": bytes(64)},
        "stranger": {"site": "nobody"},
    }
    with pytest.raises(AuthenticationFailed):
        held(consortium, "a", 0.25).seal(replace(request, **changes[change]))


def test_a_request_with_no_key(consortium: Consortium) -> None:
    """A site that signs for what is no key, or one of low order, is named."""
    late = fresh(consortium, "d")
    for key in (b"short", bytes(32)):
        signed = held_model._parts(consortium.manifest, RUN, "d", key)
        signature = consortium.keys["d"].identity.sign(held_model.REQUEST, *signed)
        request = replace(late.request(RUN), key=key, signature=signature)
        with pytest.raises(AuthenticationFailed, match="request of d: not an X25519 key"):
            held(consortium, "a").seal(request)


@pytest.mark.parametrize("change", ["payload", "signature", "donor", "stranger", "old", "twice", "unasked", "other"])
def test_a_copy_that_no_site_made(consortium: Consortium, change: str) -> None:
    """Only a copy that a site sealed and signed for this very request is taken; after a refusal the site has what it
    had."""
    donor, late = held(consortium, "a", 0.25), fresh(consortium, "d")
    copy = donor.seal(late.request(RUN))
    match change:
        case "payload":
            copy = replace(copy, payload=copy.payload[:-1] + bytes([copy.payload[-1] ^ 1]))
        case "signature":
            copy = replace(copy, signature=bytes(64))
        case "donor":
            copy = replace(copy, donor="b")
        case "stranger":
            copy = replace(copy, donor="nobody")
        case "old":
            late.request(RUN)
        case "twice":
            late.open(copy)
        case "unasked":
            late = fresh(consortium, "d")
        case "other":
            late = fresh(consortium, "c")
            late.request(RUN)
    before = late.name
    with pytest.raises(AuthenticationFailed):
        late.open(copy)
    assert late.name == before


def test_the_coordinator_cannot_seal_a_model_itself(consortium: Consortium) -> None:
    """What the coordinator seals to the request's key, in a site's name, has no site's signature."""
    late = fresh(consortium, "d")
    forged = HeldModel(consortium.manifest, replace_site(consortium, "a"), own_file(consortium, "forged"))
    forged.begin(RUN, INITIAL)
    with pytest.raises(AuthenticationFailed, match="model of a"):
        late.open(forged.seal(late.request(RUN)))


def replace_site(consortium: Consortium, name: str) -> object:
    """The coordinator's keys under a site's name."""
    return type(consortium.keys["sum"])(
        site=consortium.keys[name].site,
        identity=consortium.keys["sum"].identity,
        transport_secret=consortium.keys["sum"].transport_secret,
    )


class Lying(HeldModel):
    """A site of the consortium that seals something else than a copy."""

    what = b""

    def seal(self, request: object) -> object:
        """Seal ``what``."""
        real = msgspec.msgpack.encode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(held_model.msgspec.msgpack, "encode", lambda item: self.what or real(item))
            return super().seal(request)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (b"\xc1", MalformedMessage),
        (msgspec.msgpack.encode((bytes(32), b"no model")), ShapeMismatch),
        (msgspec.msgpack.encode((bytes(32), INITIAL)), ShapeMismatch),
    ],
)
def test_a_site_that_gives_something_else(consortium: Consortium, what: bytes, error: type[Exception]) -> None:
    """A copy with another content is refused with the name of its giver, and what was held stays."""
    lying, late = Lying(consortium.manifest, consortium.keys["a"], own_file(consortium, "a")), held(consortium, "d")
    lying.begin(RUN, INITIAL)
    lying.what = what
    with pytest.raises(error, match="model of a"):
        late.open(lying.seal(late.request(RUN)))
    assert late.name == model_digest(INITIAL)


# --- across a crash ---


@pytest.mark.parametrize("moves", [(), (0.25,), (0.25, -1.0)])
def test_it_is_on_disk_after_every_change(consortium: Consortium, moves: tuple[float, ...]) -> None:
    """A site that is started again has the model, the name and the run that it had, and goes on from there as if it had
    never stopped; nobody else can read the file."""
    before = held(consortium, "a", *moves)
    again = HeldModel(consortium.manifest, consortium.keys["a"], own_file(consortium, "a"))
    again.restore()
    assert (again.run, again.name) == (before.run, before.name)
    for model in (before, again):
        model.move(aggregate(0.5))
    np.testing.assert_array_equal(again.vector, before.vector)
    assert own_file(consortium, "a").stat().st_mode & 0o777 == 0o600


def test_a_copy_of_another_site_is_on_disk_too(consortium: Consortium) -> None:
    """What was taken from another site survives a restart."""
    donor, late = held(consortium, "a", 0.25), fresh(consortium, "d")
    late.open(donor.seal(late.request(RUN)))
    again = HeldModel(consortium.manifest, consortium.keys["d"], own_file(consortium, "d"))
    again.restore()
    np.testing.assert_array_equal(again.vector, donor.vector)


def test_a_copy_of_another_consortium_is_left_alone(consortium: Consortium) -> None:
    """After a change of the manifest the old model is not taken for one of the new consortium."""
    held(consortium, "a", 0.25)
    changed = replace(consortium.manifest, consortium=replace(consortium.manifest.consortium, name="Other"))
    again = HeldModel(changed, consortium.keys["a"], own_file(consortium, "a"))
    again.restore()
    assert (again.run, again.name) == ("", b"")


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "other"])
def test_a_damaged_file_is_named(consortium: Consortium, damage: str) -> None:
    """A file that is not what was written is an error that names it; nothing of it is used, and a copy can be asked
    for."""
    donor = held(consortium, "b", 0.25)
    held(consortium, "a", 0.25)
    path = own_file(consortium, "a")
    data = path.read_bytes()
    changed = {
        "cut": data[:-9],
        "empty": b"",
        "bit": data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
        "other": b"x" * 50,
    }
    path.write_bytes(changed[damage])
    again = HeldModel(consortium.manifest, consortium.keys["a"], path)
    with pytest.raises(ConfigurationError, match=f"{path}: damaged"):
        again.restore()
    assert again.name == b""
    again.open(donor.seal(again.request(RUN)))
    np.testing.assert_array_equal(again.vector, donor.vector)


def test_it_goes_back_by_one_sum(consortium: Consortium) -> None:
    """A site that is one sum ahead of all others goes back to where they are, also after a restart, and makes the same
    steps from there; two sums back, to another run or ahead it cannot go, and stays where it is."""
    expected = held(consortium, "b", 0.25)
    ahead = held(consortium, "a", 0.25, -1.0)
    for run, name in ((RUN, model_digest(INITIAL)), ("other", expected.name), (RUN, b"ahead")):
        assert not ahead.is_at(run, name)
    assert ahead.is_at(RUN, ahead.name)
    again = HeldModel(consortium.manifest, consortium.keys["a"], own_file(consortium, "a"))
    again.restore()
    assert again.is_at(RUN, expected.name)
    for model in (again, expected):
        model.move(aggregate(0.5))
    assert again.name == expected.name
    np.testing.assert_array_equal(again.vector, expected.vector)
