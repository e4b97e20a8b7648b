"""Files of keys: private ones stay private and are never overwritten, public ones are checked, crashes lose nothing."""

import os
import stat
import traceback

import pytest

from secureagg import ParameterError
from sites.errors import ConfigurationError, KeyFileError
from sites.files import create_private, read_private, use_up, write_atomic
from sites.keys import generate_keys, load_card, load_keys, save_keys

PRIVATE = "name = '{name}'\nsigning_key = '{signing}'\ntransport_key = '{transport}'\n"


def secrets_of(keys):
    """Both secrets in hexadecimal."""
    return keys.identity.private_bytes().hex(), keys.transport_secret.hex()


def write_private(path, text):
    """A private file of any content."""
    path.write_text(text)
    path.chmod(0o600)
    return path


# Private files


def test_private_keys_are_for_the_owner_only(tmp_path):
    """`NAME.keys` has mode 600, `NAME.card` can be read by all."""
    private, public = save_keys(generate_keys("anna"), tmp_path / "new" / "folder")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) & stat.S_IRUSR
    assert (private.name, public.name) == ("anna.keys", "anna.card")


def test_private_from_the_first_byte_on(tmp_path, monkeypatch):
    """A private file has mode 600 already while it is written, whatever the umask."""
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(stat.S_IMODE(os.fstat(fd).st_mode)), fsync(fd)))
    before = os.umask(0)
    try:
        create_private(tmp_path / "secret", b"secret")
    finally:
        os.umask(before)
    assert seen[0] == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601], ids=oct)
def test_keys_that_others_can_read(tmp_path, mode):
    """A private file that anybody else has access to is refused, with its mode and the remedy."""
    private, _ = save_keys(generate_keys("anna"), tmp_path)
    private.chmod(mode)
    with pytest.raises(KeyFileError) as refused:
        load_keys(private)
    assert f"mode {mode:03o}, expected 600; run `chmod 600 {private}`" in str(refused.value)


@pytest.mark.parametrize("mode", [0o600, 0o400], ids=oct)
def test_keys_that_only_the_owner_can_read(tmp_path, mode):
    """A private file of the owner alone is read."""
    keys = generate_keys("anna")
    private, _ = save_keys(keys, tmp_path)
    private.chmod(mode)
    assert load_keys(private).card == keys.card


def test_keys_are_never_overwritten(tmp_path):
    """Saving keys where some are already is refused; the old ones and their card stay."""
    private, public = save_keys(generate_keys("anna"), tmp_path)
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten") as refused:
        save_keys(generate_keys("anna"), tmp_path)
    assert str(private) in str(refused.value)
    assert (private.read_bytes(), public.read_bytes()) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    """Keys for a folder that is a file are refused naming it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KeyFileError, match=f"{tmp_path / 'file'}: cannot be made"):
        save_keys(generate_keys("anna"), tmp_path / "file")


@pytest.mark.parametrize("load", [load_keys, load_card, read_private])
def test_a_missing_file(tmp_path, load):
    """A missing file is a KeyFileError that names it."""
    with pytest.raises(KeyFileError, match=f"{tmp_path / 'none'}: cannot be read"):
        load(tmp_path / "none")


def test_a_name_that_is_none():
    """Keys are made for proper site names only: they become file names."""
    with pytest.raises(ParameterError):
        generate_keys("../anna")


# Round trips


def test_private_round_trip(tmp_path):
    """Loaded keys have the same name and secrets as the saved ones."""
    keys = generate_keys("anna")
    loaded = load_keys(save_keys(keys, tmp_path)[0])
    assert (loaded.site, *secrets_of(loaded)) == (keys.site, *secrets_of(keys))


def test_card_round_trip(tmp_path):
    """A loaded card is the saved one and holds no secret."""
    keys = generate_keys("anna")
    _, public = save_keys(keys, tmp_path)
    card = load_card(public)
    assert card == keys.card
    card.check()
    assert not any(secret in public.read_text() for secret in secrets_of(keys))


def test_keys_differ():
    """Two machines of one name share neither secret."""
    assert set(secrets_of(generate_keys("anna"))).isdisjoint(secrets_of(generate_keys("anna")))


# Cards and files that are not what they should be


@pytest.mark.parametrize("field", ["name", "signing_key", "transport_key", "signature"])
def test_an_altered_card(tmp_path, field):
    """A card with any field taken from another card is refused naming the file."""
    card, other = (save_keys(generate_keys(name), tmp_path)[1] for name in ("anna", "bert"))
    lines = dict(line.split(" = ") for line in card.read_text().splitlines())
    lines[field] = dict(line.split(" = ") for line in other.read_text().splitlines())[field]
    card.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
    with pytest.raises(KeyFileError, match=f"{card}: not a valid card"):
        load_card(card)


MALFORMED = {
    "not TOML": "name = {signing}",
    "empty": "",
    "missing field": "name = 'anna'\nsigning_key = '{signing}'\n",
    "extra field": PRIVATE + "note = 'x'\n",
    "bad hex": PRIVATE.replace("{signing}", "{signing}xy"),
    "short signing key": PRIVATE.replace("{signing}", "{signing:.62}"),
    "long signing key": PRIVATE.replace("{signing}", "{signing}00"),
    "short transport key": PRIVATE.replace("{transport}", "{transport:.62}"),
    "long transport key": PRIVATE.replace("{transport}", "{transport}00"),
    "number for a key": PRIVATE.replace("'{signing}'", "5"),
    "number for a name": PRIVATE.replace("'{name}'", "5"),
    "no site name": PRIVATE.replace("{name}", "../anna"),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_private_file(tmp_path, text):
    """A malformed file of keys is a KeyFileError that names it; neither its text nor its causes hold a secret."""
    keys = generate_keys("anna")
    signing, transport = secrets_of(keys)
    path = write_private(tmp_path / "x.keys", text.format(name="anna", signing=signing, transport=transport))
    with pytest.raises(KeyFileError) as refused:
        load_keys(path)
    assert str(refused.value).startswith(f"{path}: ")
    printed = "".join(traceback.format_exception(refused.value))
    # A part of a secret is a leak, too.
    assert not any(secret[:16] in printed for secret in (signing, transport))


CARD = "name = '{name}'\nsigning_key = '{signing}'\ntransport_key = '{transport}'\nsignature = '{signature}'\n"
MALFORMED_CARDS = {
    "not TOML": "name",
    "missing field": CARD.replace("signature = '{signature}'\n", ""),
    "extra field": CARD + "note = 'x'\n",
    "bad hex": CARD.replace("{signature}", "xy{signature:.126}"),
    "short key": CARD.replace("{transport}", "{transport:.62}"),
    "short signature": CARD.replace("{signature}", "{signature:.126}"),
    "number for a key": CARD.replace("'{signing}'", "5"),
}


@pytest.mark.parametrize("text", MALFORMED_CARDS.values(), ids=MALFORMED_CARDS)
def test_a_malformed_card(tmp_path, text):
    """A malformed card is a KeyFileError that names the file."""
    card = generate_keys("anna").card
    path = tmp_path / "x.card"
    path.write_text(
        text.format(
            name=card.site,
            signing=card.signing_key.hex(),
            transport=card.transport_key.hex(),
            signature=card.signature.hex(),
        )
    )
    with pytest.raises(KeyFileError) as refused:
        load_card(path)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize("load", [load_keys, load_card])
def test_bytes_that_are_no_text(tmp_path, load):
    """A binary file is a KeyFileError that names it."""
    path = tmp_path / "x"
    path.write_bytes(b"\xff\x00\xfe")
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=f"{path}: not a TOML file"):
        load(path)


def test_keys_do_not_print_their_secrets():
    """Neither repr nor str of keys holds a secret, in hexadecimal or as bytes."""
    keys = generate_keys("anna")
    printed = repr(keys) + str(keys) + repr(keys.identity) + repr(keys.card)
    assert not any(secret in printed for secret in secrets_of(keys))
    assert repr(keys.transport_secret) not in printed
    assert repr(keys.identity.private_bytes()) not in printed
    assert "anna" in printed


# Writing in one step


def test_a_written_file(tmp_path):
    """A file is replaced as a whole, and nothing else is left in the folder."""
    path = tmp_path / "file"
    for data in (b"old", b"", b"new" * 100_000):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_it_replaces_the_old(tmp_path, monkeypatch):
    """The new content is flushed while the file still has the old one, and the folder after it has the new one."""
    path, seen, fsync = tmp_path / "file", [], os.fsync
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.read_bytes()), fsync(fd)))
    write_atomic(path, b"new")
    assert seen == [b"old", b"new"]


def test_a_write_that_fails(tmp_path, monkeypatch):
    """If the disk refuses, the error names the file, its old content stays, and no other file is left."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=f"{path}: cannot be written: No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted(tmp_path, monkeypatch):
    """An interruption leaves the old content and no other file, and is not swallowed."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    """Writing into a missing folder is a ConfigurationError naming the file."""
    path = tmp_path / "none" / "file"
    with pytest.raises(ConfigurationError, match=f"{path}: cannot be written"):
        write_atomic(path, b"")


def test_a_mark_that_is_used_up_once(tmp_path):
    """The first who asks is told that the mark was not there, all others that it was; where it cannot be made, nobody
    is told anything."""
    assert use_up(tmp_path / "mark")
    assert not use_up(tmp_path / "mark")
    with pytest.raises(ConfigurationError, match="mark: cannot be written"):
        use_up(tmp_path / "nowhere" / "mark")
