"""What decoding needs of a device's memory, before anything is allocated, and what would fit."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from zip_rc_jax.inference.state import DecodeSpec, DecodeState, empty_rows
from zip_rc_jax.runtime.errors import UsageError

CGROUP_LIMITS = (
    pathlib.Path("/sys/fs/cgroup/memory.max"),
    pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device.

    Attributes:
      parameters: of the model, its folded unembedding included.
      rows: of the pool: cache, logits, joints and tokens of every row.
      temporaries: of the larger of prefill and step; an upper bound.
    """

    parameters: int
    rows: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.parameters + self.rows + self.temporaries


def abstract_pool(settings: DecodeSpec, rows: int, slots: int) -> DecodeState:
    """The pool of `state.empty_rows` as shapes, laid out as it is."""
    pool = jax.eval_shape(lambda: empty_rows(settings, rows, slots))
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


def estimate(
    settings: DecodeSpec, params: Any, rows: int, slots: int, prompts: int, prompt_slots: int
) -> Estimate:
    """What a pool of `rows` rows of `slots` slots per shard needs, when up to `prompts` prompts per
    shard are prefilled at once.

    Args:
      params: all parameters that are held while decoding.
      prompt_slots: slots that a prompt is padded to.
    """
    network, vocab = (
        settings.network,
        4 * settings.vocab_size // settings.network.layout.mesh.shape["tensor"],
    )
    pool, source = (
        abstract_pool(settings, r, s) for r, s in ((rows + 1, slots), (prompts, prompt_slots))
    )
    # Sampling holds a few arrays as large as the logits; the small leaves are carried from step to
    # step besides the pool.
    small = shard_bytes(dataclasses.replace(pool, cache=None))
    kept = 2 * 4 * rows * slots  # log-probabilities
    # seen ids, and other logits
    kept += 5 * rows * vocab // 4 if settings.filters.repetition else 0
    step = 2 * small + kept + 4 * rows * vocab + network.temporary_bytes(rows, 1, slots)
    prefill = (
        shard_bytes(source)
        + 4 * prompts * vocab
        + network.temporary_bytes(prompts, prompt_slots, prompt_slots)
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
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [
        int(text)
        for path in CGROUP_LIMITS
        if path.is_file() and (text := path.read_text().strip()).isdigit()
    ]
    return min(limits) // count


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
