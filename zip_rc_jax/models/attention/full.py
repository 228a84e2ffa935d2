"""Attention and rotary positions, shared by full forward and cached decoding.

Whole packed rows go through `packed_attention`, which hides three implementations of the same
function:

- "plain" builds the `[T, T]` scores: fastest for short rows.
- "chunked" goes through pairs of blocks with an online softmax, in XLA alone, on any platform.
  Pairs that the causal mask or a sliding window hides are never touched, and neither direction
  holds more than one block of scores.
- "splash" is JAX's TPU kernel: the same blocks in vector memory. Elsewhere it is interpreted, which
  only tests have the time for.

cuDNN's attention (`jax.nn.dot_product_attention`) is not among them: it takes segments only as a
dense `[T, T]` bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import RopeScaling
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import Layout

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

# Tokens of a block of "chunked"; for rows of one block, "auto" builds the scores. Off the CPU, a
# step of a loop costs more.
CHUNK_BLOCK, CPU_CHUNK_BLOCK = 512, 256
SPLASH_BLOCKS = (1024, 512, 256, 128)

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angle per position of every channel pair, `[head_dim / 2]` float32."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "llama3":
        wavelength = 2 * np.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # 1 where the wavelength is short (kept), 0 where it is long (divided).
        kept = np.clip((scaling.original_positions / wavelength - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rotation(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, `[B, T, 1, D / 2]` float32, for positions `[B, T]` and
    frequencies `[D / 2]`."""
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding, half-split pairing (as in Llama and Qwen), computed in float32.

    Args:
      x: `[B, T, H, D]`.
      cos, sin: from `rotation`.

    Returns:
      `[B, T, H, D]` in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Grouped-query attention that builds the `[T, S]` scores (for short sequences), softmax in
    float32.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, K, S, D]`, `H` a multiple of `K`. Heads lead, so both products are plain batched
        matmuls without a transpose.
      mask: `[B, T, S]` bool, True where the query may look. Every query must see at least one key.
      scale: factor of the scores.

    Returns:
      `[B, T, H, D]`.
    """
    batch, steps, heads, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    grouped = (
        q.reshape(batch, steps, kv_heads, groups, dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, groups * steps, dim)
    )
    if groups * steps < 8:
        # Few queries: on CPU the product with the keys in front is faster, and the barrier keeps
        # XLA from turning it round.
        scores = jnp.matmul(k, (grouped * scale).swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)
    else:
        scores = jnp.matmul(grouped * scale, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = jnp.where(
        mask[:, None, None], scores.reshape(batch, kv_heads, groups, steps, slots), -jnp.inf
    )
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # Normalised after the product: the division then touches [T, D] numbers instead of [T, S].
    out = jnp.matmul(
        weights.reshape(batch, kv_heads, groups * steps, slots).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    out = out.reshape(batch, kv_heads, groups, steps, dim) / jnp.sum(
        weights, axis=-1, keepdims=True
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, steps, heads, dim).astype(q.dtype)


def _chunk_block(platform: str) -> int:
    return CPU_CHUNK_BLOCK if platform == "cpu" else CHUNK_BLOCK


def choose_attention(name: str, platform: str, steps: int) -> str:
    """The implementation that "auto" stands for on a platform ("cpu", "gpu" or "tpu") and rows of
    `steps` tokens; others as they are.

    Raises:
      UsageError: "splash" for a row that does not divide into its blocks.
    """
    if name == "auto":
        kernel = platform == "tpu" and steps % SPLASH_BLOCKS[-1] == 0
        return "plain" if steps <= _chunk_block(platform) else "splash" if kernel else "chunked"
    if name == "splash" and steps % SPLASH_BLOCKS[-1]:
        raise UsageError(
            f"attention='splash' with rows of {steps} tokens",
            f"the kernel takes blocks of {SPLASH_BLOCKS[-1]} tokens or multiples of them",
            f"make row_tokens a multiple of {SPLASH_BLOCKS[-1]}, or use attention=chunked",
        )
    return name


def block_size(name: str, platform: str, steps: int) -> int:
    """Tokens of a block of "chunked" or "splash" in rows of `steps` tokens; "chunked" pads the row
    to a multiple of it."""
    return (
        min(_chunk_block(platform), steps)
        if name == "chunked"
        else next(b for b in SPLASH_BLOCKS if steps % b == 0)
    )


def visible_blocks(steps: int, block: int, window: int) -> np.ndarray:
    """Pairs (query block, key block) in which some query may see some key, `[pairs, 2]` int32,
    queries in order and then keys.

    Args:
      window: of a sliding layer, in tokens; 0 for none.
    """
    count = -(-steps // block)
    # The first query of block i sees back to i * block - window + 1.
    first = [max(0, (i * block - window + 1) // block) if window else 0 for i in range(count)]
    return np.array([(i, j) for i in range(count) for j in range(first[i], i + 1)], np.int32)


def packed_mask(segment_ids: jax.Array, window: int) -> jax.Array:
    """`[B, T, T]` bool: keys of the same segment, not after the query, and of the last `window`
    tokens if that is not 0."""
    index = jnp.arange(segment_ids.shape[1])
    distance = (index[:, None] - index)[None]
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance >= 0)
    return mask & (distance < window) if window else mask


def packed_attention(
    name: str, layout: Layout, segment_ids: jax.Array, scale: float, window: int
) -> Attention:
    """Causal attention inside the segments of packed rows.

    Args:
      name: one of `config.train.ATTENTIONS`.
      layout: rows and heads stay on the devices that hold them.
      segment_ids: `[B, T]` int32; equal ids see each other.
      scale: factor of the scores.
      window: tokens that a sliding layer sees, its own included; 0 for all.

    Returns:
      a function of queries `[B, T, H, D]`, keys and values `[B, K, T, D]` that gives `[B, T, H,
      D]`.

    Raises:
      UsageError: as `choose_attention`.
    """
    steps = segment_ids.shape[1]
    platform = layout.mesh.devices.flat[0].platform
    chosen = choose_attention(name, platform, steps)
    if chosen == "plain":
        mask = packed_mask(segment_ids, window)
        return lambda q, k, v: attend(q, k, v, mask, scale)
    block = block_size(chosen, platform, steps)
    if chosen == "splash":
        local = functools.partial(
            _splash, block=block, scale=scale, window=window, interpret=platform != "tpu"
        )
    else:
        local = functools.partial(_chunked, block=block, scale=scale, window=window)
    queries = layout.spec(("batch", "sequence", "heads", "head_dim"))
    keys = layout.spec(("batch", "kv_heads", "sequence", "head_dim"))
    specs = (queries, keys, keys, layout.spec(("batch", "sequence")))
    sharded = jax.shard_map(
        local, mesh=layout.mesh, in_specs=specs, out_specs=queries, check_vma=False
    )
    return lambda q, k, v: sharded(q, k, v, segment_ids)


@functools.cache
def _splash_kernel(
    steps: int, heads: int, block: int, window: int, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel with its lists of blocks as numpy arrays.

    Looking at all blocks of a long row takes seconds, so it is done once.
    """
    # Only here: to import the kernel takes a tenth of the time that JAX takes.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as splash_mask,
    )

    shape = (steps, steps)
    mask = (
        splash_mask.LocalMask(shape, (window - 1, 0), 0)
        if window
        else splash_mask.CausalMask(shape)
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    block: int,
    scale: float,
    window: int,
    interpret: bool,
) -> jax.Array:
    """JAX's TPU kernel, on one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    kernel: Any = _splash_kernel(q.shape[1], q.shape[2], block, window, interpret)
    queries = (q * jnp.asarray(scale, q.dtype)).swapaxes(1, 2)
    return jax.vmap(kernel)(queries, k, v, splash.SegmentIds(segment_ids, segment_ids)).swapaxes(
        1, 2
    )


def _chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    block: int,
    scale: float,
    window: int,
) -> jax.Array:
    """Attention in pairs of blocks, on one device's rows and heads."""
    rows, steps, heads, dim = q.shape
    groups = heads // k.shape[1]
    missing = -steps % block

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))

    grouped = padded(q.swapaxes(1, 2)).reshape(rows, k.shape[1], groups, steps + missing, dim)
    # Padding is a segment of its own, so that every query sees a key.
    ids = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=-1)
    out = _blocks(block, scale, window, grouped, padded(k), padded(v), ids)
    return out.reshape(rows, heads, steps + missing, dim)[:, :, :steps].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocks(
    block: int, scale: float, window: int, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> jax.Array:
    """`q [B, K, G, T, D]`, `k`, `v [B, K, T, D]`, `ids [B, T]`, `T` a multiple of `block`; gives
    `[B, K, G, T, D]`."""
    return _blocks_forward(block, scale, window, q, k, v, ids)[0]


def _slice(x: jax.Array, index: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _put(x: jax.Array, part: jax.Array, index: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), index * block, axis)


def _pairs(
    block: int, window: int, ids: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """What a loop goes through: query blocks, key blocks, and where a query block starts, each
    `[pairs]`, and how many count.

    Those of `visible_blocks` in which some row has a segment in common, as far as the first and the
    last segment of each block tell. Of a packed row these are few.
    """
    # padding comes after all segments, also in number
    ids = jnp.where(ids > 0, ids, jnp.max(ids) + 1)
    pairs = visible_blocks(ids.shape[1], block, window)
    blocks = ids.reshape(len(ids), -1, block)
    least, largest = jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
    queries, keys = pairs.T
    common = jnp.any(
        (least[:, queries] <= largest[:, keys]) & (least[:, keys] <= largest[:, queries]), axis=0
    )
    queries, keys = jnp.asarray(pairs)[jnp.argsort(~common, stable=True)].T
    return (queries, keys, jnp.diff(queries, prepend=-1) > 0), jnp.sum(common)


def _fold_pairs(
    step: Callable[..., Any], carry: Any, block: int, window: int, ids: jax.Array
) -> Any:
    """`carry` after `step(carry, i, j, start)` for every pair of blocks in which a query can see a
    key."""
    pairs, count = _pairs(block, window, ids)

    def one(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        n, carry = state
        # A branch instead of a shorter loop, so that what counts a program's operations knows how
        # often it runs at most.
        return n + 1, jax.lax.cond(
            n < count, lambda carry: step(carry, *(x[n] for x in pairs)), lambda carry: carry, carry
        )

    # Not a scan: JAX would compute the masks of all pairs before the loop over layers, and keep
    # them.
    return jax.lax.while_loop(lambda state: state[0] < len(pairs[0]), one, (jnp.int32(0), carry))[1]


def _block_scores(
    q: jax.Array,
    k: jax.Array,
    ids: jax.Array,
    i: jax.Array,
    j: jax.Array,
    block: int,
    scale: float,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores `[B, K, G, block, block]` float32 of query block `q [B, K, G, block, D]` and key block
    `k`, and where they are visible."""
    scores = scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    index = jnp.arange(block)
    distance = (i - j) * block + index[:, None] - index
    visible = (_slice(ids, i, block, 1)[:, :, None] == _slice(ids, j, block, 1)[:, None, :]) & (
        distance >= 0
    )
    visible = visible & (distance < window) if window else visible
    return scores, visible[:, None, None]


def _blocks_forward(
    block: int, scale: float, window: int, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def step(
        carry: tuple[jax.Array, ...], i: jax.Array, j: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, log_sum, acc, top, total = carry
        scores, visible = _block_scores(
            _slice(q, i, block, 3), _slice(k, j, block, 2), ids, i, j, block, scale, window
        )
        # A finite stand-in for -inf: the difference of two of them is 0 and not NaN.
        old = jnp.where(start, -1e30, top)
        top = jnp.maximum(old, jnp.max(jnp.where(visible, scores, -1e30), axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0)
        kept = jnp.where(start, 0, jnp.exp(old - top))
        total = kept * total + jnp.sum(weights, axis=-1)
        mixed = jnp.einsum(
            "bkgts,bksd->bkgtd",
            weights.astype(v.dtype),
            _slice(v, j, block, 2),
            preferred_element_type=jnp.float32,
        )
        acc = kept[..., None] * acc + mixed
        # Only the last key block of a query block, its own, leaves the final values. No query goes
        # without a key there.
        out = _put(out, acc / jnp.maximum(total, 1e-30)[..., None], i, block, 3)
        log_sum = _put(log_sum, top + jnp.log(jnp.maximum(total, 1e-30)), i, block, 3)
        return out, log_sum, acc, top, total

    rows, kv_heads, groups, steps, dim = q.shape
    one = jnp.zeros((rows, kv_heads, groups, block), jnp.float32)
    log_sum = jnp.zeros((rows, kv_heads, groups, steps), jnp.float32)
    start: tuple[jax.Array, ...] = (
        jnp.zeros_like(q),
        log_sum,
        jnp.zeros((*one.shape, dim), jnp.float32),
        one,
        one,
    )
    out, log_sum, *_ = _fold_pairs(step, start, block, window, ids)
    return out, (q, k, v, ids, out, log_sum)


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[B, K, S, D]` float32: `x [B, K, G, T, S]` transposed times `y [B, K, G, T, D]`, with sums
    over groups and queries."""
    x, y = x.reshape(*x.shape[:2], -1, x.shape[-1]), y.reshape(*y.shape[:2], -1, y.shape[-1])
    # The small ones are transposed. XLA on CPU would transpose the large one, element by element,
    # and the barriers keep it from that.
    y = jax.lax.optimization_barrier(y.swapaxes(2, 3))
    return jax.lax.optimization_barrier(
        jnp.matmul(y, x, preferred_element_type=jnp.float32)
    ).swapaxes(2, 3)


def _blocks_backward(
    block: int, scale: float, window: int, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, ids, out, log_sum = saved
    # What the softmax's normalisation takes off every gradient of a score.
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def step(
        carry: tuple[jax.Array, ...], i: jax.Array, j: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, ...]:
        dq, dk, dv, acc = carry
        q_i, d_i, k_j, v_j = (
            _slice(q, i, block, 3),
            _slice(d_out, i, block, 3),
            _slice(k, j, block, 2),
            _slice(v, j, block, 2),
        )
        scores, visible = _block_scores(q_i, k_j, ids, i, j, block, scale, window)
        weights = jnp.where(visible, jnp.exp(scores - _slice(log_sum, i, block, 3)[..., None]), 0)
        d_weights = jnp.einsum("bkgtd,bksd->bkgts", d_i, v_j, preferred_element_type=jnp.float32)
        d_scores = (scale * weights * (d_weights - _slice(mean, i, block, 3)[..., None])).astype(
            q.dtype
        )
        new_dv, new_dk = (
            _transposed_product(weights.astype(q.dtype), d_i),
            _transposed_product(d_scores, q_i),
        )
        new_dq = jnp.einsum("bkgts,bksd->bkgtd", d_scores, k_j, preferred_element_type=jnp.float32)
        acc = jnp.where(start, 0, acc) + new_dq
        dq = _put(dq, acc, i, block, 3)
        dk = _put(dk, _slice(dk, j, block, 2) + new_dk, j, block, 2)
        dv = _put(dv, _slice(dv, j, block, 2) + new_dv, j, block, 2)
        return dq, dk, dv, acc

    acc = jnp.zeros((*q.shape[:3], block, q.shape[4]), jnp.float32)
    start: tuple[jax.Array, ...] = (
        jnp.zeros_like(q),
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
        acc,
    )
    dq, dk, dv, _ = _fold_pairs(step, start, block, window, ids)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)
