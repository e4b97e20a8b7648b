"""Sums of ciphertexts: exact at every size, nothing foreign parsed by SEAL, and no more memory for a longer input."""

import dataclasses
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slots import round_parameters, vectors_of

from secureagg import LocalProtocolError, MalformedMessage, ParameterError, homomorphic
from secureagg.agreement import encryption_key_seed
from secureagg.homomorphic import (
    Bfv,
    CiphertextSum,
    SecretKey,
    SumReader,
    check_fresh,
    masked_and_encrypted,
    unmask_sum,
)
from secureagg.slots import COEFFICIENT_MODULUS, FRESH_BYTES, KEY_SEED_BYTES, SLOTS, SUMMED_BYTES

pytest.importorskip("tenseal", reason="the extra `homomorphic` is not installed")

BITS = 48
ALL_BITS = range(40, 53)
SEED = bytes(range(KEY_SEED_BYTES))
ROOT = Path(__file__).parents[2]


@cache
def scheme(bits: int = BITS) -> tuple[Bfv, SecretKey]:
    """BFV with a key, made once for each modulus."""
    bfv = Bfv(bits)
    return bfv, SecretKey(bfv, SEED)


def summed(ciphertexts: list[bytes], bits: int = BITS) -> bytes:
    """The sum of fresh ciphertexts."""
    total = CiphertextSum(scheme(bits)[0], 1)
    for ciphertext in ciphertexts:
        total.add(0, ciphertext, who="site")
    return total.ciphertext(0)


def slots_of(seed: int, bits: int = BITS) -> np.ndarray:
    """Random slots, with both ends of their range among them."""
    slots = np.random.default_rng(seed).integers(0, 1 << bits, SLOTS, dtype=np.uint64)
    slots[:2] = 0, (1 << bits) - 1
    return slots


def with_error(ciphertext: bytes, error: int) -> bytes:
    """A fresh ciphertext with ``error`` added to the noise of each coefficient."""
    coefficients = np.frombuffer(ciphertext, "<u8", count=SLOTS).astype(object)
    changed = (coefficients + error) % COEFFICIENT_MODULUS
    return changed.astype("<u8").tobytes() + ciphertext[-KEY_SEED_BYTES:]


# --- exact sums ---


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ALL_BITS), st.integers(1, 6), st.integers(0, 2**32))
def test_sums_are_exact(bits: int, sites: int, seed: int) -> None:
    """Ciphertexts of any slots add up to the ciphertext of their sum modulo t, and slots in clear are added exactly."""
    bfv, key = scheme(bits)
    inputs = [slots_of(seed + site, bits) for site in range(sites)]
    removed = slots_of(seed + sites, bits)
    total = CiphertextSum(bfv, 2)
    for slots in inputs:
        total.add(1, key.encrypt(slots), who="site")
    total.add_slots(1, removed)
    np.testing.assert_array_equal(key.decrypt(total.ciphertext(1), who="sum"), sum([*inputs, removed]) % (1 << bits))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_decryption_is_exact_at_the_edge_and_fails_beyond_it(bits: int, sign: int) -> None:
    """With the worst noise that the largest cohort with such slots adds up to, a sum decrypts; q / 2t is where it ends,
    and no fresh error lies further from it than 21."""
    _, key = scheme(bits)
    slots = slots_of(1, bits)
    fresh = key.encrypt(slots)
    largest_cohort = (COEFFICIENT_MODULUS // 2**bits - 3) // 43
    worst = (43 * largest_cohort + 1) // 2 - 22  # beside the 21 and the rounding that are in the ciphertext already
    edge = COEFFICIENT_MODULUS // 2 ** (bits + 1)
    for error in (worst, edge - 23):
        decrypted = key.decrypt(summed([with_error(fresh, sign * error)], bits), who="sum")
        np.testing.assert_array_equal(decrypted, slots)
    wrong = key.decrypt(summed([with_error(fresh, sign * (edge + 23))], bits), who="sum")
    assert (wrong != slots).any()
    assert worst <= edge - 23


def test_a_whole_cohort_adds_up() -> None:
    """A hundred sites with slots anywhere in the range give their exact sum."""
    _, key = scheme()
    inputs = [slots_of(seed) for seed in range(100)]
    np.testing.assert_array_equal(
        key.decrypt(summed([key.encrypt(slots) for slots in inputs]), who="sum"), sum(inputs) % (1 << BITS)
    )


def test_a_round_gives_the_masked_backends_totals() -> None:
    """Lanes to slots, masks, encryption, sum, masks removed by the coordinator, decryption: the totals are those that
    ring elements add up to in the masked backend."""
    parameters = round_parameters()
    layout = parameters.slot_layout
    vectors = [vectors_of(parameters, seed) for seed in range(3)]
    self_keys = [os.urandom(32) for _ in vectors]
    pairwise = {(one, other): os.urandom(32) for one in range(3) for other in range(one)}
    bfv, key = scheme(layout.slot_bits)
    total = CiphertextSum(bfv, layout.ciphertexts)
    for site, vector in enumerate(vectors):
        masks = [(self_keys[site], 1)]
        masks += [(shared, 1) for (one, _), shared in pairwise.items() if one == site]
        masks += [(shared, -1) for (_, other), shared in pairwise.items() if other == site]
        for number, ciphertext in enumerate(masked_and_encrypted(key, layout, vector, masks)):
            total.add(number, ciphertext, who="site")
    unmask_sum(total, layout, [(own, -1) for own in self_keys])
    reader = SumReader(key, layout)
    for chunk in total.chunks():
        reader.take(chunk, who="sum")
    found = reader.totals(survivors=3)
    for name, ring_lane in parameters.lanes.items():
        expected = np.zeros(ring_lane.lane.length, ring_lane.word)
        for vector in vectors:
            expected += vector[name]
        np.testing.assert_array_equal(found[name], ring_lane.lift(expected))


def test_a_sum_in_chunks() -> None:
    """An aggregate comes in chunks of 16 ciphertexts, the last of what is left; the sum is used up by making them."""
    layout = round_parameters(length=150_000).slot_layout
    assert layout.ciphertexts == 19
    bfv, key = scheme(layout.slot_bits)
    total = CiphertextSum(bfv, layout.ciphertexts)
    for number in range(layout.ciphertexts):
        total.add(number, key.encrypt(np.zeros(SLOTS, np.uint64)), who="site")
    assert [len(chunk) for chunk in total.chunks()] == [16 * SUMMED_BYTES, 3 * SUMMED_BYTES]
    with pytest.raises(LocalProtocolError, match="ciphertext 0: nothing was added"):
        total.chunks()


@pytest.mark.parametrize("counts", [(0,), (1,), (3,), (2, 1), (2, 2)])
def test_another_number_of_ciphertexts_is_refused(counts: tuple[int, ...]) -> None:
    """An aggregate has as many ciphertexts as the layout: with fewer, values would be missing that read as zeros."""
    layout = round_parameters(length=10_000).slot_layout
    assert layout.ciphertexts == 2
    _, key = scheme(layout.slot_bits)
    one = summed([key.encrypt(np.zeros(SLOTS, np.uint64))], layout.slot_bits)
    reader = SumReader(key, layout)
    *before, last = counts
    for count in before:
        reader.take(one * count, who="sum")
    with pytest.raises(MalformedMessage, match=r"sum: .* bytes of ciphertexts, expected"):
        reader.take(one * last, who="sum")


def test_a_sum_that_is_not_whole_gives_nothing() -> None:
    """Values that have not come are not zeros."""
    layout = round_parameters(length=10_000).slot_layout
    reader = SumReader(scheme(layout.slot_bits)[1], layout)
    assert not reader.whole
    with pytest.raises(LocalProtocolError, match="0 of 2 ciphertexts were taken"):
        reader.totals(survivors=3)


def test_bytes_per_value() -> None:
    """A ciphertext's slots, two values in each, take at most 4.2 bytes for a value."""
    assert len(scheme()[1].encrypt(slots_of(0))) == FRESH_BYTES
    assert FRESH_BYTES / (2 * SLOTS) <= 4.2


# --- keys ---


def test_fresh_ciphertexts_never_repeat() -> None:
    """Neither the seed nor the error is seen twice, also under a second key object of the same seed."""
    bfv, key = scheme()
    slots = slots_of(0)
    made = [one.encrypt(slots) for one in (key, key, SecretKey(bfv, SEED), SecretKey(Bfv(bfv.slot_bits), SEED))]
    assert len({ciphertext[-KEY_SEED_BYTES:] for ciphertext in made}) == len(made)
    assert len({ciphertext[:-KEY_SEED_BYTES] for ciphertext in made}) == len(made)


def test_the_key_is_its_seed() -> None:
    """Whoever has the seed decrypts, in another process too; whoever has another one gets noise."""
    bfv, key = scheme()
    slots = slots_of(0)
    ciphertext = summed([key.encrypt(slots)])
    np.testing.assert_array_equal(SecretKey(Bfv(bfv.slot_bits), SEED).decrypt(ciphertext, who="sum"), slots)
    other = SecretKey(bfv, SEED[:-1] + b"\0").decrypt(ciphertext, who="sum")
    assert (other != slots).mean() > 0.99


@pytest.mark.parametrize("size", [0, 32, KEY_SEED_BYTES - 1, KEY_SEED_BYTES + 1])
def test_a_short_seed_is_refused(size: int) -> None:
    """A key is never made of fewer bytes than SEAL's generator takes."""
    with pytest.raises(LocalProtocolError, match=f"seed of {size} bytes"):
        SecretKey(scheme()[0], bytes(size))


@pytest.mark.parametrize("value", [1 << BITS, (1 << 64) - 1])
def test_slots_out_of_range_are_refused(value: int) -> None:
    """A slot that is no integer modulo t is never encrypted."""
    slots = slots_of(0)
    slots[7] = value
    with pytest.raises(LocalProtocolError, match=f"integers of {BITS} bits"):
        scheme()[1].encrypt(slots)


# --- foreign bytes ---


def hostile(ciphertext: bytes) -> dict[str, bytes]:
    """Bytes that are no ciphertext, each in one respect."""
    over = COEFFICIENT_MODULUS.to_bytes(8, "little")
    return {
        "empty": b"",
        "short": ciphertext[:-1],
        "long": ciphertext + b"\0",
        "coefficient of q": over + ciphertext[8:],
        "last coefficient": ciphertext[: 8 * (SLOTS - 1)] + b"\xff" * 8 + ciphertext[8 * SLOTS :],
    }


@pytest.mark.parametrize("what", hostile(bytes(FRESH_BYTES)))
def test_what_is_no_ciphertext_never_reaches_seal(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong sizes and coefficients that are not below q are the sender's fault, found before SEAL reads anything, and
    leave the sum as it was."""
    bfv, key = scheme()
    slots = slots_of(0)
    total = CiphertextSum(bfv, 1)
    total.add(0, key.encrypt(slots), who="a")
    bad_fresh = hostile(key.encrypt(slots))[what]
    bad_sum = hostile(total.ciphertext(0))[what]
    with monkeypatch.context() as patched:
        patched.setattr(Bfv, "_load", lambda *_, **__: pytest.fail("SEAL was asked"))
        with pytest.raises(MalformedMessage, match="site-b: a ciphertext"):
            total.add(0, bad_fresh, who="site-b")
        with pytest.raises(MalformedMessage, match="site-b: a ciphertext"):
            check_fresh(bad_fresh, who="site-b")
        with pytest.raises(MalformedMessage, match="coordinator: a ciphertext"):
            key.decrypt(bad_sum, who="coordinator")
    np.testing.assert_array_equal(key.decrypt(total.ciphertext(0), who="sum"), slots)


def test_what_seal_refuses_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """If SEAL should refuse what passed our check, its exception does not leave the module."""
    bfv, key = scheme()
    fresh = key.encrypt(slots_of(0))
    monkeypatch.setattr(homomorphic, "_check", lambda *_, **__: None)
    with pytest.raises(MalformedMessage, match="site-b: SEAL refuses"):
        CiphertextSum(bfv, 1).add(0, b"\xff" * 8 + fresh[8:], who="site-b")


FUZZ = """
import sys
import numpy as np
from secureagg import MalformedMessage
from secureagg.homomorphic import Bfv, CiphertextSum, SecretKey
from secureagg.slots import FRESH_BYTES, SUMMED_BYTES
from secureagg.slots import SLOTS
bfv = Bfv(48)
key, rng, total = SecretKey(bfv, bytes(64)), np.random.default_rng(int(sys.argv[1])), CiphertextSum(bfv, 1)
slots = np.zeros(SLOTS, np.uint64)
taken = 0
takers = {FRESH_BYTES: lambda raw: total.add(0, raw, who="x"), SUMMED_BYTES: lambda raw: key.decrypt(raw, who="x")}
for size, take in takers.items():
    total.add(0, key.encrypt(slots), who="x")
    for step in range(int(sys.argv[2])):
        raw = np.frombuffer(key.encrypt(slots) if size == FRESH_BYTES else total.ciphertext(0), np.uint8).copy()
        kind = step % 5
        if kind == 0:
            raw[rng.integers(0, size, rng.integers(1, 100))] = rng.integers(0, 256)
        elif kind == 1:
            raw = rng.integers(0, 256, size, dtype=np.uint8)
        elif kind == 2:
            raw = raw[: rng.integers(0, size)]
        elif kind == 3:
            raw[:] = rng.integers(0, 16)
        else:
            raw[-64:] = rng.integers(0, 256, 64)
        try:
            take(raw.tobytes())
            taken += 1
        except MalformedMessage:
            pass
print(taken)
"""


def test_no_bytes_end_the_process() -> None:
    """Whatever a peer sends is taken or refused with MalformedMessage: a process fed with it ends as it should."""
    examples = int(os.environ.get("SECUREAGG_FUZZ_EXAMPLES", "200")) // 2
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, "1", str(examples)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > examples // 4  # some of each kind are ciphertexts, and SEAL has read them


# --- SEAL itself ---


def test_without_tenseal_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain installation says what is missing, and importing the module does not need it."""
    monkeypatch.setitem(sys.modules, "tenseal", None)
    homomorphic._seal.cache_clear()
    with pytest.raises(ParameterError, match=r"pip install 'secureagg\[homomorphic\]'"):
        Bfv(BITS)
    monkeypatch.undo()
    homomorphic._seal.cache_clear()


def test_a_system_without_files_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SEAL's bytes would have to go through a disk, there are no homomorphic sums."""
    monkeypatch.delattr(os, "memfd_create")
    homomorphic._seal.cache_clear()
    with pytest.raises(ParameterError, match="expected Linux"):
        Bfv(BITS)
    monkeypatch.undo()
    homomorphic._seal.cache_clear()


def test_another_format_of_a_sum_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what SEAL writes of a sum."""
    around = Bfv._around

    def other(self: Bfv, coefficients: int) -> bytes:
        expected = around(self, coefficients)
        return expected if coefficients == SLOTS else expected[:-1] + b"\x01"

    monkeypatch.setattr(Bfv, "_around", other)
    monkeypatch.setattr(homomorphic, "_CHECKED", {})
    with pytest.raises(LocalProtocolError, match="another format of a summed"):
        Bfv(BITS)


def test_a_seal_that_adds_wrongly_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme is usable only after a sum of two ciphertexts has decrypted to the sum."""
    monkeypatch.setattr(homomorphic, "_CHECKED", {})
    monkeypatch.setattr(SecretKey, "decrypt", lambda *_, **__: np.zeros(SLOTS, np.uint64))
    with pytest.raises(LocalProtocolError, match="does not decrypt to the sum"):
        Bfv(BITS)


def test_a_rounds_key_is_bound_to_its_context() -> None:
    """One secret gives every site of a round the same seed, and another round another one."""
    parameters = round_parameters()
    following = dataclasses.replace(parameters, round_number=2)
    seeds = [encryption_key_seed(one, b"s" * 32) for one in (parameters, round_parameters(), following)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert encryption_key_seed(parameters, b"t" * 32) != seeds[0]
    assert len(seeds[0]) == KEY_SEED_BYTES


def test_another_format_of_seal_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SEAL that writes something else than expected is refused when the scheme is built, and no site is blamed."""
    monkeypatch.setattr(homomorphic, "_BLAKE2XB", b"\x02")
    monkeypatch.setattr(homomorphic, "_CHECKED", {})
    with pytest.raises(LocalProtocolError, match="SEAL: another format"):
        Bfv(BITS)


def test_an_unfit_modulus_is_refused() -> None:
    """A plaintext modulus that is not below q is refused before anything is encrypted."""
    with pytest.raises(ParameterError, match=r"SEAL refuses t = 2\^60"):
        Bfv(60)


def test_a_number_without_ciphertexts_has_no_sum() -> None:
    """The sum of nothing is an error here, not a ciphertext of zero, which would be one in clear."""
    total = CiphertextSum(scheme()[0], 2)
    with pytest.raises(LocalProtocolError, match="ciphertext 1: nothing was added"):
        total.ciphertext(1)
    with pytest.raises(LocalProtocolError, match="ciphertext 1: nothing was added"):
        total.add_slots(1, slots_of(0))


MEMORY = """
import resource
import numpy as np
from secureagg.homomorphic import Bfv, CiphertextSum, SecretKey
from secureagg.slots import SLOTS
bfv = Bfv(48)
key, total, slots = SecretKey(bfv, bytes(64)), CiphertextSum(bfv, 1), np.zeros(SLOTS, np.uint64)
def work(times):
    for _ in range(times):
        total.add(0, key.encrypt(slots), who="x")
        key.decrypt(total.ciphertext(0), who="x")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = work(50)
print(work(500) - before)
"""


def test_memory_does_not_grow_with_the_number_of_ciphertexts() -> None:
    """Five hundred ciphertexts more, 16 MB, that were made, added and decrypted leave less than 2 MB behind."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048  # KiB


def test_sizes_are_as_documented() -> None:
    """A fresh ciphertext is c0 and a seed, a summed one c0 and c1."""
    assert (FRESH_BYTES, SUMMED_BYTES) == (32_768 + 64, 65_536)
