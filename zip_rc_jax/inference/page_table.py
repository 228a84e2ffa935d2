"""The pages of one sequence, and what edits of them return."""

from __future__ import annotations

import dataclasses
from typing import Literal

GONE = -1  # in a table: the sliding window has left this page behind
Copy = tuple[int, int]  # from a page, to a page
Place = Literal["device", "host", "ended"]


class PageError(RuntimeError):
    """A call that can only be a mistake of the program."""


@dataclasses.dataclass(eq=False)
class PageTable:
    """The pages of one sequence.

    Attributes:
      pages: numbers in order of positions; of pages on the host where it is offloaded. Behind those
        of its tokens there may be pages for the next ones.
      length: tokens that it holds.
      place: where its pages are.
    """

    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    place: Place = "device"


@dataclasses.dataclass(frozen=True)
class Released:
    """What nobody holds any more.

    Attributes:
      pages: free pages of the device.
      host_pages: pages of the host whose copies can be deleted, after pending writes.
    """

    pages: tuple[int, ...] = ()
    host_pages: tuple[int, ...] = ()
