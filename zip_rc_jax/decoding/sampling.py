"""Drawing the next token: temperature, top_k, top_p, min_p, with one independent key per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zip_rc_jax.config import SamplingConfig


def filter_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Log-weights of the tokens that may be drawn; the others are -inf.

    Args:
      logits: `[..., V]`, ids that may never be drawn already at -inf.
      config: filters, applied in the order temperature, top_k, top_p, min_p. Temperature 0 is left to `sample`.

    Returns:
      `[..., V]` float32. At least the likeliest token stays.
    """
    logits = logits.astype(jnp.float32)
    if config.temperature > 0:
        logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        # Mass strictly before a token decides: the token that crosses top_p is kept, so the kept mass is at least top_p.
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.sum(before < config.top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(logits >= jnp.take_along_axis(ordered, last, axis=-1), logits, -jnp.inf)
    if config.min_p > 0:
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= top + jnp.log(config.min_p), logits, -jnp.inf)
    return logits


def row_keys(seed_key: jax.Array, prompt_hash: jax.Array, branch: jax.Array, position: jax.Array) -> jax.Array:
    """One key per row, `fold(seed, prompt, branch, position)`: a row draws the same tokens wherever it lies in the batch.

    Args:
      seed_key: scalar key of the run.
      prompt_hash: `[R]` uint32, a hash of the prompt's ids.
      branch: `[R]` int32, the prefix's number within its prompt.
      position: `[R]` int32, index of the token to be drawn.
    """

    def one(prompt: jax.Array, branch: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(seed_key, prompt), branch), position)

    return jax.vmap(one)(prompt_hash, branch, position)


BLOCK = 128


def sample(keys: jax.Array, logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Next token of each row.

    The inverse of the cumulative distribution, in two draws: a block of ids by its mass, then an id of that block. That takes two random
    numbers a row and one pass over the vocabulary; Gumbel noise for every id took half of a decode step. Two draws also keep the
    resolution of a float32 uniform for ids deep in the tail.

    Args:
      keys: `[R]` keys, consumed.
      logits: `[R, V]`, ids that may never be drawn already at -inf.

    Returns:
      `[R]` int32.
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits, config)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % BLOCK))).reshape(len(weights), -1, BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _draw(uniform[:, 0], jnp.sum(weights, axis=-1))
    inside = _draw(uniform[:, 1], jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0])
    return block * BLOCK + inside


def _draw(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    """Index `[R]` int32 drawn in proportion to `weights [R, N]`, with one number from [0, 1) each."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # Rounding may lift a cumulative sum where the weight is 0, or keep all of them from exceeding the last: neither may be drawn.
    found = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.where(jnp.any(found, axis=-1), jnp.argmax(found, axis=-1), jnp.argmax(weights, axis=-1)).astype(jnp.int32)
