"""Which rows of the pool are taken, whether more may be, and the moves that keep the live ones
first. Host code."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

RECENT = 64

Move = tuple[int, int, int]  # from row, to row, branch number or -1 to keep it


@dataclasses.dataclass
class Shard:
    """The rows of one shard of the pool.

    Attributes:
      free: rows that hold no prefix, a heap.
      taken: rows that each of the last prompts took at its first decision, the root's included.
    """

    free: list[int]
    taken: deque[int] = dataclasses.field(default_factory=lambda: deque(maxlen=RECENT))

    def take(self) -> int:
        """The first free row."""
        return heapq.heappop(self.free)

    def give(self, row: int) -> None:
        heapq.heappush(self.free, row)

    def expected(self, most: int) -> float:
        """Rows that the next prompt will probably take, at most `most`: a guess, on which only
        speed depends."""
        return min(most, sum(self.taken) / len(self.taken)) if self.taken else most


def safe(free: int, accounts: Iterable[tuple[int, int]]) -> bool:
    """Whether there is an order in which every prompt gets all the rows that it may ever need, and
    ends (the banker's algorithm).

    While that holds, prompts together may need more rows than there are: some wait, but never all
    of them.

    Args:
      free: rows.
      accounts: per prompt, (rows that it may still take, rows that it holds); when it ends it has
        given back both.
    """
    for claim, held in sorted(accounts):
        if claim > free:
            return False
        free += held
    return True


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


def live_rows_first(
    live: Sequence[Place], paused: Sequence[Place], shard: Shard, width: int, scratch: int
) -> list[Move]:
    """Moves live rows until all of them are below `width`; updates the places and the free rows.

    A live row goes to a free one if there is one below `width`; otherwise it takes the place of a
    paused one, which goes to a free row or, where there is none, to the live row's, through
    `scratch`.

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
        elif shard.free:
            other = next(in_the_way)
            place.move(other.row)
            other.move(shard.take())
            shard.give(old)
            moves += [(place.row, other.row, -1), (old, place.row, -1)]
        else:
            other = next(in_the_way)
            place.move(other.row)
            other.move(old)
            moves += [(old, scratch, -1), (place.row, old, -1), (scratch, place.row, -1)]
    return moves
