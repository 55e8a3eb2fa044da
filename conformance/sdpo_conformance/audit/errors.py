"""What the audit raises when it cannot look."""

from __future__ import annotations

_LONGEST_NAME = 120


class AuditError(Exception):
    """The audit cannot look; the message is one line that says what was wrong and what to do."""


class PickledError(AuditError):
    """Weights that are a pickle, which reading could run."""


class NoStepsError(AuditError):
    """A log that is understood and holds no training step: nothing was logged."""


def shown(text: object) -> str:
    """A name from a file, safe to print: control characters escaped, cut at 120 characters."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return plain if len(plain) <= _LONGEST_NAME else plain[: _LONGEST_NAME - 1] + "…"
