"""How much of which prompts is computed at once. Host code.

Attention in prefill makes scores of all pairs of new tokens and slots, so it is bounded by pairs. A
short prompt is computed whole, several together. A long one is computed in chunks, with intervals
of decode steps between them, so that it does not stall the prompts in flight.
"""

from __future__ import annotations

import math

from zip_rc_jax.inference.state import bucket

# Of the prompts of a shard that are computed at once: enough tokens to keep a device busy, and
# pairs whose scores (float32, 16 heads) take half a GiB.
TOKENS = 2**14
PAIRS = 2**23


def chunk_tokens(padded: int) -> int:
    """Tokens that are computed at once of a prompt that is padded to `padded` tokens."""
    if padded * padded <= PAIRS:
        return padded
    return _power_of_two(PAIRS // padded)


def together(most: int, padded: int) -> int:
    """How many prompts of a shard, at most `most`, are computed at once if they are padded to
    `padded` tokens.

    Their number is padded to a power of two, and so counted here.
    """
    chunk = chunk_tokens(padded)
    return min(most, _power_of_two(min(TOKENS // chunk, PAIRS // (chunk * padded))))


def largest_prefills(most: int, longest: int) -> list[tuple[int, int]]:
    """Upper bounds on every prefill, as (prompts, tokens that each is padded to), if at most `most`
    prompts are computed at once.

    Args:
      longest: tokens that the longest prompt is padded to.
    """
    counts = [1 << i for i in range(bucket(most, least=1).bit_length())]
    whole = [(c, min(longest, TOKENS // c, math.isqrt(PAIRS // c))) for c in counts]
    # The longest prompt for every size of a chunk.
    sizes = (1 << k for k in range(PAIRS.bit_length() // 2))
    return [*whole, *sorted({(1, min(longest, PAIRS // size)) for size in sizes})]


def _power_of_two(most: int) -> int:
    """The largest that is at most `most`; at least 1."""
    return 1 << max(1, most).bit_length() - 1
