"""Copies of pages in host memory: who holds them, and which pages of the device are the same."""

from __future__ import annotations

import dataclasses

NOWHERE = -1


@dataclasses.dataclass(eq=False)
class _HostPage:
    refs: int = 0
    page: int = NOWHERE


class HostPages:
    """Numbers of host pages. Only a full page of the device can be linked to its copy here, for
    only then its content stays as it is."""

    def __init__(self) -> None:
        self._pages: dict[int, _HostPage] = {}
        self._copies: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, host: int) -> bool:
        return host in self._pages

    def new(self) -> int:
        """A page with no holder yet."""
        self._next += 1
        self._pages[self._next - 1] = _HostPage()
        return self._next - 1

    def copy_of(self, page: int) -> int:
        """The copy of a page of the device, or `NOWHERE`."""
        return self._copies.get(page, NOWHERE)

    def page_of(self, host: int) -> int:
        """The page of the device that has the same content, or `NOWHERE`."""
        return self._pages[host].page

    def link(self, page: int, host: int) -> None:
        """The two have the same content from now on."""
        self._copies[page], self._pages[host].page = host, page

    def unlink(self, page: int) -> None:
        """The content of a page of the device is going to change."""
        host = self._copies.pop(page, NOWHERE)
        if host != NOWHERE:
            self._pages[host].page = NOWHERE

    def swap(self, page: int, other: int) -> None:
        """Two pages of the device change places."""
        new = {page: other, other: page}
        copies = {new[p]: self._copies.pop(p) for p in new if p in self._copies}
        for number, host in copies.items():
            self._pages[host].page = number
        self._copies |= copies

    def hold(self, host: int) -> None:
        self._pages[host].refs += 1

    def release(self, host: int) -> bool:
        """One holder less; whether it was the last one, and the copy is forgotten."""
        held = self._pages[host]
        held.refs -= 1
        if held.refs:
            return False
        self._copies.pop(held.page, None)
        del self._pages[host]
        return True
