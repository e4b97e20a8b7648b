"""Masked secure aggregation, sans-IO: machines that turn messages into messages, and nothing else.

A round from top to bottom: ``parameters`` (what the round is), ``encoding`` (floats to ring integers), ``masking``
and ``shamir`` (how inputs are hidden and masks are recovered), ``messages`` and ``codec`` (what crosses the wire),
``participant`` and ``coordinator`` (the two sides), ``testing`` (a whole round in process).
"""

from secureagg.coordinator import Aggregate, Coordinator, Outbound
from secureagg.encoding import Counts, EncodedInput, FixedPoint, Lane, RingElements, encode_input
from secureagg.errors import (
    AuthenticationFailed,
    DuplicateMessage,
    InconsistentSurvivors,
    LocalProtocolError,
    MalformedMessage,
    ParameterError,
    RemoteProtocolError,
    RoundAborted,
    RoundReplayed,
    SecureAggregationError,
    ShapeMismatch,
    ThresholdNotMet,
    UnexpectedMessage,
    ValueOutOfRange,
)
from secureagg.identity import Card, Identity, Roster, SiteId, site_id
from secureagg.parameters import RoundParameters
from secureagg.participant import Journal, Participant

__all__ = [
    "Aggregate",
    "AuthenticationFailed",
    "Card",
    "Coordinator",
    "Counts",
    "DuplicateMessage",
    "EncodedInput",
    "FixedPoint",
    "Identity",
    "InconsistentSurvivors",
    "Journal",
    "Lane",
    "LocalProtocolError",
    "MalformedMessage",
    "Outbound",
    "ParameterError",
    "Participant",
    "RemoteProtocolError",
    "RingElements",
    "Roster",
    "RoundAborted",
    "RoundParameters",
    "RoundReplayed",
    "SecureAggregationError",
    "ShapeMismatch",
    "SiteId",
    "ThresholdNotMet",
    "UnexpectedMessage",
    "ValueOutOfRange",
    "encode_input",
    "site_id",
]
