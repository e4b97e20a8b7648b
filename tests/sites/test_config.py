"""SITE.toml: nothing begins unless configuration, keys and manifest fit each other and the site's own limits."""

import tomllib

import msgspec
import pytest
import tomli_w
from support.consortium import make_consortium

from sites import recipe
from sites.config import HeartData, open_site, save_config
from sites.errors import ConfigurationError, KeyFileError, ManifestError
from sites.keys import generate_keys, save_keys

NO_PRIVACY = msgspec.structs.replace(recipe.PRIVACY, mode="none")


def rewritten(path, **changes):
    """Replace fields of a SITE.toml; None removes one."""
    fields = {**tomllib.loads(path.read_text()), **changes}
    path.write_text(tomli_w.dumps({name: value for name, value in fields.items() if value is not None}))
    return path


@pytest.fixture
def consortium(tmp_path):
    """A signed consortium of a, b, c and d."""
    return make_consortium(tmp_path)


@pytest.fixture
def site(consortium):
    """The SITE.toml of a."""
    return consortium.site_configs["a"]


def test_all_sites_open(consortium):
    """Each site opens its own configuration, with its name, keys and state, and the manifest that all have signed."""
    for name, path in consortium.site_configs.items():
        site = open_site(path)
        assert (site.name, site.keys.site) == (name, name)
        assert site.keys.card == consortium.keys[name].card
        assert site.manifest == consortium.manifest
        assert site.state.resolve() == path.parent.resolve()
        assert site.minimum_survivors == 0
        assert site.config.data is None


def test_hospitals_open(tmp_path):
    """A hospital's configuration says which part of the data is its own."""
    for name, path in make_consortium(tmp_path, hospitals=True).site_configs.items():
        assert open_site(path).config.data == HeartData(hospital=name)


def test_own_state_and_policy(site):
    """State folder and minimum of survivors are the site's own choice."""
    opened = open_site(rewritten(site, state="elsewhere", policy={"minimum_survivors": 4}))
    assert opened.state == site.parent / "elsewhere"
    assert opened.minimum_survivors == 4


def test_the_ledger(site):
    """The ledger lies in the state folder, or where the site says."""
    assert open_site(site).ledger.resolve() == site.parent.resolve() / "ledger.sqlite"
    assert open_site(rewritten(site, state="x")).ledger == site.parent / "x" / "ledger.sqlite"
    assert open_site(rewritten(site, ledger="../own.sqlite")).ledger == site.parent / "../own.sqlite"


def test_signing_again_keeps_what_the_site_has_decided(consortium, site):
    """A SITE.toml that is there keeps its budget, policy, ledger and data when another manifest is pinned, however much
    that asks for; a manifest above the budget is refused then."""
    own = {
        "privacy": {"mode": "local", "epsilon": 1.5, "delta": 1e-3},
        "policy": {"minimum_survivors": 4},
        "ledger": "../own.sqlite",
        "data": {"kind": "heart", "hospital": "va", "folder": ""},
    }
    rewritten(site, **own)
    for epsilon, fits in ((0.5, True), (9.0, False)):
        privacy = msgspec.structs.replace(consortium.manifest.privacy, epsilon=epsilon)
        changed = msgspec.structs.replace(consortium.manifest, privacy=privacy, signatures=[])
        for name in consortium.site_configs:
            changed = changed.sign(consortium.keys[name].identity, consortium.keys[name].site)
        changed.save(consortium.manifest_path)
        save_config(
            site,
            manifest=changed,
            manifest_path=consortium.manifest_path,
            keys=site.parent.parent / "a.keys",
            site="a",
            data=None,
        )
        fields = tomllib.loads(site.read_text())
        assert {name: fields[name] for name in own} == own
        assert fields["manifest_sha256"] == changed.digest.hex()
        if fits:
            open_site(site)
        else:
            with pytest.raises(ManifestError, match=r"up to epsilon 9 .* expected at most the epsilon 1\.5"):
                open_site(site)


def test_signing_does_not_replace_what_it_cannot_read(consortium, site):
    """A SITE.toml that cannot be read is not overwritten: the budget in it would be lost."""
    site.write_text("name = ")
    with pytest.raises(ConfigurationError, match="not a TOML file"):
        save_config(
            site,
            manifest=consortium.manifest,
            manifest_path=consortium.manifest_path,
            keys=site.parent.parent / "a.keys",
            site="a",
            data=None,
        )
    assert site.read_text() == "name = "


def test_another_manifest_than_the_pinned_one(consortium, site):
    """A manifest that all have signed, but that is not the pinned one, is refused with both digests."""
    changed = msgspec.structs.replace(
        consortium.manifest, training=msgspec.structs.replace(consortium.manifest.training, rounds=11), signatures=[]
    )
    for name in consortium.site_configs:
        changed = changed.sign(consortium.keys[name].identity, consortium.keys[name].site)
    changed.check()
    changed.save(consortium.manifest_path)
    with pytest.raises(ManifestError) as refused:
        open_site(site)
    for part in (changed.digest.hex()[:16], consortium.manifest.digest.hex()[:16], str(site), "manifest.toml"):
        assert part in str(refused.value)


def test_another_pinned_digest(site):
    """A pinned digest that is not the manifest's is refused."""
    with pytest.raises(ManifestError, match="expected the pinned 0000000000000000"):
        open_site(rewritten(site, manifest_sha256="00" * 32))


def test_a_manifest_that_not_all_have_signed(consortium, site):
    """A manifest of the pinned digest without all signatures is refused."""
    entries = [entry for entry in consortium.manifest.signatures if entry.site != "c"]
    msgspec.structs.replace(consortium.manifest, signatures=entries).save(consortium.manifest_path)
    with pytest.raises(ManifestError, match="not signed by c"):
        open_site(site)


def test_keys_of_another_site(site):
    """Keys of another site are refused, both names said."""
    with pytest.raises(ManifestError, match=r"b\.keys: keys of b, expected the ones that the manifest lists for a"):
        open_site(rewritten(site, keys="../b.keys"))


def test_other_keys_under_the_same_name(site, tmp_path):
    """Keys of the right name that the manifest does not list are refused."""
    save_keys(generate_keys("a"), tmp_path / "other")
    with pytest.raises(ManifestError, match="expected the ones that the manifest lists for a"):
        open_site(rewritten(site, keys="../other/a.keys"))


def test_keys_that_others_can_read(site, tmp_path):
    """A site whose keys are exposed does not start."""
    (tmp_path / "a.keys").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        open_site(site)


@pytest.mark.parametrize(
    ("own", "accepted"),
    [
        ({"epsilon": 1.0, "delta": 1e-3}, True),
        ({"epsilon": 2.0, "delta": 1e-2}, True),
        ({"epsilon": 0.99, "delta": 1e-3}, False),
        ({"epsilon": 1.0, "delta": 0.9e-3}, False),
        ({"epsilon": 2.0, "delta": 1e-6}, False),
    ],
    ids=str,
)
def test_own_limits(site, own, accepted):
    """A consortium may spend as much as the site allows or less, in epsilon and delta each, never more."""
    rewritten(site, privacy={"mode": "local", **own})
    if accepted:
        assert open_site(site).config.privacy.epsilon == own["epsilon"]
    else:
        with pytest.raises(ManifestError, match=f"epsilon 1 at delta 0.001, expected at most the .* {site} allows"):
            open_site(site)


def test_no_privacy_where_the_site_wants_some(tmp_path):
    """A consortium without differential privacy is refused by a site that has limits, however wide."""
    site = make_consortium(tmp_path, privacy=NO_PRIVACY).site_configs["a"]
    rewritten(site, privacy={"mode": "local", "epsilon": 1000.0, "delta": 0.5})
    with pytest.raises(ManifestError, match="differential privacy: none, expected mode local"):
        open_site(site)


def test_no_privacy_where_the_site_agrees(tmp_path):
    """A site that says so takes part without differential privacy."""
    assert open_site(make_consortium(tmp_path, privacy=NO_PRIVACY).site_configs["a"]).manifest.privacy.mode == "none"


def test_more_privacy_than_the_site_wants(site):
    """A site that would do without differential privacy accepts a consortium that has it."""
    assert open_site(rewritten(site, privacy={"mode": "none"})).manifest.privacy.mode == "local"


def test_a_site_that_is_not_listed(site):
    """A site that the manifest does not list is refused by name."""
    with pytest.raises(ManifestError, match="does not list site mallory"):
        open_site(rewritten(site, name="mallory"))


def test_the_coordinator_is_no_site(site):
    """The coordinator's own keys open no site."""
    with pytest.raises(ManifestError, match="does not list site sum"):
        open_site(rewritten(site, name="sum", keys="../sum.keys"))


@pytest.mark.parametrize(
    ("field", "error"), [("keys", KeyFileError), ("manifest", ManifestError)], ids=["keys", "manifest"]
)
def test_a_missing_file(site, field, error):
    """A missing file of keys or manifest is an error that names it."""
    with pytest.raises(error, match=r"gone\.x: cannot be read"):
        open_site(rewritten(site, **{field: "gone.x"}))


def test_a_missing_configuration(tmp_path):
    """A missing SITE.toml is a ConfigurationError that names it."""
    with pytest.raises(ConfigurationError, match=f"{tmp_path / 'SITE.toml'}: cannot be read"):
        open_site(tmp_path / "SITE.toml")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"note": "x"}, "note"),
        ({"privacy": {"mode": "local", "epsilon": 1.0, "delta": 1e-3, "note": 1}}, "note"),
        ({"privacy": {"mode": "none", "epsilon": 1.0}}, "epsilon"),
        ({"privacy": {"mode": "central"}}, "central"),
        ({"privacy": {"mode": "local", "epsilon": -1.0, "delta": 1e-3}}, "epsilon"),
        ({"privacy": {"mode": "local", "epsilon": float("nan"), "delta": 1e-3}}, "epsilon"),
        ({"privacy": {"mode": "local", "epsilon": 1.0, "delta": 1.0}}, "delta"),
        ({"privacy": {"mode": "local", "epsilon": 1.0}}, "delta"),
        ({"privacy": None}, "privacy"),
        ({"policy": {"minimum_survivors": -1}}, "minimum_survivors"),
        ({"policy": {"note": 1}}, "note"),
        ({"manifest_sha256": "ab"}, "manifest_sha256"),
        ({"manifest_sha256": None}, "manifest_sha256"),
        ({"name": None}, "name"),
        ({"keys": 5}, "keys"),
        ({"data": {"kind": "lungs", "hospital": "va"}}, "kind"),
        ({"data": {"kind": "heart"}}, "hospital"),
    ],
    ids=str,
)
def test_bad_fields(site, changes, named):
    """An unknown, missing or unfit field is a ConfigurationError that names file and field."""
    with pytest.raises(ConfigurationError, match=named) as refused:
        open_site(rewritten(site, **changes))
    assert str(refused.value).startswith(f"{site}: ")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"], ids=["not TOML", "not text"])
def test_not_a_configuration(site, content):
    """A file that is no TOML or no text is a ConfigurationError that names it."""
    site.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{site}: not a TOML file"):
        open_site(site)
