"""Errors of the protocol core: whose fault, in which phase, what was found, what was expected.

Each class has a stable ``code``.  Only the code ever crosses the wire; the text stays on the machine that
raised it.  No error holds key bytes, share bytes or statistics of an update.
"""

from typing import ClassVar


class SecureAggregationError(Exception):
    """Base of every error of this package; never raised itself."""

    code: ClassVar[str] = "secure-aggregation"


class ParameterError(SecureAggregationError, ValueError):
    """The caller asked for an unsafe or impossible round."""

    code = "parameter"


class ValueOutOfRange(ParameterError):
    """An input lies outside the range or bound that its lane declares, or is not finite.

    ``lane`` and ``index`` say where, if it is an element of a lane.
    """

    code = "value-out-of-range"

    def __init__(self, message: str, *, lane: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane
        self.index = index


class ShapeMismatch(ParameterError):
    """An input has another shape than its lane, or a model other tensors than the consortium's."""

    code = "shape-mismatch"


class LocalProtocolError(SecureAggregationError):
    """A machine was driven wrongly by its own side: a bug here, not at a peer."""

    code = "local-protocol"


class RemoteProtocolError(SecureAggregationError):
    """A peer broke the protocol; base of the errors below."""

    code = "remote-protocol"


class MalformedMessage(RemoteProtocolError):
    """Bytes that are not the one encoding of a message, or exceed a limit."""

    code = "malformed-message"


class UnexpectedMessage(RemoteProtocolError):
    """A message that has no place in the current phase, or comes from someone who may not send it."""

    code = "unexpected-message"


class DuplicateMessage(RemoteProtocolError):
    """A second message where the protocol has one."""

    code = "duplicate-message"


class AuthenticationFailed(RemoteProtocolError):
    """A signature, ciphertext, key or commitment does not verify under this round's context.

    ``blamed``: the site whose own signed messages prove it, where they do.
    """

    code = "authentication-failed"

    def __init__(self, message: str, *, blamed: str | None = None) -> None:
        super().__init__(message)
        self.blamed = blamed


class InconsistentSurvivors(RemoteProtocolError):
    """The survivor list is not one that this participant can have been part of."""

    code = "inconsistent-survivors"


class RoundAborted(SecureAggregationError):
    """The round cannot finish and releases nothing."""

    code = "round-aborted"


class ThresholdNotMet(RoundAborted):
    """Fewer sites remain than the round needs; nobody misbehaved."""

    code = "threshold-not-met"


class RoundReplayed(RoundAborted):
    """The journal shows that this round was already begun, or its unmask request already answered."""

    code = "round-replayed"
