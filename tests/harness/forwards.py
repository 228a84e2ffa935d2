"""A transformer run in the ways that must agree: whole rows, a prefill padded on the right, and one
token per row. All give logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.models.kv_cache import Cache
from zip_rc_jax.models.transformer import forward_cached, forward_packed, logits, unembedding
from zip_rc_jax.runtime.sharding import single_device

LAYOUT = single_device()
SLOTS = 24
# Tests of tiny models spend their time on compiling, so LLVM does not optimise.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(fast_jit, static_argnames=("config", "remat"))
def uncached(config, params, tokens, positions, segments, remat=False):
    hidden = forward_packed(config, params, tokens, positions, segments, layout=LAYOUT, remat=remat)
    return logits(config, hidden, unembedding(config, params))


@functools.partial(fast_jit, static_argnames=("config",))
def cached(config, params, tokens, positions, cache, last, live):
    hidden, cache = forward_cached(
        config, params, tokens, positions, cache, layout=LAYOUT, last=last, live=live
    )
    return logits(config, hidden, unembedding(config, params)), cache


def full(config, params, tokens):
    """Logits `[B, T, V]` by one forward without a cache."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(uncached(config, params, tokens, positions, jnp.ones_like(tokens)))


def place(cache):
    """Lays a cache out as the forward returns it, or the first step after it would be compiled once
    more."""
    return jax.device_put(cache, LAYOUT.sharding(()))


def empty(config, rows, dtype=jnp.float32):
    return place(Cache.empty(config, 1, rows, SLOTS, dtype))


@fast_jit
def gathered(pool, source, index, at):
    """Rows `index [N]` of the cache `source` in rows `at [N]` of `pool`; both of one shard."""

    def pages(cache, rows):
        return (rows[:, None] if cache.table is None else cache.table[0, rows]).reshape(1, -1)

    pool = pool.put_pages(pages(pool, at), source.take_pages(pages(source, index)))
    return pool.put_slots(at[None], source.take_slots(index[None]))


def gather(pool, source, index, at):
    return place(gathered(pool, source, jnp.asarray(index), jnp.asarray(at)))


@functools.partial(fast_jit, static_argnames=("slots",))
def copied(pool, from_row, to_row, slots):
    """Row `to_row` becomes as row `from_row` in its first `slots` slots, in place."""
    if pool.table is None:
        pages = [jnp.asarray([row]) for row in (from_row, to_row)]
    else:
        pages = [pool.table[0, row] for row in (from_row, to_row)]
    pool = pool.copy_pages(*pages, jnp.int32(len(pages[0])), slots)
    return pool.copy_slot(jnp.int32(from_row), jnp.int32(to_row))


def extend(config, params, cache, tokens, first, counts, live=None):
    """Feeds `tokens [B, T]` from positions `first [B]` on. Row `b` holds `counts[b]` tokens, and
    then padding.

    Returns:
      logits `[B, T, V]` and the cache.
    """
    positions = np.asarray(first, np.int32)[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    live = np.ones(len(tokens), bool) if live is None else live
    out, cache = cached(
        config,
        params,
        jnp.asarray(tokens),
        jnp.asarray(positions),
        cache,
        jnp.asarray(counts, jnp.int32) - 1,
        live,
    )
    return np.asarray(out), cache


def prefill(config, params, tokens, lengths):
    """Right-padded prefill: row `r` is its first `lengths[r]` tokens; what is behind them goes
    through the model, and nobody may see it."""
    return extend(
        config, params, empty(config, len(tokens)), tokens, np.zeros(len(tokens)), lengths
    )


def step(config, params, cache, tokens, positions, live=None):
    """One token `[B]` per row. Returns logits `[B, V]` and the cache."""
    out, cache = extend(
        config, params, cache, np.asarray(tokens)[:, None], positions, np.ones(len(tokens)), live
    )
    return out[:, 0], cache


def padded(tokens, lengths, seed=1):
    """`tokens [B, T]` with other ones behind each row's length: the worst padding are real ids."""
    other = (tokens + np.random.default_rng(seed).integers(1, 60, tokens.shape)) % 64
    return np.where(
        np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None], tokens, other
    ).astype(np.int32)


def continued(tokens, lengths, continuation):
    """Rows `tokens[r, :lengths[r]]`, then `continuation[r]`, then padding up to the slots of the
    cache."""
    whole = np.zeros((len(tokens), SLOTS), np.int32)
    for row, length in enumerate(lengths):
        whole[row, : length + continuation.shape[1]] = np.concatenate(
            [tokens[row, :length], continuation[row]]
        )
    return whole
