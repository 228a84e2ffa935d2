"""Stop strings: where in a prefix one of them first appears.

Host code. What it finds does not depend on the interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"
MARGIN = 4  # characters at the start of a text that may read otherwise than in the middle of one

Decode = Callable[[tuple[int, ...]], str]


@dataclasses.dataclass(frozen=True)
class Stop:
    """The end of a prefix by a stop string.

    Attributes:
      string: which.
      length: tokens up to the one that completes it.
      text: what stands before it.
    """

    string: str
    length: int
    text: str


def find_stop(
    decode: Decode, tokens: tuple[int, ...], known: int, strings: Sequence[str]
) -> Stop | None:
    """The first stop string that is complete after more than `known` tokens; None if there is none.

    Of several that the same token completes, it is the one that begins first, then the first of
    `strings`.

    Args:
      decode: ids to text.
      tokens: of the whole prefix.
      known: after so many tokens none was there.
    """
    longest = max(map(len, strings))
    tail = decode(tokens[_tail_start(decode, tokens, known, longest) :])
    if not any(string in tail for string in strings):
        return None
    for length in range(known + 1, len(tokens) + 1):
        # Bytes of a character that is not complete yet read as this one.
        text = decode(tokens[:length]).rstrip(UNFINISHED_CHARACTER)
        places = [(place, i) for i, x in enumerate(strings) if (place := text.find(x)) >= 0]
        if places:
            place, i = min(places)
            return Stop(strings[i], length, text[:place])
    return None


def _tail_start(decode: Decode, tokens: tuple[int, ...], known: int, longest: int) -> int:
    """A token before the last `longest` characters of the first `known` tokens.

    From there on the text stays short to decode.
    """
    reach = longest + MARGIN
    while reach < known:
        if len(decode(tokens[known - reach : known])) >= longest + MARGIN:
            return known - reach
        reach *= 2
    return 0


def withheld(text: str, strings: Sequence[str]) -> int:
    """How many last characters of `text` may begin a stop string, and are not streamed yet."""
    most = min(len(text), max((len(x) for x in strings), default=1) - 1)
    return next((n for n in range(most, 0, -1) if any(x.startswith(text[-n:]) for x in strings)), 0)


@dataclasses.dataclass(frozen=True)
class JointHistory:
    """The last joints of a prefix, kept where a stop string may end it in the middle of an
    interval.

    Attributes:
      joints: `[K, C]` float32, the last one after the last token.
      tokens: how many that is.
    """

    joints: np.ndarray
    tokens: int = 0

    def extended(self, joints: Any) -> JointHistory:
        """With the joints `[T, C]` after `T` more tokens."""
        return JointHistory(np.concatenate([self.joints, joints]), self.tokens + len(joints))

    def last(self, window: int) -> JointHistory:
        """The last `window` of them, which is all that is ever read."""
        return JointHistory(self.joints[-window:], self.tokens)

    def mean_of_finished(self, length: int, window: int) -> np.ndarray:
        """Mean joint `[C]` of a prefix that ends with token number `length`.

        The joint after its last token does not count.
        """
        first = self.tokens - len(self.joints) + 1  # number of tokens before the first joint
        used = self.joints[max(0, length - window) - first : length - first]
        return used.mean(axis=0, dtype=np.float64).astype(np.float32)
