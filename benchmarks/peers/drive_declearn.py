"""Drives DecLearn's secure aggregation, in an environment that has ``declearn``.

``round`` encrypts a site's reply with DecLearn's encrypters, bit size and clipping value as they are by default,
serialises it with its messages, and aggregates with its server's function.  Only the exchange that precedes the first
round is made here: the secrets that its X3DH agrees on, 32 bytes for each pair, are drawn at random, and become seeds
through its own code; Joye-Libert's keys are drawn as its clients draw them.  All sites have the weight 1.
"""

import os
import secrets
from types import SimpleNamespace

import numpy as np
from answering import Answer, Spent, answer, said
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from declearn.aggregator import ModelUpdates
from declearn.messaging import SerializedMessage, TrainReply
from declearn.model.sklearn import NumpyVector
from declearn.secagg.joye_libert import JoyeLibertDecrypter, JoyeLibertEncrypter
from declearn.secagg.joye_libert._primitives import DEFAULT_BIPRIME, PRIME_P, PRIME_Q, hash_into_domain
from declearn.secagg.masking import MaskingDecrypter, MaskingEncrypter, MaskingSecaggConfigClient
from declearn.secagg.messaging import SecaggTrainReply, aggregate_secagg_messages

LAYER = "weights"


def masking(sites: int):
    """Encrypters and the decrypter of masks from shared seeds."""
    keys = [Ed25519PrivateKey.generate() for _ in range(sites)]
    raw = [key.public_key().public_bytes_raw() for key in keys]
    agreed = {frozenset((a, b)): os.urandom(32) for a in raw for b in raw if a != b}
    encrypters = []
    for key, own in zip(keys, raw, strict=True):
        pairs = {other: agreed[frozenset((own, other))] for other in raw if other != own}
        here = SimpleNamespace(id_keys=SimpleNamespace(prv_key=key))
        added, subtracted = MaskingSecaggConfigClient._setup_rng_seeds_from_symmetric_keys(here, pairs)
        encrypters.append(MaskingEncrypter(pos_masks_seeds=added, neg_masks_seeds=subtracted))
    return encrypters, MaskingDecrypter(n_peers=sites)


def joye_libert(sites: int):
    """Encrypters and the decrypter of Joye and Libert's scheme."""
    keys = [secrets.randbits(2 * DEFAULT_BIPRIME.bit_length()) for _ in range(sites)]
    encrypters = [JoyeLibertEncrypter(prv_key=key) for key in keys]
    return encrypters, JoyeLibertDecrypter(pub_key=-sum(keys), n_peers=sites)


SCHEMES = {"masking": masking, "Joye-Libert": joye_libert}


def whole_round(path: str, sites: int, scheme: str, missing: int = 0) -> Answer:
    """A whole round; the last ``missing`` sites, which took part in the exchange of keys, send nothing."""
    rows = np.load(path, mmap_mode="r")
    encrypters, decrypter = SCHEMES[scheme](sites)
    client, server, up, sent = Spent(), Spent(), 0, {}
    for number, encrypter in enumerate(encrypters[: sites - missing]):
        vector = NumpyVector({LAYER: rows[number % len(rows)].copy()})
        reply = TrainReply(n_epoch=1, n_steps=1, t_spent=0.0, updates=ModelUpdates(vector, 1), aux_var={})
        with client:
            serialised = SecaggTrainReply.from_cleartext_message(reply, encrypter).serialize()
        sent[f"site-{number}"] = serialised
        up += len(serialised)
    result: Answer = {"client": client.each(len(sent)), "bytes": up / len(sent) / rows.shape[1], "survived": False}
    try:
        with server:
            replies = {name: SerializedMessage.from_bin_message(each).deserialize() for name, each in sent.items()}
            updates = aggregate_secagg_messages(replies, decrypter).updates
            aggregate = (updates.updates / updates.weights).coefs[LAYER]
    except Exception as error:
        if not missing:
            raise
        return result | {"failed": said(error)}
    mean = np.mean([rows[number % len(rows)] for number in range(len(sent))], axis=0, dtype=np.float64)
    error = float(np.abs(aggregate - mean).max())
    return result | {"server": server.each(len(sent)), "error": error, "survived": error < 0.1}


def opened_with_the_published_factors(sites: int = 3, length: int = 20, steps: int = 100) -> Answer:
    """Open one site's upload under Joye-Libert with the factors of the default modulus, which its source has.

    With N's totient phi, y^phi mod N^2 is 1 + N (x phi + s h), h from the public hash of the index in the same way: one
    known x gives the site's key s modulo N, and with it every other x.  The known one is the number of steps, which is
    encrypted first.
    """
    (encrypter, *_), _ = joye_libert(sites)
    update = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    updates = ModelUpdates(NumpyVector({LAYER: update.copy()}), 1)
    reply = TrainReply(n_epoch=1, n_steps=steps, t_spent=0.0, updates=updates, aux_var={})
    sent = SecaggTrainReply.from_cleartext_message(reply, encrypter)
    n, phi = DEFAULT_BIPRIME, (PRIME_P - 1) * (PRIME_Q - 1)

    def exponent(y: int) -> int:
        return (pow(y, phi, n * n) - 1) // n % n

    hashes = [exponent(hash_into_domain(index, n)) for index in range(length + 1)]
    key = (exponent(sent.n_steps) - steps * phi) * pow(hashes[0], -1, n) % n
    inverse = pow(phi, -1, n)
    ciphertexts = sent.updates.encrypted[:length]
    found = [(exponent(y) - key * h) * inverse % n for y, h in zip(ciphertexts, hashes[1:], strict=True)]
    opened = [encrypter.quantizer.unquantize_value(value) for value in found]
    return {"error": float(np.abs(np.array(opened) - update).max())}


if __name__ == "__main__":
    answer(["declearn", "numpy"], {"round": whole_round, "opened": opened_with_the_published_factors})
