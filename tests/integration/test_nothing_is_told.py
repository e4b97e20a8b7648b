"""Markers in everything that is a site's own, and a search for them in everything that others write down.

What is searched is raw: every byte of every file, and all that was said, logged or raised; in rounds that end well, and
in rounds in which a machine fails, an update is refused, a site breaks the rules and a site's own code raises.
"""

import logging
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.federation import QUICK, STRICT, Tampering, Together
from zmq.utils import z85

import secureagg.participant
import sites.participant_loop
from secureagg import EncodedInput, Participant, RoundParameters, ValueOutOfRange
from secureagg.encoding import encode_input
from secureagg.messages import MaskedInput, ToCoordinator, UnmaskShares
from secureagg.shamir import share
from sites import recipe
from sites.config import open_site
from sites.manifest import Policy
from sites.participant_loop import Federation
from sites.programs import run_coordinator
from sites.rounds import UPDATE
from sites.status import read_status
from sites.trainer import binary_loss, heart_model, initial_heart_model

NAMES = ("a", "b", "c", "d", "e")
ROUNDS = 3
PATIENT = "patient-7f3c"
FOLDER = "ward-51d2"

Markers = dict[str, set[bytes]]  # site -> what is its own


def slices(vector: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """Each four neighbours of a vector, in the forms in which they might be written down, and each number as text."""
    for place in range(0, len(vector) - 3, 4):
        part = vector[place : place + 4]
        if part.all():  # zeros are everywhere
            yield from (form.tobytes() for form in (part, part.astype(np.float64), part.astype(np.float32)))
    yield from (repr(float(value)).encode() for value in vector if vector.dtype.kind == "f" and len(repr(value)) > 9)


def spellings(secret: bytes) -> set[bytes]:
    """A secret as bytes, as Python shows them, in hexadecimal and base64, and as ZeroMQ writes keys."""
    spelled = {secret, repr(secret)[2:-1].encode(), secret.hex().encode(), secret.hex().upper().encode()}
    spelled.add(b64encode(secret).rstrip(b"="))
    return spelled | ({z85.encode(secret)} if len(secret) % 4 == 0 else set())


class Planted:
    """Puts down, as it comes up, what each site must keep to itself."""

    def __init__(self, patch: pytest.MonkeyPatch, together: Together) -> None:
        self.markers: Markers = {
            name: {f"{PATIENT}-{name}".encode(), f"{FOLDER}-{name}".encode()} for name in together.names
        }
        for name in together.names:
            keys = together.consortium.keys[name]
            self.markers[name] |= spellings(keys.identity.private_bytes()) | spellings(keys.transport_secret)
        self._here = threading.local()
        patch.setattr(sites.participant_loop, "encode_input", self._encode)
        patch.setattr(sites.participant_loop, "Participant", self._participant)
        patch.setattr(secureagg.participant, "share", self._share)

    def program(self, name: str, program: Callable[[Federation], None]) -> Callable[[Federation], None]:
        """The same program, whose thread is known as the site's."""

        def known(federation: Federation) -> None:
            self._here.name = name
            program(federation)

        return known

    def _encode(self, parameters: RoundParameters, values: Mapping[str, Any], **options: Any) -> EncodedInput:
        encoded = encode_input(parameters, values, **options)
        for vector in (values.get(UPDATE), encoded.vectors.get(UPDATE)):
            if vector is not None:
                self.markers[self._here.name].update(slices(np.asarray(vector)))
        return encoded

    def _participant(self, *, site: str, **options: Any) -> Participant:
        return Participant(site=site, entropy=partial(self._entropy, site), **options)

    def _entropy(self, site: str, count: int) -> bytes:
        # Secret keys, seeds and the randomness of shares.
        self._here.name, drawn = site, np.random.default_rng().bytes(count)
        self.markers[site] |= spellings(drawn)
        return drawn

    def _share(self, secret: bytes, **options: Any) -> dict[int, bytes]:
        shares = share(secret, **options)
        for piece in (secret, *shares.values()):
            self.markers[self._here.name] |= spellings(piece)
        return shares


def found_in(data: bytes, markers: Markers) -> dict[str, list[bytes]]:
    """Site -> those of its markers that are in ``data``."""
    found = {name: [marker for marker in own if marker in data] for name, own in markers.items()}
    return {name: own for name, own in found.items() if own}


def contents(folder: Path) -> bytes:
    """All files below a folder, and their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return b"\0".join(part for path in paths for part in (str(path.relative_to(folder)).encode(), path.read_bytes()))


def data_of(name: str) -> dict[str, Any]:
    """Patients with names, of whom each has two rows."""
    generator = np.random.default_rng(list(name.encode()))
    return {
        "features": torch.from_numpy(generator.normal(size=(40, 13)).astype(np.float32)),
        "targets": torch.from_numpy((np.arange(40) % 2).astype(np.float32)),
        "patients": [f"{PATIENT}-{name}-{row // 2}" for row in range(40)],
    }


def trains(name: str) -> Callable[[Federation], None]:
    """A site that trains behind its budget; b first submits what cannot be encoded, and c's code fails in the end."""

    def program(federation: Federation) -> None:
        trainer = federation.trainer(heart_model(), binary_loss, max_rows_per_patient=2, **data_of(name))
        for training_round in federation.rounds():
            result = trainer.train_round(training_round)
            if name == "b":
                far = {key: tensor * 1e6 for key, tensor in result.state.items()}
                with pytest.raises(ValueOutOfRange) as refused:
                    training_round.submit(far, examples=1, epsilon=0.5)
                logging.getLogger("secureagg.site").error("%s", refused.value)
            if name == "c" and training_round.number == ROUNDS:
                raise OSError(f"{FOLDER}-{name}/{PATIENT}-{name}.dcm cannot be read")
            training_round.submit_trained(result)

    return program


def spoiling(message: ToCoordinator) -> ToCoordinator | None:
    """Shares other than those that it was given."""
    if not isinstance(message, UnmaskShares):
        return None
    spoiled = tuple((site, bytes([data[0] ^ 1]) + data[1:]) for site, data in message.self_seed_shares)
    return msgspec.structs.replace(message, self_seed_shares=spoiled)


needs_tenseal = pytest.mark.skipif(find_spec("tenseal") is None, reason="the extra `homomorphic` is not installed")


@pytest.mark.parametrize(
    ("policy", "fails"),
    [
        (recipe.POLICY, "dies"),
        (recipe.POLICY, "spoils"),
        pytest.param(recipe.HOMOMORPHIC, "dies", marks=[needs_tenseal, pytest.mark.slow]),
    ],
)
def test_no_marker_is_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    policy: Policy,
    fails: str,
) -> None:
    """Updates, keys, seeds, shares, folders and patients of a site are in no file, log, status, message to an operator
    or error of the coordinator, nor of any other site; a site's own log names none of its patients either."""
    monkeypatch.setattr("dp.budget.noise_multiplier_for", lambda **_: 4.0)  # its search takes seconds
    wrap = {"d": lambda real, site: Tampering(real, site, spoiling)} if fails == "spoils" else {}
    together = Together(
        tmp_path,
        names=NAMES,
        rounds=ROUNDS,
        initial=initial_heart_model(),
        policy=policy,
        privacy=msgspec.structs.replace(recipe.PRIVACY, epsilon=50.0),
        encoding=msgspec.structs.replace(STRICT, value_range=16.0),
        deadlines=msgspec.structs.replace(QUICK, join_seconds=10.0, phase_seconds=5.0, training_seconds=5.0),
        fails={"d": (MaskedInput, 2)} if fails == "dies" else {},
        wrap=wrap,
        coordinator=lambda consortium: run_coordinator(
            consortium.manifest_path,
            keys=consortium.coordinator_keys_path,
            initial=consortium.initial_path,
            state=tmp_path / "state",
            report=lambda record: together.records.append(record),  # noqa: PLW0108  made after this
            notify=together.said.append,
        ),
    )
    for name, path in together.consortium.site_configs.items():
        path.write_text(path.read_text().replace('state = "."', f'state = "{FOLDER}-{name}"'))
    planted = Planted(monkeypatch, together)
    together.programs = {name: planted.program(name, trains(name)) for name in NAMES}
    caplog.set_level(logging.DEBUG)
    together.run()
    assert any(record.survivors for record in together.records)
    assert any(record.dropped or record.refused for record in together.records)
    states = {name: open_site(path).state for name, path in together.consortium.site_configs.items()}

    # The search finds what is there: a site's own update is in its outbox or ledger's folder, its keys in its key file.
    for name in ("a", "e"):
        assert found_in((tmp_path / f"{name}.keys").read_bytes(), planted.markers).keys() == {name}
    for markers in planted.markers.values():
        assert len(markers) > 50
        assert any(marker.startswith((b"0.", b"-0.")) for marker in markers)  # of an update

    console = capfd.readouterr()
    status = msgspec.json.encode(read_status(together.consortium.manifest, tmp_path / "state"))
    records = msgspec.json.encode(together.records)
    said = "\n".join([*together.said, repr(together.failure), console.out, console.err]).encode()
    for what, data in {
        "state folder": contents(tmp_path / "state"),
        "status": status,
        "records": records,
        "messages": said,
    }.items():
        assert not found_in(data, planted.markers), f"the coordinator's {what}"
    logged = caplog.text.encode()
    assert logged
    assert not found_in(logged, planted.markers), "a log"
    for name, state in states.items():
        others = {other: markers for other, markers in planted.markers.items() if other != name}
        assert not found_in(contents(state), others), f"the state folder of {name}"
        assert not found_in(repr(together.errors.get(name)).encode(), others), f"the error of {name}"
        assert PATIENT.encode() not in contents(state)
