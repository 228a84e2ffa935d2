"""Which rows of the pool are taken, and the moves that keep the live ones at the beginning of their shard. Host code."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

Move = tuple[int, int, int]  # from row, to row, branch number or -1 to keep it


@dataclasses.dataclass
class Shard:
    """The rows of one shard of the pool.

    Attributes:
      free: rows that hold no prefix, a heap.
      promised: how many of them prefixes that branching may add will take.
    """

    free: list[int]
    promised: int = 0

    def take(self) -> int:
        """The first free row."""
        return heapq.heappop(self.free)

    def give(self, row: int) -> None:
        heapq.heappush(self.free, row)


@dataclasses.dataclass(frozen=True)
class Place:
    """The field of a host record that says in which row a prefix lies."""

    record: Any
    field: str

    @property
    def row(self) -> int:
        return getattr(self.record, self.field)

    def move(self, row: int) -> None:
        setattr(self.record, self.field, row)


def live_rows_first(live: Sequence[Place], paused: Sequence[Place], shard: Shard, width: int, scratch: int) -> list[Move]:
    """Moves live rows until all of them are below `width`; updates the places and the free rows.

    A live row goes to a free one if there is one below `width`; otherwise it changes places with a paused one, through `scratch`.

    Args:
      live, paused: who holds the taken rows of the shard.
      width: at least the number of live rows.
      scratch: a row that holds nothing.
    """
    moves: list[Move] = []
    in_the_way = iter([place for place in paused if place.row < width])
    for place in [place for place in live if place.row >= width]:
        old = place.row
        if shard.free and shard.free[0] < width:
            place.move(shard.take())
            shard.give(old)
            moves.append((old, place.row, -1))
        else:
            other = next(in_the_way)
            place.move(other.row)
            other.move(old)
            moves += [(old, scratch, -1), (place.row, old, -1), (scratch, place.row, -1)]
    return moves
