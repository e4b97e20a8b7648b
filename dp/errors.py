"""Errors of the privacy package: what was asked, what was spent, what would be allowed."""

from typing import ClassVar


class PrivacyError(Exception):
    """Base of every error of this package; never raised itself."""

    code: ClassVar[str] = "privacy"


class BudgetExhausted(PrivacyError):
    """A release would exceed the budget; it did not happen."""

    code = "budget-exhausted"


class LedgerTampered(PrivacyError):
    """The record of releases is not the one that was written."""

    code = "ledger-tampered"


class LedgerMismatch(PrivacyError):
    """The record of releases is of other data, another unit or another site."""

    code = "ledger-mismatch"


class LedgerUnavailable(PrivacyError):
    """The record of releases cannot be read or written; nothing that depends on it happened."""

    code = "ledger-unavailable"


class ReservationMisused(PrivacyError):
    """One reservation stands for one draw of the noise; a second one was about to be given out under it."""

    code = "reservation-misused"


class AuditFailed(PrivacyError):
    """Guesses about who was in a training contradict the epsilon that is claimed for it."""

    code = "audit-failed"


class UnsupportedEvent(PrivacyError, ValueError):
    """A mechanism, a model or data for which no guarantee can be given."""

    code = "unsupported-event"
