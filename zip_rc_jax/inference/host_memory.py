"""Sequences that left the device for host memory, bit for bit. Host code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from zip_rc_jax.inference.page_table import Edits, Key

Content = list[np.ndarray]  # one array for every leaf


class HostMemory:
    """Contents of pages and of slots, by shard and number.

    The leaves of what `state.read_out` gives are `[L, X, N, ...]`: entry `n` of shard `x` is kept.
    """

    def __init__(self) -> None:
        self.pages: dict[tuple[int, int], Content] = {}
        self.slots: dict[tuple[int, Key], Content] = {}

    def keep(self, edits: Sequence[Edits], pages: Any, slots: Any) -> None:
        """Takes over what was read out for the edits of every shard."""
        page_leaves, slot_leaves = map(_on_host, (pages, slots))
        for shard, mine in enumerate(edits):
            for n, (_, host) in enumerate(mine.reads):
                self.pages[shard, host] = _entry(page_leaves, shard, n)
            for n, (_, key) in enumerate(mine.slot_reads):
                self.slots[shard, key] = _entry(slot_leaves, shard, n)

    def filled_pages(self, edits: Sequence[Edits], like: Any) -> Any:
        """Arrays as `like` (abstract) that hold the pages to be written."""
        wanted = [[self.pages[x, host] for host, _ in e.writes] for x, e in enumerate(edits)]
        return _filled(wanted, like)

    def filled_slots(self, edits: Sequence[Edits], like: Any) -> Any:
        """Arrays as `like` (abstract) that hold the slots to be written."""
        wanted = [[self.slots[x, key] for key, _ in e.slot_writes] for x, e in enumerate(edits)]
        return _filled(wanted, like)

    def copy_and_drop(self, edits: Sequence[Edits]) -> None:
        """What the edits ask for in host memory itself; copies first."""
        for shard, mine in enumerate(edits):
            for source, target in mine.host_copies:
                self.slots[shard, target] = self.slots[shard, source]
            for host in mine.dropped_pages:
                del self.pages[shard, host]
            for key in mine.dropped_keys:
                del self.slots[shard, key]


def _on_host(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _entry(leaves: Iterable[np.ndarray], shard: int, n: int) -> Content:
    # copied, so that it does not keep all that was read with it
    return [leaf[:, shard, n].copy() for leaf in leaves]


def _filled(wanted: Sequence[Sequence[Content]], like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    arrays = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    for shard, contents in enumerate(wanted):
        for n, content in enumerate(contents):
            for array, part in zip(arrays, content, strict=True):
                array[:, shard, n] = part
    return jax.tree.unflatten(structure, arrays)
