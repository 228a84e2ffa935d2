"""The one error type for bad input."""

from __future__ import annotations

import re

LONGEST = 900  # characters of a message: a paragraph, whatever the input was
# what would start another line, or move the cursor of a terminal
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class UsageError(ValueError):
    """Input that cannot work, found before any expensive work.

    The message is one short paragraph that names the value, the reason and the fix.
    Long parts lose their middle, for a value may be a text of megabytes.
    The command line prints the message without a traceback and exits with status 2.

    Attributes:
      value, reason, fix: the three parts, as the message shows them.
    """

    def __init__(self, value: str, reason: str, fix: str):
        self.value, self.reason, self.fix = _fitted(
            [value, reason, fix], LONGEST - len(": . Fix: .")
        )
        super().__init__(f"{self.value}: {self.reason}. Fix: {self.fix}.")

    def __reduce__(self) -> tuple[type[UsageError], tuple[str, str, str]]:
        """Pickled by its three parts, so that it comes through a process pool."""
        return UsageError, (self.value, self.reason, self.fix)


def shortened(text: str, length: int) -> str:
    """At most `length` characters of `text` in one line: its start and its end, for paths differ at
    their ends."""
    if len(text) > 4 * length:
        text = f"{text[: 2 * length]}{text[-2 * length :]}"  # so that megabytes cost nothing
    text = _BREAKS.sub(" ", text)
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 5]} ... {text[-end:]}"


def _fitted(parts: list[str], total: int) -> list[str]:
    """The parts, the longest ones shortened until all together have at most `total` characters."""
    fitted, left = dict[int, str](), total
    for rank, (number, part) in enumerate(sorted(enumerate(parts), key=lambda pair: len(pair[1]))):
        fitted[number] = shortened(part, left // (len(parts) - rank))
        left -= len(fitted[number])
    return [fitted[number] for number in range(len(parts))]
