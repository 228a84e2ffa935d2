"""Pages of the decoder's cache: who holds which, and what the device must copy. No JAX here.

A page holds `page_size` positions of one sequence, in all layers. A sequence has a table: the
numbers of its pages, in order of positions. A meta-action is an edit of tables:

  start, fork   the new table names the same pages, and each page counts one holder more;
  extend        pages for the next tokens; a page that others hold too is copied before it is
                written, so at most one page of a table is copied;
  stop          each page counts one holder less;
  offload       the pages are read into host memory and given back; `fetch` brings them home.

A page with several holders is never written. That no page is left is an answer (None), not an
error: the scheduler decides then. Wrong calls raise `PageError`.

The device carries out what one plan returns in this order: reads, writes, copies, and then steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from zip_rc_jax.inference.host_pages import NOWHERE, HostPages
from zip_rc_jax.inference.page_table import GONE, Copy, PageError, PageTable, Place, Released
from zip_rc_jax.inference.prefix_cache import PrefixCache


class PageAllocator:
    """The pages of one shard of the device's cache, and the copies in host memory."""

    def __init__(self, num_pages: int, page_size: int, window: int = 0, least_copied: int = 32):
        """Args:
        num_pages, page_size: pages, and tokens of each. One page may be a whole slot.
        window: of a model where all layers slide: tokens that the next one sees, its own
          included; 0 for all. If one layer sees all tokens, no page is ever left behind.
        least_copied: see `PrefixCache`.
        """
        self.num_pages, self.page_size, self.window = num_pages, page_size, window
        self.refs = [0] * num_pages
        self.cache = PrefixCache(page_size, least_copied)
        self.host = HostPages()
        self._free = list(range(num_pages))  # a heap

    # Counting.

    @property
    def available(self) -> int:
        """Pages that can be taken now: free ones, and those that only the prefix cache keeps."""
        return len(self._free) + self.cache.num_idle

    def is_free(self, page: int) -> bool:
        """Whether nothing in it is needed."""
        return not self.refs[page] and page not in self.cache

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    def worst_case(self, prompt: int, max_tokens: int, n: int) -> int:
        """Most pages that `n` sequences of a prompt ever hold; they share its full pages.

        Of the root only the last page is not full. It counts as the first page of a sequence that
        has not begun.
        """
        shared = prompt // self.page_size
        return shared + n * (self.pages_for(prompt + max_tokens) - shared)

    def needs(self, table: PageTable, tokens: int) -> int:
        """Pages that are taken to write the next `tokens` tokens of a sequence on the device."""
        if not tokens:
            return 0
        new = max(0, self.pages_for(table.length + tokens) - len(table.pages))
        return new + self._has_shared_tail(table)

    def fetch_needs(self, table: PageTable) -> int:
        """Pages that are taken to bring a sequence back."""
        here = [self.host.page_of(h) for h in table.pages if h != GONE]
        return sum(page < 0 or self.cache.is_idle(page) for page in here)

    def gives_back(self, table: PageTable) -> int:
        """Pages that are free if this sequence leaves the device."""
        return sum(page != GONE and self.refs[page] == 1 for page in table.pages)

    def open_needs(self, ids: Sequence[int]) -> int:
        """Pages that are taken to open a prompt and to write all of it."""
        match = self.cache.match(ids)
        idle = sum(map(self.cache.is_idle, match.pages))
        return self.pages_for(len(ids)) - len(match.pages) + idle

    def known_tokens(self, ids: Sequence[int]) -> int:
        """First tokens of a prompt that `open` would find."""
        match = self.cache.match(ids)
        return len(match.pages) * self.page_size + match.tail_tokens

    # Edits.

    def open(self, ids: Sequence[int], share: bool = True) -> tuple[PageTable, list[Copy]]:
        """A table for a prompt. It holds what the prefix cache has of it: full pages are shared.

        One page more may begin as the prompt goes on. It is copied if another page is free, else
        taken over if nobody holds it. The caller computes the tokens behind `length`, and has the
        copies carried out before the next edit of a plan.

        Args:
          share: False for a model whose state is more than its pages (short convolutions).
        """
        table, copies = PageTable(), list[Copy]()
        if not share:
            return table, copies
        match = self.cache.match(ids)
        for page in match.pages:
            self._hold(page)
        table.pages, table.length = list(match.pages), len(match.pages) * self.page_size
        if match.tail < 0:
            return table, copies
        is_idle = self.cache.is_idle(match.tail)
        if self.available > is_idle:
            self._hold(match.tail)  # so that it is not reclaimed for its own copy
            copies.append((match.tail, self._take()))
            self._release(match.tail)
            table.pages.append(copies[0][1])
        elif is_idle:
            self._hold(match.tail)
            self._set_free(self.cache.forget(match.tail))
            self.host.unlink(match.tail)  # what follows the equal tokens is overwritten
            table.pages.append(match.tail)
        else:
            return table, copies
        table.length += match.tail_tokens
        return table, copies

    def publish(self, table: PageTable, ids: Sequence[int]) -> None:
        """Enters the pages of a prompt into the prefix cache, as far as they are computed.

        Call it when they are known to be finite. `ids` are the prompt's.
        """
        self._check(table, "device")
        count = next((i for i, p in enumerate(table.pages) if p == GONE), len(table.pages))
        known = ids[: min(table.length, count * self.page_size)]
        self._set_free(self.cache.insert(table.pages[: self.pages_for(len(known))], known))

    def extend(self, table: PageTable, tokens: int) -> list[Copy] | None:
        """Makes the next `tokens` positions writable: at most one copy, then new pages.

        None, with nothing changed, if pages are missing.
        """
        self._check(table, "device")
        if self.needs(table, tokens) > self.available:
            return None
        copies = list[Copy]()
        if tokens and self._has_shared_tail(table):
            last = table.length // self.page_size
            copies.append((table.pages[last], self._take()))
            self._release(table.pages[last])
            table.pages[last] = copies[0][1]
        while len(table.pages) < self.pages_for(table.length + tokens):
            table.pages.append(self._take())
        return copies

    def advance(self, table: PageTable, tokens: int) -> None:
        """Counts tokens that were written, and gives back what the window has left behind."""
        self._check(table, "device")
        length = table.length + tokens
        if tokens < 0 or length > len(table.pages) * self.page_size:
            raise PageError(f"{tokens} tokens were written where none were asked for")
        if tokens and self._has_shared_tail(table):
            raise PageError("a page that others hold was written")
        table.length = length
        if self.window:
            # The next token, at `length`, sees positions from length - window + 1 on.
            for i in range(max(0, (length - self.window + 1) // self.page_size)):
                if table.pages[i] != GONE:
                    self._release(table.pages[i])
                    table.pages[i] = GONE

    def fork(self, table: PageTable) -> PageTable:
        """A second table on the same pages; takes no page now.

        The last page is copied by whoever writes it first, not at once: a fork that ends before it
        runs costs nothing, and the last holder writes in place.
        """
        if table.place == "ended":
            raise PageError("a sequence that has ended was forked")
        pages = table.pages[: self.pages_for(table.length)]
        for page in pages:
            if page != GONE and table.place == "host":
                self.host.hold(page)
            elif page != GONE:
                self._hold(page)
        return PageTable(pages, table.length, table.place)

    def stop(self, table: PageTable, discard: bool = False) -> Released:
        """Gives back all that a sequence holds.

        Args:
          discard: what it wrote is not finite. Pages of its own leave the prefix cache too, and
            `Released.pages` are to be cleared.
        """
        if table.place == "ended":
            raise PageError("a sequence ended twice")
        if table.place == "host":
            released = Released((), self._drop_host(table))
        else:
            if discard:
                for page in table.pages:
                    if page in self.cache and self.refs[page] == 1:
                        self._set_free(self.cache.forget(page))
            # The last pages first: they are reclaimed before those that they continue.
            held = [page for page in reversed(table.pages) if page != GONE]
            released = Released(tuple(page for page in held if self._release(page)))
        table.pages, table.place = [], "ended"
        return released

    def swap(self, page: int, other: int) -> bool:
        """Two pages change places; the tables that name them are the caller's to change.

        Returns:
          whether anything in `other` is still needed. Otherwise a copy to it is enough.
        """
        other_was_free = other in self._free
        self.refs[page], self.refs[other] = self.refs[other], self.refs[page]
        self.cache.swap(page, other)
        self.host.swap(page, other)
        for mine, theirs in ((page, other), (other, page)):
            if mine in self._free and theirs not in self._free:
                self._free[self._free.index(mine)] = theirs
                break
        heapq.heapify(self._free)
        return not other_was_free

    # Host memory.

    def offload(self, table: PageTable) -> list[Copy]:
        """Moves a sequence to host memory.

        A full page that several sequences hold is read once, and shared again when they come back.

        Returns:
          what is to be read, as (page, page of the host).
        """
        self._check(table, "device")
        reads, kept = list[Copy](), list[int]()
        for i, page in enumerate(table.pages[: self.pages_for(table.length)]):
            is_full = (i + 1) * self.page_size <= table.length
            if page == GONE:
                kept.append(GONE)
                continue
            host = self.host.copy_of(page)
            if host == NOWHERE:
                host = self.host.new()
                reads.append((page, host))
                if is_full:
                    self.host.link(page, host)
            self.host.hold(host)
            kept.append(host)
        for page in reversed(table.pages):
            if page != GONE:
                self._release(page)
        table.pages, table.place = kept, "host"
        return reads

    def fetch(self, table: PageTable) -> tuple[list[Copy], Released] | None:
        """Brings a sequence back bit for bit; None, with nothing changed, if pages are missing.

        Returns:
          what is to be written, as (page of the host, page), and copies that are not needed then.
        """
        self._check(table, "host")
        if self.fetch_needs(table) > self.available:
            return None
        # Hold what is still here first, so that it is not reclaimed for the rest.
        pages = [GONE if h == GONE else self.host.page_of(h) for h in table.pages]
        for page in pages:
            if page != GONE:
                self._hold(page)
        writes = list[Copy]()
        for i, host in enumerate(table.pages):
            if host != GONE and pages[i] < 0:
                pages[i] = self._take()
                writes.append((host, pages[i]))
                if (i + 1) * self.page_size <= table.length:
                    self.host.link(pages[i], host)
        dropped = self._drop_host(table)
        table.pages, table.place = pages, "device"
        return writes, Released((), dropped)

    # Inside.

    def _check(self, table: PageTable, place: Place) -> None:
        if table.place != place:
            raise PageError(f"a sequence is expected on the {place}, and this one: {table.place}")

    def _has_shared_tail(self, table: PageTable) -> bool:
        last, used = divmod(table.length, self.page_size)
        return used > 0 and self.refs[table.pages[last]] > 1

    def _take(self) -> int:
        if not self._free:
            self._set_free(self.cache.reclaim())
        page = heapq.heappop(self._free)
        self.refs[page] = 1
        return page

    def _hold(self, page: int) -> None:
        if self.cache.is_idle(page):
            self.cache.revive(page)
        self.refs[page] += 1

    def _release(self, page: int) -> bool:
        """Whether the page is free now."""
        if self.refs[page] < 1:
            raise PageError(f"page {page} was given back twice")
        self.refs[page] -= 1
        if self.refs[page]:
            return False
        if page in self.cache:
            self.cache.retire(page)
            return False
        self._set_free([page])
        return True

    def _set_free(self, pages: list[int]) -> None:
        for page in pages:
            self.host.unlink(page)
            heapq.heappush(self._free, page)

    def _drop_host(self, table: PageTable) -> tuple[int, ...]:
        """Counts one holder less of every host page; those that nobody holds are forgotten."""
        return tuple(h for h in table.pages if h != GONE and self.host.release(h))
