"""The running batch and the jitted programs on it: prefill, advance, edit.

A sequence has a slot, with its small state (tokens, logits, joints), and pages of the cache. The
host says for every lane of a step which slot and which pages it has. So a sequence never moves: to
start, fork, pause, resume and stop one is to edit tables, and at most one page is copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zip_rc_jax.head import ZipHead, joint_log_probs, policy_logits
from zip_rc_jax.inference.network import Network
from zip_rc_jax.inference.sampler import Filters, Sampling, penalized, row_keys, sample, seen_tokens
from zip_rc_jax.models.kv_cache import copy_row, put_rows, taken_rows


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What the jitted programs are compiled for. Hashable.

    Attributes:
      network: the model.
      head: where the joint lies in its logits.
      vocab_size: `V`.
      filters: parts of sampling that are compiled.
      window: joints averaged per prefix.
      history: joints of single steps that `advance` also returns, at least its `steps`; 0 for none.
    """

    network: Network
    head: ZipHead
    vocab_size: int
    filters: Filters
    window: int
    history: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What the requests say about the sequences to step, one in each lane, `[X, W]`.

    The host makes it again for every interval, so the pool does not hold it.

    Attributes:
      slot: int32, where the small state of the lane's sequence is; past the last slot for padding.
      table: `[X, W, N]` int32, its pages; None where lane `i` has page `i`, a whole slot of the
        cache.
      active: bool, lanes to step. The others stay as they are.
      key: `[X, W, 2]` uint32, data of the request's random key.
      prompt_hash: uint32, and branch: int32: identity of the sequence's randomness.
      quota: int32, generated tokens at which the row rests until the next interval.
      max_tokens: int32, generated tokens after which the row is done.
      stop_ids: `[X, W, K]` int32, ids that end the row; -1 is none.
      sampling: how tokens are drawn.
    """

    slot: Any
    table: Any
    active: Any
    key: Any
    prompt_hash: Any
    branch: Any
    quota: Any
    max_tokens: Any
    stop_ids: Any
    sampling: Sampling


def abstract_lanes(shards: int, width: int, pages: int = 0, stop_ids: int = 4) -> StepInputs:
    """Shapes of `StepInputs`, to compile for.

    Args:
      pages: of each sequence; 0 without a table.
    """

    def lane(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shards, width, *shape), dtype)

    number = lane(jnp.float32)
    sampling = Sampling(number, lane(jnp.int32), number, number, number)
    return StepInputs(
        lane(jnp.int32),
        lane(jnp.int32, pages) if pages else None,
        lane(jnp.bool_),
        lane(jnp.uint32, 2),
        lane(jnp.uint32),
        lane(jnp.int32),
        lane(jnp.int32),
        lane(jnp.int32),
        lane(jnp.int32, stop_ids),
        sampling,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Sequences, `[X, R]`: `R` slots in each of `X` shards of the mesh's data axis.

    `S` tokens hold prompt and response; `C` cells.

    Attributes:
      tokens: `[X, R, S]` int32.
      length: `[X, R]` int32, tokens so far, prompt included.
      prompt_length: `[X, R]` int32.
      done: `[X, R]` bool, ended by a stop id, by max_tokens or by a fault.
      logits: `[X, R, V]` float32, of the next token, for the whole prefix.
      ring: `[X, R, W, C]` float32, the last `W` joints; joint number `i` of a prefix lies at `i %
        W`.
      cache: the network's: pages of all sequences, and what it keeps of each besides.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array
    done: jax.Array
    logits: jax.Array
    ring: jax.Array
    cache: Any

    def sharding(self, settings: DecodeSpec) -> DecodeState:
        """Where every leaf lies: shards over the data axis."""
        axes: dict[str, Any] = {
            name: ("batch", *[None] * (getattr(self, name).ndim - 1)) for name in _SMALL
        }
        axes["logits"] = ("batch", None, "vocab")
        named = DecodeState(**axes, cache=self.cache.axes())
        return jax.tree.map(lambda x, a: settings.network.layout.sharding(a, x.shape), self, named)


_SMALL = ("tokens", "length", "prompt_length", "done", "logits", "ring")
PADDING = 2**30  # position of a token that is none


@dataclasses.dataclass(frozen=True)
class PoolSizes:
    """Of one shard of the mesh's data axis.

    Attributes:
      slots: sequences, `R`.
      tokens: that a sequence may have, `S`.
      pages: of the cache.
    """

    slots: int
    tokens: int
    pages: int


def empty_pool(settings: DecodeSpec, sizes: PoolSizes) -> DecodeState:
    """Free slots (all done) and pages, laid out on the mesh."""
    return _maker(settings, sizes)()


@functools.lru_cache(maxsize=16)
def _maker(settings: DecodeSpec, sizes: PoolSizes) -> Callable[[], DecodeState]:
    """The compiled `empty_pool`, which is kept."""
    shards = settings.network.layout.mesh.shape["data"]

    def make() -> DecodeState:
        def full(value: Any, *shape: int) -> jax.Array:
            return jnp.full((shards, sizes.slots, *shape), value)

        return DecodeState(
            tokens=full(jnp.int32(0), sizes.tokens),
            length=full(jnp.int32(1)),
            prompt_length=full(jnp.int32(1)),
            done=full(True),
            logits=full(jnp.float32(0), settings.vocab_size),
            ring=full(jnp.float32(0), settings.window, settings.head.grid.n_cells),
            cache=settings.network.empty_cache(shards, sizes.slots, sizes.tokens, sizes.pages),
        )

    return jax.jit(make, out_shardings=jax.eval_shape(make).sharding(settings))


# Per lane, one entry: `x[i, index[i]]` of `x [N, M, ...]`, and the same written. As a batched
# gather and scatter they stay on the lane's device; indexed with the lane's number they would cross
# the mesh.
_pick = jax.vmap(lambda row, i: row[i])
_place = jax.vmap(lambda row, i, value: row.at[i].set(value))


def _joint(logits: jax.Array, head: ZipHead) -> jax.Array:
    return jnp.exp(joint_log_probs(logits, head)).reshape(*logits.shape[:-1], -1)


def _top(logits: jax.Array, head: ZipHead) -> jax.Array:
    """`[...]`: the largest of the policy's logits in all logits `[..., V]`; NaN if one of them
    is."""
    return jnp.max(policy_logits(logits, head), axis=-1)


def _log_prob(policy: jax.Array, top: jax.Array, token: jax.Array) -> jax.Array:
    """`[R]` log-probability of `token [R]` under masked logits `policy [R, V]` with the maximum
    `top [R]`.

    The token's logit is picked by a sum, so that a vocabulary that lies on several devices stays
    there.
    """
    mine = jnp.arange(policy.shape[-1]) == token[:, None]
    picked = jnp.sum(jnp.where(mine, policy, 0), axis=-1)
    return picked - top - jnp.log(jnp.sum(jnp.exp(policy - top[:, None]), axis=-1))


def _fault(logits: jax.Array, top: jax.Array, joint: jax.Array, head: ZipHead) -> jax.Array:
    """`[...]` bool: NaN or infinity among the logits `[..., V]`, or no joint `[..., C]` in them.

    Every logit is looked at once: the policy's in `top`, the reserved ones in the joint, and the
      padding here.
    """
    return ~(
        jnp.isfinite(top)
        & jnp.isfinite(joint).all(-1)
        & (logits[..., head.used_ids :] < jnp.inf).all(-1)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillInputs:
    """Prompts, one in each lane, `[X, W]`.

    Attributes:
      slot, table: as in `StepInputs`; the table is never None.
      tokens: `[X, W, T]` int32, the whole prompts from position 0.
      start: int32, positions whose keys and values are in the pages already, fewer than `length`.
      length: int32 >= 1, tokens of the prompt.
    """

    slot: Any
    table: Any
    tokens: Any
    start: Any
    length: Any


def abstract_prompts(shards: int, width: int, tokens: int, pages: int) -> PrefillInputs:
    """Shapes of `PrefillInputs`, to compile for."""

    def lane(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shards, width, *shape), jnp.int32)

    return PrefillInputs(lane(), lane(pages), lane(tokens), lane(), lane())


@functools.partial(jax.jit, static_argnames=("settings", "steps"), donate_argnames=("pool",))
def prefill(
    settings: DecodeSpec, params: Any, pool: DecodeState, prompts: PrefillInputs, steps: int
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Feeds prompts to the model: their pages, their next-token logits and their first joint.

    Args:
      params: of the network.
      steps: at least the most tokens that are not in the pages yet.

    Returns:
      the pool; the joints `[X, W, C]`; and bool `[X, W]`, prompts whose logits are at fault.
    """
    shards, width, most = prompts.tokens.shape
    slot = prompts.slot
    tokens, start, length = (
        x.reshape(-1, *x.shape[2:]) for x in (prompts.tokens, prompts.start, prompts.length)
    )
    live = (slot < pool.length.shape[1]).reshape(-1)
    positions = start[:, None] + jnp.arange(steps)
    fed = jnp.take_along_axis(tokens, jnp.minimum(positions, most - 1), axis=1)
    # Padding is not written: its positions are nobody's.
    positions = jnp.where(positions < length[:, None], positions, PADDING)
    logits, cache = settings.network.logits(
        params,
        fed,
        positions,
        length - 1 - start,
        live,
        pool.cache.lanes(slot, prompts.table),
        most,
    )
    joint = _joint(logits, settings.head)
    fault = _fault(logits, _top(logits, settings.head), joint, settings.head)
    ring = jnp.zeros((shards * width, settings.window, joint.shape[-1]), jnp.float32)
    small = {
        "tokens": tokens,
        "length": length,
        "prompt_length": length,
        "done": fault,
        "logits": logits,
        "ring": ring.at[:, 0].set(joint),
    }
    pool = _written(pool, small, cache, slot)
    pool = jax.lax.with_sharding_constraint(pool, pool.sharding(settings))
    return pool, joint.reshape(shards, width, -1), fault.reshape(shards, width)


class Stepped(NamedTuple):
    """What the host reads after an interval, for the `N = X * W` lanes that were stepped.

    `tokens [N, S]`, `length [N]`, `done [N]`, `fault [N]`: done because the logits after its last
    token are not finite, and `joint [N, C]`: the mean over the last `window` tokens (fewer while it
    is shorter), without those logits.
    `logprobs [N, S]` float32: of the tokens of this interval, before any sampling option.
    `history [N, H, C]`: the joint after each of these tokens; None if `settings.history` is 0.
    """

    tokens: jax.Array
    length: jax.Array
    done: jax.Array
    fault: jax.Array
    joint: jax.Array
    logprobs: jax.Array
    history: jax.Array | None


@functools.partial(jax.jit, static_argnames=("settings", "slots"), donate_argnames=("pool",))
def advance(
    settings: DecodeSpec,
    params: Any,
    pool: DecodeState,
    lanes: StepInputs,
    steps: jax.Array,
    slots: int,
) -> tuple[DecodeState, Stepped]:
    """Up to `steps` decode steps of the sequences in the lanes, in place; stops early when all
    active ones are done or rest.

    Args:
      lanes: which sequences, and what to do with them.
      steps: scalar int32.
      slots: tokens that the sequences may reach; at least their longest length + steps.
    """
    slot, table = lanes.slot, lanes.table
    lanes = dataclasses.replace(lanes, table=None)
    lanes = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lanes)
    seed_keys = jax.random.wrap_key_data(lanes.key)
    window = settings.window

    def live_rows(rows: dict[str, jax.Array]) -> jax.Array:
        return lanes.active & ~rows["done"] & (rows["length"] - rows["prompt_length"] < lanes.quota)

    def cond(carry: tuple[jax.Array, dict[str, jax.Array], Any]) -> jax.Array:
        step, rows, _ = carry
        return (step < steps) & jnp.any(live_rows(rows))

    def body(
        carry: tuple[jax.Array, dict[str, jax.Array], Any],
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        step, rows, cache = carry
        tokens, length, done = rows["tokens"], rows["length"], rows["done"]

        # Draw a token for every row.
        keys = row_keys(seed_keys, lanes.prompt_hash, lanes.branch, length)
        policy = policy_logits(rows["logits"], settings.head)
        weighed, top = policy, rows["top"]
        if settings.filters.repetition:
            weighed = penalized(policy, rows["seen"], lanes.sampling.repetition_penalty)
            top = jnp.max(weighed, axis=-1)
        drawn = sample(keys, weighed, lanes.sampling, settings.filters, top)
        live = live_rows(rows)
        # A row that is not live is fed its last token again, which gives its logits again if it
        # only rests.
        slot = jnp.where(live, length, length - 1)
        token = jnp.where(live, drawn, _pick(tokens, slot))
        log_prob = _log_prob(policy, rows["top"], token)
        log_prob = jnp.where(live, log_prob, _pick(rows["logprobs"], slot))

        # Rows that end with it, and those that go on.
        length = length + live
        generated = length - rows["prompt_length"]
        ended = jnp.any(token[:, None] == lanes.stop_ids, axis=1) | (generated >= lanes.max_tokens)
        done = done | (live & ended)
        # Nothing comes after the last token of a row, so it stays out of the cache.
        goes_on = lanes.active & ~done

        # Forward, and read the head.
        logits, cache = settings.network.logits(
            params, token[:, None], slot[:, None], jnp.zeros_like(slot), goes_on, cache, slots
        )
        place = generated % window
        # The joint after the last token of a row is never read.
        read = live & ~done
        top, joint = _top(logits, settings.head), _joint(logits, settings.head)
        fault = read & _fault(logits, top, joint, settings.head)
        joint = jnp.where((read & ~fault)[:, None], joint, _pick(rows["ring"], place))

        # Write.
        changed = {
            "tokens": _place(tokens, slot, token),
            "length": length,
            "done": done | fault,
            "fault": rows["fault"] | fault,
            "logits": logits,
            # `sample` reuses this maximum, so the NaN check costs no extra pass.
            "top": top,
            "ring": _place(rows["ring"], place, joint),
            "logprobs": _place(rows["logprobs"], slot, log_prob),
        }
        if settings.filters.repetition:
            changed["seen"] = _place(rows["seen"], token, jnp.ones_like(live))
        if settings.history:
            changed["history"] = rows["history"].at[:, step].set(joint)
        return step + 1, rows | changed, cache

    before = _before_interval(settings, pool, slot, slots)
    cache = pool.cache.lanes(slot, table)
    _, after, cache = jax.lax.while_loop(cond, body, (jnp.int32(0), before, cache))
    after["logits"] = jnp.where(lanes.active[:, None], after["logits"], before["logits"])
    stepped = Stepped(
        tokens=after["tokens"],
        length=after["length"],
        done=after["done"],
        fault=after["fault"],
        joint=_window_mean(after, window),
        logprobs=after["logprobs"],
        history=after.get("history"),
    )
    return _written(pool, after, cache, slot), stepped


def _before_interval(
    settings: DecodeSpec, pool: DecodeState, slot: jax.Array, slots: int
) -> dict[str, jax.Array]:
    """What the loop of an interval carries of the sequences in slots `slot [X, W]`, without their
    cache."""
    parts = {name: getattr(pool, name) for name in _SMALL}
    parts["tokens"] = parts["tokens"][:, :, :slots]
    before = {name: taken_rows(part, slot) for name, part in parts.items()}
    before |= {
        "fault": jnp.zeros_like(before["done"]),
        "top": _top(before["logits"], settings.head),
    }
    before["logprobs"] = jnp.zeros(before["tokens"].shape, jnp.float32)
    if settings.filters.repetition:
        before["seen"] = seen_tokens(before["tokens"], before["length"], settings.vocab_size)
    if settings.history:
        cells = settings.head.grid.n_cells
        before["history"] = jnp.zeros((slot.size, settings.history, cells), jnp.float32)
    return before


def _window_mean(rows: dict[str, jax.Array], window: int) -> jax.Array:
    """`[N, C]`: the mean of the joints in each row's window, fewer while it is shorter."""
    seen = jnp.minimum(rows["length"] - rows["prompt_length"] + ~rows["done"], window)
    valid = jnp.arange(window) < seen[:, None]
    total = jnp.einsum(
        "rwc,rw->rc", rows["ring"], valid.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return total / jnp.maximum(seen, 1)[:, None]


def _written(
    pool: DecodeState, small: dict[str, jax.Array], cache: Any, slot: jax.Array
) -> DecodeState:
    """The pool with what lanes have come to: `small` leaves for slots `slot [X, W]`, and the
    cache."""

    def put(name: str) -> jax.Array:
        old, new = getattr(pool, name), small[name]
        if name == "tokens":  # the first ones of each sequence
            part = put_rows(old[:, :, : new.shape[1]], slot, new)
            return jax.lax.dynamic_update_slice(old, part, (0, 0, 0))
        return put_rows(old, slot, new)

    kept = pool.cache.with_lanes(cache, slot)
    return DecodeState(**{name: put(name) for name in _SMALL}, cache=kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolEdits:
    """Copies that edits of tables ask for, per shard.

    Attributes:
      pages: `[X, N, 2]` int32, (from page, to page).
      page_count: `[X]` int32, those that count.
      slots: `[X, M, 2]` int32, (from slot, to slot).
      slot_count: `[X]` int32.
    """

    pages: Any
    page_count: Any
    slots: Any
    slot_count: Any


EDITS = 256  # least number of copies that a program is compiled for


def abstract_edits(shards: int) -> PoolEdits:
    """Shapes of `PoolEdits`, to compile for."""
    pairs = jax.ShapeDtypeStruct((shards, EDITS, 2), jnp.int32)
    count = jax.ShapeDtypeStruct((shards,), jnp.int32)
    return PoolEdits(pairs, count, pairs, count)


@functools.partial(jax.jit, static_argnames=("settings", "tokens"), donate_argnames=("pool",))
def edit(settings: DecodeSpec, pool: DecodeState, edits: PoolEdits, tokens: int) -> DecodeState:
    """Carries out copies one after the other, in place. No copy crosses shards.

    Args:
      tokens: of a page to copy where it is a whole slot: at least the longest sequence that is
        copied.
    """

    def one_shard(pool: DecodeState, edits: PoolEdits) -> DecodeState:
        pages, slots = edits.pages[0], edits.slots[0]
        cache = pool.cache.copy_pages(pages[:, 0], pages[:, 1], edits.page_count[0], tokens)
        pool = dataclasses.replace(pool, cache=cache)

        def copied(i: jax.Array, pool: DecodeState) -> DecodeState:
            source, target = slots[i]
            small = {
                name: copy_row(getattr(pool, name), getattr(pool, name), source, target, 1)
                for name in _SMALL
            }
            return DecodeState(**small, cache=pool.cache.copy_slot(source, target))

        return jax.lax.fori_loop(0, edits.slot_count[0], copied, pool)

    specs = jax.tree.map(lambda s: s.spec, pool.sharding(settings))
    return jax.shard_map(
        one_shard,
        mesh=settings.network.layout.mesh,
        in_specs=(specs, PartitionSpec("data")),
        out_specs=specs,
        check_vma=False,
    )(pool, edits)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("pool",))
def clear(settings: DecodeSpec, pool: DecodeState, pages: jax.Array) -> DecodeState:
    """Zeroes pages `[X, N]`, such as hold values that are not finite; those past the end are
    dropped.

    A masked position still counts 0 times, and 0 times NaN would reach who holds the page next.
    """
    return dataclasses.replace(pool, cache=pool.cache.clear_pages(pages))


@functools.partial(jax.jit, static_argnames=("settings",))
def read_out(
    settings: DecodeSpec, pool: DecodeState, pages: jax.Array, slots: jax.Array
) -> tuple[Any, Any]:
    """What lies in pages `[X, N]` and in slots `[X, M]`, to be kept by the host and put back by
    `write_in`, bit for bit. All leaves are `[L, X, N, ...]` or `[L, X, M, ...]`."""

    def taken(name: str) -> jax.Array:
        leaf = getattr(pool, name)
        return taken_rows(leaf, slots).reshape(1, *slots.shape, *leaf.shape[2:])

    small = {name: taken(name) for name in _SMALL}
    return pool.cache.take_pages(pages), (small, pool.cache.take_slots(slots))


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("pool",))
def write_in(
    settings: DecodeSpec,
    pool: DecodeState,
    pages: jax.Array,
    page_content: Any,
    slots: jax.Array,
    slot_content: Any,
) -> DecodeState:
    """`read_out` undone; pages and slots past the end are dropped."""
    small, rest = slot_content
    cache = pool.cache.put_pages(pages, page_content).put_slots(slots, rest)
    leaves = {name: put_rows(getattr(pool, name), slots, small[name][0]) for name in _SMALL}
    return DecodeState(**leaves, cache=cache)


def bucket(size: int, most: int | None = None, least: int = 8) -> int:
    """Smallest of `least`, 2 `least`, 4 `least`, ... that holds `size`, at most `most`: few shapes
    mean few compilations."""
    wanted = least
    while wanted < size:
        wanted *= 2
    return wanted if most is None else min(wanted, most)


def fine_bucket(tokens: int, most: int, least: int = 64) -> int:
    """Smallest of `least` (a power of two), 3/2 `least`, 2 `least`, 3 `least`, 4 `least`, ... that
    holds `tokens`, at most `most`."""
    wanted = least
    while wanted < tokens:
        wanted += wanted // 2 if wanted & (wanted - 1) == 0 else wanted // 3
    return min(wanted, most)
