"""Drives Flower's own secure aggregation, in an environment that has ``flwr``.

``functions`` and ``secrets`` call Flower's functions alone.  ``round`` runs its client mod ``secaggplus_mod`` and its
server workflow ``SecAggPlusWorkflow`` as they are; only the network is ours: a grid in memory that carries each message
as the bytes that Flower would send.

What Flower has no default for is given here: every site holds a share of every other's secrets, the threshold is that
of the question, and each site's number of examples is the workflow's ``max_weight``, with which its sums lose least.
"""

import os
import tracemalloc
from logging import ERROR
from uuid import uuid4

import numpy as np
from answering import Answer, Spent, answer, said
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supercore.task_identity import TaskIdentity

CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE = 8.0, 1 << 22, 1 << 32  # the defaults of SecAggPlusWorkflow
EXAMPLES = 1000  # its max_weight
STAGES = ("setup", "share keys", "collect masked vectors", "unmask")
SITE, SERVER_NODE, RUN = 1, 0, 1  # the site that is measured


# --- its functions alone ---


def masked_input(update: np.ndarray, neighbours: int) -> list[np.ndarray]:
    """What a client of Flower sends for this update, by the steps of its mod."""
    parameters = parameters_multiply([update], 1.0)
    quantized = factor_combine(TARGET_RANGE, quantize(parameters, CLIPPING_RANGE, TARGET_RANGE))
    dimensions = [array.shape for array in quantized]
    quantized = parameters_addition(quantized, pseudo_rand_gen(os.urandom(32), MOD_RANGE, dimensions))
    for index in range(neighbours):
        mask = pseudo_rand_gen(os.urandom(32), MOD_RANGE, dimensions)
        combine = parameters_addition if index % 2 else parameters_subtraction
        quantized = combine(quantized, mask)
    return parameters_mod(quantized, MOD_RANGE)


def functions(path: str, neighbours: int) -> Answer:
    """One masked input."""
    update = np.load(path, mmap_mode="r")[0].copy()
    with Spent() as client:
        sent = masked_input(update, neighbours)
    return {"client": client.each(1), "bytes": sum(array.nbytes for array in sent) / update.size}


def peak(path: str, neighbours: int) -> Answer:
    """Most memory that one masked input takes beyond its update, as a multiple of it."""
    update = np.load(path, mmap_mode="r")[0].copy()
    tracemalloc.start()
    masked_input(update, neighbours)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"peak": most / update.nbytes}


def secrets(holders: int, threshold: int) -> Answer:
    """Sharing one 32-byte secret, and reconstructing it."""
    secret = os.urandom(32)
    with Spent() as shared:
        shares = create_shares(secret, threshold, holders)
    with Spent() as rebuilt:
        found = combine_shares(shares[:threshold])
    if found != secret:
        raise RuntimeError("the secret was not reconstructed")
    return {"share": shared.each(1), "reconstruct": rebuilt.each(1)}


def folded(seed: bytes) -> int:
    """The state that ``pseudo_rand_gen`` seeds MT19937 with, found by asking which 32-bit seed gives the same mask."""
    words = np.frombuffer(seed, "<u4")
    state = int(np.bitwise_xor.reduce(words))
    same = np.random.RandomState(state).randint(0, MOD_RANGE - 1, 8, dtype=np.int64)
    if not np.array_equal(same, pseudo_rand_gen(seed, MOD_RANGE, [(8,)])[0]):
        raise RuntimeError("pseudo_rand_gen does not seed as it was read to")
    return state


def seed_bits(samples: int = 200) -> Answer:
    """How many bits of a mask's seed ever change, over fresh secrets."""

    def varying(states: list[int]) -> int:
        changed = 0
        for state in states:
            changed |= state ^ states[0]
        return changed.bit_count()

    selves = [folded(os.urandom(32)) for _ in range(samples)]
    pairs = []
    private, _ = generate_key_pairs()
    for _ in range(samples):
        pairs.append(folded(generate_shared_key(private, generate_key_pairs()[1])))
    return {"self mask": varying(selves), "pairwise mask": varying(pairs)}


# --- its client mod and its server workflow ---


class MemoryGrid(Grid):
    """Delivers the workflow's messages to the client mods, as bytes, and counts."""

    def __init__(self, rows: np.ndarray, silent: dict[int, int]) -> None:
        self.rows, self.silent = rows, silent
        self.contexts: dict[int, Context] = {}
        self.stage = -1
        self.delivering, self.client, self.input = Spent(), Spent(), Spent()
        self.up = 0
        self.errors: list[str] = []

    def send_and_receive(self, messages, *, timeout=None):
        """One stage: everyone who is not silent by now answers; those who are have run into the timeout."""
        self.stage += 1
        with self.delivering:
            return [self._deliver(one) for one in messages if self.silent.get(one.metadata.dst_node_id, 9) > self.stage]

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = str(uuid4())  # as InMemoryGrid does
        there = _copied(message_to_proto(message).SerializeToString())
        context = self.contexts.setdefault(node, Context(RUN, node, {}, RecordDict(), {}))
        spent = Spent()
        counted = (self.client, self.input) if self.stage < STAGES.index("unmask") else (self.client,)
        try:
            with spent:
                reply = secaggplus_mod(there, context, lambda request, _: self._train(request, node, spent))
        except Exception as error:  # as a client's runtime answers
            self.errors.append(f"{STAGES[self.stage]}: {said(error)}")
            reply = Message(Error(code=0, reason=said(error)), reply_to=there)
        for each in counted if node == SITE else ():
            each.wall += spent.wall
            each.processor += spent.processor
        sent = message_to_proto(reply).SerializeToString()
        if node == SITE:
            self.up += len(sent)
        return _copied(sent)

    def _train(self, request: Message, node: int, spent: Spent) -> Message:
        """The client app: its update, which takes no time."""
        with spent.paused():
            parameters = ndarrays_to_parameters([self.rows[(node - 1) % len(self.rows)]])
            result = FitRes(Status(Code.OK, ""), parameters, EXAMPLES, {})
            return Message(recorddict_compat.fitres_to_recorddict(result, keep_input=False), reply_to=request)

    def set_run(self, run):
        """Not used by the workflow."""
        raise NotImplementedError

    run = property(set_run)

    def create_message(self, *_, **__):
        """Not used by the workflow."""
        raise NotImplementedError

    get_node_ids = push_messages = pull_messages = create_message


def _copied(proto: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(proto))


class KeepSum(FedAvg):
    """FedAvg, whose part after the unmasking is timed by itself: it averages copies of the same aggregate."""

    def __init__(self, sites: int) -> None:
        super().__init__(fraction_fit=1.0, min_fit_clients=sites, min_available_clients=sites)
        self.spent, self.aggregate = Spent(), None

    def aggregate_fit(self, server_round, results, failures):
        """Keep what the workflow opened, then do what FedAvg does."""
        with self.spent:
            self.aggregate = parameters_to_ndarrays(results[0][1].parameters)[0]
            return super().aggregate_fit(server_round, results, failures)


class TimedWorkflow(SecAggPlusWorkflow):
    """The workflow, each of whose stages is timed without the delivery of messages and without the strategy."""

    def timed(self, grid: MemoryGrid, strategy: KeepSum) -> None:
        """Wrap the stages."""
        self.spent: dict[str, Spent] = {}
        for name in ("setup", "share_keys", "collect_masked_vectors", "unmask"):
            stage = getattr(self, f"{name}_stage")
            setattr(self, f"{name}_stage", self._timed(name, stage, grid, strategy))

    def _timed(self, name, stage, grid, strategy):
        def run(*arguments):
            others = (grid.delivering, strategy.spent)
            before = [(each.wall, each.processor) for each in others]
            spent = self.spent[name] = Spent()
            with spent:
                went_on = stage(*arguments)
            for each, (wall, processor) in zip(others, before, strict=True):
                spent.wall -= each.wall - wall
                spent.processor -= each.processor - processor
            return went_on

        return run


def whole_round(path: str, sites: int, threshold: int, silent: dict[str, int]) -> Answer:
    """A whole round; ``silent``: site (from 1) -> the stage from which it does not answer."""
    rows = np.load(path, mmap_mode="r")
    quiet = {int(site): stage for site, stage in silent.items()}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER_NODE, 1
    grid, strategy = MemoryGrid(rows, quiet), KeepSum(sites)
    manager = SimpleClientManager()
    for node in range(1, sites + 1):
        manager.register(GridClientProxy(node, grid, RUN))
    state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1})})
    # The model on its way down is not measured, so it is small.
    state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(
        ndarrays_to_parameters([np.zeros(1, np.float32)]), keep_input=False
    )
    context = LegacyContext(Context(RUN, SERVER_NODE, {}, state, {}), strategy=strategy, client_manager=manager)
    workflow = TimedWorkflow(num_shares=1.0, reconstruction_threshold=threshold)
    workflow.timed(grid, strategy)
    workflow(grid, context)
    spent = list(workflow.spent.values())
    server = Spent()
    server.wall, server.processor = sum(s.wall for s in spent), sum(s.processor for s in spent)
    result: Answer = {
        "client": grid.client.each(1),
        "input": grid.input.each(1),
        "server": server.each(sites),
        "strategy": strategy.spent.each(sites),
        "bytes": grid.up / rows.shape[1],
        "survived": strategy.aggregate is not None,
        "errors": sorted(set(grid.errors)),
    }
    if "unmask" in workflow.spent:
        result["unmask"] = workflow.spent["unmask"].each(1)
    if strategy.aggregate is not None:
        counted = [node for node in range(1, sites + 1) if quiet.get(node, 9) > STAGES.index("collect masked vectors")]
        mean = np.mean([rows[(node - 1) % len(rows)] for node in counted], axis=0, dtype=np.float64)
        result["error"] = float(np.abs(strategy.aggregate - mean).max())
    else:
        result["failed"] = f"the workflow halted after {STAGES[grid.stage]!r}"
    return result


if __name__ == "__main__":
    FLOWER_LOGGER.setLevel(ERROR)
    answer(
        ["flwr", "numpy"],
        {"functions": functions, "peak": peak, "secrets": secrets, "seed bits": seed_bits, "round": whole_round},
    )
