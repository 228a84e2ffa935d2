"""The one error type for bad input."""

from __future__ import annotations

MOST, PART = 900, 280  # characters of a message, and of each of its three parts where the whole would be longer


class UsageError(ValueError):
    """Input that cannot work, found before any expensive work.

    The message is one paragraph that names the value, the reason and the fix. However large the input is, it stays short.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, value: str, reason: str, fix: str):
        if len(value) + len(reason) + len(fix) > MOST:
            value, reason, fix = (_cut(part) for part in (value, reason, fix))
        super().__init__(f"{value}: {reason}. Fix: {fix}.")
        self.value, self.reason, self.fix = value, reason, fix


def _cut(text: str) -> str:
    """Without its middle, if it is long; names of files end in what tells them apart."""
    return text if len(text) <= PART else f"{text[: PART - 80]} ... {text[-75:]}"
