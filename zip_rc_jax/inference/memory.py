"""What decoding needs of a device's memory, before anything is allocated, and what would fit."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference.page_policy import check_worst_case
from zip_rc_jax.inference.pages import PageAllocator
from zip_rc_jax.inference.prefill import chunk_tokens, largest_prefills
from zip_rc_jax.inference.state import (
    DecodeSpec,
    DecodeState,
    PoolSizes,
    empty_pool,
    fine_bucket,
)
from zip_rc_jax.runtime.errors import UsageError

FILL = 0.9  # share of a device's memory that is used where the number of pages is free

CGROUP_LIMITS = (
    pathlib.Path("/sys/fs/cgroup/memory.max"),
    pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device.

    Attributes:
      parameters: of the model, its folded unembedding included.
      rows: of the pool: pages, and logits, joints and tokens of every slot.
      temporaries: of the larger of prefill and step; an upper bound.
    """

    parameters: int
    rows: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.parameters + self.rows + self.temporaries


def abstract_pool(settings: DecodeSpec, sizes: PoolSizes) -> DecodeState:
    """The pool of `state.empty_pool` as shapes, laid out as it is."""
    pool = jax.eval_shape(lambda: empty_pool(settings, sizes))
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        pool,
        pool.sharding(settings),
    )


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's share of (abstract) arrays, without padding.

    An array that occurs twice counts once.
    """
    leaves = {id(x): x for x in jax.tree.leaves(tree)}.values()
    # whole numbers of any size
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def page_bytes(settings: DecodeSpec, slots: int) -> int:
    """Of one page, in all layers, on one device.

    Args:
      slots: positions of a sequence, which are those of a page where it holds a whole one.
    """
    one, two = (
        shard_bytes(abstract_pool(settings, PoolSizes(1, slots, pages)).cache) for pages in (1, 2)
    )
    return two - one


def estimate(
    settings: DecodeSpec, params: Any, sizes: PoolSizes, prompts: int, prompt_slots: int
) -> Estimate:
    """What a pool needs, when up to `prompts` prompts per shard are prefilled at once.

    Args:
      params: all parameters that are held while decoding.
      prompt_slots: slots that a prompt is padded to.
    """
    network, vocab = (
        settings.network,
        4 * settings.vocab_size // settings.network.layout.mesh.shape["tensor"],
    )
    rows, slots = sizes.slots, sizes.tokens
    pool = abstract_pool(settings, sizes)
    # Sampling holds a few arrays as large as the logits; the small leaves are carried from step to
    # step besides the pool.
    small = shard_bytes(dataclasses.replace(pool, cache=None))
    kept = 2 * 4 * rows * slots  # log-probabilities
    # seen ids, and other logits
    kept += 5 * rows * vocab // 4 if settings.filters.repetition else 0
    step = 2 * small + kept + 4 * rows * vocab + network.temporary_bytes(rows, 1, slots)
    # Of a prompt: its logits and joints, and those of the slots once more where XLA copies them.
    prefill = (
        small
        + 2 * 4 * prompts * vocab
        + network.temporary_bytes(prompts, chunk_tokens(prompt_slots), prompt_slots)
    )
    return Estimate(shard_bytes(params), shard_bytes(pool), max(step, prefill))


def check_parameters(held: Any, copied: Any, limit: int) -> None:
    """Checks, before it is done, that what a decoder copies of the parameters fits beside them.

    Args:
      held: all parameters.
      copied: those that are copied.
      limit: bytes of a device.

    Raises:
      UsageError: it does not fit.
    """
    parameters, copies = shard_bytes(held), shard_bytes(copied)
    if parameters + copies > limit:
        raise UsageError(
            f"a model of {_size(parameters)} per device",
            f"decoding copies {_size(copies)} of it into arrays of its own, and a device has "
            f"{_size(limit)}",
            "use a smaller model, a lower precision (dtype=bfloat16) or more devices",
        )


def device_limit(device: jax.Device, count: int) -> int:
    """Bytes that one device may hold.

    The devices of a CPU share its memory: physical, or what the control group allows; each of the
      `count` in use gets an equal part.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_limit() // count


def host_limit() -> int:
    """Bytes that the process may hold in host memory."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [
        int(text)
        for path in CGROUP_LIMITS
        if path.is_file() and (text := path.read_text().strip()).isdigit()
    ]
    return min(limits)


def check_fits(
    needed: Callable[..., Estimate],
    limit: int,
    n: int,
    rows: int,
    slots: int,
    prompt_tokens: int,
    shards: int,
    window: int = 1,
) -> None:
    """Checks the estimate against the limit of a device.

    Args:
      needed: the estimate for (rows of each shard, slots of each row), and optionally another
        window; it grows with all three.
      limit: bytes of a device.
      n, rows, slots: what is asked for; `n` prefixes of a prompt lie in the `rows` rows of one
        shard.
      prompt_tokens: of the longest prompt.
      shards: of the pool.
      window: what is asked for; every row holds that many joints.

    Raises:
      UsageError: it does not fit. What would is named: fewer rows with the same `n` or, where that
        takes more than there is, the largest `n`; and the largest length for these rows. Where
        neither alone is enough, the largest length for one row. A window whose joints take more
        than all the rest of the rows is to blame: it is named first, with the largest that fits.
    """
    estimate = needed(rows, slots)
    if estimate.total <= limit:
        return
    joints = estimate.rows - needed(rows, slots, 1).rows
    if 2 * joints > estimate.rows and (
        most := largest(lambda w: needed(rows, slots, w).total <= limit, window)
    ):
        raise UsageError(
            f"window={window} with max_num_seqs={rows * shards} of {slots} tokens",
            f"every row holds the joints of its last {window} tokens, {_size(joints)} per device "
            f"of the {_size(estimate.total)} that "
            f"decoding needs, and a device has {_size(limit)}",
            f"use window={most} or less (max_tokens is the most that has any effect)",
        )
    blame = f" with window={window}" if 2 * joints > estimate.rows else ""

    def longest(rows: int) -> int:
        return 32 * largest(lambda s: needed(rows, 32 * s).total <= limit, slots // 32)

    fit, length, alone = (
        largest(lambda r: needed(r, slots).total <= limit, rows),
        longest(rows),
        longest(1),
    )
    fixes = []
    if fit >= n:
        fixes.append(f"use max_num_seqs={fit * shards} or fewer (n={n} fits)")
    elif fit >= 1:
        fixes.append(f"use n={fit} or less with max_num_seqs={fit * shards}")
    if length > prompt_tokens:
        fixes.append(
            f"keep prompt and max_tokens within {length} tokens (the longest prompt has "
            f"{prompt_tokens})"
        )
    if not fixes and alone > prompt_tokens:
        fixes.append(
            f"use n=1 with max_num_seqs={shards} and keep prompt and max_tokens within {alone} "
            "tokens "
            f"(the longest prompt has {prompt_tokens})"
        )
    raise UsageError(
        f"max_num_seqs={rows * shards} of {slots} tokens{blame}",
        f"decoding needs {_size(estimate.total)} per device "
        f"({_size(estimate.parameters)} parameters, {_size(estimate.rows)} rows, up to "
        f"{_size(estimate.temporaries)} temporaries), and a device has {_size(limit)}",
        ", or ".join(fixes)
        or "not even one sample fits: use a smaller model, a lower precision, shorter prompts or "
        "more devices",
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in 0 .. most that fits, where all below it fit too; 0 is taken to fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


class PoolMemory:
    """How large the pool of an engine is, and whether the device has room for it.

    It knows the engine's arrays, and not the engine.
    """

    def __init__(
        self,
        settings: DecodeSpec,
        held: Any,
        config: DecodeConfig,
        max_positions: int,
        limit: int | None = None,
    ):
        """Args:
        held: all parameters, those of the caller too: most arrays are the same.
        limit: bytes of a device; None asks it.
        """
        self.settings, self.held, self.config, self.limit = settings, held, config, limit
        self.max_positions = max_positions
        self.shards = settings.network.layout.mesh.shape["data"]
        self.rows = config.seqs_per_shard(self.shards)
        self.known_to_fit: set[tuple[int, int]] = set()

    def check(self, tokens: int, prompt_tokens: int, listed: bool) -> None:
        """Raises UsageError if sequences of `tokens` tokens and prompts of `prompt_tokens` do not
        fit into the device's memory together."""
        slots = pool_tokens(tokens, listed, self.max_positions)
        prompt = fine_bucket(prompt_tokens, tokens, least=16)
        if (slots, prompt) in self.known_to_fit:
            return
        if self.settings.network.page:
            self._check_pages(tokens, prompt_tokens, slots, prompt)
        else:
            self._check_rows(slots, prompt, prompt_tokens)
        self.known_to_fit.add((slots, prompt))

    def sizes(self, tokens: int, listed: bool) -> tuple[PoolSizes, int]:
        """The pool for sequences of `tokens` tokens, and pages that host memory may hold for every
        shard. Results do not depend on either."""
        slots = pool_tokens(tokens, listed, self.max_positions)
        sizes = self._sizes(slots)
        one = page_bytes(self.settings, slots)
        if self.settings.network.layout.platform == "cpu":
            left = self._limit() - self._needed(sizes, slots).total
        else:
            left = host_limit() // 2 // self.shards
        return sizes, max(0, left // one)

    def _sizes(self, slots: int) -> PoolSizes:
        """Where pages are small, as many as fill `FILL` of the device, and no more than all
        sequences can use; else one for every slot, and one for swaps. A prompt may be as long as a
        sequence."""
        page = self.settings.network.page
        if not page:
            return PoolSizes(self.rows, slots, self.rows + 1)
        each = -(-slots // page)
        without = self._needed(PoolSizes(self.rows, slots, 1), slots).total
        room = (int(FILL * self._limit()) - without) // page_bytes(self.settings, slots) + 1
        return PoolSizes(self.rows, slots, max(1, min(self.rows * each, room)))

    def _check_rows(self, slots: int, prompt: int, prompt_tokens: int) -> None:
        def needed(rows: int, slots: int, window: int = self.config.window) -> Estimate:
            sizes = PoolSizes(rows, slots, rows + 1)
            return self._needed(sizes, min(prompt, slots), window)

        check_fits(
            needed,
            self._limit(),
            self.config.n,
            self.rows,
            slots,
            prompt_tokens,
            self.shards,
            self.config.window,
        )

    def _check_pages(self, tokens: int, prompt_tokens: int, slots: int, prompt: int) -> None:
        """One sequence must fit the device; its prompt's others can leave for host memory."""
        page = self.settings.network.page
        sizes = self._sizes(slots)
        needed = self._needed(sizes, prompt)
        if needed.total > self._limit():
            raise UsageError(
                f"max_num_seqs={self.rows * self.shards} of {tokens} tokens",
                f"decoding needs {_size(needed.total)} per device without pages for more than one "
                f"sequence ({_size(needed.parameters)} parameters, up to "
                f"{_size(needed.temporaries)} temporaries), and a device has "
                f"{_size(self._limit())}",
                "use a smaller max_num_seqs or window, a lower precision, shorter prompts or more "
                "devices",
            )
        pool = PageAllocator(sizes.pages, page)
        check_worst_case(
            pool, self.rows, None, prompt_tokens, max(1, tokens - prompt_tokens), self.config.n
        )

    def _needed(self, sizes: PoolSizes, prompt: int, window: int | None = None) -> Estimate:
        settings = self.settings
        if window is not None:
            settings = dataclasses.replace(settings, window=window)
        prefills = largest_prefills(max(1, sizes.slots // self.config.n), prompt)
        estimates = [
            estimate(settings, self.held, sizes, min(count, sizes.slots), tokens)
            for count, tokens in prefills
        ]
        return max(estimates, key=lambda found: found.total)

    def _limit(self) -> int:
        if self.limit is not None:
            return self.limit
        devices = self.settings.network.layout.mesh.devices
        return device_limit(devices.flat[0], devices.size)


def pool_tokens(tokens: int, listed: bool, max_positions: int) -> int:
    """Tokens of a sequence in a pool for sequences of `tokens`: just enough for a list, which is
    known as a whole; else rounded, as more may come."""
    return -(-tokens // 32) * 32 if listed else fine_bucket(tokens, max_positions)
