"""The one error type for bad input."""

from __future__ import annotations


class UsageError(ValueError):
    """Input that cannot work, found before any expensive work.

    The message is one paragraph that names the value, the reason and the fix.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, value: str, reason: str, fix: str):
        super().__init__(f"{value}: {reason}. Fix: {fix}.")
        self.value, self.reason, self.fix = value, reason, fix
