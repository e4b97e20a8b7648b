"""Writes the known-answer vectors from the reference implementation: ``cd tests && python -m vectors.generate``.

Nothing here imports ``secureagg``: a vector says what docs/protocol.md means, not what the implementation does.
"""

import json
import math
import sys
from collections.abc import Container, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from reference import homomorphic_reference as slots
from reference import protocol_reference as plain

HERE = Path(__file__).parent / "v1"
WIDTHS = (8, 9, 13, 16, 20, 24, 31, 32, 33, 47, 63, 64)
Frames = list[bytes]


def as_json(value: Any) -> Any:
    """``value`` with bytes in hexadecimal and tuples as lists."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def files() -> dict[str, str]:
    """File name -> its whole text."""
    three, four, sparse = small_round(), dropout_round(), sparse_round()
    contents = {
        "roster": roster(),
        "context": contexts(),
        "keys": keys(),
        "shares": shares(),
        "commitments": commitments(),
        "masks": masks(),
        "packing": packing(),
        "encoding": encodings(),
        "round": whole_round(*three),
        "round_dropout": whole_round(*four),
        "round_sparse": whole_round(*sparse),
        "hostile": hostile(three),
        "hostile_sparse": hostile_sparse(sparse),
        "homomorphic": homomorphic(),
    }
    return {f"{name}.json": json.dumps(as_json(item), indent=1) + "\n" for name, item in contents.items()}


def write(directory: Path = HERE) -> None:
    """Write every file into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


# --- roster, context ---


def founders(n: int) -> dict[str, dict[str, bytes]]:
    """The first ``n`` sites of the consortium of all vectors: name -> seed, keys and card signature."""
    sites = {}
    for name in ("st-anna", "uni-b", "clinic.7", "north_east", "a", "z" * 64, "b", "m-2")[:n]:
        entropy = plain.counting_entropy(f"site {name}".encode())
        seed, transport_key = entropy(32), entropy(32)
        sites[name] = {
            "identity_seed": seed,
            "signing_key": plain.ed25519_public(seed),
            "transport_key": transport_key,
            "card_signature": plain.card_signature(seed, name, transport_key),
        }
    return sites


def members(n: int) -> tuple[plain.Member, ...]:
    """The roster entries of the first ``n`` sites."""
    return tuple(plain.Member(name, site["signing_key"], site["transport_key"]) for name, site in founders(n).items())


def roster() -> dict[str, Any]:
    """Cards and roster digests; cards to refuse."""
    sites = founders(8)
    first, second = (dict(name=name, **sites[name]) for name in ("st-anna", "uni-b"))
    refused = {
        "transport key of another site": ({**first, "transport_key": second["transport_key"]}, "authentication-failed"),
        "name of another site": ({**first, "name": "uni-b"}, "authentication-failed"),
        "signature of another site": ({**first, "card_signature": second["card_signature"]}, "authentication-failed"),
        "short transport key": ({**first, "transport_key": first["transport_key"][:31]}, "parameter"),
        "name with a capital": ({**first, "name": "St-Anna"}, "parameter"),
    }
    return {
        "cards": [{"name": name, **site} for name, site in sites.items()],
        "digests": [{"first": n, "digest": plain.roster_digest(members(n))} for n in (3, 4, 6, 8)],
        "refused": [{"why": why, "card": card, "code": code} for why, (card, code) in refused.items()],
    }


def spec_of(n: int, **changes: Any) -> plain.Round:
    """A round of the first ``n`` sites under the default thresholds, but for ``changes``."""
    t = 2 * n // 3 + 1
    c = min(2 * t - n - 1, t - 2)
    options = {
        "consortium": "consortium",
        "run": "run",
        "number": 1,
        "members": members(n),
        "cohort": tuple(sorted(founders(n))),
        "own_lanes": (plain.Lane("update", 4, plain.FixedPoint(1.0)),),
        "threshold": t,
        "max_corrupt": c,
        "minimum_survivors": max(t, c + 2),
        "model_digest": sha256(b"model").digest(),
    }
    return plain.Round(**{**options, **changes})


def lane_json(lane: plain.Lane) -> dict[str, Any]:
    """A lane, as the files have it."""
    match lane.encoding:
        case plain.FixedPoint(value_range, value_bits, clip):
            encoding = {"kind": "fixed-point", "value_range": value_range, "value_bits": value_bits, "clip": clip}
        case plain.Counts(maximum):
            encoding = {"kind": "counts", "maximum": maximum}
    return {"name": lane.name, "length": lane.length, "weighted": lane.weighted, "encoding": encoding}


def spec_json(spec: plain.Round) -> dict[str, Any]:
    """A round's parameters, as the files have them, and what is derived from them."""
    return {
        "consortium": spec.consortium,
        "run": spec.run,
        "round_number": spec.number,
        "roster": len(spec.members),
        "cohort": spec.cohort,
        "threshold": spec.threshold,
        "max_corrupt": spec.max_corrupt,
        "minimum_survivors": spec.minimum_survivors,
        "max_weight": spec.max_weight,
        "model_digest": spec.model_digest,
        "lanes": [lane_json(lane) for lane in spec.own_lanes],
        "ring_bits": {lane.name: spec.bits(lane) for lane in spec.lanes},
        "parameters": spec.parameters,
        "context": spec.context,
        **({} if spec.neighbours is None else {"neighbours": spec.neighbours, "max_dropouts": spec.max_dropouts}),
        **({} if spec.release_to is None else {"release_to": spec.release_to}),
    }


def contexts() -> list[dict[str, Any]]:
    """Rounds, their ring widths, parameter digests and contexts."""
    wide = (
        plain.Lane("histogram", 300, plain.Counts(1_000_000)),
        plain.Lane("update", 1 << 20, plain.FixedPoint(0.25, 16, clip=True), weighted=True),
        plain.Lane("after", 1, plain.FixedPoint(1e-3, 32)),
        plain.Lane("scaled", 2, plain.Counts(7), weighted=True),
    )
    return [
        spec_json(spec)
        for spec in (
            spec_of(3),
            spec_of(3, number=2),
            spec_of(3, members=members(6)),
            spec_of(3, consortium="Verbund Süd", run="2"),
            spec_of(3, consortium="Verbund", run="Süd2"),
            spec_of(4, max_weight=10),
            spec_of(4, number=2**63 - 1, max_weight=10**6, own_lanes=wide),
            spec_of(6, members=members(6), own_lanes=wide, max_weight=1, minimum_survivors=6, max_corrupt=0),
        )
    ]


# --- keys, shares, commitments ---


def keys() -> dict[str, Any]:
    """X25519, every derived key, sealed shares."""
    entropy = plain.counting_entropy(b"keys")
    secrets = [entropy(32), entropy(32), bytes(32), b"\xff" * 32]
    roster_digest, context = entropy(32), entropy(32)
    seed = entropy(32)
    agreements = [
        {
            "secret": mine,
            "public": plain.x25519_public(mine),
            "peer_public": plain.x25519_public(peer),
            "shared": plain.x25519(mine, plain.x25519_public(peer)),
        }
        for mine, peer in zip(secrets, secrets[1:] + secrets[:1], strict=True)
    ]
    shared = agreements[0]["shared"]
    derived = [
        {
            "purpose": purpose,
            "secret": secret,
            "names": names,
            "key": plain.derive(roster_digest, context, secret, purpose, *names),
        }
        for purpose, secret, names in (
            ("pairwise-mask", shared, ["update", "a", "b"]),
            ("pairwise-mask", shared, ["update/clipped", "a", "b"]),
            ("pairwise-mask", shared, ["update", "a", "c"]),
            ("self-mask", seed, ["update", "a"]),
            ("self-mask", seed, ["canary", "b"]),
            ("channel", shared, ["a", "b"]),
            ("channel", shared, ["b", "a"]),
        )
    ]
    plaintext = entropy(66)
    sealed = [
        {
            "secret": shared,
            "sender": sender,
            "recipient": recipient,
            "shares": plaintext,
            "sealed": plain.seal(roster_digest, context, shared, plaintext, sender, recipient),
        }
        for sender, recipient in (("a", "b"), ("b", "a"))
    ]
    low_order = [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")]
    return {
        "x25519": agreements,
        "low_order": low_order,
        "roster": roster_digest,
        "context": context,
        "derived": derived,
        "sealed": sealed,
    }


def shares() -> dict[str, Any]:
    """Shamir shares with the entropy that they were drawn from, subsets that give the secret, and values to refuse."""
    dealt = []
    cases = (
        (bytes(32), 2, [1, 2, 3], [[1, 2], [2, 3]]),
        (b"\xff" * 32, 3, [1, 3, 4, 6], [[1, 3, 4], [1, 4, 6]]),
        (sha256(b"secret").digest(), 5, [1, 2, 3, 5, 999, 1000], [[1, 2, 3, 5, 999], [2, 3, 5, 999, 1000]]),
    )
    for secret, threshold, positions, subsets in cases:
        entropy = plain.counting_entropy(b"shares")
        draws = [entropy(48) for _ in range(threshold - 1)]
        replay = iter(draws)
        given = plain.shamir_share(secret, threshold, positions, lambda _, replay=replay: next(replay))
        assert all(plain.shamir_reconstruct({at: given[at] for at in subset}) == secret for subset in subsets)
        dealt.append(
            {
                "secret": secret,
                "threshold": threshold,
                "entropy": draws,
                "shares": {str(at): share for at, share in given.items()},
                "subsets": subsets,
            }
        )
    field_end = plain.PRIME.to_bytes(33, "little")
    return {
        "prime": plain.PRIME.to_bytes(33, "little"),
        "dealt": dealt,
        "accepted": [bytes(33), (plain.PRIME - 1).to_bytes(33, "little")],
        "refused": [field_end, b"\xff" * 33, bytes(32), bytes(34)],
        # The secret of these would be 2^256: a field element, but no 32 bytes.
        "no_secret": {"shares": {str(at): (2**256).to_bytes(33, "little") for at in (1, 2)}},
    }


def commitments() -> dict[str, Any]:
    """Commitments to a seed and to a holder's shares."""
    entropy = plain.counting_entropy(b"commitments")
    context, seed, mask_key_share, seed_share = entropy(32), entropy(32), entropy(33), entropy(33)
    return {
        "context": context,
        "seeds": [{"site": "a", "seed": seed, "commitment": plain.seed_commitment(context, "a", seed)}],
        "shares": [
            {
                "owner": owner,
                "holder": holder,
                "mask_key_share": mask_key_share,
                "self_seed_share": seed_share,
                "commitments": plain.share_commitments(context, owner, holder, mask_key_share, seed_share),
            }
            for owner, holder in (("a", "b"), ("b", "a"), ("a", "a"))
        ],
    }


# --- the homomorphic backend, without what SEAL draws ---


def homomorphic() -> dict[str, Any]:
    """Contexts, secrets and digests of homomorphic rounds; inputs as slots, before and under masks, and their sum."""
    own_lanes = (
        plain.Lane("histogram", 7, plain.Counts(100)),
        plain.Lane("large", 2, plain.Counts(2**50)),  # wider than a slot
        plain.Lane("update", 5, plain.FixedPoint(1.0), weighted=True),
    )
    spec = spec_of(4, max_weight=10, own_lanes=own_lanes, release_to="sites")
    entropy = plain.counting_entropy(b"homomorphic")
    secret, masks = entropy(32), [(entropy(32), 1), (entropy(32), -1)]
    end = sum(place.slots for place in slots.layout(spec))
    inputs, totals = [], [0] * end
    for number, name in enumerate(spec.cohort):
        values = {
            "histogram": [number * 20 + at for at in range(7)],
            "large": [2**50, number],
            "update": [(-1) ** at * (number + 1) / 4 for at in range(5)],
        }
        elements = plain.encode_input(spec, values, 10 - number, entropy)
        bare = slots.slots_of(spec, elements)
        inputs.append(
            {
                "site": name,
                "elements": elements,
                "slots": bare[:end],
                "masked": slots.add_masks(spec, bare, masks)[:end],
                "secret_commitment": slots.secret_commitment(spec.context, name, secret),
            }
        )
        totals = [total + slot for total, slot in zip(totals, bare, strict=False)]
    opened = slots.totals_of(spec, totals, 4)
    key = slots.digest_key(spec.roster, spec.context, secret)
    sizes = (3, 4, 31, 32, 100, 340, 341, 1000)
    return {
        "rounds": [spec_json(replace(spec, release_to=whom)) for whom in ("sites", "coordinator")],
        "slot_bits": [{"cohort_size": n, "bits": slots.slot_bits(n)} for n in sizes],
        "secret": secret,
        "key_seed": slots.key_seed(spec.roster, spec.context, secret),
        "digest_key": key,
        "masks": [{"key": mask, "sign": sign} for mask, sign in masks],
        "inputs": inputs,
        "sum": totals,
        "totals": opened,
        "aggregate_digest": slots.aggregate_digest(spec, key, opened),
    }


# --- masks, packing, encoding ---


def masks() -> dict[str, Any]:
    """First bytes of keystreams, as bytes and as words; masks over a few words."""
    entropy = plain.counting_entropy(b"masks")
    streams = []
    for key in (bytes(32), entropy(32)):
        words = {str(bits): plain.mask(key, 64 * 8 // bits // 4, bits) for bits in (8, 16, 32, 64)}
        stream = plain.keystream(key, plain.STRETCH_BYTES + 32)
        streams.append({"key": key, "first_bytes": stream[:64], "over_a_stretch": stream[-64:], "words": words})
    masked = []
    for bits in (8, 12, 16, 20, 32, 40, 64):
        values = [0, 1, 2**bits - 1, *(int.from_bytes(entropy(8), "little") % 2**bits for _ in range(2))]
        key_signs = [(entropy(32), 1), (entropy(32), -1)]
        result = values
        for key, sign in key_signs:
            result = plain.add_mask(result, sign, key, bits)
        named = [{"key": key, "sign": sign} for key, sign in key_signs]
        masked.append({"word_bits": bits, "values": values, "masks": named, "masked": result})
    return {"keystreams": streams, "masked": masked}


def packing() -> dict[str, Any]:
    """Words and their packed bytes; bytes to refuse; ring elements and the words that have them for digits."""
    packed = []
    for bits in WIDTHS:
        for length in (1, 5, 17):
            entropy = plain.counting_entropy(f"packing {bits} {length}".encode())
            values = [int.from_bytes(entropy(8), "little") % 2**bits for _ in range(length)]
            values[-1] = 2**bits - 1
            packed.append({"word_bits": bits, "words": values, "packed": plain.pack(values, bits)})
    refused = [
        {"word_bits": 9, "length": 1, "packed": b"\x00\x02"},
        {"word_bits": 20, "length": 3, "packed": bytes(7) + b"\x80"},
        {"word_bits": 20, "length": 3, "packed": bytes(7)},
        {"word_bits": 16, "length": 2, "packed": bytes(5)},
    ]
    joined = []
    for bits in WIDTHS:
        for signed, length in ((True, 1), (True, 9), (False, 8)):
            entropy = plain.counting_entropy(f"joining {bits} {signed} {length}".encode())
            elements = [int.from_bytes(entropy(8), "little") % 2**bits for _ in range(length)]
            elements[0] = 2**bits - 1
            words = plain.join(elements, bits, signed)
            integers = [plain.centred(element, bits, signed) for element in elements]
            assert plain.split(words, length, bits, signed) == integers
            joined.append({"ring_bits": bits, "signed": signed, "integers": integers, "words": words})
    return {"packed": packed, "refused": refused, "joined": joined}


def encodings() -> list[dict[str, Any]]:
    """Fixed-point values, coins and the ring elements that they become, times a weight."""
    results = []
    for value_range, value_bits, clip, weight in (
        (1.0, 16, False, None),
        (1.0, 2, False, None),
        (0.1, 16, False, 7),
        (3.0, 32, False, 1000),
        (1.0, 16, True, None),
        (0.3, 24, True, 5),
    ):
        key = sha256(f"{value_range} {value_bits} {clip} {weight}".encode()).digest()
        values = [part * value_range for part in (0.0, 1.0, -1.0, 0.5, -0.5, 1 / 3, -0.7, 1e-9, -1e-9, 0.9999999, 0.1)]
        values += [1.5 * value_range, -100.0, value_range * (1 + 2**-50)] if clip else []
        values += close_calls(len(values), value_range, value_bits, key) if value_bits == 32 else []
        lane = plain.Lane("x", len(values), plain.FixedPoint(value_range, value_bits, clip), weight is not None)
        spec = spec_of(3, own_lanes=(lane,), max_weight=None if weight is None else 1000)
        encoded = plain.encode_input(spec, {"x": values}, weight, lambda _, key=key: key)
        results.append(
            {
                "lane": lane_json(lane),
                "cohort": 3,
                "max_weight": spec.max_weight,
                "weight": weight,
                "values": values,
                "coins_key": key,
                "ring_bits": {lane.name: spec.bits(lane) for lane in spec.lanes},
                "encoded": encoded,
            }
        )
    return results


def close_calls(first: int, value_range: float, value_bits: int, key: bytes) -> list[float]:
    """Values, at places from ``first``, that x * levels / range rounds otherwise than x * (levels / range) does."""
    coins = plain.keystream(key, 4 * (first + 4))
    found = []
    for place in range(first, first + 4):
        coin = int.from_bytes(coins[4 * place : 4 * place + 4], "little")
        found.append(next(close_call(value_range, 2 ** (value_bits - 1) - 1, coin)))
    return found


def close_call(value_range: float, levels: int, coin: int) -> Iterator[float]:
    """Floats whose fraction is as near to the coin's as two orders of the same operations are to each other."""
    for whole in range(1_000_003, levels, 1_000_003):
        value = (whole + coin / 2**32) / levels * value_range
        for near in (value, math.nextafter(value, 0), math.nextafter(value, math.inf)):
            if rounds_up(near * (levels / value_range), coin) != rounds_up(near * levels / value_range, coin):
                yield near


def rounds_up(scaled: float, coin: int) -> bool:
    """Whether the coin rounds a scaled value up."""
    return coin < (scaled - math.floor(scaled)) * 2.0**32


# --- whole rounds ---


class Recorded:
    """A stream of entropy that keeps what was drawn."""

    def __init__(self, seed: str) -> None:
        self.draws: list[bytes] = []
        self._entropy = plain.counting_entropy(seed.encode())

    def __call__(self, length: int) -> bytes:
        """The next bytes."""
        self.draws.append(self._entropy(length))
        return self.draws[-1]


# In a run of this name the first site and another one have not drawn each other, and a holder of it did not draw it.
SPARSE_RUN = "eight sites, 39"

Setting = tuple[plain.Round, dict[str, plain.SiteInput], dict[str, str]]


def site_inputs(spec: plain.Round, values: dict[str, dict[str, list]], weights: dict[str, int] | None) -> dict:
    """What each site of the cohort brings."""
    return {
        name: plain.SiteInput(
            identity_seed=founders(8)[name]["identity_seed"],
            entropy=Recorded(f"{spec.run} {name}"),
            coins=Recorded(f"{spec.run} {name} coins"),
            values=values[name],
            weight=None if weights is None else weights[name],
        )
        for name in spec.cohort
    }


def small_round() -> Setting:
    """Three sites, two lanes, weights, nobody drops out."""
    lanes = (
        plain.Lane("update", 5, plain.FixedPoint(1.0), weighted=True),
        plain.Lane("histogram", 3, plain.Counts(100)),
    )
    spec = spec_of(3, run="three sites", own_lanes=lanes, max_weight=10)
    values = {
        name: {"update": [-1.0, -0.3 * at, 0.0, 0.25 / at, 1.0], "histogram": [at, 0, 100]}
        for at, name in enumerate(spec.cohort, start=1)
    }
    weights = {name: 3 * at for at, name in enumerate(spec.cohort, start=1)}
    return spec, site_inputs(spec, values, weights), {}


def dropout_round() -> Setting:
    """Four sites, a lane that clips, no weights; one site shares its keys and sends no input."""
    spec = spec_of(4, run="four sites", number=7, own_lanes=(plain.Lane("update", 6, plain.FixedPoint(0.5, 8, True)),))
    values = {
        name: {"update": [0.5, -0.7, 0.01 * at, 1.0, -0.2 / at, 0.0]} for at, name in enumerate(spec.cohort, start=1)
    }
    return spec, site_inputs(spec, values, None), {spec.cohort[1]: "CollectingMaskedInputs"}


def sparse_round() -> Setting:
    """Eight sites on the sparse graph, of which one shares its keys and sends no input and one reveals no shares."""
    n, c, d = 8, 1, 2
    planned = plain.plan(n, c, d)
    assert planned is not None
    k, t, h = planned
    lanes = (
        plain.Lane("update", 3, plain.FixedPoint(1.0), weighted=True),
        plain.Lane("histogram", 2, plain.Counts(100)),
    )
    spec = spec_of(
        n,
        run=SPARSE_RUN,
        own_lanes=lanes,
        max_weight=10,
        threshold=t,
        max_corrupt=c,
        minimum_survivors=h,
        neighbours=k,
        max_dropouts=d,
    )
    values = {
        name: {"update": [-1.0, 0.25 / at, 0.1 * at], "histogram": [at, 100]}
        for at, name in enumerate(spec.cohort, start=1)
    }
    weights = {name: at for at, name in enumerate(spec.cohort, start=1)}
    silent_from = {spec.cohort[2]: "CollectingMaskedInputs", spec.cohort[5]: "Unmasking"}
    return spec, site_inputs(spec, values, weights), silent_from


def whole_round(spec: plain.Round, inputs: dict[str, plain.SiteInput], silent_from: dict[str, str]) -> dict[str, Any]:
    """All that goes into a round and all that comes out of it."""
    transcript = plain.run_round(spec, inputs, silent_from)
    return {
        "parameters": spec_json(spec),
        "sites": {
            name: {
                "entropy": item.entropy.draws,
                "coins": item.coins.draws,
                "values": item.values,
                "weight": item.weight,
                "encoded": transcript.encoded[name],
            }
            for name, item in inputs.items()
        },
        "silent_from": silent_from,
        "phases": [
            {"phase": phase, "from_sites": transcript.from_sites[phase], "to_sites": transcript.to_sites[phase]}
            for phase in plain.PHASES
        ],
        "survivors": transcript.survivors,
        "totals": transcript.totals,
        "aggregate_digest": transcript.digest,
    }


# --- hostile messages ---


class Honest(plain.Conversation):
    """The honest messages of a round, as lists of fields, for somebody to change."""

    def __init__(self, spec: plain.Round, inputs: dict[str, plain.SiteInput], silent_from: dict[str, str]) -> None:
        # fresh streams: those of ``inputs`` may have been drawn from already
        fresh = {
            name: replace(item, entropy=Recorded(f"{spec.run} {name}"), coins=Recorded(f"{spec.run} {name} coins"))
            for name, item in inputs.items()
        }
        super().__init__(spec, fresh, silent_from)
        self.names = spec.cohort
        self.seeds = {name: item.identity_seed for name, item in inputs.items()}

    def signed(self, message: list, **fields: Any) -> list:
        """``message`` with some fields changed (f4=..., by place) and signed again by its sender."""
        changed = list(message)
        for place, value in fields.items():
            changed[int(place[1:])] = value
        return plain.signed(self.seeds[message[2]], changed)


SiteCase = tuple[str, str, Frames, str]
CoordinatorCase = tuple[str, str, list[str], str, Frames, str]


def flipped(raw: bytes, at: int = 0) -> bytes:
    """``raw`` with one bit changed."""
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def bytes_of(message: list) -> Frames:
    """The one frame of a message."""
    return [plain.messagepack(message)]


def hostile(setting: Setting) -> dict[str, Any]:
    """Bytes that a machine must refuse in the round of three, and the code of the error."""
    honest = Honest(*setting)
    to_sites = [*hostile_cohort_keys(honest), *hostile_deliveries(honest), *hostile_lists(honest)]
    to_coordinator = hostile_to_coordinator(honest)
    other_to_sites, other_to_coordinator = messages_of_the_sparse_graph(honest)
    return hostile_file("round.json", honest, to_sites + other_to_sites, to_coordinator + other_to_coordinator)


def hostile_sparse(setting: Setting) -> dict[str, Any]:
    """The same for the round on the sparse graph."""
    honest = Honest(*setting)
    to_sites = [
        *hostile_sparse_keys(honest),
        *hostile_sparse_deliveries(honest),
        *hostile_statements(honest),
        *hostile_sparse_receipts(honest),
    ]
    to_coordinator = hostile_sparse_to_coordinator(honest)
    other_to_sites, other_to_coordinator = messages_of_the_complete_graph(honest)
    return hostile_file("round_sparse.json", honest, to_sites + other_to_sites, to_coordinator + other_to_coordinator)


def hostile_file(
    name_of_round: str, honest: Honest, to_sites: list[SiteCase], to_coordinator: list[CoordinatorCase]
) -> dict[str, Any]:
    """The cases, as the files have them; those of a site are for the first one."""
    return {
        "round": name_of_round,
        "to_sites": [
            {"name": name, "machine": honest.names[0], "phase": phase, "frames": frames, "code": code}
            for name, phase, frames, code in to_sites
        ],
        "to_coordinator": [
            {
                "name": name,
                "machine": "coordinator",
                "phase": phase,
                "received_from": received,
                "sender": sender,
                "frames": frames,
                "code": code,
            }
            for name, phase, received, sender, frames, code in to_coordinator
        ],
    }


def hostile_cohort_keys(honest: Honest) -> list[SiteCase]:
    """Advertisements that the first site must not believe."""
    first, second, third = (honest.advertisements[name] for name in honest.names)
    shown = honest.keys[honest.names[0]]
    frame = plain.messagepack(shown)
    other_key = plain.x25519_public(sha256(b"another key").digest())
    phase, malformed, failed = "AwaitingCohortKeys", "malformed-message", "authentication-failed"

    def keys(*advertisements: list) -> Frames:
        return bytes_of([*shown[:2], list(advertisements)])

    nested_context = honest.signed(third, f1=sha256(b"another context").digest())
    stranger = founders(4)["north_east"]["identity_seed"]
    fourth = plain.signed(stranger, [third[0], third[1], "north_east", b"", other_key, plain.x25519_public(bytes(32))])
    return [
        ("trailing byte", phase, [frame + b"\x00"], malformed),
        ("truncated by a byte", phase, [frame[:-1]], malformed),
        ("array in a longer form", phase, [b"\xdc\x00\x03" + frame[1:]], malformed),
        ("tag in a longer form", phase, [frame[:1] + b"\xd9\x0b" + frame[2:]], malformed),
        ("tag as bytes", phase, [frame[:1] + b"\xc4\x0b" + frame[2:]], malformed),
        ("context as text", phase, bytes_of([shown[0], "c" * 32, shown[2]]), malformed),
        ("field too many", phase, bytes_of([*shown, 0]), malformed),
        ("field missing", phase, bytes_of(shown[:2]), malformed),
        ("map instead of array", phase, [b"\x80"], malformed),
        ("unknown tag", phase, bytes_of(["cohort-key", *shown[1:]]), malformed),
        ("empty frame", phase, [b""], malformed),
        ("second frame", phase, [frame, b""], malformed),
        ("message of a site", phase, bytes_of(first), malformed),
        (
            "wrong context",
            phase,
            bytes_of([shown[0], flipped(shown[1]), shown[2]]),
            "unexpected-message",
        ),
        ("message of a later phase", phase, bytes_of(honest.survivors[honest.names[0]]), "unexpected-message"),
        ("too few advertisements", phase, keys(first, second), "threshold-not-met"),
        ("advertisement listed twice", phase, keys(first, second, third, third), malformed),
        ("own advertisement with another key", phase, keys(honest.signed(first, f4=other_key), second, third), failed),
        ("substituted key", phase, keys(first, second, [*third[:4], other_key, third[5]]), failed),
        ("advertisement signed for another context", phase, keys(first, second, nested_context), failed),
        ("duplicate key of a peer", phase, keys(first, second, honest.signed(third, f4=second[4])), failed),
        ("one key in both roles", phase, keys(first, second, honest.signed(third, f4=third[5])), failed),
        ("mask key of low order", phase, keys(first, second, honest.signed(third, f4=bytes(32))), failed),
        ("channel key of low order", phase, keys(first, second, honest.signed(third, f5=b"\x01" + bytes(31))), failed),
        ("short key", phase, keys(first, second, honest.signed(third, f4=third[4][:31])), failed),
        ("site outside the cohort", phase, keys(first, fourth, second, third), "unexpected-message"),
    ]


def hostile_deliveries(honest: Honest) -> list[SiteCase]:
    """Shares that the first site must not take."""
    me, second, third = honest.names
    phase, malformed, failed = "AwaitingShares", "malformed-message", "authentication-failed"
    tag, context, committed, sealed = honest.deliveries[me]

    def delivery(commitments: list, ciphertexts: list) -> Frames:
        return bytes_of([tag, context, commitments, ciphertexts])

    def sealed_by_third(shares_of_me: bytes) -> list:
        """The ciphertext of other shares, which the third site itself made."""
        site, spec = honest.sites[third], honest.spec
        secret = plain.x25519(site.channel_secret, site.channel_keys[me])
        return [sealed[0], [third, plain.seal(spec.roster, context, secret, shares_of_me, third, me)]]

    # What the third site sealed for the second one, given to the first.
    for_second = dict(honest.shares[third][6])[second]
    share = honest.sites[me].held[third]
    wrong = (int.from_bytes(share[1], "little") + 1) % plain.PRIME
    swapped = [[second, sealed[1][1]], [third, sealed[0][1]]]
    beyond = share[0] + plain.PRIME.to_bytes(33, "little")
    return [
        ("tampered ciphertext", phase, delivery(committed, [sealed[0], [third, flipped(sealed[1][1], 5)]]), failed),
        ("tampered tag", phase, delivery(committed, [sealed[0], [third, flipped(sealed[1][1], 81)]]), failed),
        ("short ciphertext", phase, delivery(committed, [sealed[0], [third, b"short"]]), failed),
        ("swapped ciphertexts", phase, delivery(committed, swapped), failed),
        ("ciphertext for another recipient", phase, delivery(committed, [sealed[0], [third, for_second]]), failed),
        ("swapped commitments", phase, delivery([[second, committed[1][1]], [third, committed[0][1]]], sealed), failed),
        (
            "wrong share dealt",
            phase,
            delivery(committed, sealed_by_third(share[0] + wrong.to_bytes(33, "little"))),
            failed,
        ),
        ("share not below the prime", phase, delivery(committed, sealed_by_third(beyond)), malformed),
        ("shares a byte short", phase, delivery(committed, sealed_by_third(b"".join(share)[:-1])), malformed),
        ("too few sharers", phase, delivery(committed[:1], sealed[:1]), "threshold-not-met"),
        ("commitment missing", phase, delivery(committed[:1], sealed), malformed),
        ("names out of order", phase, delivery(committed, sealed[::-1]), malformed),
        ("name repeated", phase, delivery(committed, [sealed[0], *sealed]), malformed),
        (
            "shares of a site that advertised nothing",
            phase,
            delivery([[second, committed[0][1]], ["uni-c", bytes(64)]], [sealed[0], ["uni-c", bytes(82)]]),
            "unexpected-message",
        ),
        ("second cohort keys", phase, bytes_of(honest.keys[me]), "unexpected-message"),
    ]


def hostile_lists(honest: Honest) -> list[SiteCase]:
    """Survivor lists, unmask requests and receipts that the first site must refuse."""
    me, _, third = honest.names
    context = honest.spec.context
    survivor_list, unmask_request, receipt = honest.survivors[me], honest.requests[me], honest.receipts[me]
    listed, signatures = survivor_list[2], unmask_request[2]
    inconsistent, failed, malformed = "inconsistent-survivors", "authentication-failed", "malformed-message"

    def survivors(*pairs: list) -> Frames:
        return bytes_of(["survivor-list", context, list(pairs)])

    def request(*pairs: list) -> Frames:
        return bytes_of(["unmask-request", context, list(pairs)])

    def with_canary(encoded: bytes) -> Frames:
        """The receipt with other bytes in place of the one of the canary; the digest behind it has 2 + 32."""
        raw = plain.messagepack(receipt)
        return [raw[:-35] + encoded + raw[-34:]]

    other_list = ["survivor-list", context, [listed[0], listed[1], [third, flipped(listed[2][1])]]]
    on_other_list = plain.ed25519(honest.seeds[third], "survivors", context, plain.messagepack(other_list))
    at_list, at_request, at_receipt = "AwaitingSurvivors", "AwaitingUnmaskRequest", "AwaitingReceipt"
    other_context = sha256(b"another context").digest()
    elsewhere = plain.ed25519(honest.seeds[third], "survivors", other_context, plain.messagepack(survivor_list))
    return [
        ("another input in the own name", at_list, survivors([me, flipped(listed[0][1])], *listed[1:]), inconsistent),
        ("survivor that shared nothing", at_list, survivors(*listed, ["zz", bytes(32)]), inconsistent),
        ("too few survivors", at_list, survivors(*listed[:2]), "threshold-not-met"),
        ("survivors out of order", at_list, survivors(*listed[::-1]), malformed),
        ("short input digest", at_list, survivors(*listed[:2], [third, listed[2][1][:31]]), malformed),
        ("list of another round", at_list, bytes_of(["survivor-list", other_context, listed]), "unexpected-message"),
        ("second survivor list", at_request, bytes_of(other_list), "unexpected-message"),
        ("the same survivor list again", at_request, bytes_of(survivor_list), "unexpected-message"),
        ("too few signatures", at_request, request(*signatures[:2]), "threshold-not-met"),
        ("no signatures", at_request, request(), "threshold-not-met"),
        ("signature on another list", at_request, request(*signatures[:2], [third, on_other_list]), failed),
        ("signature in another context", at_request, request(*signatures[:2], [third, elsewhere]), failed),
        ("one signature for two", at_request, request(*signatures[:2], [third, signatures[1][1]]), failed),
        ("signer named twice", at_request, request(*signatures[:2], signatures[1]), malformed),
        ("signer who is no survivor", at_request, request(*signatures, ["zz", bytes(64)]), inconsistent),
        ("second unmask request", at_receipt, bytes_of(unmask_request), "unexpected-message"),
        ("canary of another sum", at_receipt, bytes_of([*receipt[:3], 2, receipt[4]]), inconsistent),
        ("receipt for fewer survivors", at_receipt, bytes_of([*receipt[:2], 2, 2, receipt[4]]), inconsistent),
        ("negative canary", at_receipt, with_canary(b"\xff"), inconsistent),
        ("canary in a longer form", at_receipt, with_canary(b"\xcc\x03"), malformed),
    ]


def hostile_to_coordinator(honest: Honest) -> list[CoordinatorCase]:
    """What the coordinator must refuse of the last site, after it received what the named sites sent in the phase."""
    spec, names = honest.spec, honest.names
    *others, liar = names
    first = names[0]
    advertisement, sharing = honest.advertisements[liar], honest.shares[liar]
    masked, chunks, answer = honest.inputs[liar], honest.chunks[liar], honest.answers[liar]
    malformed, failed, unexpected = "malformed-message", "authentication-failed", "unexpected-message"
    keys, secrets, sums, lists, end = plain.PHASES

    def resized(packed: bytes) -> Frames:
        return [*bytes_of(honest.signed(masked, f4=[sha256(packed).digest()])), packed]

    padded = bytearray(chunks[0])
    padded[8 + 8 - 1] |= 0x80  # behind the canary: bit 63 of the histogram's one word of seven times 9 bits
    seeds = answer[4]
    wrong = ((int.from_bytes(seeds[0][1], "little") + 1) % plain.PRIME).to_bytes(33, "little")
    beyond = plain.PRIME.to_bytes(33, "little")
    both = [[first, honest.sites[liar].held[first][0]]]
    other_list = ["survivor-list", spec.context, honest.survivors[first][2][:2]]
    on_other_list = plain.ed25519(honest.seeds[liar], "survivors", spec.context, plain.messagepack(other_list))
    committed, sealed = sharing[5], sharing[6]

    def advertised(**changes: Any) -> Frames:
        return bytes_of(honest.signed(advertisement, **changes))

    def shared(**changes: Any) -> Frames:
        return bytes_of(honest.signed(sharing, **changes))

    def answered(**changes: Any) -> Frames:
        return bytes_of(honest.signed(answer, **changes))

    raw = plain.messagepack(advertisement)
    a_key = honest.advertisements[first][5]
    other_context = advertised(f1=sha256(b"another context").digest())
    stranger = [*advertisement[:2], "north_east", b"", *advertisement[4:]]
    stranger = plain.signed(founders(4)["north_east"]["identity_seed"], stranger)
    return [
        ("trailing byte", keys, [], liar, [raw + b"\x00"], malformed),
        ("array in a longer form", keys, [], liar, [b"\xdc\x00\x06" + raw[1:]], malformed),
        ("message of the coordinator", keys, [], liar, bytes_of(honest.keys[first]), malformed),
        ("wrong context", keys, [], liar, other_context, unexpected),
        ("sender that the connection is not of", keys, [], first, [raw], failed),
        (
            "signature changed",
            keys,
            [],
            liar,
            bytes_of([*advertisement[:3], flipped(advertisement[3]), *advertisement[4:]]),
            failed,
        ),
        ("key changed after signing", keys, [], liar, bytes_of([*advertisement[:5], a_key]), failed),
        ("key of a peer", keys, others, liar, advertised(f4=a_key), failed),
        ("one key in both roles", keys, [], liar, advertised(f5=advertisement[4]), failed),
        ("key of low order", keys, [], liar, advertised(f4=bytes(32)), failed),
        ("short key", keys, [], liar, advertised(f4=bytes(31)), failed),
        ("second advertisement", keys, [liar], liar, [raw], "duplicate-message"),
        ("site outside the cohort", keys, [], "north_east", bytes_of(stranger), unexpected),
        ("shares before keys", keys, [], liar, bytes_of(sharing), unexpected),
        ("recipient missing", secrets, others, liar, shared(f6=sealed[:1]), malformed),
        ("recipients out of order", secrets, others, liar, shared(f6=sealed[::-1]), malformed),
        ("holder missing", secrets, others, liar, shared(f5=committed[:2]), malformed),
        (
            "short commitment to a share",
            secrets,
            others,
            liar,
            shared(f5=[*committed[:2], [liar, bytes(63)]]),
            malformed,
        ),
        ("short commitment to the seed", secrets, others, liar, shared(f4=bytes(31)), malformed),
        ("masked input a byte short", sums, others, liar, resized(chunks[0][:-1]), malformed),
        ("masked input a byte long", sums, others, liar, resized(chunks[0] + b"\x00"), malformed),
        ("padding bits set", sums, others, liar, resized(bytes(padded)), malformed),
        ("chunk changed", sums, others, liar, [*bytes_of(masked), flipped(chunks[0])], failed),
        ("chunk missing", sums, others, liar, bytes_of(masked), malformed),
        ("chunk too many", sums, others, liar, [*bytes_of(masked), *chunks, b""], malformed),
        ("chunk inside the message", sums, others, liar, [*bytes_of([*masked[:5], chunks]), *chunks], malformed),
        (
            "masked input twice",
            sums,
            [first],
            first,
            [*bytes_of(honest.inputs[first]), *honest.chunks[first]],
            "duplicate-message",
        ),
        (
            "signature on another list",
            lists,
            others,
            liar,
            bytes_of(honest.signed(honest.agreed[liar], f4=on_other_list)),
            failed,
        ),
        ("wrong share", end, others, liar, answered(f4=[[first, wrong], *seeds[1:]]), failed),
        ("share not below the prime", end, others, liar, answered(f4=[[first, beyond], *seeds[1:]]), malformed),
        ("short share", end, others, liar, answered(f4=[[first, seeds[0][1][:32]], *seeds[1:]]), malformed),
        ("share missing", end, others, liar, answered(f4=seeds[1:]), malformed),
        ("both shares of a survivor", end, others, liar, answered(f5=both), malformed),
    ]


# --- hostile messages on the sparse graph ---

OTHER_CONTEXT = sha256(b"another context").digest()


def out_of_place(
    liar: str, to_sites: list[tuple[str, str, list]], to_coordinator: list[tuple[str, str, Frames]]
) -> tuple[list[SiteCase], list[CoordinatorCase]]:
    """Cases of messages that have no place in their phase."""
    code = "unexpected-message"
    return (
        [(name, phase, bytes_of(message), code) for name, phase, message in to_sites],
        [(name, phase, [], liar, frames, code) for name, phase, frames in to_coordinator],
    )


def messages_of_the_sparse_graph(honest: Honest) -> tuple[list[SiteCase], list[CoordinatorCase]]:
    """Messages that have no place in a round on the complete graph."""
    spec, me, liar = honest.spec, honest.names[0], honest.names[-1]
    context, signed = spec.context, honest.sites[liar].sign
    positions = spec.positions(name for name in honest.names if name != liar)
    inclusion, acknowledgement = signed("inclusion", positions), signed("acknowledgement", positions)
    advertisement = signed("sparse-advertisement", *honest.advertisements[liar][4:], positions)
    masked = signed("sparse-input", *honest.inputs[liar][4:], inclusion)
    delivery, receipt = honest.deliveries[me], honest.receipts[me]
    to_sites = [
        ("sparse keys", "AwaitingCohortKeys", ["sparse-keys", context, [advertisement]]),
        ("sparse delivery", "AwaitingShares", ["sparse-delivery", *delivery[1:], [2, 3]]),
        ("sparse survivors", "AwaitingSurvivors", ["sparse-survivors", context, [inclusion]]),
        ("acknowledgement list", "AwaitingUnmaskRequest", ["acknowledgement-list", context, [acknowledgement]]),
        ("sparse receipt", "AwaitingReceipt", ["sparse-receipt", *receipt[1:], 2, 2]),
    ]
    to_coordinator = [
        ("sparse advertisement", "AdvertisingKeys", bytes_of(advertisement)),
        ("sparse input", "CollectingMaskedInputs", [*bytes_of(masked), *honest.chunks[liar]]),
        ("acknowledgement", "CheckingConsistency", bytes_of(acknowledgement)),
    ]
    return out_of_place(liar, to_sites, to_coordinator)


def messages_of_the_complete_graph(honest: Honest) -> tuple[list[SiteCase], list[CoordinatorCase]]:
    """Messages that have no place in a round on the sparse graph."""
    spec, me, liar = honest.spec, honest.names[0], honest.names[-1]
    context, signed = spec.context, honest.sites[liar].sign
    survivors = ["survivor-list", context, [[name, plain.input_digest(honest.inputs[name])] for name in honest.inputs]]
    signature = plain.ed25519(honest.seeds[liar], "survivors", context, plain.messagepack(survivors))
    advertisement = signed("key-advertisement", *honest.advertisements[liar][4:6])
    masked = signed("masked-input", *honest.inputs[liar][4:6])
    delivery, receipt = honest.deliveries[me], honest.receipts[me]
    to_sites = [
        ("cohort keys", "AwaitingCohortKeys", ["cohort-keys", context, [advertisement]]),
        ("share delivery", "AwaitingShares", ["share-delivery", *delivery[1:4]]),
        ("survivor list", "AwaitingSurvivors", survivors),
        ("unmask request", "AwaitingAcknowledgements", ["unmask-request", context, [[liar, signature]]]),
        ("receipt of the complete graph", "AwaitingReceipt", ["round-receipt", *receipt[1:5]]),
    ]
    to_coordinator = [
        ("key advertisement", "AdvertisingKeys", bytes_of(advertisement)),
        ("masked input", "CollectingMaskedInputs", [*bytes_of(masked), *honest.chunks[liar]]),
        ("survivor signature", "CheckingConsistency", bytes_of(signed("survivor-signature", signature))),
    ]
    return out_of_place(liar, to_sites, to_coordinator)


def neighbours_of_the_first(honest: Honest) -> tuple[str, str, list[str], str]:
    """The first site, a site that it has nothing to do with, its holders, and one of these that did not draw it."""
    me = honest.names[0]
    holders = {name: plain.holders_of(honest.spec, item) for name, item in honest.advertisements.items()}
    stranger = next(name for name in honest.names if name != me and name not in holders[me] and me not in holders[name])
    return me, stranger, sorted(holders[me]), next(name for name in sorted(holders[me]) if me not in holders[name])


def hostile_sparse_keys(honest: Honest) -> list[SiteCase]:
    """Advertisements that the first site must not believe on the sparse graph."""
    spec = honest.spec
    me, stranger, holders, no_dealer = neighbours_of_the_first(honest)
    phase, malformed, failed, unexpected = (
        "AwaitingCohortKeys",
        "malformed-message",
        "authentication-failed",
        "unexpected-message",
    )
    shown = {item[2]: item for item in honest.keys[me][2]}
    dealer = next(name for name in shown if name != me and me in plain.holders_of(spec, shown[name]))
    drawn, own = shown[dealer][6], shown[me][6]
    missing = next(at for at in range(1, len(spec.cohort) + 1) if at not in drawn and at != spec.position(dealer))
    others = sorted([*drawn[:1], *drawn[2:], missing])

    def keys(*changed: list, without: Container[str] = ()) -> Frames:
        items = {**shown, **{item[2]: item for item in changed}}
        return bytes_of([*honest.keys[me][:2], [items[name] for name in sorted(items) if name not in without]])

    def drew(positions: list[int]) -> Frames:
        return keys(honest.signed(shown[dealer], f6=positions))

    # The dealer stays a neighbour, though no longer one that this site drew.
    own_others = sorted({*own, spec.position(stranger)} - {spec.position(dealer)})
    outsider = plain.signed(bytes(32), [*shown[dealer][:2], "outsider", b"", *shown[dealer][4:]])
    elsewhere = honest.signed(shown[dealer], f1=OTHER_CONTEXT)
    too_many = sorted([*drawn, missing])
    itself = sorted([*drawn[:1], *drawn[2:], spec.position(dealer)])
    return [
        ("holders changed after signing", phase, keys([*shown[dealer][:6], others]), failed),
        ("own advertisement with another holder", phase, keys([*shown[me][:6], own_others]), failed),
        ("own advertisement missing", phase, keys(without=[me, no_dealer]), "threshold-not-met"),
        ("a holder too few", phase, drew([drawn[0], *drawn[2:]]), malformed),
        ("a holder too many", phase, drew(too_many), malformed),
        ("a holder repeated", phase, drew([drawn[0], drawn[0], *drawn[2:]]), malformed),
        ("holders out of order", phase, drew(drawn[::-1]), malformed),
        ("a site as its own holder", phase, drew(itself), malformed),
        ("a holder before the cohort", phase, drew([0, drawn[0], *drawn[2:]]), malformed),
        ("a holder beyond the cohort", phase, drew([drawn[0], *drawn[2:], len(spec.cohort) + 1]), malformed),
        ("a site that is no neighbour", phase, keys(honest.advertisements[stranger]), unexpected),
        ("a site outside the cohort", phase, keys(outsider), unexpected),
        ("too few holders who advertised", phase, keys(without=holders[spec.threshold - 1 :]), "threshold-not-met"),
        ("an advertisement of another context", phase, keys(elsewhere), failed),
    ]


def hostile_sparse_deliveries(honest: Honest) -> list[SiteCase]:
    """Deliveries that the first site must not take on the sparse graph."""
    spec = honest.spec
    me, stranger, holders, no_dealer = neighbours_of_the_first(honest)
    phase, malformed = "AwaitingShares", "malformed-message"
    tag, context, committed, sealed, sharers = honest.deliveries[me]

    def delivery(positions: list[int], *more: str, among: Container[str] = spec.cohort) -> Frames:
        """With these sharers, with more dealers, and of the true ones those ``among`` some only."""
        fields = [[*field, *([name, bytes(size)] for name in more)] for field, size in ((committed, 64), (sealed, 82))]
        return bytes_of(
            [tag, context, *(sorted(pair for pair in field if pair[0] in among) for field in fields), positions]
        )

    few = holders[: spec.threshold - 1]
    return [
        ("a sharer that is no holder", phase, delivery(sorted([*sharers, spec.position(stranger)])), malformed),
        ("the site among its holders", phase, delivery(sorted([*sharers, spec.position(me)])), malformed),
        ("a sharer beyond the cohort", phase, delivery([*sharers, len(spec.cohort) + 1]), malformed),
        ("a sharer repeated", phase, delivery([sharers[0], *sharers]), malformed),
        ("sharers out of order", phase, delivery(sharers[::-1]), malformed),
        ("too few holders who shared", phase, delivery(spec.positions(few), among=few), "threshold-not-met"),
        ("shares of a site that is no neighbour", phase, delivery(sharers, stranger), "unexpected-message"),
        ("shares of a holder that is no dealer", phase, delivery(sharers, no_dealer), "unexpected-message"),
    ]


def hostile_statements(honest: Honest) -> list[SiteCase]:
    """Inclusions and acknowledgements that the first site must refuse."""
    spec = honest.spec
    me, stranger, _, no_dealer = neighbours_of_the_first(honest)
    malformed, failed, inconsistent = "malformed-message", "authentication-failed", "inconsistent-survivors"
    stated = {name: message[6] for name, message in honest.inputs.items()}
    cases: list[SiteCase] = []
    for phase, what, shown, strangers in (
        (
            "AwaitingSurvivors",
            "inclusion",
            honest.survivors[me],
            {"neighbour": stated[stranger], "dealer": stated[no_dealer]},
        ),
        ("AwaitingAcknowledgements", "acknowledgement", honest.requests[me], {"neighbour": honest.agreed[stranger]}),
    ):
        first, second, *rest = shown[2]
        about_others = honest.signed(first, f4=[at for at in first[4] if at != spec.position(me)])
        outsider = plain.signed(bytes(32), [*first[:2], "outsider", b"", first[4]])
        changed = {
            "not about the site": ([about_others, second, *rest], inconsistent),
            "changed after signing": ([[*first[:4], first[4][:-1]], second, *rest], failed),
            "forged": ([[*first[:3], flipped(first[3]), first[4]], second, *rest], failed),
            "signed by another site": ([[*first[:3], second[3], first[4]], second, *rest], failed),
            "of another context": ([honest.signed(first, f1=OTHER_CONTEXT), second, *rest], failed),
            "repeated": ([first, first, second, *rest], malformed),
            "out of order": ([second, first, *rest], malformed),
            "of a site outside the cohort": (
                sorted([first, second, *rest, outsider], key=lambda item: item[2]),
                inconsistent,
            ),
        }
        for who, statement in strangers.items():
            items = sorted([first, second, *rest, statement], key=lambda item: item[2])
            changed[f"of a site that is no {who}"] = (items, inconsistent)
        cases += [
            (f"{what} {how}", phase, bytes_of([*shown[:2], items]), code) for how, (items, code) in changed.items()
        ]
    request = honest.requests[me]
    few = [*request[:2], request[2][: spec.threshold - 1]]
    return [
        *cases,
        ("too few acknowledgements", "AwaitingAcknowledgements", bytes_of(few), "threshold-not-met"),
        ("no acknowledgements", "AwaitingAcknowledgements", bytes_of([*request[:2], []]), "threshold-not-met"),
        ("other statements", "AwaitingAcknowledgements", bytes_of(honest.survivors[me]), "unexpected-message"),
        ("second acknowledgement list", "AwaitingReceipt", bytes_of(request), "unexpected-message"),
    ]


def hostile_sparse_receipts(honest: Honest) -> list[SiteCase]:
    """Receipts that the first site must refuse on the sparse graph."""
    receipt = honest.receipts[honest.names[0]]
    fewest = honest.spec.minimum_survivors - 1
    changed = {
        "canary of another sum": {3: receipt[3] + 1},
        "receipt for too few survivors": {2: fewest, 3: fewest},
        "receipt of another graph": {5: receipt[5] + 2},
        "receipt of another threshold": {6: receipt[6] + 1},
    }
    return [
        (
            name,
            "AwaitingReceipt",
            bytes_of([fields.get(place, value) for place, value in enumerate(receipt)]),
            "inconsistent-survivors",
        )
        for name, fields in changed.items()
    ]


def hostile_sparse_to_coordinator(honest: Honest) -> list[CoordinatorCase]:
    """What the coordinator must refuse of the last site on the sparse graph."""
    spec, liar = honest.spec, honest.names[-1]
    first = honest.names[0]
    malformed, failed = "malformed-message", "authentication-failed"
    keys, secrets, sums, lists, end = plain.PHASES
    advertisement, sharing, masked = honest.advertisements[liar], honest.shares[liar], honest.inputs[liar]
    drawn, inclusion = advertisement[6], masked[6]
    (no_holder,) = set(range(1, len(spec.cohort))) - set(drawn)
    no_holder_name = spec.cohort[no_holder - 1]
    agreed, answer = honest.agreed[liar], honest.answers[liar]
    seeds, mask_keys = answer[4], answer[5]
    gone = spec.position(mask_keys[0][0])
    seed_share_of_gone = [mask_keys[0][0], honest.sites[liar].held[mask_keys[0][0]][1]]

    def drew(positions: list[int]) -> Frames:
        return bytes_of(honest.signed(advertisement, f6=positions))

    def dealt(field: int, size: int) -> list:
        return sorted([*sharing[field], [no_holder_name, bytes(size)]])

    def included(statement: list) -> Frames:
        return [*bytes_of(honest.signed(masked, f6=statement)), *honest.chunks[liar]]

    def stated(positions: list[int]) -> Frames:
        return included(honest.signed(inclusion, f4=positions))

    def acknowledged(positions: list[int]) -> Frames:
        return bytes_of(honest.signed(agreed, f4=positions))

    def answered(**changes: Any) -> Frames:
        return bytes_of(honest.signed(answer, **changes))

    cases = [
        ("a holder too few", keys, drew(drawn[1:]), malformed),
        ("a holder repeated", keys, drew([drawn[0], drawn[0], *drawn[2:]]), malformed),
        ("holders out of order", keys, drew(drawn[::-1]), malformed),
        ("itself as holder", keys, drew([*drawn[1:], spec.position(liar)]), malformed),
        ("a holder before the cohort", keys, drew([0, *drawn[1:]]), malformed),
        ("a holder beyond the cohort", keys, drew([*drawn[1:], len(spec.cohort) + 1]), malformed),
        (
            "holders changed after signing",
            keys,
            bytes_of([*advertisement[:6], sorted([*drawn[1:], no_holder])]),
            failed,
        ),
        ("holder missing", secrets, bytes_of(honest.signed(sharing, f5=sharing[5][1:], f6=sharing[6][1:])), malformed),
        (
            "shares for no holder",
            secrets,
            bytes_of(honest.signed(sharing, f5=dealt(5, 64), f6=dealt(6, 82))),
            malformed,
        ),
        ("inclusion of another site", sums, included(honest.inputs[first][6]), failed),
        ("inclusion of another context", sums, included(honest.signed(inclusion, f1=OTHER_CONTEXT)), failed),
        ("forged inclusion", sums, included([*inclusion[:3], flipped(inclusion[3]), inclusion[4]]), failed),
        ("inclusion without a holder", sums, stated(inclusion[4][1:]), malformed),
        ("inclusion with no holder", sums, stated(sorted([*inclusion[4], no_holder])), malformed),
        ("acknowledgement without a survivor", lists, acknowledged(agreed[4][1:]), malformed),
        ("acknowledgement of a dropout", lists, acknowledged(sorted([*agreed[4], gone])), malformed),
        ("acknowledgement out of order", lists, acknowledged(agreed[4][::-1]), malformed),
        ("seed share of a dropout", end, answered(f4=sorted([*seeds, seed_share_of_gone])), malformed),
        ("mask-key share missing", end, answered(f5=[]), malformed),
    ]
    twice = [*bytes_of(honest.inputs[first]), *honest.chunks[first]]
    return [
        *((name, phase, [], liar, frames, code) for name, phase, frames, code in cases),
        ("sparse input twice", sums, [first], first, twice, "duplicate-message"),
    ]


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:2]))
