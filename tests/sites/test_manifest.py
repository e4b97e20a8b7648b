"""The manifest: every field of it is signed by every site, and one that is unsound or altered is refused."""

from copy import deepcopy
from functools import cache

import msgspec
import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save

from secureagg import AuthenticationFailed, Card, Identity
from secureagg.identity import verify
from sites import recipe
from sites.errors import ManifestError
from sites.keys import generate_keys
from sites.manifest import LABEL, Manifest, Signature
from sites.rounds import round_parameters
from transport import public_key

NAMES = ("a", "b", "c", "d")
ADDRESS = "tcp://127.0.0.1:9"
# Two tensors of one rank, so that the fields are called the same in whichever order they are listed.
INITIAL = save({"w": np.zeros((2, 3), np.float32), "b": np.zeros((4, 1), np.float32)})
STRANGER = generate_keys("mallory")


@cache
def keys():
    """The keys of the coordinator and of four sites."""
    return {name: generate_keys(name) for name in ("sum", *NAMES)}


def unsigned(*, coordinator=None, cards=None, **changes):
    """A manifest without signatures."""
    return recipe.new_manifest(
        name="Test",
        coordinator=coordinator or keys()["sum"].card,
        address=ADDRESS,
        cards=[keys()[name].card for name in NAMES] if cards is None else cards,
        initial=INITIAL,
        changes=changes,
    )


def signed(manifest, names=NAMES):
    """The manifest with the signatures of ``names``."""
    for name in names:
        manifest = manifest.sign(keys()[name].identity, keys()[name].site)
    return manifest


@cache
def sound():
    """A manifest that everybody has signed."""
    return signed(unsigned())


def leaves(value, path=()):
    """The paths to all single values in nested tables and lists."""
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in leaves(item, (*path, name))]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [path]


def fields_of(manifest):
    """The manifest as plain tables and lists, signatures apart."""
    fields = msgspec.to_builtins(manifest)
    return {name: table for name, table in fields.items() if name != "signatures"}


def replaced(fields, path, value):
    """A copy of nested ``fields`` with the value at ``path`` replaced."""
    copy = deepcopy(fields)
    table = copy
    for step in path[:-1]:
        table = table[step]
    table[path[-1]] = value
    return copy


def written(path, fields):
    """A TOML file of ``fields``."""
    path.write_text(tomli_w.dumps(fields))
    return path


CHOICES = {
    "mode": "none",
    "out_of_range": "error",
    "server_optimizer": "adam",
    "address": "tcp://127.0.0.1:10",
    "graph": "complete",
    "backend": "homomorphic",
    "release_to": "sites",
}
FIXED = {"version": 2, "threshold": "half", "unit": "visit"}  # fields that allow one value only


def other_value(path, value):
    """Another value that the form of the field allows."""
    name = path[-1]
    if name in CHOICES:
        return CHOICES[name]
    if name == "histogram_bins":
        return value + 2
    if name in ("name", "follows"):
        return {"name": "zz", "follows": "0" * 64}[name]
    if isinstance(value, str):
        return ("1" if value[0] == "0" else "0") + value[1:]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 1.5


def at(fields, path):
    """The value at ``path``."""
    for step in path:
        fields = fields[step]
    return fields


# What is signed


def test_a_sound_manifest():
    """A manifest that every site has signed passes, and nobody is missing."""
    sound().check()
    assert sound().unsigned_by == []


def test_round_trip(tmp_path):
    """Saved and loaded again, a manifest is equal, has the same digest, and its signatures still hold."""
    privacy = msgspec.structs.replace(recipe.PRIVACY, epsilon=0.1 + 0.2, delta=1e-5 / 3)
    manifest = signed(unsigned(privacy=privacy))
    manifest.save(tmp_path / "manifest.toml")
    loaded = Manifest.load(tmp_path / "manifest.toml")
    assert loaded == manifest
    assert loaded.digest == manifest.digest
    loaded.check()


def test_signing_leaves_the_digest(tmp_path):
    """The digest that a site pins is the same before, between and after the signatures."""
    manifest = unsigned()
    assert len({signed(manifest, NAMES[:count]).digest for count in range(5)}) == 1


LEAVES = leaves(fields_of(sound()))
FREE = [path for path in LEAVES if path[-1] not in FIXED]


@pytest.mark.parametrize("path", FREE, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_signed(tmp_path, path):
    """A change of any single field gives another digest, fits no site's signature, and is refused."""
    fields = msgspec.to_builtins(sound())
    changed = Manifest.load(written(tmp_path / "x.toml", replaced(fields, path, other_value(path, at(fields, path)))))
    assert changed.digest != sound().digest
    assert len(changed.signatures) == len(NAMES)
    for entry in changed.signatures:
        with pytest.raises(AuthenticationFailed):
            verify(
                keys()[entry.site].identity.public_key,
                bytes.fromhex(entry.signature),
                LABEL,
                changed.canonical,
                who=entry.site,
            )
    with pytest.raises(ManifestError):
        changed.check()


@pytest.mark.parametrize("path", [path for path in LEAVES if path[-1] in FIXED], ids=lambda path: path[-1])
def test_fields_with_one_value(tmp_path, path):
    """A field that allows one value only refuses another, by its name."""
    fields = replaced(msgspec.to_builtins(sound()), path, FIXED[path[-1]])
    with pytest.raises(ManifestError, match=path[-1]):
        Manifest.load(written(tmp_path / "x.toml", fields))


def test_every_field_is_in_the_walk():
    """The walk over the fields above misses no table; shared noise has its own, in test_shared_noise, images in
    test_site_data and a census in test_census."""
    assert {path[0] for path in LEAVES} == set(Manifest.__struct_fields__) - {"signatures", "noise", "images", "census"}
    assert {path[-1] for path in LEAVES} >= set(FIXED) | set(CHOICES)


def test_an_added_site():
    """A site that is added after signing gives another digest, and no old signature fits."""
    more = [keys()[name].card for name in NAMES] + [STRANGER.card]
    grown = msgspec.structs.replace(unsigned(cards=more), signatures=sound().signatures)
    assert grown.digest != sound().digest
    with pytest.raises(ManifestError, match="altered after signing"):
        grown.check()


def test_reordered_tensors():
    """The order in which tensors are flattened is signed, too."""
    model = sound().model
    turned = msgspec.structs.replace(model, tensors=list(reversed(model.tensors)))
    assert msgspec.structs.replace(sound(), model=turned).digest != sound().digest


def test_the_order_of_the_cards_does_not_matter():
    """Whoever creates the manifest from the same cards in another order gets the same sites."""
    cards = [keys()[name].card for name in reversed(NAMES)]
    assert unsigned(cards=cards).sites == unsigned().sites


# Who has signed


def test_unsigned():
    """A manifest that nobody has signed is refused, and all sites are named."""
    with pytest.raises(ManifestError, match="not signed by a, b, c, d, expected all 4"):
        unsigned().check()


def test_partly_signed():
    """A manifest that some sites have not signed names these, and only these."""
    partly = signed(unsigned(), ("a", "c"))
    assert partly.unsigned_by == ["b", "d"]
    with pytest.raises(ManifestError, match="not signed by b, d, expected all 4"):
        partly.check()


def test_altered_after_signing():
    """A manifest that is sound but was altered after it was signed names a site whose signature does not fit."""
    training = msgspec.structs.replace(sound().training, rounds=11)
    with pytest.raises(ManifestError, match="the signature of a does not fit the contents; they were altered after"):
        msgspec.structs.replace(sound(), training=training).check()


def test_one_stale_signature():
    """One signature over former contents is found among fitting ones, and its site named."""
    changed = msgspec.structs.replace(
        sound(), training=msgspec.structs.replace(sound().training, rounds=11), signatures=[]
    )
    stale = [entry for entry in sound().signatures if entry.site == "c"]
    mixed = signed(msgspec.structs.replace(changed, signatures=stale), ("a", "b", "d"))
    with pytest.raises(ManifestError, match="signature of c does not fit"):
        mixed.check()
    signed(mixed, ("c",)).check()


def test_signed_by_a_stranger():
    """The signature of somebody who is not listed is refused, beside all others as well."""
    entry = Signature(site="mallory", signature=STRANGER.identity.sign(LABEL, sound().canonical).hex())
    with pytest.raises(ManifestError, match="signed by mallory, who is not listed"):
        msgspec.structs.replace(sound(), signatures=[*sound().signatures, entry]).check()


def test_a_signature_under_another_name():
    """One site's signature under another site's name does not count as the other's."""
    own = next(entry for entry in sound().signatures if entry.site == "a")
    kept = [entry for entry in sound().signatures if entry.site != "b"]
    borrowed = msgspec.structs.replace(own, site="b")
    with pytest.raises(ManifestError, match="signature of b does not fit"):
        msgspec.structs.replace(sound(), signatures=[*kept, borrowed]).check()


def test_a_signature_for_another_purpose():
    """A signature over the same bytes under another label does not count."""
    entry = Signature(site="a", signature=keys()["a"].identity.sign(b"other", sound().canonical).hex())
    others = [other for other in sound().signatures if other.site != "a"]
    with pytest.raises(ManifestError, match="signature of a does not fit"):
        msgspec.structs.replace(sound(), signatures=[entry, *others]).check()


@pytest.mark.parametrize(("signer", "name"), [("b", "a"), ("sum", "a"), ("sum", "sum"), ("a", "mallory")])
def test_signing_with_other_keys(signer, name):
    """A site signs under its own listed name with its own listed key only."""
    with pytest.raises(ManifestError, match=f"site {name} is not listed with these keys"):
        unsigned().sign(keys()[signer].identity, name)


def test_signing_twice():
    """A site that signs again replaces its signature."""
    again = signed(sound(), ("b",))
    assert again == sound()


# What makes a manifest unsound

BAD_VALUES = [
    (("privacy", "epsilon"), float("nan"), "epsilon"),
    (("privacy", "epsilon"), -1.0, "epsilon"),
    (("privacy", "epsilon"), 0.0, "epsilon"),
    (("privacy", "epsilon"), float("-inf"), "epsilon"),
    (("privacy", "epsilon"), "1.0", "epsilon"),
    (("privacy", "delta"), 1.0, "delta"),
    (("privacy", "delta"), float("nan"), "delta"),
    (("privacy", "clip_norm"), 0.0, "clip_norm"),
    (("privacy", "mode"), "central", "mode"),
    (("encoding", "value_range"), float("nan"), "value_range"),
    (("encoding", "value_bits"), 33, "value_bits"),
    (("encoding", "max_examples"), 0, "max_examples"),
    (("evaluation", "histogram_bins"), 201, "histogram_bins"),
    (("training", "rounds"), 0, "rounds"),
    (("training", "rounds"), 1.5, "rounds"),
    (("training", "learning_rate"), -0.1, "learning_rate"),
    (("training", "server_optimizer"), "lamb", "server_optimizer"),
    (("deadlines", "phase_seconds"), float("inf"), "phase_seconds"),
    (("deadlines", "join_seconds"), 0.0, "join_seconds"),
    (("policy", "minimum_cohort"), 2, "minimum_cohort"),
    (("policy", "max_corrupt"), -1, "max_corrupt"),
    (("model", "tensors"), [], "tensors"),
    (("model", "tensors", 0, "shape", 0), 0, "shape"),
    (("model", "initial_sha256"), "ab", "initial_sha256"),
    (("coordinator", "address"), "ipc:///tmp/x", "address"),
    (("coordinator", "signing_key"), "XY" * 32, "signing_key"),
    (("sites", 0, "transport_key"), "ab" * 31, "sites"),
    (("consortium", "name"), "", "name"),
    (("privacy", "note"), "x", "note"),
    (("note",), "x", "note"),
]


@pytest.mark.parametrize(
    ("path", "value", "named"), BAD_VALUES, ids=lambda item: ".".join(map(str, item)) if isinstance(item, tuple) else ""
)
def test_bad_values(tmp_path, path, value, named):
    """A value out of its bounds, of another type, or of an unknown field names file and field."""
    file = written(tmp_path / "x.toml", replaced(msgspec.to_builtins(sound()), path, value))
    with pytest.raises(ManifestError, match=named) as refused:
        Manifest.load(file)
    assert str(refused.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "path",
    [
        ("privacy", "epsilon"),
        ("privacy", "clip_norm"),
        ("encoding", "value_range"),
        ("training", "learning_rate"),
        ("training", "server_learning_rate"),
    ],
    ids=".".join,
)
def test_infinite_values(tmp_path, path):
    """Infinity is above every lower bound, and still refused: no budget, range or rate is infinite."""
    file = written(tmp_path / "x.toml", replaced(msgspec.to_builtins(sound()), path, float("inf")))
    with pytest.raises(ManifestError, match=path[1]):
        Manifest.load(file)
    table = msgspec.structs.replace(getattr(sound(), path[0]), **{path[1]: float("inf")})
    with pytest.raises(ManifestError, match=path[1]):
        unsigned(**{path[0]: table})


@pytest.mark.parametrize(
    "path",
    [path for path in LEAVES if path[-1] not in FIXED and not isinstance(path[-1], int)],
    ids=lambda path: ".".join(map(str, path)),
)
def test_missing_fields(tmp_path, path):
    """Every field whose value is not fixed is required, and the missing one named."""
    fields = deepcopy(msgspec.to_builtins(sound()))
    del at(fields, path[:-1])[path[-1]]
    with pytest.raises(ManifestError, match=path[-1]):
        Manifest.load(written(tmp_path / "x.toml", fields))


@pytest.mark.parametrize("content", [b"[consortium", b"\xff\xfe", b""], ids=["not TOML", "not text", "empty"])
def test_not_a_manifest(tmp_path, content):
    """A file that is no TOML, no text, or empty is a ManifestError naming it."""
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=str(path)):
        Manifest.load(path)


def test_a_missing_manifest(tmp_path):
    """A missing file is a ManifestError naming it."""
    with pytest.raises(ManifestError, match=f"{tmp_path / 'none'}: cannot be read"):
        Manifest.load(tmp_path / "none")


def refused(match, **changes):
    """Assert that tables are refused by who creates the manifest, and by who checks one that all have signed."""
    with pytest.raises(ManifestError, match=match):
        unsigned(**changes)
    with pytest.raises(ManifestError, match=match):
        signed(msgspec.structs.replace(unsigned(), **changes)).check()


def test_a_tensor_listed_twice():
    """Two tensors of one name are refused: one of them would never be trained."""
    tensors = [*sound().model.tensors, sound().model.tensors[0]]
    refused("tensor is listed twice", model=msgspec.structs.replace(sound().model, tensors=tensors))


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"minimum_cohort": 5}, "minimum_cohort is 5, expected at most the 4 sites"),
        ({"max_corrupt": 3}, "threshold: found 2t = 2 x 3 = 6, expected above"),
        ({"max_corrupt": 2}, "minimum_survivors: found 4, expected at most the cohort size 3"),
        ({"minimum_survivors": 4}, "minimum_survivors: found 4, expected at most the cohort size 3"),
    ],
    ids=str,
)
def test_unsafe_policies(numbers, match):
    """Thresholds that are not safe in the smallest or the largest cohort are refused with the inequality."""
    refused(match, policy=msgspec.structs.replace(sound().policy, **numbers))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"backend": "clear"}, "'clear'"),
        ({"release_to": "sites"}, "release_to: found sites with the masked backend, expected the homomorphic one"),
        ({"backend": "homomorphic", "graph": "sparse"}, "graph: found sparse with the homomorphic backend"),
    ],
    ids=str,
)
def test_backends_that_cannot_be(changes, match):
    """Only the homomorphic backend can keep the sum from the coordinator, and it runs on the complete graph."""
    refused(match, policy=msgspec.structs.replace(sound().policy, **changes))


@pytest.mark.parametrize("release_to", ["sites", "coordinator"])
def test_the_backend_is_part_of_what_is_signed(release_to):
    """Each backend, and who is given the sum, makes another manifest, and rounds of another context, on the complete
    graph."""
    plain = sound()
    policy = msgspec.structs.replace(plain.policy, backend="homomorphic", release_to=release_to)
    manifest = msgspec.structs.replace(plain, policy=policy)
    assert manifest.digest != plain.digest
    made = round_parameters(
        manifest, run="run", round_number=1, purpose="train", cohort=manifest.roster, model_digest=bytes(32)
    )
    assert (made.backend, made.release_to, made.neighbours) == ("homomorphic", release_to, None)


def test_a_policy_that_is_unsafe_when_all_take_part():
    """Thresholds have to be safe with all sites as well: six stand three colluding ones, seven do not."""
    cards = [generate_keys(name).card for name in "abcdefg"]
    policy = msgspec.structs.replace(sound().policy, minimum_cohort=6, max_corrupt=3)
    assert len(unsigned(cards=cards[:6], policy=policy).sites) == 6
    with pytest.raises(ManifestError, match=r"threshold: found 2t = 2 x 5 = 10, expected above n [+] c = 7 [+] 3"):
        unsigned(cards=cards, policy=policy)


def with_site(card):
    """A manifest's sites with the one of this name replaced by ``card``, as tables."""
    fields = msgspec.to_builtins(unsigned())
    table = {
        "name": str(card.site),
        "signing_key": card.signing_key.hex(),
        "transport_key": card.transport_key.hex(),
        "signature": card.signature.hex(),
    }
    fields["sites"] = [table if entry["name"] == card.site else entry for entry in fields["sites"]]
    return msgspec.convert(fields, Manifest)


def card_of(name, *, identity=None, transport=None):
    """A sound card of ``name``, with keys borrowed from others."""
    transport_key = keys()[transport].card.transport_key if transport else public_key(STRANGER.transport_secret)
    return Card.issue(name, keys()[identity].identity if identity else Identity.generate(), transport_key)


@pytest.mark.parametrize(
    ("card", "match"),
    [
        (lambda: card_of("b", identity="a"), "signing key listed more than once"),
        (lambda: card_of("b", transport="a"), "transport key listed more than once"),
        (lambda: card_of("b", identity="sum"), "b has the coordinator's name or one of its keys"),
        (lambda: card_of("b", transport="sum"), "b has the coordinator's name or one of its keys"),
    ],
    ids=["signing key of a site", "transport key of a site", "coordinator's signing", "coordinator's transport"],
)
def test_one_key_under_two_names(card, match):
    """Two sites, or a site and the coordinator, with one key are one machine, and are refused."""
    with pytest.raises(ManifestError, match=match):
        with_site(card()).check()
    cards = [card(), *(keys()[name].card for name in NAMES if name != "b")]
    with pytest.raises(ManifestError, match=match):
        unsigned(cards=cards)


def test_the_coordinator_under_the_name_of_a_site():
    """A coordinator that is called like a site is refused."""
    with pytest.raises(ManifestError, match="a has the coordinator's name"):
        unsigned(coordinator=generate_keys("a").card)


def test_one_site_twice():
    """A site that is listed twice is refused: it would count twice towards every threshold."""
    with pytest.raises(ManifestError, match="site name listed more than once: a"):
        unsigned(cards=[generate_keys("a").card, *(keys()[name].card for name in NAMES)])


@pytest.mark.parametrize("whose", ["coordinator", "site"])
def test_a_card_that_does_not_verify(whose):
    """A card whose transport key was exchanged is refused, though the manifest itself is signed."""
    fields = msgspec.to_builtins(unsigned())
    table = fields["coordinator"] if whose == "coordinator" else fields["sites"][1]
    table["transport_key"] = public_key(STRANGER.transport_secret).hex()
    with pytest.raises(ManifestError, match=f"card of {table['name']}: the signature does not verify"):
        signed(msgspec.convert(fields, Manifest)).check()


def test_too_few_sites():
    """Two sites are no consortium: each would see the other's update in the sum."""
    with pytest.raises(ManifestError, match="sites"):
        unsigned(cards=[keys()[name].card for name in ("a", "b")])
