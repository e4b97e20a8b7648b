"""Whole federations over real sockets: who is in which sum, and what everybody is told when something goes wrong."""

import json
import threading

import msgspec
import numpy as np
import pytest
import torch
from support.federation import PATIENT, QUICK, ChangedUpload, Tampering, Together, expected_model, moving, step_of

from secureagg import ParameterError, ShapeMismatch, ValueOutOfRange
from secureagg.messages import (
    Acknowledgement,
    EncryptedShares,
    KeyAdvertisement,
    MaskedInput,
    SparseInput,
    SurvivorSignature,
    ToCoordinator,
    UnmaskShares,
)
from sites.config import open_site
from sites.errors import FederationFailed
from sites.evaluation import evaluate_scores
from sites.manifest import Manifest
from sites.participant_loop import Federation
from sites.recipe import ENCODING, POLICY, PRIVACY
from sites.rounds import model_spec
from transport import PeerId, PeerUnreachable, listen

STEP = ENCODING.value_range / (2**15 - 1)


def assert_model(together: Together, survivors: list[str]) -> None:
    """Every number of the final model stands where rounds with these survivors lead, at each site that saw the end."""
    expected = expected_model(survivors)
    tolerance = STEP * len(survivors) + 1e-6
    assert together.final
    for state in together.final.values():
        for tensor in state.values():
            np.testing.assert_allclose(tensor.numpy(), expected, atol=tolerance)


def test_everybody_finishes(tmp_path) -> None:
    """Four sites end with the model that the weighted means lead to, the same at each, and nobody has an error."""
    together = Together(tmp_path, rounds=3).run()
    assert together.failure is None
    assert together.errors == {}
    assert_model(together, ["abcd"] * 3)
    states = [{key: tensor.tolist() for key, tensor in state.items()} for state in together.final.values()]
    assert all(state == states[0] for state in states)
    for history in together.history.values():
        assert [(entry.number, entry.purpose, entry.result) for entry in history] == [
            (1, "train", "finished"),
            (2, "train", "finished"),
            (3, "train", "finished"),
            (4, "evaluate", "finished"),
        ]
    assert [record.examples for record in together.records] == [100, 100, 100, None]


def test_metrics_are_those_of_all_held_out_examples(tmp_path) -> None:
    """What the coordinator reads off the summed counts equals the metrics computed with all examples in one place."""
    random = np.random.default_rng(5)
    held_out = {name: (random.random(40), random.integers(0, 2, 40)) for name in "abcd"}
    together = Together(tmp_path, rounds=1, evaluate={name: lambda _, n=name: held_out[n] for name in "abcd"}).run()
    scores, labels = (np.concatenate(parts) for parts in zip(*held_out.values(), strict=True))
    expected = evaluate_scores(scores, labels, together.consortium.manifest.evaluation.histogram_bins)
    assert together.records[-1].metrics == expected


@pytest.mark.parametrize(
    ("message", "phase", "in_the_sum"),
    [
        (KeyAdvertisement, "AdvertisingKeys", False),
        (EncryptedShares, "SharingKeys", False),
        (MaskedInput, "CollectingMaskedInputs", False),
        (SurvivorSignature, "CheckingConsistency", True),
        (UnmaskShares, "Unmasking", True),
    ],
)
def test_a_machine_fails(tmp_path, message: type[ToCoordinator], phase: str, in_the_sum: bool) -> None:
    """A site that falls silent in any phase is noticed in that phase; the round's sum is right with or without it, and
    the next rounds go on with the others."""
    together = Together(tmp_path, rounds=3, fails={"d": (message, 2)}).run()
    assert together.failure is None
    assert together.errors.keys() <= {"d"}
    survivors = ["abcd", "abcd" if in_the_sum else "abc", "abc"]
    assert ["".join(record.survivors) for record in together.records] == [*survivors, "abc"]
    assert [record.dropped for record in together.records] == [{}, {"d": phase}, {}, {}]
    assert_model(together, survivors)


@pytest.mark.parametrize(
    ("message", "phase", "in_the_sum"),
    [
        (SparseInput, "CollectingMaskedInputs", False),
        pytest.param(Acknowledgement, "CheckingConsistency", True, marks=pytest.mark.slow),
    ],
)
def test_a_machine_fails_on_the_sparse_graph(
    tmp_path, message: type[ToCoordinator], phase: str, in_the_sum: bool
) -> None:
    """A consortium that asks for the sparse graph trains on it, and survives a site that falls silent."""
    policy = msgspec.structs.replace(POLICY, graph="sparse", max_corrupt=0, minimum_cohort=7, dropout_percent=20)
    together = Together(tmp_path, names="abcdefgh", rounds=3, fails={"d": (message, 2)}, policy=policy).run()
    assert together.failure is None
    assert together.errors.keys() <= {"d"}
    survivors = ["abcdefgh", "abcdefgh" if in_the_sum else "abcefgh", "abcefgh"]
    assert ["".join(record.survivors) for record in together.records] == [*survivors, "abcefgh"]
    assert [record.dropped for record in together.records] == [{}, {"d": phase}, {}, {}]
    assert_model(together, survivors)


def test_fewer_than_the_threshold(tmp_path) -> None:
    """With two of four sites failing, the round releases nothing, the coordinator says why, and the model of the last
    finished round is kept."""
    together = Together(
        tmp_path,
        rounds=3,
        fails={"c": (MaskedInput, 2), "d": (MaskedInput, 2)},
        deadlines=msgspec.structs.replace(QUICK, join_seconds=2.0),
    ).run()
    assert isinstance(together.failure, FederationFailed)
    assert "2 of 4 sites" in str(together.failure)
    assert "missing: c, d" in str(together.failure)
    assert [record.error for record in together.records] == ["", "threshold-not-met"]
    assert any("CollectingMaskedInputs: 2 of 4 sites answered, expected at least 3" in text for text in together.said)
    kept = together.folder / "state" / "model.safetensors"
    vector = model_spec(together.consortium.manifest).from_bytes(kept.read_bytes(), who="kept")
    np.testing.assert_allclose(vector, expected_model(["abcd"]), atol=STEP + 1e-6)
    for name in "ab":
        assert isinstance(together.errors[name], FederationFailed)
        assert "ended the federation" in str(together.errors[name])


def test_a_site_that_comes_late(tmp_path) -> None:
    """A site that starts after the first round takes part from the next one on."""
    started = threading.Event()
    together = Together(
        tmp_path,
        rounds=6,
        late={"d": started},
        report=lambda _record: started.set(),
        programs={"a": slow(moving("a"))},
        deadlines=msgspec.structs.replace(QUICK, join_seconds=1.0, training_seconds=10.0),
    ).run()
    assert together.failure is None
    assert together.errors == {}
    cohorts = ["".join(record.cohort) for record in together.records]
    assert cohorts[0] == "abc"
    assert cohorts[-1] == "abcd"


def slow(program):
    """The program with half a second of training in each round."""

    def slowed(federation: Federation) -> None:
        rounds = federation.rounds

        def waiting():
            for training_round in rounds():
                threading.Event().wait(0.5)
                yield training_round

        federation.rounds = waiting
        program(federation)

    return slowed


def test_a_site_that_submits_nothing_in_a_round(tmp_path) -> None:
    """A site whose loop goes on without submitting leaves that round, and is back in the next."""

    def lazy(federation: Federation) -> None:
        for training_round in federation.rounds():
            if training_round.number != 1:
                training_round.submit(training_round.global_state, examples=1)

    together = Together(tmp_path, rounds=2, programs={"d": lazy}, deadlines=PATIENT).run()
    assert together.failure is None
    assert together.errors == {}
    assert ["".join(record.survivors) for record in together.records] == ["abc", "abcd", "abcd"]
    assert together.records[0].dropped.keys() == {"d"}
    assert together.history["d"][0].result == "withdrawn"
    assert sum(together.records[0].seconds.values()) < PATIENT.phase_seconds  # it said so: nobody waited for a deadline


def test_training_that_fails(tmp_path) -> None:
    """An exception of the engineer's own code leaves the federation at once and cleanly; the others go on."""

    def broken(federation: Federation) -> None:
        for training_round in federation.rounds():
            if training_round.number == 2:
                raise ZeroDivisionError
            training_round.submit(training_round.global_state, examples=1)

    together = Together(tmp_path, rounds=3, programs={"d": broken}).run()
    assert together.failure is None
    assert isinstance(together.errors["d"], ZeroDivisionError)
    assert ["".join(record.survivors) for record in together.records] == ["abcd", "abc", "abc", "abc"]


def test_leaving_early(tmp_path) -> None:
    """Breaking out of the loop lets the submitted round end, and tells the coordinator."""

    def impatient(federation: Federation) -> None:
        for training_round in federation.rounds():
            training_round.submit(training_round.global_state, examples=1)
            break

    together = Together(tmp_path, rounds=2, programs={"d": impatient}).run()
    assert together.failure is None
    assert together.errors == {}
    assert ["".join(record.survivors) for record in together.records] == ["abcd", "abc", "abc"]
    assert together.history["d"][0].result == "finished"


def trying(bad: list[tuple[dict[str, object], dict[str, object], type[Exception], str]], seen: list[str]):
    """A program that tries unfit submissions in the first round before a good one."""

    def program(federation: Federation) -> None:
        for training_round in federation.rounds():
            if training_round.number == 1:
                for change, options, error, text in bad:
                    before = {key: tensor.clone() for key, tensor in training_round.global_state.items()}
                    state = {**training_round.global_state, **change}
                    with pytest.raises(error, match=text):
                        training_round.submit(state, **{"examples": 40, **options})
                    assert all(torch.equal(training_round.global_state[key], before[key]) for key in before)
                    seen.append(text)
            state = {key: tensor + step_of("d") for key, tensor in training_round.global_state.items()}
            training_round.submit(state, examples=40)

    return program


def test_unfit_submissions(tmp_path) -> None:
    """NaN, a value out of range, other shapes, other tensors, an unfit weight: each names tensor, found and expected;
    nothing is sent, and a good submission in the same round is still taken."""
    nan, far = torch.zeros(1, 3), torch.zeros(1, 3)
    nan[0, 1], far[0, 2] = float("nan"), 2.5
    bad = [
        ({"weight": nan}, {}, ValueOutOfRange, "round 1, tensor weight, element 1: .*not finite"),
        ({"weight": far}, {}, ValueOutOfRange, r"tensor weight, element 2: .*0\.5 above the range, expected at most 2"),
        ({"weight": torch.zeros(3)}, {}, ShapeMismatch, r"tensor weight has shape \(3,\), expected \(1, 3\)"),
        ({"bias": torch.zeros(1).double()}, {}, ShapeMismatch, "tensor bias has dtype torch.float64"),
        ({"extra": torch.zeros(1)}, {}, ShapeMismatch, "tensor extra is not part of the consortium's model"),
        ({}, {"examples": -1}, ValueOutOfRange, "weight: found a value below 0"),
        ({}, {"examples": 10**9}, ValueOutOfRange, "weight: found a value above 100000"),
    ]
    seen: list[str] = []
    together = Together(tmp_path, rounds=1, programs={"d": trying(bad, seen)}).run()
    assert together.errors == {}
    assert len(seen) == len(bad)
    assert_model(together, ["abcd"])


@pytest.mark.parametrize(("epsilon", "found"), [(None, "found none"), (1.01, r"found 1\.01"), (-0.1, r"found -0\.1")])
def test_a_private_consortium_wants_to_know_epsilon(tmp_path, epsilon: float | None, found: str) -> None:
    """Where the manifest says mode local, a submission without an epsilon within the bound is refused."""
    seen: list[str] = []

    def program(federation: Federation) -> None:
        for training_round in federation.rounds():
            with pytest.raises(
                ParameterError, match=f"{found} as the epsilon this run has spent, expected one up to 1"
            ):
                training_round.submit(training_round.global_state, examples=1, epsilon=epsilon)
            seen.append(found)
            training_round.submit(training_round.global_state, examples=1, epsilon=0.5)

    together = Together(tmp_path, rounds=1, programs=dict.fromkeys("abcd", program), privacy=PRIVACY).run()
    assert together.errors == {}
    assert len(seen) == 4
    assert "".join(together.records[0].survivors) == "abcd"


def test_another_manifest(tmp_path) -> None:
    """A site whose manifest differs from the coordinator's is told so and ends; the others go on without it."""
    together = Together(tmp_path, rounds=1, deadlines=msgspec.structs.replace(QUICK, join_seconds=2.0))
    manifest = together.consortium.manifest
    other = msgspec.structs.replace(manifest, policy=msgspec.structs.replace(POLICY, minimum_cohort=4), signatures=[])
    for name in "abcd":
        keys = together.consortium.keys[name]
        other = other.sign(keys.identity, keys.site)
    path = tmp_path / "other.toml"
    other.save(path)
    config = together.consortium.site_configs["d"]
    config.write_text(
        config.read_text().replace("manifest.toml", "other.toml").replace(manifest.digest.hex(), other.digest.hex())
    )
    together.run()
    assert isinstance(together.errors["d"], FederationFailed)
    assert "it refuses site d (manifest-differs)" in str(together.errors["d"])
    assert together.failure is None
    assert "".join(together.records[0].survivors) == "abc"


def test_the_coordinator_goes_away(tmp_path) -> None:
    """When the coordinator's machine fails for good, each site says so after the agreed time; its journal is kept."""

    together = Together(
        tmp_path,
        rounds=2,
        coordinator=listen_and_vanish,
        deadlines=msgspec.structs.replace(QUICK, join_seconds=1.0),
    ).run()
    for name in "abcd":
        assert isinstance(together.errors[name], PeerUnreachable)
        assert "gone for 1 s; " in str(together.errors[name])
        assert (tmp_path / name / "journal.sqlite").exists()


def listen_and_vanish(consortium) -> None:
    """A coordinator that hears one site and is gone."""
    manifest = consortium.manifest
    peers = {PeerId(site): card.transport_key for site, card in manifest.roster.items()}
    secret = consortium.keys["sum"].transport_secret
    with listen(manifest.coordinator.address, secret_key=secret, peers=peers) as endpoint:
        assert endpoint.receive(10) is not None


def test_a_cohort_below_the_minimum_never_starts(tmp_path) -> None:
    """With too few sites present when the time to join is over, no round begins, and the missing are named."""
    never = threading.Event()
    together = Together(
        tmp_path,
        names=("a", "b", "c"),
        late={"c": never},
        deadlines=msgspec.structs.replace(QUICK, join_seconds=1.0),
    )
    threading.Timer(3.0, never.set).start()
    together.run()
    assert isinstance(together.failure, FederationFailed)
    assert "2 of 3 sites" in str(together.failure)
    assert "expected at least 3; missing: c" in str(together.failure)
    assert together.records == []


def test_the_log_has_sums_only(tmp_path) -> None:
    """The coordinator's record of each round has the fields that it documents, and no site's numbers among them."""
    together = Together(tmp_path, rounds=1).run()
    lines = [json.loads(line) for line in (tmp_path / "state" / "rounds.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0].keys() == {
        *("run", "number", "purpose", "cohort", "survivors", "dropped", "refused", "seconds", "bytes_received"),
        *("masked_sample", "examples", "metrics", "personal_metrics", "error"),
    }
    assert lines[0]["examples"] == 100
    assert together.records[0].masked_sample.keys() == set("abcd")


def test_manifest_of_the_run_is_checked_before_anything_is_sent(tmp_path) -> None:
    """``open_site`` refuses an unsigned manifest; the session that would send is never made."""
    together = Together(tmp_path)
    manifest = together.consortium.manifest
    unsigned = msgspec.structs.replace(manifest, signatures=manifest.signatures[1:])
    unsigned.save(together.consortium.manifest_path)
    assert Manifest.load(together.consortium.manifest_path).digest == manifest.digest
    with pytest.raises(Exception, match="not signed by a, expected all 4 sites"):
        open_site(together.consortium.site_configs["b"])


def wrong_share(message: ToCoordinator) -> ToCoordinator | None:
    """A share that is a field element, but not the one that was dealt."""
    if not isinstance(message, UnmaskShares):
        return None
    (first, _), *others = message.self_seed_shares
    return msgspec.structs.replace(message, self_seed_shares=((first, bytes(33)), *others))


def wrong_commitment(message: ToCoordinator) -> ToCoordinator | None:
    """A commitment to another seed than the one that is shared."""
    return msgspec.structs.replace(message, commitment=bytes(32)) if isinstance(message, EncryptedShares) else None


@pytest.mark.parametrize(("change", "released"), [(wrong_share, True), (wrong_commitment, False)])
def test_a_site_that_misbehaves(tmp_path, change, released: bool) -> None:
    """A site whose own messages prove a wrong share or commitment is blamed in the record, told so, and excluded; the
    round is released all the same if it was a share, and the next ones in both cases."""
    together = Together(
        tmp_path, rounds=3, wrap={"d": lambda real, site: Tampering(real, site, change)}, deadlines=PATIENT
    ).run()
    assert together.failure is None
    assert "refuses site d (authentication-failed)" in str(together.errors["d"])
    assert together.errors.keys() == {"d"}
    first, *later = together.records
    assert first.refused == {"d": ["authentication-failed"]}
    assert "".join(first.survivors) == ("abcd" if released else "")
    assert first.error == ("" if released else "authentication-failed")
    assert ["".join(record.survivors) for record in later] == ["abc"] * 3
    assert all(record.refused == {} for record in later)
    assert sum(together.records[0].seconds.values()) < PATIENT.phase_seconds  # nobody waited for a deadline


Pieces = list[list[bytes]]


def uploading(tmp_path, monkeypatch, change, **options) -> Together:
    """A federation whose masked inputs travel in many small chunks; those of site d are changed on their way."""
    monkeypatch.setattr(MaskedInput, "CHUNK_BYTES", 64)
    return Together(tmp_path, wrap={"d": lambda real, _site: ChangedUpload(real, change)}, **options).run()


def the_header_is_lost(piece: int, frames: list[bytes]) -> Pieces:
    """Everything but the header arrives."""
    return [frames] if piece else []


def a_chunk_is_lost(piece: int, frames: list[bytes]) -> Pieces:
    """Everything but the second chunk arrives."""
    return [] if piece == 2 else [frames]


def the_rest_is_lost(piece: int, frames: list[bytes]) -> Pieces:
    """Nothing arrives behind the second chunk."""
    return [frames] if piece <= 2 else []


@pytest.mark.parametrize(
    ("change", "refused"),
    [(the_header_is_lost, {}), (a_chunk_is_lost, {"d": ["unexpected-message"]}), (the_rest_is_lost, {})],
)
def test_an_upload_that_breaks_off(tmp_path, monkeypatch, change, refused: dict[str, list[str]]) -> None:
    """A site whose upload loses a piece on its way is a dropout of the round, whose sum is exactly the others'; it is
    not blamed for it."""
    together = uploading(tmp_path, monkeypatch, change, rounds=1)
    assert together.failure is None
    assert together.errors.keys() <= {"d"}  # it may not have been there again when the federation was over
    assert "refuses" not in str(together.errors)
    first = together.records[0]
    assert first.survivors == ("a", "b", "c")
    assert first.dropped == {"d": "CollectingMaskedInputs"}
    assert first.refused == refused
    assert not any("excluded" in text for text in together.said)
    assert_model(together, ["abc"])


class LateChunks:
    """From the second round on, a chunk of the first arrives before and behind every piece."""

    def __init__(self) -> None:
        self._uploads = 0
        self._old: list[bytes] = []

    def __call__(self, piece: int, frames: list[bytes]) -> Pieces:
        """The piece, between late ones."""
        self._uploads += piece == 0
        if (self._uploads, piece) == (1, 1):
            self._old = frames
        return [frames] if self._uploads == 1 else [self._old, frames, self._old]


class BeginningAgain:
    """After its first chunk a site sends header and first chunk once more, as over a new connection."""

    def __init__(self) -> None:
        self._header: list[bytes] = []

    def __call__(self, piece: int, frames: list[bytes]) -> Pieces:
        """The piece, with what comes behind it."""
        if piece == 0:
            self._header = frames
        return [frames, self._header, frames] if piece == 1 else [frames]


@pytest.mark.parametrize("change", [LateChunks, BeginningAgain])
def test_chunks_of_another_upload(tmp_path, monkeypatch, change) -> None:
    """Chunks of an earlier round are ignored as late messages are, and an upload may begin again: nobody is refused,
    and everybody is in each sum."""
    together = uploading(tmp_path, monkeypatch, change(), rounds=2, deadlines=PATIENT)
    assert together.failure is None
    assert together.errors == {}
    assert [record.survivors for record in together.records] == [("a", "b", "c", "d")] * 3
    assert all(record.refused == {} for record in together.records)
    assert_model(together, ["abcd"] * 2)


def a_changed_chunk(piece: int, frames: list[bytes]) -> Pieces:
    """The second chunk is another one than was signed."""
    return [[*frames[:2], bytes(len(frames[2]))]] if piece == 2 else [frames]


def a_frame_too_many(piece: int, frames: list[bytes]) -> Pieces:
    """A chunk with something behind it."""
    return [[*frames, b""]] if piece == 2 else [frames]


@pytest.mark.parametrize(
    ("change", "code"), [(a_changed_chunk, "authentication-failed"), (a_frame_too_many, "malformed-message")]
)
def test_a_wrong_chunk(tmp_path, monkeypatch, change, code: str) -> None:
    """A site whose chunk is not the one that it signed is refused once, told so and excluded; the round goes on without
    waiting for its deadline, and its sum is exactly the others'."""
    together = uploading(tmp_path, monkeypatch, change, rounds=1, deadlines=PATIENT)
    assert together.failure is None
    assert together.errors.keys() == {"d"}
    assert f"refuses site d ({code})" in str(together.errors["d"])
    first = together.records[0]
    assert first.survivors == ("a", "b", "c")
    assert first.refused == {"d": [code]}
    assert first.dropped == {"d": "CollectingMaskedInputs"}
    assert sum(first.seconds.values()) < PATIENT.phase_seconds
    assert_model(together, ["abc"])
