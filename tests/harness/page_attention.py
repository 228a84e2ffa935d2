"""The kernels of pages for TPU and GPU, and a loop over rows and heads that says what they give."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from harness.forwards import LAYOUT, fast_jit
from zip_rc_jax.models.attention import gpu, tpu
from zip_rc_jax.models.paged_cache import live_pages


@functools.partial(fast_jit, static_argnames=("kernel", "window", "layout"))
def attended(kernel, q, cache, layer, table, length, window=0, layout=LAYOUT):
    length, table = jnp.asarray(length, jnp.int32), jnp.asarray(table)
    options = {"scale": 0.3, "window": window, "interpret": LAYOUT.platform != kernel}
    given = q, cache, jnp.asarray(layer, jnp.int32)
    if kernel == "gpu":
        return gpu.attend_pages(layout, *given, table, length, **options)
    listed = live_pages(length, table, len(cache.kv), cache.page, window)
    return tpu.attend_pages(layout, *given, listed, length, **options)


def reference(q, cache, layer, table, length, window=0):
    """Position by position from the tables, in float64; 0 for rows of length 0."""
    q, kv = np.asarray(q, np.float64), np.asarray(cache.kv, np.float64)
    rows, _, heads, _ = q.shape
    groups, out = heads // kv.shape[2], np.zeros_like(q)
    for row, size in enumerate(length):
        shard = row // (rows // len(kv))
        seen = range(max(0, size - window) if window else 0, size)
        pages = [layer * cache.pages + table[row, at // cache.page] for at in seen]
        for head in range(heads if size else 0):
            held = [
                kv[shard, page, head // groups, at % cache.page]
                for page, at in zip(pages, seen, strict=True)
            ]
            keys, values = np.split(np.stack(held), 2, axis=1)
            scores = keys @ q[row, 0, head] * 0.3
            weights = np.exp(scores - scores.max())
            out[row, 0, head] = weights / weights.sum() @ values
    return out
