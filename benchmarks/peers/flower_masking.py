"""Flower's own secure aggregation functions on one core, run in a virtual environment of Flower's own.

    python flower_masking.py UPDATE.npy NEIGHBOURS REPEATS

Prints JSON: seconds of a client's masked input (quantise, self mask, pairwise masks), its bytes, its peak memory, and
seconds to share and to reconstruct one 32-byte secret among 100 with threshold 67.  The steps are those of Flower's
client in `secaggplus_mod`, with its default ranges.
"""

import json
import os
import sys
import time
import tracemalloc

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE = 8.0, 1 << 22, 1 << 32  # the defaults of SecAggPlusWorkflow


def masked_input(update: np.ndarray, neighbours: int) -> list[np.ndarray]:
    """What a client of Flower sends for this update."""
    parameters = parameters_multiply([update], 1.0)
    quantized = factor_combine(TARGET_RANGE, quantize(parameters, CLIPPING_RANGE, TARGET_RANGE))
    dimensions = [array.shape for array in quantized]
    quantized = parameters_addition(quantized, pseudo_rand_gen(os.urandom(32), MOD_RANGE, dimensions))
    for index in range(neighbours):
        mask = pseudo_rand_gen(os.urandom(32), MOD_RANGE, dimensions)
        combine = parameters_addition if index % 2 else parameters_subtraction
        quantized = combine(quantized, mask)
    return parameters_mod(quantized, MOD_RANGE)


def best(repeats: int, function) -> tuple[float, object]:
    """The least time of several calls, and the last result."""
    times, result = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - began)
    return min(times), result


def main() -> None:
    """Measure and print."""
    update, neighbours, repeats = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    masked, sent = best(repeats, lambda: masked_input(update, neighbours))
    tracemalloc.start()
    masked_input(update, neighbours)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    share, shares = best(repeats, lambda: create_shares(os.urandom(32), 67, 100))
    rebuild, _ = best(repeats, lambda: combine_shares(shares[:67]))
    size = sum(array.nbytes for array in sent)
    print(json.dumps({"masked_input": masked, "bytes": size, "peak": peak, "share": share, "reconstruct": rebuild}))


if __name__ == "__main__":
    main()
