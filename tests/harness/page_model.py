"""A slow model of a device with pages: what every page and every slot holds. It carries out edits
one after another."""

from __future__ import annotations

POISON = -7  # what a page holds that nobody may read


class Device:
    """What every page of the device and of the host holds."""

    def __init__(self, num_pages, page_size, slots=0):
        self.pages = [[POISON] * page_size for _ in range(num_pages)]
        self.host = {}
        self.slots, self.host_slots = [None] * slots, {}

    def copy(self, copies):
        """All at once, as a gather and a scatter do it."""
        assert len({to for _, to in copies}) == len(copies)
        for to, content in [(to, list(self.pages[page])) for page, to in copies]:
            self.pages[to] = content

    def read(self, reads):
        for page, host in reads:
            assert host not in self.host
            self.host[host] = list(self.pages[page])

    def write(self, writes):
        for host, page in writes:
            self.pages[page] = list(self.host[host])

    def release(self, released):
        for page in released.pages:
            self.pages[page] = [POISON] * len(self.pages[page])
        for host in released.host_pages:
            del self.host[host]

    def carry_out(self, edits):
        """Reads, writes and copies, each kind at once, in this order."""
        self.read(edits.reads)
        for slot, key in edits.slot_reads:
            assert self.slots[slot] is not None
            self.host_slots[key] = self.slots[slot]
        self.write(edits.writes)
        for key, slot in edits.slot_writes:
            self.slots[slot] = self.host_slots[key]
        self.copy(edits.copies)
        for slot, content in [(to, self.slots[slot]) for slot, to in edits.slot_copies]:
            self.slots[slot] = content
        for key, new in edits.host_copies:
            self.host_slots[new] = self.host_slots[key]
        for host in edits.dropped_pages:
            del self.host[host]
        for key in edits.dropped_keys:
            del self.host_slots[key]
        for page in edits.cleared:
            self.pages[page] = [POISON] * len(self.pages[page])
