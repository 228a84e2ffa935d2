"""The pages of one sequence, and what edits of them return."""

from __future__ import annotations

import dataclasses
from typing import Literal

GONE = -1  # in a table: the sliding window has left this page behind
Copy = tuple[int, int]  # from a page, to a page
Key = tuple[int, int]  # number of the prompt in order of admission, id of the prefix (or ROOT)
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


@dataclasses.dataclass
class Edits:
    """What the device does, in the order of the fields.

    Those of decisions are carried out before the next plan; those of a plan, before its interval.
    Edits of one kind do not depend on each other: all reads of a field may come before its writes.

    Attributes:
      cleared: pages whose content is not finite, and that nobody holds; to be zeroed.
      reads: (page, page of the host); `slot_reads`: (slot, key) of a sequence's small state.
      writes: (page of the host, page); `slot_writes`: (key, slot).
      copies: (from, to) of pages; `slot_copies` of slots; `host_copies` of keys, in host memory.
      dropped_pages, dropped_keys: copies in host memory that nobody needs after that.
      run: the sequences to step: each writes its `due` tokens, or ends before.
    """

    cleared: list[int] = dataclasses.field(default_factory=list)
    reads: list[Copy] = dataclasses.field(default_factory=list)
    slot_reads: list[tuple[int, Key]] = dataclasses.field(default_factory=list)
    writes: list[Copy] = dataclasses.field(default_factory=list)
    slot_writes: list[tuple[Key, int]] = dataclasses.field(default_factory=list)
    copies: list[Copy] = dataclasses.field(default_factory=list)
    slot_copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    host_copies: list[tuple[Key, Key]] = dataclasses.field(default_factory=list)
    dropped_pages: list[int] = dataclasses.field(default_factory=list)
    dropped_keys: list[Key] = dataclasses.field(default_factory=list)
    run: list[Key] = dataclasses.field(default_factory=list)

    def add(self, later: Edits) -> None:
        """Edits that come after these, and depend on none of them."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).extend(getattr(later, field.name))
