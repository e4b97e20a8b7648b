"""What a round releases, made of the exact integer sums: by the coordinator, or by each site that opened them."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from secureagg import labels
from secureagg.encoding import decode_total
from secureagg.errors import ParameterError, RoundAborted
from secureagg.identity import SiteId
from secureagg.keystream import Spread
from secureagg.lanes import CANARY, WEIGHT
from secureagg.parameters import RoundParameters
from secureagg.phases import Aggregate


def aggregate_of(
    parameters: RoundParameters,
    totals: Mapping[str, npt.NDArray[np.int64]],
    *,
    survivors: tuple[SiteId, ...],
    digest_key: bytes = b"",
    spread: Spread = map,
    who: str,
) -> Aggregate:
    """The aggregate of ``totals`` (lane -> integers); RoundAborted naming ``who`` unless the canary holds.

    ``digest_key``: 32 bytes without which the digest of a homomorphic sum tells nothing of it.
    """
    # Stops a sum in which any mask is left, whatever the reason: nothing is released.
    if int(totals[CANARY][0]) != len(survivors):
        raise RoundAborted(f"{who}: the canary lane does not equal the {len(survivors)} survivors")
    weight = int(totals[WEIGHT][0]) if WEIGHT in totals else None
    try:
        means = {
            name: decode_total(ring_lane, totals[name], survivors=len(survivors), weight=weight, spread=spread)
            for name, ring_lane in parameters.lanes.items()
        }
    except ParameterError as error:
        raise RoundAborted(f"{who}: {error}") from error
    parts: list[bytes | memoryview] = [digest_key] if digest_key else []
    for name, total in totals.items():
        parts += [name.encode(), total.astype("<i8", copy=False).data]
    label = labels.OPENED_AGGREGATE if digest_key else labels.AGGREGATE
    return Aggregate(
        totals=totals, means=means, survivors=survivors, digest=labels.digest(label, parameters.context, *parts)
    )
