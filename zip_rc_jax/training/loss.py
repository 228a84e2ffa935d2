"""The training losses (paper, section 3; recipe in the authors' code)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.transformer import logits
from zip_rc_jax.runtime.sharding import Layout


def joint_loss(
    log_joint: jax.Array, reward: jax.Array, remaining: jax.Array, censored: jax.Array, grid: Grid
) -> jax.Array:
    """Cross-entropy of the joint with the observed (reward, remaining length).

    A truncated rollout has no true length, only a lower bound: its loss is the survival `-log
    sum_{l >= l_observed} p(b, l)`.

    Args:
      log_joint: `[..., B_V, B_T]` float32.
      reward: `[...]` in [0, 1].
      remaining: `[...]` tokens still to generate (the least that it can be where censored).
      censored: `[...]` bool.

    Returns:
      `[...]` float32.
    """
    reward_bin = jnp.sum(reward[..., None] >= jnp.asarray(grid.reward_edges, jnp.float32), axis=-1)
    length_bin = jnp.sum(
        remaining[..., None] >= jnp.asarray(grid.length_edges[1:-1], jnp.int32), axis=-1
    )
    at_reward = jnp.take_along_axis(log_joint, reward_bin[..., None, None], axis=-2)[..., 0, :]
    bins = jnp.arange(grid.n_length)
    possible = jnp.where(
        censored[..., None], bins >= length_bin[..., None], bins == length_bin[..., None]
    )
    return -jax.nn.logsumexp(jnp.where(possible, at_reward, -jnp.inf), axis=-1)


class PolicyLosses(NamedTuple):
    """Weighted sums over positions, float32 `[]`, over the ids that the policy may emit.

    Attributes:
      nll: of -log p(next token).
      kl: of the divergence from the teacher; 0 without one.
    """

    nll: jax.Array
    kl: jax.Array


class FullTeacher(NamedTuple):
    """A frozen policy as its final hidden states `[B, S, d]` and its unembedding `[V, d]`, in the
    dtype of the products."""

    hidden: jax.Array
    table: jax.Array


class TopK(NamedTuple):
    """A frozen policy cut to its likeliest ids at every position: `ids [B, S, k]` int32, `log_probs
    [B, S, k]` float32, renormalised."""

    ids: Any
    log_probs: Any


@dataclasses.dataclass(frozen=True)
class VocabChunking:
    """How all that takes logits of the whole vocabulary goes through the positions. Hashable.

    Attributes:
      model: of student and teacher; only how logits are made of hidden states is read.
      layout: rows stay on the devices that hold them.
      chunk: positions of a chunk, over all devices; peak memory is a few times `chunk * V` floats.
    """

    model: ModelConfig
    layout: Layout
    chunk: int

    def replicated(self, table: jax.Array, dtype: Any) -> jax.Array:
        """A table `[V, d]` as products of all chunks take it: on every device but for the
        vocabulary axis."""
        return self.layout.constrain(table.astype(dtype), "vocab", None)

    def map_row_shards(
        self, function: Callable[[Any, Any], Any], rows: Any, tables: Any, out_specs: Any
    ) -> Any:
        """`function(rows, tables)` on every device, with its part of the arrays `rows [B, ...]` and
        whole `tables`.

        Axes of the mesh that split the vocabulary are left to the compiler.
        """
        mapped = jax.shard_map(
            function,
            mesh=self.layout.mesh,
            axis_names=set(self.layout.mesh.axis_names) - set(self.layout.mesh_axes("vocab")),
            in_specs=(self.layout.spec(("batch",)), PartitionSpec()),
            out_specs=out_specs,
            check_vma=False,
        )
        return mapped(rows, tables)

    def top_k(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """`top_k` of `x [n, V]`, within a function of `map_row_shards`: only the largest of every
        part of the vocabulary change devices."""
        axes = self.layout.mesh_axes("vocab")
        if not axes:
            return top_k(x, k)

        def of_part(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            size = part.shape[-1]
            values, ids = top_k(part, min(k, size))
            parts = values, ids + size * jax.lax.axis_index(axes)
            values, ids = (jax.lax.all_gather(x, axes, axis=-1, tiled=True) for x in parts)
            values, at = jax.lax.top_k(values, k)
            return values, jnp.take_along_axis(ids, at, axis=-1)

        split = jax.shard_map(
            of_part,
            axis_names=set(axes),
            in_specs=PartitionSpec(None, axes),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return split(x)

    def scan_chunks(
        self, function: Callable[[Any, jax.Array], Any], carry: Any, wanted: jax.Array
    ) -> Any:
        """`carry` after `function(carry, positions)` of all chunks of the positions that are
        wanted, on one device.

        Args:
          function: gets int32 `[width]`; what is missing to a whole chunk is `n`.
          wanted: `[n]` bool, of this device. Chunks without any take no time.
        """
        chunks, width = split_positions(wanted.size, self.chunk // self.layout.ways("batch"))
        positions = jnp.flatnonzero(wanted, size=chunks * width, fill_value=wanted.size).reshape(
            chunks, width
        )
        if chunks == 1:  # no loop, so that the compiler sees what the carry starts from
            return function(carry, positions[0])

        def step(carry: Any, positions: jax.Array) -> tuple[Any, None]:
            return jax.lax.cond(
                positions[0] < wanted.size, function, lambda carry, _: carry, carry, positions
            ), None

        return jax.lax.scan(step, carry, positions)[0]


def split_positions(positions: int, chunk: int) -> tuple[int, int]:
    """How positions go through in chunks of at most `chunk` (but at least 1), as even as they can
    be: (chunks, positions in each)."""
    chunks = -(-positions // max(1, chunk))
    return chunks, -(-positions // chunks)


def _flat(x: jax.Array) -> jax.Array:
    """`[B, S, ...]` as `[B * S, ...]`."""
    return x.reshape(-1, *x.shape[2:])


def _taken(arrays: Any, positions: jax.Array) -> Any:
    """Arrays `[B, S, ...]` at some of their `B * S` positions; 0 where a position is none."""
    return jax.tree.map(lambda x: _flat(x).at[positions].get(mode="fill", fill_value=0), arrays)


def _masked(scores: jax.Array, sampleable: jax.Array) -> jax.Array:
    """Logits `[..., V]`, hugely negative at ids that cannot be sampled."""
    # A large finite mask instead of -inf: 0 * -inf would poison the divergences.
    return jnp.where(sampleable, scores, -1e30)


def top_k(x: jax.Array, k: int, group: int = 128) -> tuple[jax.Array, jax.Array]:
    """The `k` largest of `x [..., V]` with their indices, `[..., k]` each, as `jax.lax.top_k` up to
    the order of equal values.

    Compilers sort for it (TPU), and a vocabulary is long. The largest ones lie in the `k` groups
    with the largest maxima, so only the maxima and these groups are sorted.
    """
    size = x.shape[-1]
    if size <= 2 * k * group:
        return jax.lax.top_k(x, k)
    groups = jnp.pad(
        x, [(0, 0)] * (x.ndim - 1) + [(0, -size % group)], constant_values=-jnp.inf
    ).reshape(*x.shape[:-1], -1, group)
    _, chosen = jax.lax.top_k(jnp.max(groups, axis=-1), k)
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    ids = chosen[..., None] * group + jnp.arange(group)
    values, at = jax.lax.top_k(candidates.reshape(*x.shape[:-1], -1), k)
    return values, jnp.take_along_axis(ids.reshape(*x.shape[:-1], -1), at, axis=-1)


def teacher_top_k(
    settings: VocabChunking,
    teacher: FullTeacher,
    labelled: jax.Array,
    sampleable: np.ndarray,
    k: int,
) -> TopK:
    """The teacher's `k` likeliest ids (fewer if fewer are sampleable) at labelled positions `[B,
    S]`, zeros at others."""
    kept, teacher = min(k, int(np.sum(sampleable))), jax.lax.stop_gradient(teacher)

    def local(rows: tuple[jax.Array, jax.Array], tables: tuple[jax.Array, jax.Array]) -> TopK:
        (hidden, labelled), (table, sampleable) = rows, tables

        def put(so_far: TopK, positions: jax.Array) -> TopK:
            top, ids = settings.top_k(
                _masked(logits(settings.model, _taken(hidden, positions), table), sampleable), kept
            )
            new = TopK(ids, jax.nn.log_softmax(top, axis=-1))
            return jax.tree.map(lambda x, y: x.at[positions].set(y, mode="drop"), so_far, new)

        none = TopK(
            jnp.zeros((labelled.size, kept), jnp.int32),
            jnp.zeros((labelled.size, kept), jnp.float32),
        )
        return jax.tree.map(
            lambda x: x.reshape(*labelled.shape, kept),
            settings.scan_chunks(put, none, labelled.reshape(-1)),
        )

    tables = settings.replicated(teacher.table, teacher.hidden.dtype), jnp.asarray(sampleable)
    filled: TopK = settings.map_row_shards(
        local, (teacher.hidden, labelled), tables, settings.layout.spec(("batch",))
    )
    return filled


def max_logit_difference(
    settings: VocabChunking,
    one: FullTeacher,
    other: FullTeacher,
    positions: jax.Array,
    sampleable: np.ndarray,
) -> jax.Array:
    """Largest absolute difference of a sampleable logit of two policies at `positions [B, S]` bool,
    float32 `[]`."""

    def local(rows: Any, tables: Any) -> jax.Array:
        (a, b, wanted), (table_a, table_b, sampleable) = rows, tables

        def update(difference: jax.Array, at: jax.Array) -> jax.Array:
            gap = jnp.abs(
                logits(settings.model, _taken(a, at), table_a)
                - logits(settings.model, _taken(b, at), table_b)
            )
            return jnp.maximum(difference, jnp.max(jnp.where(sampleable, gap, 0)))

        return jax.lax.pmax(
            settings.scan_chunks(update, jnp.float32(0), wanted.reshape(-1)),
            settings.layout.mesh_axes("batch"),
        )

    unembeddings = [settings.replicated(p.table, p.hidden.dtype) for p in (one, other)]
    tables = *unembeddings, jnp.asarray(sampleable)
    difference: jax.Array = settings.map_row_shards(
        local, (one.hidden, other.hidden, positions), tables, PartitionSpec()
    )
    return difference


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """What the losses of the next-token distribution are made of. Hashable.

    Attributes:
      kl_kind: "forward_topk" (teacher cut to its likeliest ids and renormalised), "forward" or
        "reverse".
      kl_weight, nll_weight: of the parts in the objective.
    """

    vocabulary: VocabChunking
    kl_kind: str
    kl_weight: float
    nll_weight: float

    def objective(self, parts: PolicyLosses) -> jax.Array:
        return self.kl_weight * parts.kl + self.nll_weight * parts.nll


class _Rows(NamedTuple):
    """`[B, S, ...]`: see `policy_loss`; of the teacher, None, its hidden states, or `TopK`."""

    targets: jax.Array
    weight: jax.Array
    teacher: Any


class _Tables(NamedTuple):
    """Of the ids: `[V]` bool, and the teacher's unembedding `[V, d]`; None if its logits are not
    needed."""

    sampleable: jax.Array
    teacher: Any


def policy_loss(
    settings: PolicyLoss,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    sampleable: np.ndarray,
    teacher: FullTeacher | TopK | None,
) -> tuple[jax.Array, PolicyLosses]:
    """The objective of the next-token distribution, float32 `[]`, and its parts (without gradient),
    with no `[B, S, V]` array.

    The gradient of a sum needs nothing but its terms, so it is made chunk by chunk together with
    the loss: no logits are kept, and none are computed again.

    Args:
      hidden: `[B, S, d]` final hidden states of the student, in the dtype of the products.
      table: `[V, d]` float32, the unembedding itself. Its gradient is summed over chunks and
        devices in its own dtype.
      targets: `[B, S]` int32.
      weight: `[B, S]` float32, of every position in the sums. Where it is 0, nothing is computed.
      sampleable: `[V]` bool; reserved and padding ids take no part in any softmax here.
      teacher: None gives no divergence; `TopK` for kl_kind "forward_topk", else `FullTeacher`.
    """
    reference: Any = jax.lax.stop_gradient(teacher)
    full = isinstance(reference, FullTeacher)
    rows = _Rows(targets, weight, reference.hidden if full else reference)
    tables = _Tables(
        jnp.asarray(sampleable),
        settings.vocabulary.replicated(reference.table, reference.hidden.dtype) if full else None,
    )
    return _policy_loss(settings, hidden, table, rows, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _policy_loss(
    settings: PolicyLoss, hidden: jax.Array, table: jax.Array, rows: _Rows, tables: _Tables
) -> tuple[jax.Array, PolicyLosses]:
    vocabulary = settings.vocabulary

    def local(row_shards: Any, replicated: Any) -> PolicyLosses:
        hidden, rows = row_shards

        def add(parts: PolicyLosses, positions: jax.Array) -> PolicyLosses:
            new = _chunk_losses(
                settings, _taken(hidden, positions), _taken(rows, positions), *replicated
            )
            return jax.tree.map(jnp.add, parts, new)

        parts = vocabulary.scan_chunks(
            add, PolicyLosses(jnp.float32(0), jnp.float32(0)), rows.weight.reshape(-1) != 0
        )
        return jax.lax.psum(parts, vocabulary.layout.mesh_axes("batch"))

    parts = vocabulary.map_row_shards(
        local, (hidden, rows), (tables, vocabulary.replicated(table, hidden.dtype)), PartitionSpec()
    )
    return settings.objective(parts), parts


def _policy_loss_forward(
    settings: PolicyLoss, hidden: jax.Array, table: jax.Array, rows: _Rows, tables: _Tables
) -> tuple[tuple[jax.Array, PolicyLosses], tuple[jax.Array, jax.Array]]:
    """The loss, and its gradients with respect to `hidden` and `table`, laid out like these."""
    vocabulary, layout, dtype = settings.vocabulary, settings.vocabulary.layout, table.dtype

    def local(row_shards: Any, replicated: Any) -> tuple[PolicyLosses, jax.Array, jax.Array]:
        (hidden, rows), (tables, table) = row_shards, replicated

        def objective(
            hidden: jax.Array, master: jax.Array, rows: _Rows
        ) -> tuple[jax.Array, PolicyLosses]:
            parts = _chunk_losses(settings, hidden, rows, tables, table, master)
            return settings.objective(parts), parts

        def add(carry: Any, positions: jax.Array) -> Any:
            parts, hidden_gradient, table_gradient = carry
            # The parameter's value is read from `table`; here only its dtype and its gradient
            # matter.
            master = jnp.zeros(table.shape, dtype)
            gradients, new = jax.grad(objective, argnums=(0, 1), has_aux=True)(
                _taken(hidden, positions), master, _taken(rows, positions)
            )
            parts = jax.tree.map(jnp.add, parts, new)
            return (
                parts,
                hidden_gradient.at[positions].set(gradients[0], mode="drop"),
                table_gradient + gradients[1],
            )

        none = (
            PolicyLosses(jnp.float32(0), jnp.float32(0)),
            jnp.zeros_like(_flat(hidden)),
            jnp.zeros(table.shape, dtype),
        )
        parts, hidden_gradient, table_gradient = vocabulary.scan_chunks(
            add, none, rows.weight.reshape(-1) != 0
        )
        # Summed over the devices once, after the last chunk. A scatter here would first gather what
        # lies over the vocabulary axis.
        parts, table_gradient = jax.lax.psum((parts, table_gradient), layout.mesh_axes("batch"))
        return parts, hidden_gradient.reshape(hidden.shape), table_gradient

    out_specs = PartitionSpec(), layout.spec(("batch",)), PartitionSpec()
    replicated = tables, vocabulary.replicated(table, hidden.dtype)
    parts, hidden_gradient, table_gradient = vocabulary.map_row_shards(
        local, (hidden, rows), replicated, out_specs
    )
    # What the backward pass of the layers needs comes after the sum over the devices, or whole
    # tables would be kept until after it.
    gradients = jax.lax.optimization_barrier(
        (hidden_gradient, layout.constrain(table_gradient, "vocab", "embed"))
    )
    return (settings.objective(parts), parts), gradients


def _policy_loss_backward(
    settings: PolicyLoss, gradients: tuple[jax.Array, jax.Array], cotangents: Any
) -> tuple[Any, ...]:
    return *((cotangents[0] * x).astype(x.dtype) for x in gradients), None, None


_policy_loss.defvjp(_policy_loss_forward, _policy_loss_backward)


def _chunk_losses(
    settings: PolicyLoss, hidden: jax.Array, rows: _Rows, tables: _Tables, *student: jax.Array
) -> PolicyLosses:
    """Sums over a chunk: of its states `[n, d]`, what belongs to its positions, and the student's
    tables, see `logits`."""
    model, (targets, weight, teacher), (sampleable, teacher_table) = (
        settings.vocabulary.model,
        rows,
        tables,
    )
    scores = logits(model, hidden, *student)
    total = jax.nn.logsumexp(_masked(scores, sampleable), axis=-1, keepdims=True)
    ids = (
        jnp.concatenate([targets[:, None], teacher.ids], axis=-1)
        if isinstance(teacher, TopK)
        else targets[:, None]
    )
    # Log-probabilities of few ids, all of them sampleable: the others need no array of their own.
    at = jnp.take_along_axis(scores, ids, axis=-1) - total
    kl = jnp.zeros_like(weight)
    if isinstance(teacher, TopK):
        kl = jnp.sum(jnp.exp(teacher.log_probs) * (teacher.log_probs - at[:, 1:]), axis=-1)
    elif teacher is not None:
        # Like the student's, so that the divergence of equal models is exactly 0.
        reference = _masked(logits(model, teacher, teacher_table), sampleable)
        log_p, log_q = (
            reference - jax.nn.logsumexp(reference, axis=-1, keepdims=True),
            _masked(scores, sampleable) - total,
        )
        likely, difference = (
            (log_p, log_p - log_q) if settings.kl_kind == "forward" else (log_q, log_q - log_p)
        )
        kl = jnp.sum(jnp.exp(likely) * difference, axis=-1)
    return PolicyLosses(-jnp.sum(weight * at[:, 0]), jnp.sum(weight * kl))
