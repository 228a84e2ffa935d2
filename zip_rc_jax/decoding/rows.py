"""The row pool and the jitted programs that move it: prefill, advance, copy. One row holds one prefix.

Everything the search does to prefixes (start, continue, branch, pause, resume) is choosing row indices; these programs only gather
rows, step them and put them back.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.config import SamplingConfig
from zip_rc_jax.decoding.network import Network
from zip_rc_jax.decoding.sampling import row_keys, sample
from zip_rc_jax.zip_head import ZipHead, joint_log_probs, policy_logits


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the jitted programs are compiled for. Hashable.

    Attributes:
      network: the model.
      head: where the joint lies in its logits.
      vocab_size: `V`.
      sampling: how tokens are drawn.
      window: joints averaged per prefix.
      max_tokens: generated tokens after which a row is done.
      stop_ids: ids that end a row.
    """

    network: Network
    head: ZipHead
    vocab_size: int
    sampling: SamplingConfig
    window: int
    max_tokens: int
    stop_ids: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """`R` prefixes. `S` slots hold prompt and response; `C` cells; `W` window.

    Attributes:
      tokens: `[R, S]` int32.
      length: `[R]` int32, tokens so far, prompt included.
      prompt_length: `[R]` int32.
      prompt_hash: `[R]` uint32 and branch `[R]` int32: identity of the row's randomness.
      done: `[R]` bool, ended by a stop id or by max_tokens.
      logits: `[R, V]` float32, of the next token, for the whole prefix.
      ring: `[R, W, C]` float32, the last `W` joints; joint number `i` of a prefix lies at `i % W`.
      cache: the network's; slots `0 .. length - 1` are valid.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array
    prompt_hash: jax.Array
    branch: jax.Array
    done: jax.Array
    logits: jax.Array
    ring: jax.Array
    cache: Any

    @classmethod
    def empty(cls, settings: StepSettings, rows: int, slots: int) -> Rows:
        """A pool of free rows (all done)."""
        return cls(
            tokens=jnp.zeros((rows, slots), jnp.int32),
            length=jnp.ones((rows,), jnp.int32),
            prompt_length=jnp.ones((rows,), jnp.int32),
            prompt_hash=jnp.zeros((rows,), jnp.uint32),
            branch=jnp.zeros((rows,), jnp.int32),
            done=jnp.ones((rows,), bool),
            logits=jnp.zeros((rows, settings.vocab_size), jnp.float32),
            ring=jnp.zeros((rows, settings.window, settings.head.grid.n_cells), jnp.float32),
            cache=settings.network.empty_cache(rows, slots),
        )

    def take(self, index: jax.Array, slots: int) -> Rows:
        """Rows `index [N]`, first `slots` slots. An index past the pool (padding) gives a row that is done."""
        small = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self) if f.name not in ("tokens", "cache", "done")}
        return Rows(
            **small,
            done=jnp.where(index < self.done.shape[0], self.done[index], True),
            tokens=self.tokens[index, :slots],
            cache=self.cache.take(index, slots),
        )

    def put(self, index: jax.Array, rows: Rows) -> Rows:
        """Writes `rows` to rows `index [N]`; indices past the pool are dropped."""
        slots = rows.tokens.shape[1]
        small = {
            f.name: getattr(self, f.name).at[index].set(getattr(rows, f.name), mode="drop")
            for f in dataclasses.fields(self)
            if f.name not in ("tokens", "cache")
        }
        return Rows(**small, tokens=self.tokens.at[index, :slots].set(rows.tokens, mode="drop"), cache=self.cache.put(index, rows.cache))

    def mean_joint(self) -> jax.Array:
        """`[R, C]` mean of the joint over the last `W` tokens (fewer while the prefix is shorter)."""
        seen = jnp.minimum(self.length - self.prompt_length + 1, self.ring.shape[1])
        # Of a row that is done the joint after its last token was never read.
        seen = jnp.where(self.done, jnp.minimum(self.length - self.prompt_length, self.ring.shape[1]), seen)
        valid = jnp.arange(self.ring.shape[1]) < seen[:, None]
        return jnp.einsum("rwc,rw->rc", self.ring, valid.astype(jnp.float32)) / jnp.maximum(seen, 1)[:, None]


def _joint(logits: jax.Array, head: ZipHead) -> jax.Array:
    return jnp.exp(joint_log_probs(logits, head)).reshape(*logits.shape[:-1], -1)


@functools.partial(jax.jit, static_argnames=("settings",))
def prefill(settings: StepSettings, params: Any, tokens: jax.Array, length: jax.Array, prompt_hash: jax.Array) -> Rows:
    """Root prefixes of `N` prompts: their cache, their next-token logits and their first joint.

    Args:
      params: of the network.
      tokens: `[N, S]` int32, prompts from slot 0; `S` is the slot count of the returned rows.
      length: `[N]` int32 >= 1.
      prompt_hash: `[N]` uint32.
    """
    count, slots = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(slots), (count, slots))
    cache = settings.network.empty_cache(count, slots)
    logits, cache = settings.network.logits(params, tokens, positions, length - 1, cache)
    ring = jnp.zeros((count, settings.window, settings.head.grid.n_cells), jnp.float32).at[:, 0].set(_joint(logits, settings.head))
    return Rows(
        tokens=tokens,
        length=length,
        prompt_length=length,
        prompt_hash=prompt_hash,
        branch=jnp.zeros_like(length),
        done=jnp.zeros(count, bool),
        logits=logits,
        ring=ring,
        cache=cache,
    )


@functools.partial(jax.jit, static_argnames=("settings", "slots"), donate_argnames=("pool",))
def advance(
    settings: StepSettings, params: Any, pool: Rows, index: jax.Array, steps: jax.Array, seed_key: jax.Array, slots: int
) -> tuple[Rows, jax.Array]:
    """Up to `steps` decode steps of the live rows `index [N]` only; stops early when all are done.

    Args:
      slots: slots the stepped rows may reach; at least their longest length + steps.
      index: rows to step; padding is any index past the pool.
      steps: scalar int32.

    Returns:
      the pool, and the `[R, C]` mean joints after the steps.
    """
    stop_ids = jnp.asarray(settings.stop_ids, jnp.int32)
    lanes = jnp.arange(index.shape[0])

    def cond(carry: tuple[jax.Array, Rows]) -> jax.Array:
        step, rows = carry
        return (step < steps) & ~jnp.all(rows.done)

    def body(carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
        step, rows = carry
        keys = row_keys(seed_key, rows.prompt_hash, rows.branch, rows.length)
        drawn = sample(keys, policy_logits(rows.logits, settings.head), settings.sampling)
        live = ~rows.done
        # A row that is done rewrites its last token in place, which changes nothing.
        slot = jnp.where(live, rows.length, rows.length - 1)
        token = jnp.where(live, drawn, rows.tokens[lanes, slot])
        length = rows.length + live
        ended = jnp.any(token[:, None] == stop_ids, axis=1) | (length - rows.prompt_length >= settings.max_tokens)
        done = rows.done | ended
        logits, cache = settings.network.logits(params, token[:, None], slot[:, None], jnp.zeros_like(slot), rows.cache)
        place = (length - rows.prompt_length) % settings.window
        joint = jnp.where(done[:, None], rows.ring[lanes, place], _joint(logits, settings.head))
        return step + 1, dataclasses.replace(
            rows,
            tokens=rows.tokens.at[lanes, slot].set(token),
            length=length,
            done=done,
            logits=logits,
            ring=rows.ring.at[lanes, place].set(joint),
            cache=cache,
        )

    _, stepped = jax.lax.while_loop(cond, body, (jnp.int32(0), pool.take(index, slots)))
    pool = pool.put(index, stepped)
    return pool, pool.mean_joint()


@functools.partial(jax.jit, donate_argnames=("pool",))
def copy_rows(pool: Rows, source: Rows, from_index: jax.Array, to_index: jax.Array, branch: jax.Array) -> Rows:
    """Copies rows of `source` into the pool and gives each its own branch number: start, branch and admit are all this.

    Args:
      from_index, to_index, branch: `[N]` int32; a `to_index` past the pool is padding.
    """
    rows = source.take(from_index, source.tokens.shape[1])
    return pool.put(to_index, dataclasses.replace(rows, branch=branch))


@functools.partial(jax.jit, donate_argnames=("pool",))
def fork_rows(pool: Rows, from_index: jax.Array, to_index: jax.Array, branch: jax.Array) -> Rows:
    """`copy_rows` within the pool."""
    rows = pool.take(from_index, pool.tokens.shape[1])
    return pool.put(to_index, dataclasses.replace(rows, branch=branch))


def bucket(size: int, most: int | None = None) -> int:
    """Smallest of 8, 32, 128, ... that holds `size`, at most `most`: few shapes mean few compilations."""
    wanted = 8
    while wanted < size:
        wanted *= 4
    return wanted if most is None else min(wanted, most)


def padded(values: list[int], size: int, fill: int) -> Any:
    """`values` as an int32 array of length `size`, padded with `fill`."""
    return jnp.asarray(values + [fill] * (size - len(values)), jnp.int32)
