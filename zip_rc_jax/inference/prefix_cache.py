"""Pages of prompts, found again by the ids that they hold. Host code, without JAX.

A radix tree of pages: a node is one page, and the path to it spells the ids before it. Ids are
compared themselves; a hash only speeds up the look-up of equal ones. The allocator counts who holds
a page. The cache knows which of its pages nobody holds, and gives up the least recently used first.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence

Ids = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class _Node:
    """One page and the first ids in it: a full page, or the last page of a prompt.

    Attributes:
      full: children that are full pages, by their ids.
      alike: all children, by their first ids.
    """

    page: int
    ids: Ids
    parent: _Node | None
    full: dict[Ids, _Node] = dataclasses.field(default_factory=dict)
    alike: dict[Ids, list[_Node]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Match:
    """What the cache holds of a prompt's beginning.

    Attributes:
      pages: full pages, in order; to be shared.
      tail: a page that begins as the prompt's next page does, to be copied; -1 for none.
      tail_tokens: how many of its first tokens are the prompt's.
    """

    pages: tuple[int, ...]
    tail: int = -1
    tail_tokens: int = 0


class PrefixCache:
    """The pages of prompts by their ids."""

    def __init__(self, page_size: int, least_copied: int):
        """Args:
        page_size: tokens of a page.
        least_copied: tokens that make it worth to copy a page for its beginning.
        """
        self.page_size, self.least_copied = page_size, least_copied
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, the oldest first

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    @property
    def num_idle(self) -> int:
        """Pages that could be given up now."""
        return len(self._idle)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def tokens_in(self, page: int) -> int:
        """Tokens of a page that prompts may find; 0 where it is not here."""
        return len(self._nodes[page].ids) if page in self else 0

    def retire(self, page: int) -> None:
        """The last holder of a page has left. It is the most recently used one now."""
        self._idle[page] = None

    def revive(self, page: int) -> None:
        """An idle page is held again."""
        del self._idle[page]

    def match(self, ids: Sequence[int]) -> Match:
        """The longest beginning of `ids` that is here; never all of it.

        The last id is left out because its logits have to be computed.
        """
        known = tuple(ids[:-1])
        node, pages = self._root, list[int]()
        for chunk in self._chunks(known):
            child = node.full.get(chunk)
            if child is None:
                break
            node = child
            pages.append(node.page)
        rest = known[len(pages) * self.page_size :][: self.page_size]
        start = rest[: self._start]
        alike = node.alike.get(start, []) if len(rest) >= self.least_copied else []
        equal = [(_equal(child.ids, rest), child.page) for child in alike]
        tokens, page = max(equal, key=lambda pair: pair[0], default=(0, -1))
        if tokens < self.least_copied:
            return Match(tuple(pages))
        return Match(tuple(pages), page, tokens)

    def insert(self, pages: Sequence[int], ids: Sequence[int]) -> list[int]:
        """Enters the pages that hold `ids`, the last one perhaps in part.

        Pages whose ids are here already stay outside.

        Args:
          pages: one for every page of ids, all of them held.

        Returns:
          pages that left the cache for it, and that nobody holds.
        """
        node, freed = self._root, list[int]()
        for page, chunk in zip(pages, self._chunks(tuple(ids), partial=True), strict=True):
            child = node.full.get(chunk)
            if child is None:
                known = self._nodes.get(page)
                if known is not None and (known.parent is not node or known.ids != chunk):
                    freed += self.forget(page)  # as its prompt went on, the page got fuller
                    known = None
                child = known or self._add(node, page, chunk)
            node = child
        return freed

    def forget(self, page: int) -> list[int]:
        """Takes a page out, and all that continue it, for they cannot be found without it.

        Returns:
          pages that nobody holds, which are free now.
        """
        top = self._nodes[page]
        assert top.parent is not None
        top.parent.full.pop(top.ids, None)
        start = top.ids[: self._start]
        top.parent.alike[start].remove(top)
        if not top.parent.alike[start]:
            del top.parent.alike[start]
        freed, left = list[int](), [top]
        while left:
            node = left.pop()
            del self._nodes[node.page]
            if node.page in self._idle:
                del self._idle[node.page]
                freed.append(node.page)
            left += [child for alike in node.alike.values() for child in alike]
        return freed

    def swap(self, page: int, other: int) -> None:
        """Two pages change places; what they hold is found as before."""
        new = {page: other, other: page}
        nodes = {new[p]: self._nodes.pop(p) for p in new if p in self._nodes}
        for number, node in nodes.items():
            node.page = number
        self._nodes |= nodes
        if page in self._idle or other in self._idle:
            self._idle = OrderedDict.fromkeys(new.get(p, p) for p in self._idle)

    def reclaim(self) -> list[int]:
        """Gives up the page that nobody has used for longest, and what continues it."""
        return self.forget(next(iter(self._idle)))

    @property
    def _start(self) -> int:
        return min(self.least_copied, self.page_size)

    def _chunks(self, ids: Ids, partial: bool = False) -> Iterator[Ids]:
        """The ids of every full page; with `partial`, those of the last one too."""
        size = self.page_size
        end = len(ids) if partial else len(ids) // size * size
        return (ids[i : i + size] for i in range(0, end, size))

    def _add(self, parent: _Node, page: int, ids: Ids) -> _Node:
        node = _Node(page, ids, parent)
        self._nodes[page] = node
        parent.alike.setdefault(ids[: self._start], []).append(node)
        if len(ids) == self.page_size:
            parent.full[ids] = node
        return node


def _equal(ids: Ids, other: Ids) -> int:
    """How many first ids are the same in both."""
    pairs = zip(ids, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other)))
