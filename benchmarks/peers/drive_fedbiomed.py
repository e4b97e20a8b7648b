"""Drives Fed-BioMed's secure aggregation, in an environment that has ``fedbiomed``.

``round`` encrypts with the nodes' crypters (LOM, its default scheme, or Joye-Libert), serialises the reply as its nodes
do, and aggregates with the researcher's classes, clipping and target range as they are by default.  Only the exchange
between nodes that precedes the first round is made here from the same parts: for LOM pairwise secrets by its
Diffie-Hellman classes, for Joye-Libert keys of the length and from the source that its nodes take, under the biprime
that it ships.  Every node says it has one sample, so that the weighted mean is the mean.
"""

import logging
import random
from types import SimpleNamespace

import numpy as np
import torch
from answering import Answer, Spent, answer, said

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Fed-BioMed imports torchvision, which it does not use here, and whose compiled part does not load beside a torch
    # that was built for the processor alone.  It is content if the names of two operators are known.
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from fedbiomed.common.constants import SAParameters
from fedbiomed.common.secagg import DHKey, DHKeyAgreement, SecaggCrypter, SecaggLomCrypter
from fedbiomed.common.serializer import Serializer
from fedbiomed.common.utils import get_default_biprime
from fedbiomed.node.secagg._secagg_setups import SecaggServkeySetup
from fedbiomed.researcher.secagg import JoyeLibertSecureAggregation, LomSecureAggregation

SECAGG_ID = "secagg_b9d5f3a0-65ab-4e1a-9d70-1f3f7d0b9a51"  # as the researcher names a context
ROUND, SAMPLES = 1, 1
CHECKED = 0.618  # a number that the researcher draws and lets everyone encrypt too, to see if sums are right


class Lom:
    """Masking with ChaCha20 keystreams."""

    def __init__(self, names: list[str]) -> None:
        keys = {name: DHKey() for name in names}
        self.names, self.secrets = names, {}
        for name, key in keys.items():
            agreement = DHKeyAgreement(node_u_id=name, node_u_dh_key=key, session_salt=SECAGG_ID.encode())
            others = {other: each.export_public_key() for other, each in keys.items() if other != name}
            self.secrets[name] = {other: agreement.agree(other, public) for other, public in others.items()}
        self.researcher = LomSecureAggregation()
        self.researcher._dh = SimpleNamespace(status=True)

    def node(self, name: str):
        """The encryption of one node."""
        crypter = SecaggLomCrypter(nonce=SECAGG_ID)
        common = {"node_ids": self.names, "node_id": name, "pairwise_secrets": self.secrets[name]}
        return lambda params: crypter.encrypt(params=params, current_round=ROUND, weight=SAMPLES, **common)

    def aggregate(self, replies: dict[str, dict]) -> list[float]:
        """The researcher's part."""
        return self.researcher.aggregate(
            model_params={name: reply["params"] for name, reply in replies.items()},
            encryption_factors={name: reply["encryption_factor"] for name, reply in replies.items()},
            total_sample_size=len(replies) * SAMPLES,
        )


class JoyeLibert:
    """Joye and Libert's scheme."""

    def __init__(self, names: list[str]) -> None:
        self.biprime = int(get_default_biprime())
        bits = SecaggServkeySetup._key_bit_length
        self.keys = {name: random.SystemRandom().getrandbits(bits) for name in names}
        self.researcher = JoyeLibertSecureAggregation()
        key = -sum(self.keys.values())
        self.researcher._servkey = SimpleNamespace(status=True, context={"server_key": key, "biprime": self.biprime})

    def node(self, name: str):
        """The encryption of one node."""
        common = {"num_nodes": len(self.keys), "key": self.keys[name], "biprime": self.biprime}
        return lambda params: SecaggCrypter().encrypt(params=params, current_round=ROUND, weight=SAMPLES, **common)

    def aggregate(self, replies: dict[str, dict]) -> list[float]:
        """The researcher's part."""
        return self.researcher.aggregate(
            round_=ROUND,
            model_params={name: reply["params"] for name, reply in replies.items()},
            encryption_factors={name: reply["encryption_factor"] for name, reply in replies.items()},
            total_sample_size=len(replies) * SAMPLES,
            num_expected_params=self.length,
        )


SCHEMES = {"LOM": Lom, "Joye-Libert": JoyeLibert}


def whole_round(path: str, sites: int, scheme: str, missing: int = 0) -> Answer:
    """A whole round; the last ``missing`` nodes, which took part in the exchange of keys, send nothing."""
    rows = np.load(path, mmap_mode="r")
    names = [f"node-{number:04d}" for number in range(sites)]
    made = SCHEMES[scheme](names)
    made.length, made.researcher._secagg_random = rows.shape[1], CHECKED
    sending = names[: sites - missing]
    client, server, up, sent = Spent(), Spent(), 0, {}
    for number, name in enumerate(sending):
        values = rows[number % len(rows)].astype(float).tolist()  # what its nodes flatten a model to
        encrypt = made.node(name)
        with client:
            reply = {"params": encrypt(values), "encryption_factor": encrypt([CHECKED])}
            sent[name] = Serializer.dumps(reply)
        up += len(sent[name])
    result: Answer = {
        "client": client.each(len(sending)),
        "bytes": up / len(sending) / rows.shape[1],
        "survived": False,
    }
    try:
        with server:
            aggregate = made.aggregate({name: Serializer.loads(each) for name, each in sent.items()})
    except Exception as error:
        if not missing:
            raise
        return result | {"failed": said(error)}
    mean = np.mean([rows[number % len(rows)] for number in range(len(sending))], axis=0, dtype=np.float64)
    error = float(np.abs(np.asarray(aggregate) - mean).max())
    return result | {"server": server.each(len(sending)), "error": error, "survived": error < 0.1}


def repeated_keystream(sites: int = 4, length: int = 1000) -> Answer:
    """Whether LOM masks two vectors of one round alike: how far the difference of two uploads is from theirs.

    The second is what the researcher knows, its check value: its mask is then that of the update's first value.
    """
    made = Lom([f"node-{number:04d}" for number in range(sites)])
    encrypt = made.node("node-0000")
    values = np.random.default_rng(0).uniform(-1, 1, length)
    update, known = encrypt(values.tolist()), encrypt([CHECKED])
    difference = (update[0] - known[0] + (1 << 63)) % (1 << 64) - (1 << 63)
    opened = CHECKED + difference / SAMPLES * 2 * SAParameters.CLIPPING_RANGE / SAParameters.TARGET_RANGE
    return {"error of the first value": abs(opened - values[0])}


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    answer(["fedbiomed", "torch", "numpy"], {"round": whole_round, "repeated keystream": repeated_keystream})
