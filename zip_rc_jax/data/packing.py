"""Which rollouts share a row.

Planned from their lengths alone, so that every process has the whole plan and need not read for it.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

with optional_import():
    import grain

ENOUGH = 0.95  # share of the positions that should hold a token
_LOOK = 4  # windows that are packed to see how full rows will be,
_LOOK_ROLLOUTS = 2000  # as long as they have few rollouts


class _Rooms:
    """Rows of one window, filled best-fit: a sequence goes where it leaves the least room."""

    def __init__(self, rows: int, tokens: int):
        self._rooms = [(tokens, row) for row in range(rows)]

    def add(self, size: int) -> int | None:
        """The row that a sequence of this size went to; None if there is no room."""
        at = bisect.bisect_left(self._rooms, (size, -1))
        if at == len(self._rooms):
            return None
        room, row = self._rooms.pop(at)
        bisect.insort(self._rooms, (room - size, row))
        return row

    def add_all(self, sizes: np.ndarray) -> list[int] | None:
        """The rows of many, the longest first; None if there is no room for all."""
        rows = [0] * len(sizes)
        for i in np.argsort(-sizes, kind="stable"):
            row = self.add(int(sizes[i]))
            if row is None:
                return None
            rows[i] = row
        return rows


class PackedBatches(grain.IterDataset):
    """Batches as lists of rows, each row an int64 array of the numbers of its rollouts.

    A batch may have fewer than `batch_rows` rows.

    Every epoch draws a new order of the rollouts. A window of `pack_batches` batches takes as many
    of them as best-fit decreasing finds room for, and skips none. Its rows are shuffled. An
    iterator's state is where its window begins and how many of its batches were given.

    Args:
      lengths: int64 `[n]`, tokens of every rollout; at most `row_tokens`.
      epochs: passes over the rollouts; None repeats for ever.
      seed: 0 .. 2**32 - 1; decides the order and the shuffling of rows.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_rows: int,
        row_tokens: int,
        pack_batches: int,
        seed: int,
        epochs: int | None,
    ):
        order = grain.MapDataset.range(len(lengths)).shuffle(seed=seed).repeat(epochs)
        super().__init__(order)
        self._order, self._lengths, self._seed = order, lengths, seed
        self._rows, self._batch_rows, self._row_tokens = (
            batch_rows * pack_batches,
            batch_rows,
            row_tokens,
        )

    def __iter__(self) -> PackedBatchesIterator:
        return PackedBatchesIterator(self)

    def window(self, start: int) -> tuple[list[list[np.ndarray]], int]:
        """The batches of the window that begins with the `start`-th rollout of the order, and where
        the next one begins."""
        candidates, sizes = self._candidates(start)
        low, high = min(self._rows, len(candidates)), len(candidates)  # one in a row always fits
        while low < high:
            middle = (low + high + 1) // 2
            fits = _Rooms(self._rows, self._row_tokens).add_all(sizes[:middle]) is not None
            low, high = (middle, high) if fits else (low, middle - 1)
        rooms = _Rooms(self._rows, self._row_tokens)
        rows = rooms.add_all(sizes[:low])
        assert rows is not None
        for size in sizes[low:]:  # more may fit where they come: then no row stays empty
            row = rooms.add(int(size))
            if row is None:
                break
            rows.append(row)
        groups = [
            candidates[: len(rows)][np.array(rows) == row]
            for row in np.random.default_rng([self._seed, start]).permutation(self._rows)
        ]
        groups = [group for group in groups if len(group)]
        return [
            groups[i : i + self._batch_rows] for i in range(0, len(groups), self._batch_rows)
        ], start + len(rows)

    def _candidates(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and sizes of the next rollouts, so many that all rows would be full; fewer at the
        end of the last epoch."""
        taken: list[int] = []
        room = self._rows * self._row_tokens
        while room > 0 and start + len(taken) < len(self._order):
            taken.append(int(self._order[start + len(taken)]))
            room -= int(self._lengths[taken[-1]])
        numbers = np.array(taken, np.int64)
        return numbers, self._lengths[numbers]

    def fill_rate(self) -> float:
        """Share of the positions of the first windows that hold a token, in rows with any."""
        start, tokens, rows = 0, 0, 0
        for _ in range(_LOOK):
            if start > _LOOK_ROLLOUTS:
                break
            batches, start = self.window(start)
            groups = [group for batch in batches for group in batch]
            tokens, rows = (
                tokens + sum(int(self._lengths[group].sum()) for group in groups),
                rows + len(groups),
            )
        return tokens / (max(rows, 1) * self._row_tokens)


class PackedBatchesIterator(grain.DatasetIterator):
    """See `PackedBatches`."""

    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._dataset = dataset
        self._start, self._given = 0, 0
        self._batches: list[list[np.ndarray]] | None = None
        self._next_start = 0

    def __next__(self) -> list[np.ndarray]:
        if self._batches is None or self._given == len(self._batches):
            if self._batches is not None:
                self._start, self._given = self._next_start, 0
            self._batches, self._next_start = self._dataset.window(self._start)
        if self._given >= len(self._batches):
            raise StopIteration
        self._given += 1
        return self._batches[self._given - 1]

    def get_state(self) -> dict[str, Any]:
        return {"start": self._start, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises `UsageError` for the state of another packer."""
        if state.keys() != {"start", "given"}:
            raise UsageError(
                "the checkpoint's position in the data",
                "batches were packed otherwise then",
                "start the run afresh",
            )
        self._start, self._given = state["start"], state["given"]
        self._batches, self._next_start = self._dataset.window(self._start)


def packing_advice(
    lengths: np.ndarray, *, batch_rows: int, row_tokens: int, pack_batches: int, seed: int
) -> str | None:
    """What to tell who trains on rows that are less than `ENOUGH` full, with a row length that is
    better; None where they are fuller."""

    def fill(times: int) -> float:
        rows = max(1, batch_rows // times)
        shape = {"batch_rows": rows, "row_tokens": row_tokens * times, "pack_batches": pack_batches}
        return PackedBatches(lengths, **shape, seed=seed, epochs=None).fill_rate()

    now = fill(1)
    if now >= ENOUGH:
        return None
    shares = {times: fill(times) for times in (2, 4, 8)}
    best = next(
        (times for times in shares if shares[times] >= ENOUGH),
        max(shares, key=lambda times: shares[times]),
    )
    return (
        f"row_tokens={row_tokens}: the rows are only {now:.1%} full: what is left of them is too "
        "short for rollouts of "
        f"{lengths.min()} to {lengths.max()} tokens. Fix: set row_tokens={row_tokens * best} and "
        f"batch_rows={max(1, batch_rows // best)}, and they are {shares[best]:.1%} full."
    )
