"""Drawing the next token: temperature, top_k, top_p, min_p of each row's request, with one
independent key per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which parts of sampling any row uses; the others are not compiled. Hashable.

    Attributes:
      random, greedy: some row has a temperature above 0, or of 0.
      top_k, top_p: some row has this filter.
      repetition: some row has a repetition penalty.
    """

    random: bool
    greedy: bool
    top_k: bool
    top_p: bool
    repetition: bool = False

    @classmethod
    def of(cls, configs: Iterable[SamplingConfig]) -> Filters:
        """What rows with these settings use."""
        configs = list(configs)
        drawn = [c for c in configs if c.temperature > 0]
        return cls(
            random=bool(drawn),
            greedy=len(drawn) < len(configs),
            top_k=any(c.top_k > 0 for c in drawn),
            top_p=any(c.top_p < 1 for c in drawn),
            repetition=any(c.repetition_penalty != 1 for c in configs),
        )


ALL_FILTERS = Filters(True, True, True, True, True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """A `SamplingConfig` per row: `top_k` `[R]` int32, all others `[R]` float32."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any = 1.0

    @classmethod
    def stack(cls, configs: Sequence[SamplingConfig]) -> Sampling:
        """As arrays on the host."""
        types = {field.name: np.float32 for field in dataclasses.fields(cls)} | {"top_k": np.int32}
        return cls(
            **{
                name: np.array([getattr(c, name) for c in configs], dtype)
                for name, dtype in types.items()
            }
        )


def penalized(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with those of seen tokens made smaller (CTRL, arXiv 1909.05858; as in Hugging Face).

    Args:
      logits: `[R, V]`.
      seen: `[R, V]` bool, ids that occur in the prompt or in what was generated.
      penalty: `[R]`; positive logits are divided by it, negative ones multiplied. 1 changes no bit.
    """
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def seen_tokens(tokens: jax.Array, length: jax.Array, vocab_size: int) -> jax.Array:
    """`[R, V]` bool: the ids among the first `length [R]` of each row's `tokens [R, S]`."""
    ids = jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], tokens, vocab_size)
    empty = jnp.zeros((len(tokens), vocab_size), bool)
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(empty, ids)


def filter_logits(
    logits: jax.Array,
    sampling: Sampling | SamplingConfig,
    filters: Filters = ALL_FILTERS,
    top: jax.Array | None = None,
) -> jax.Array:
    """Log-weights of the tokens that may be drawn, 0 for the likeliest; the others are -inf.

    A token that is as likely (in float32) as the last one that a filter keeps stays too: of equals,
    none is preferred.

    Args:
      logits: `[..., V]`, ids that may never be drawn already at -inf.
      sampling: of each row, or one for all rows. Filters apply in the order temperature, top_k,
        top_p, min_p. Temperature 0 is left to `sample`.
      filters: what is compiled; a filter that is not must be off in every row.
      top: `[...]` float32, the maximum of the logits where the caller knows it, which saves a pass
        over the vocabulary.

    Returns:
      `[..., V]` float32. At least the likeliest token stays.
    """
    temperature, top_k, top_p, min_p = (
        jnp.asarray(getattr(sampling, name))[..., None]
        for name in ("temperature", "top_k", "top_p", "min_p")
    )
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1) if top is None else top
    # Relative to the likeliest token, which every filter keeps.
    logits = (logits - top[..., None]) / jnp.where(temperature > 0, temperature, 1)
    kept = logits >= jnp.log(min_p)
    if filters.top_k or filters.top_p:
        weights = jnp.exp(logits)  # in [0, 1]
        if filters.top_k:
            least = _least_weight(
                weights, jnp.ones_like(weights), jnp.where(top_k > 0, top_k, jnp.inf)
            )
            kept &= weights >= least
            weights = jnp.where(weights >= least, weights, 0)
        if filters.top_p:
            # The token that crosses top_p is kept, so the kept mass is at least top_p.
            wanted = jnp.where(top_p < 1, top_p * jnp.sum(weights, axis=-1, keepdims=True), jnp.inf)
            # A top_p that is 0 in float32 asks for nothing; the likeliest token, of weight 1,
            # stays.
            kept &= weights >= jnp.minimum(_least_weight(weights, weights, wanted), 1)
    return jnp.where(kept, logits, -jnp.inf)


def _least_weight(weights: jax.Array, amounts: jax.Array, wanted: jax.Array) -> jax.Array:
    """Largest `t [..., 1]` for which the `amounts` of all tokens of weight `t` or more add up to
    `wanted [..., 1]`; 0 if there is none.

    Exact, and without sorting. Non-negative floats are ordered like their bits, so `t` is found bit
    by bit from the highest. Each bit takes one pass over the vocabulary, and no set of candidates
    can turn out too small.

    Args:
      weights: `[..., V]` float32 in [0, 1].
      amounts: `[..., V]`, not negative.
    """

    def try_bit(i: jax.Array, bits: jax.Array) -> jax.Array:
        trial = bits | (jnp.int32(1 << 29) >> i)  # the highest bit of 1.0
        reached = jnp.sum(jnp.where(weights >= as_float(trial), amounts, 0), axis=-1, keepdims=True)
        return jnp.where(reached >= wanted, trial, bits)

    def as_float(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    return as_float(
        jax.lax.fori_loop(0, 30, try_bit, jnp.zeros((*weights.shape[:-1], 1), jnp.int32))
    )


def row_keys(
    seed_key: jax.Array, prompt_hash: jax.Array, branch: jax.Array, position: jax.Array
) -> jax.Array:
    """One key per row, `fold(seed, prompt, branch, position)`: a row draws the same tokens wherever
    it lies in the batch.

    Args:
      seed_key: key of each row's request `[R]`, or a scalar key for all rows.
      prompt_hash: `[R]` uint32, a hash of the prompt's ids.
      branch: `[R]` int32, the prefix's number within its prompt.
      position: `[R]` int32, index of the token to be drawn.
    """

    def one(key: jax.Array, prompt: jax.Array, branch: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.fold_in(key, prompt), branch), position
        )

    return jax.vmap(one)(
        jnp.broadcast_to(seed_key, prompt_hash.shape), prompt_hash, branch, position
    )


BLOCK = 128


def sample(
    keys: jax.Array,
    logits: jax.Array,
    sampling: Sampling | SamplingConfig,
    filters: Filters = ALL_FILTERS,
    top: jax.Array | None = None,
) -> jax.Array:
    """Next token of each row: drawn, or the likeliest (of equals the first) at temperature 0.

    The inverse of the cumulative distribution, in two draws: a block of ids by its mass, then an id
    of that block. That takes two random numbers a row and one pass over the vocabulary.
    Gumbel noise takes a random number and two logarithms for every id. Two draws also keep the
    resolution of a float32 uniform for ids deep in the tail.

    Args:
      keys: `[R]` keys, consumed.
      logits: `[R, V]`, ids that may never be drawn already at -inf.
      sampling, filters, top: see `filter_logits`.

    Returns:
      `[R]` int32.
    """
    if not filters.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    weights = jnp.exp(filter_logits(logits, sampling, filters, top))
    weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % BLOCK))).reshape(
        len(weights), -1, BLOCK
    )
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _draw(uniform[:, 0], jnp.sum(weights, axis=-1))
    inside = _draw(uniform[:, 1], jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0])
    drawn = block * BLOCK + inside
    if not filters.greedy:
        return drawn
    return jnp.where(
        jnp.asarray(sampling.temperature) > 0, drawn, jnp.argmax(logits, axis=-1).astype(jnp.int32)
    )


def _draw(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    """Index `[R]` int32 drawn in proportion to `weights [R, N]`, with one number from [0, 1)
    each."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # Rounding may lift a cumulative sum where the weight is 0, or keep all of them from exceeding
    # the last: neither may be drawn.
    reached = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.where(
        jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1)
    ).astype(jnp.int32)
