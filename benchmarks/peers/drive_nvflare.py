"""Drives NVFlare's homomorphic encryption, in an environment that has ``nvflare[HE]``.

The contexts are those that NVFlare's provisioning makes: ``HEBuilder`` with its default arguments.  ``round`` sends
updates through the encryptor, the aggregator and the decryptor of its recipe ``FedAvgRecipeWithHE``, serialised by its
own FOBS, in one layer (each layer carries its context: one is the least).  Each site reports one local step, so that
the weighted mean is the mean.  TenSEAL takes all cores, as it does by default.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
import tenseal
from answering import Answer, Spent, answer
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.he.intime_accumulate_model_aggregator import HEInTimeAccumulateWeightedAggregator
from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
from nvflare.fuel.sec.security_content_service import SecurityContentService
from nvflare.fuel.utils import fobs
from nvflare.lighter.impl.he import HEBuilder

LAYER = "weights"
CLIENT_CONTEXT, SERVER_CONTEXT = "client_context.tenseal", "server_context.tenseal"


def provision(folder: Path) -> None:
    """Write the contexts of the clients' and the server's kits, as ``HEBuilder.build`` does."""
    builder = HEBuilder()
    builder.initialize(None, None)
    (folder / CLIENT_CONTEXT).write_bytes(builder.get_serialized_context(is_client=True))
    (folder / SERVER_CONTEXT).write_bytes(builder.get_serialized_context())
    SecurityContentService.initialize(str(folder))


def context_of(name: str) -> FLContext:
    """The context that filters and aggregator run in, of the site or server of this name."""
    context = FLContextManager(identity_name=name, job_id="job").new_context()
    # The kit's files are not signed here, which NVFlare takes in a project that is not secured only.
    context.set_prop(FLContextKey.SECURE_MODE, False, private=True, sticky=False)
    context.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=False)
    context.set_peer_context(FLContextManager(identity_name="server", job_id="job").new_context())
    return context


def upload(encryptor: HEModelEncryptor, update: np.ndarray, name: str) -> bytes:
    """What a site sends."""
    dxo = DXO(DataKind.WEIGHTS, data={LAYER: update}, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1})
    shareable = encryptor.process(dxo.to_shareable(), context_of(name))
    shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
    return fobs.dumps(shareable)


def accept(aggregator: HEInTimeAccumulateWeightedAggregator, sent: bytes, name: str, context: FLContext) -> None:
    """The server's part for one site."""
    shareable: Shareable = fobs.loads(sent)
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: name})
    if not aggregator.accept(shareable, context):
        raise RuntimeError(f"the aggregator did not accept {name}")


def started(component, name: str):
    """A component that has seen the beginning of the run."""
    component.handle_event(EventType.START_RUN, context_of(name))
    return component


def whole_round(path: str, sites: int, missing: int = 0) -> Answer:
    """A whole round; the last ``missing`` sites send nothing."""
    rows = np.load(path, mmap_mode="r")
    names = [f"site-{number}" for number in range(sites - missing)]
    aggregator = started(HEInTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS), "server")
    at_server = context_of("server")
    client, server, opening = Spent(), Spent(), Spent()
    up = 0
    first = b""
    for number, name in enumerate(names):
        encryptor = started(HEModelEncryptor(), name)
        update = rows[number % len(rows)].copy()
        with client:
            sent = upload(encryptor, update, name)
        first = first or sent
        up += len(sent)
        with server:
            accept(aggregator, sent, name, at_server)
    with server:
        down = fobs.dumps(aggregator.aggregate(at_server))
    decryptor = started(HEModelDecryptor(), names[0])
    with opening:
        aggregate = from_shareable(decryptor.process(fobs.loads(down), context_of(names[0]))).data[LAYER]
    mean = np.mean([rows[number % len(rows)] for number in range(len(names))], axis=0, dtype=np.float64)
    encrypting = client.each(len(names))
    return {
        "client": {clock: spent + opening.each(1)[clock] for clock, spent in encrypting.items()},
        "input": encrypting,
        "server": server.each(len(names)),
        "bytes": up / len(names) / rows.shape[1],
        "error": float(np.abs(np.asarray(aggregate) - mean).max()),
        "survived": True,
        "opened by another site": opened_by_another_site(first, rows[0]),
    }


def opened_by_another_site(sent: bytes, update: np.ndarray) -> float:
    """Decrypt one site's upload with the context in every other site's kit; its largest error, far below 1 if open."""
    ciphertext = from_shareable(fobs.loads(sent)).data[LAYER]
    kit = tenseal.context_from((Path(SecurityContentService.content_folder) / CLIENT_CONTEXT).read_bytes())
    return float(np.abs(np.asarray(ciphertext.decrypt(secret_key=kit.secret_key())) - update).max())


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as kits:
        provision(Path(kits))
        answer(["nvflare", "tenseal", "numpy"], {"round": whole_round})
