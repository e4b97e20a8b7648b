"""Attack: the coordinator subtracts two masked inputs of one site: had they a mask in common, it would be gone.

So no keystream may be used twice: not in another round, not in a run that starts again with round 1, not for another
lane, pair or purpose.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np
import pytest
from support.keystreams import keystream
from support.rounds import StoppedRound

from secureagg import (
    Coordinator,
    LocalProtocolError,
    Participant,
    RoundParameters,
    SiteId,
    UnexpectedMessage,
    agreement,
)
from secureagg.agreement import pairwise_mask_key, self_mask_key
from secureagg.keystream import Keystream
from secureagg.masking import SLOTS_LANE, apply_masks
from secureagg.messages import KeyAdvertisement, MaskedInput, ShareDelivery
from secureagg.phases import Aborted, CoordinatorFinished

pytestmark = pytest.mark.usefixtures("backend")

COORDINATOR, CODER = "the coordinator", "encode_input"
STREAM_BYTES = 4096
SITES = [SiteId(f"site-00{index}") for index in range(5)]
LATE = SITES[4]
# Round -> what differs from an ordinary one; in the order in which they are played, by the same sites.
PLAYED: dict[str, dict[str, object]] = {
    "run, round 1": {},
    "run, round 2, with a dropout": {"round_number": 2, "silent": {LATE: MaskedInput}},
    "run, round 3, without a release": {"round_number": 3, "silent": {LATE: MaskedInput, SITES[3]: MaskedInput}},
    "run, round 4": {"round_number": 4},
    "restarted run, round 1": {"run": "run again"},
    "restarted run, round 2": {"run": "run again", "round_number": 2},
    "another model in round 1": {"model_digest": b"\1" * 32},
    "round 1 once more, as after a lost journal": {},
}


class Recorder:
    """Notes who begins which keystream, and where in it: ``uses`` holds (round, machine, key, offset)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uses: list[tuple[str, str, bytes, int]] = []
        self.round = ""
        self._machine = CODER
        begin = Keystream.__init__

        def spy(stream: Keystream, key: bytes, *, offset: int = 0) -> None:
            self.uses.append((self.round, self._machine, key, offset))
            begin(stream, key, offset=offset)

        monkeypatch.setattr(Keystream, "__init__", spy)
        for name in ("start", "submit", "receive"):
            monkeypatch.setattr(Participant, name, self._noted(getattr(Participant, name)))
        for name in ("receive", "drop", "close_phase"):
            monkeypatch.setattr(Coordinator, name, self._noted(getattr(Coordinator, name)))

    def _noted(self, method: Callable[..., object]) -> Callable[..., object]:
        def noted(machine: Participant | Coordinator, *args: object, **options: object) -> object:
            before = self._machine
            self._machine = machine._site if isinstance(machine, Participant) else COORDINATOR
            try:
                return method(machine, *args, **options)
            finally:
                self._machine = before

        return noted

    def by_key(self) -> dict[bytes, list[tuple[str, str]]]:
        """Key -> the (round, machine) of each keystream made from it; no lane here is so long that it is cut."""
        found: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
        for number, machine, key, offset in self.uses:
            assert offset == 0
            found[key].append((number, machine))
        return found

    def mask_keys(self) -> set[bytes]:
        """The keys of all masks, without those that flip the coins of rounding."""
        return {key for _, machine, key, _ in self.uses if machine != CODER}


def blocks(keys: Iterable[bytes]) -> Counter[bytes]:
    """How often each aligned block of 16 bytes occurs in the keystreams of these keys."""
    found: Counter[bytes] = Counter()
    for key in keys:
        stream = keystream(key, "<u1", STREAM_BYTES).tobytes()
        found.update(stream[start : start + 16] for start in range(0, STREAM_BYTES, 16))
    return found


def masked(parameters: RoundParameters) -> list[str]:
    """What has masks of its own: each lane, or the slots of all together."""
    return list(parameters.lanes) if parameters.backend == "masked" else [SLOTS_LANE]


def whole_rounds(recorder: Recorder) -> dict[str, StoppedRound]:
    """All rounds of ``PLAYED`` to their ends, by the same identities under the same roster, each with fresh entropy."""
    recorder.round = "first"
    first = StoppedRound(len(SITES), seed=1000)
    rounds = {}
    for seed, (recorder.round, options) in enumerate(PLAYED.items()):
        stopped = StoppedRound(
            len(SITES), seed=seed, identities=first.identities, **{"roster": first.roster, **options}
        )
        stopped.finish()
        rounds[recorder.round] = stopped
    return rounds


def same_input_again(first: StoppedRound, **options: object) -> dict[SiteId, MaskedInput]:
    """The masked inputs of another round of the same sites with the very integers of ``first``."""
    stopped = StoppedRound(len(first.sites), **{"identities": first.identities, "roster": first.roster, **options})
    for site in stopped.sites:
        stopped.participants[site]._input = first.inputs[site]
    stopped.deliver(stopped.until(ShareDelivery))
    masked = dict(stopped.pending)
    assert all(isinstance(message, MaskedInput) for message in masked.values())
    return masked


def test_the_same_input_looks_new_in_every_round() -> None:
    """Twelve rounds, most of them with one and the same context: no two masked inputs have as much as a lane's vector
    in common, whoever sent them.

    Stopped by fresh mask keys in ``Participant.start`` or a fresh self seed in ``Participant._share_secrets``; each
    alone is enough for this, and the next test misses either.
    """
    first = StoppedRound(4)
    options = [*({"seed": seed} for seed in range(1, 10)), {"seed": 20, "round_number": 2}, {"seed": 21, "run": "2"}]
    lane = first.parameters.lanes["update"]
    start = sum(other.packed_bytes for name, other in first.parameters.lanes.items() if name < "update")
    end = start + lane.packed_bytes
    seen, vectors = [], []
    for masked in (same_input_again(first), *(same_input_again(first, **changes) for changes in options)):
        for message in masked.values():
            (packed,) = message.chunks
            seen.append(packed)
            vectors.append(packed[start:end])
    assert len(set(seen)) == len(set(vectors)) == 12 * 4


def test_no_key_makes_two_streams_in_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over finished, thinned and failed rounds, and a run that starts again, each key belongs to one round, and in it
    to one pair or one site, each of whom makes its keystream once; the coordinator makes it at most once more.

    Stopped by ``_derive``, which binds each key to lane, sites and context, and by fresh secrets in
    ``Participant.start`` and ``Participant._share_secrets``.
    """
    recorder = Recorder(monkeypatch)
    rounds = whole_rounds(recorder)
    lanes = len(masked(rounds["run, round 1"].parameters))
    assert lanes == (4 if StoppedRound.backend == "masked" else 1)
    used = recorder.by_key()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for uses in used.values():
        assert len({number for number, _ in uses}) == 1, "a key of two rounds"
        number = uses[0][0]
        machines = {machine for _, machine in uses}
        assert len(machines) == len(uses), "a machine makes one keystream twice"
        if machines == {CODER}:
            kinds[number]["coins"] += 1
            continue
        sites = machines - {COORDINATOR}
        assert sites <= set(SITES)
        kinds[number][{1: "self", 2: "pair"}[len(sites)]] += 1
        if COORDINATOR in machines:
            # Of a survivor it removes the self mask, of a dropout the pairwise masks, never both.
            silent = rounds[number].silent if number in rounds else {}
            assert (len(sites) == 2) == bool(sites & silent.keys())
            kinds[number]["removed"] += 1
    whole = {"coins": 5, "self": 5 * lanes, "pair": 10 * lanes}
    for number, stopped in rounds.items():
        if "without a release" in number:
            assert isinstance(stopped.coordinator.phase, Aborted)
            assert kinds[number] == whole
            continue
        assert isinstance(stopped.coordinator.phase, CoordinatorFinished)
        dropped = len(stopped.silent)
        assert kinds[number] == {**whole, "removed": (5 - dropped) * lanes + dropped * 4 * lanes}


def test_no_block_of_any_stream_repeats_in_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 4 KiB of every keystream of eight rounds, coins included: no block of 16 bytes occurs twice.

    Stopped by the same checks; that one stream has no block twice is AES in counter mode, in ``Keystream``.
    """
    recorder = Recorder(monkeypatch)
    whole_rounds(recorder)
    keys = set(recorder.by_key())
    found = blocks(keys)
    assert len(keys) > (500 if StoppedRound.backend == "masked" else 150)
    assert len(found) == len(keys) * STREAM_BYTES // 16
    assert set(found.values()) == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"round_number": 2},
        {"run": "run again"},
        {"model_digest": b"\1" * 32},
        {"consortium": "other"},
        {"max_weight": 9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_even_if_all_random_bytes_repeat(monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> None:
    """Machines restored from a snapshot draw the same keys and seeds again: in another round, run, model, consortium or
    policy the masks are still others.

    Stopped by the context in ``_derive``.
    """
    advertised, masks = [], []
    for options in ({}, change):
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            stopped = StoppedRound(4, **options)
            advertised.append(
                [(m.mask_key, m.channel_key) for _, m in stopped.pending if isinstance(m, KeyAdvertisement)]
            )
            stopped.finish()
            assert isinstance(stopped.coordinator.phase, CoordinatorFinished)
            masks.append(recorder.mask_keys())
    assert advertised[0] == advertised[1]
    assert len(masks[0]) == len(masks[1]) == len(masked(stopped.parameters)) * (4 + 6)
    assert not masks[0] & masks[1]


def derived(parameters: RoundParameters, secret: bytes) -> list[bytes]:
    """Every mask key of a round if one secret stood for all seeds and all agreements."""
    lanes, sites = masked(parameters), parameters.cohort
    keys = [self_mask_key(parameters, secret, lane=lane, site=site) for lane in lanes for site in sites]
    pairs = list(combinations(sites, 2))
    return keys + [pairwise_mask_key(parameters, secret, lane=lane, one=v, other=u) for lane in lanes for u, v in pairs]


def test_one_secret_for_everything_still_repeats_nothing() -> None:
    """The worst of secrets, the same for all seeds and all pairs in all rounds: still no two streams, of whichever
    round, lane, pair or site, share a block of 16 bytes.

    Stopped by label, lane and names in ``pairwise_mask_key`` and ``self_mask_key``, and the context in ``_derive``.
    """
    first = StoppedRound(4)
    contexts = [
        StoppedRound(4, **{"roster": first.roster, **options}).parameters
        for options in ({}, {"round_number": 2}, {"run": "run again"}, {"run": "run again", "round_number": 2})
    ]
    keys = [key for parameters in contexts for key in derived(parameters, b"one secret".ljust(32))]
    assert len(set(keys)) == len(keys) == 4 * len(masked(first.parameters)) * (4 + 6)
    assert set(blocks(keys).values()) == {1}


def test_no_block_repeats_along_a_long_lane() -> None:
    """A lane of 2 MiB, masked in parts: under one mask no block of 16 bytes occurs twice.

    Stopped by the counter of ``Keystream``, which goes on from part to part in ``apply_masks``.
    """
    parameters = StoppedRound(3).parameters
    words = np.zeros(1 << 18, "<u8")
    apply_masks(words, [(self_mask_key(parameters, bytes(32), lane="update", site=SITES[0]), 1)])
    assert len(np.unique(words.view("V16"))) == len(words) // 2


def test_no_channel_key_seals_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nonce of sealed shares is constant, so each channel key seals one message in all rounds, and is no mask key.

    Stopped by sender, recipient and context in ``seal_shares``, and by fresh channel keys in ``Participant.start``.
    """
    sealed: list[tuple[bytes, bytes]] = []
    real = agreement.ChaCha20Poly1305

    class Spy:
        def __init__(self, key: bytes) -> None:
            self._key, self._cipher = key, real(key)
            self.decrypt = self._cipher.decrypt

        def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
            sealed.append((self._key, nonce))
            return self._cipher.encrypt(nonce, data, associated)

    monkeypatch.setattr(agreement, "ChaCha20Poly1305", Spy)
    recorder = Recorder(monkeypatch)
    rounds = whole_rounds(recorder)
    assert len(sealed) == len(set(sealed)) == (len(rounds)) * 5 * 4
    assert not {key for key, _ in sealed} & set(recorder.by_key())
    again = len(sealed)
    for options in ({}, {"round_number": 2}):
        StoppedRound(4, **options).until(ShareDelivery)
    assert len(sealed) == len(set(sealed)) == again + 2 * 4 * 3


def test_one_input_under_one_set_of_masks() -> None:
    """Neither its own program nor the coordinator gets a site to mask a second input in one round.

    Stopped by ``Participant.submit`` and the transition table.
    """
    stopped = StoppedRound(4)
    site, other = stopped.sites[:2]
    with pytest.raises(LocalProtocolError):
        stopped.participants[site].submit(stopped.inputs[other])
    messages = stopped.until(ShareDelivery)
    (masked,) = stopped.answers(site, messages[site])
    assert isinstance(masked, MaskedInput)
    with pytest.raises(LocalProtocolError):
        stopped.participants[site].submit(stopped.inputs[other])
    with pytest.raises(UnexpectedMessage):
        stopped.answers(site, messages[site])
    with pytest.raises(LocalProtocolError):
        stopped.participants[site].submit(stopped.inputs[other])
