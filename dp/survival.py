"""Survival analysis whose loss belongs to each patient alone: discrete-time hazards.

Cox' partial likelihood compares a patient with all who are still at risk, so that one patient's gradient depends on
others and clipping it bounds nobody's influence.  Here time is cut into intervals, and a model says for each interval
the chance h of an event in it for those who have come so far.  The likelihood of a patient is then a product over
that patient's own intervals (Cox 1972, section 8; Gensheimer and Narasimhan, PeerJ 2019):

    event in interval j:      h_j (1 - h_0) ... (1 - h_{j-1})
    censored in interval j:       (1 - h_0) ... (1 - h_{j-1})

A patient censored within an interval counts up to the one before, which was survived whole.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dp.errors import UnsupportedEvent


def survival_targets(times: Tensor, events: Tensor, *, ends: Tensor) -> Tensor:
    """What ``hazard_loss`` compares with: (n, 2) int64, the interval of each patient's time and whether an event ended
    it.

    ``times`` (n,): follow-up in any unit, 0 or more; ``events`` (n,): whether it ended with the event (True) or was
    censored; ``ends`` (intervals,): the end of each interval in the same unit, ascending, the first one above 0.  A
    time at an end belongs to the next interval; from the last end on everybody has survived all intervals.
    Raises UnsupportedEvent if times or ends are not so.
    """
    if ends.dim() != 1 or len(ends) == 0 or not (ends.diff(prepend=ends.new_zeros(1)) > 0).all():
        raise UnsupportedEvent(f"intervals: found ends {ends.tolist()}, expected ascending numbers above 0")
    if times.shape != events.shape or times.dim() != 1:
        raise UnsupportedEvent(
            f"survival: found times {tuple(times.shape)} and events {tuple(events.shape)}, expected one of each per row"
        )
    if not (torch.isfinite(times) & (times >= 0)).all():
        raise UnsupportedEvent("survival: found times that are negative or not finite, expected 0 or more")
    interval = torch.bucketize(times, ends, right=True)
    return torch.stack([interval, events.bool() & (interval < len(ends))], dim=1).long()


def hazard_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood of logits of hazards (n, intervals) for ``survival_targets`` (n, 2)."""
    interval, event = targets[:, :1], targets[:, 1:].bool()
    position = torch.arange(predictions.shape[1], device=predictions.device)
    survived = torch.where(position < interval, logsigmoid(-predictions), 0.0)
    ended = torch.where((position == interval) & event, logsigmoid(predictions), 0.0)
    return -(survived.sum() + ended.sum())


def survival_curves(predictions: Tensor) -> Tensor:
    """The chance (n, intervals) to survive each interval and all before it, from logits of hazards."""
    return logsigmoid(-predictions).cumsum(dim=1).exp()
