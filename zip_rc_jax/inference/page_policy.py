"""Who is admitted, who goes first, and who leaves when pages run short. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from zip_rc_jax.inference.page_table import Key, PageTable
from zip_rc_jax.inference.pages import PageAllocator
from zip_rc_jax.runtime.errors import UsageError


@dataclasses.dataclass(eq=False)
class PagedSequence:
    """One prefix, or the root of a prompt, as the pager sees it.

    Attributes:
      prompt, branch: its key. A lower `prompt` was admitted earlier.
      slot: place in the running batch; -1 in host memory.
      live: the search extends it. False is a pause that the search decided.
      due: tokens that it still writes before the next decision for its prompt.
      waited: plans in a row that passed it over because pages were short.
      utility: what the prompt gains from it; any unit, one for all prompts.
      remaining: expected remaining length, tokens.
    """

    prompt: int
    branch: int
    table: PageTable
    slot: int
    live: bool = False
    due: int = 0
    waited: int = 0
    utility: float = 0.0
    remaining: float = 0.0

    @property
    def key(self) -> Key:
        return self.prompt, self.branch

    @property
    def is_here(self) -> bool:
        return self.table.place == "device"


Value = Callable[[PagedSequence, PageAllocator], float]


def utility_per_page(sequence: PagedSequence, pool: PageAllocator) -> float:
    """Utility divided by the pages that the sequence will hold at its end."""
    return sequence.utility / max(1.0, expected_pages(sequence, pool))


def expected_pages(sequence: PagedSequence, pool: PageAllocator) -> float:
    """Pages of a sequence when it has its expected length."""
    return (sequence.table.length + sequence.remaining) / pool.page_size


def check_worst_case(
    pool: PageAllocator, slots: int, host_pages: int | None, prompt: int, max_tokens: int, n: int
) -> None:
    """Checks that a prompt can always finish alone, before anything is allocated.

    Either all its sequences fit the device at their full length, or one does and host memory holds
    the others meanwhile.

    Args:
      slots: sequences that can be on the device.
      host_pages: pages of host memory; None for any number.
      prompt, max_tokens, n: tokens of the prompt, the most of each sequence, and sequences.

    Raises:
      UsageError: it cannot. What would fit is named: fewer tokens, or fewer sequences.
    """

    def fits(tokens: int, n: int) -> bool:
        longest = pool.pages_for(prompt + tokens)
        together = pool.worst_case(prompt, tokens, n) <= pool.num_pages and n <= slots
        others = host_pages is None or (n - 1) * longest <= host_pages
        return longest <= pool.num_pages and (together or others)

    if fits(max_tokens, n):
        return
    fixes = []
    if tokens := _largest(lambda tokens: fits(tokens, n), max_tokens):
        fixes.append(f"use max_tokens={tokens} or less")
    if fewer := _largest(lambda count: fits(max_tokens, count), n):
        fixes.append(f"use n={fewer} or less")
    size, pages = pool.page_size, pool.num_pages
    if not fixes and pages * size > n:
        fixes.append(f"shorten it to less than {pages * size // n} tokens, and lower max_tokens")
    host = "" if host_pages is None else f" and host memory {host_pages:,}"
    raise UsageError(
        f"a prompt of {prompt:,} tokens with max_tokens={max_tokens} and n={n}",
        f"its sequences may take {pool.worst_case(prompt, max_tokens, n):,} pages of {size} tokens "
        f"and {n} slots; one device has {pages:,} pages and {slots} slots{host}",
        ", or ".join(fixes) or "use a larger pool (more memory, or more devices for each copy)",
    )


def predicted_peak(held: int, growing: Iterable[tuple[int, int]]) -> int:
    """The most pages that will be held at once, if every sequence ends when it is expected to.

    All grow at the same pace. A sequence that ends gives its pages back.

    Args:
      held: pages that are held now.
      growing: of every live sequence, the pages that it holds alone, and those that it will add.
    """
    peak, given_back = held, 0
    running = sorted(growing, key=lambda pair: pair[1])
    for ended, (own, more) in enumerate(running):
        peak = max(peak, held - given_back + (len(running) - ended) * more)
        given_back += own
    return peak


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in 1 .. most that fits, where all below it fit too; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
