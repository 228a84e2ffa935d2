"""One optimizer step, as a pure jitted function of a train state."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.data.batches import TrainBatch
from zip_rc_jax.head import ZipHead, cell_log_probs
from zip_rc_jax.models.transformer import forward_packed, logits, unembedding
from zip_rc_jax.runtime.sharding import Layout
from zip_rc_jax.training.loss import (
    FullTeacher,
    PolicyLoss,
    TopK,
    VocabChunking,
    joint_loss,
    policy_loss,
    teacher_top_k,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint must hold to continue exactly.

    Attributes:
      params: `{"body": ..., "zip_rows": [cells, d]}` float32, also where the step computes in
        bfloat16.
      opt_state: of the trained part of `params` only.
      step: int32, optimizer steps done.
      skipped: int32, steps whose loss or gradient was not finite and which changed nothing.
    """

    params: dict[str, Any]
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """What the step is compiled for. Hashable.

    `unrolled`: the layers of parameters, teacher and optimizer have arrays of their own, see
      `models.stacks.unstack`.
    """

    model: ModelConfig
    head: ZipHead
    layout: Layout
    train: TrainConfig
    unrolled: bool = False


def prefers_unrolled(layout: Layout, config: TrainConfig) -> bool:
    """Whether `TrainSpec.unrolled` makes the step faster: on one CPU device, for XLA there copies
    what a scan takes and leaves.

    Not with `remat`, which XLA on CPU undoes outside a loop, and not in bfloat16, which needs the
    products of the stacked form.
    """
    one = layout.mesh.size == 1 and layout.platform == "cpu"
    return (
        one and config.trainable == "all" and not config.remat and config.compute_dtype == "float32"
    )


def change_bodies(
    state: TrainState, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> TrainState:
    """The state of trainable="all" with `change` applied to the body's parameters and to the
    optimizer's moments of them."""

    def changed(tree: dict[str, Any]) -> dict[str, Any]:
        return {**tree, "body": change(tree["body"])}

    clipping, adam, decay = state.opt_state
    adam = adam._replace(mu=changed(adam.mu), nu=changed(adam.nu))
    return dataclasses.replace(
        state, params=changed(state.params), opt_state=(clipping, adam, decay)
    )


def learning_rate(step: jax.Array, config: TrainConfig) -> jax.Array:
    """Linear warm-up whose first step already moves, then a cosine whose last step still does: it
    is 0 just after the run.

    Args:
      step: int32, steps done before this one.
    """
    warm = max(1, round(config.warmup * config.steps))
    done = step.astype(jnp.float32) + 1
    cosine = 0.5 * (
        1 + jnp.cos(math.pi * jnp.clip((done - warm) / (config.steps + 1 - warm), 0, 1))
    )
    return config.learning_rate * jnp.where(done <= warm, done / warm, cosine)


def init_adamw(
    trained: dict[str, Any],
) -> tuple[optax.EmptyState, optax.ScaleByAdamState, optax.EmptyState]:
    """The state of `adamw_update` before its first step.

    It has the form of optax's clipping, Adam and weight decay in a chain, which checkpoints hold.
    """
    zeros = optax.tree.zeros_like
    return (
        optax.EmptyState(),
        optax.ScaleByAdamState(jnp.int32(0), zeros(trained), zeros(trained)),
        optax.EmptyState(),
    )


def adamw_update(
    settings: TrainSpec,
    state: TrainState,
    grads: dict[str, Any],
    norm: jax.Array,
    rate: jax.Array,
    is_finite: jax.Array,
) -> tuple[dict[str, Any], Any]:
    """Clipped AdamW: the trained parameters after a step, and its new state; the old ones unless
    `is_finite`.

    It is the update of the same chain of optax transformations (tested), in fewer passes over
    memory.

    Args:
      norm: of all gradients together.
      rate: learning rate of the body.
    """
    config, params = settings.train, trained_part(state.params, settings.train)
    clipping, adam, decay = state.opt_state
    count = optax.safe_increment(adam.count)
    # Clipping is a factor inside the update instead of an array.
    factor = jnp.where(norm < config.clip, 1, config.clip / norm)

    def moment(old: Any, decay: float, power: int) -> Any:
        return jax.tree.map(
            lambda m, g: jnp.where(is_finite, decay * m + (1 - decay) * (factor * g) ** power, m),
            old,
            grads,
        )

    moments = moment(adam.mu, config.adam_b1, 1), moment(adam.nu, config.adam_b2, 2)
    if settings.layout.platform == "cpu":
        # XLA would compute them again for the parameters, from the old moments, which it then
        # copies before it overwrites them.
        moments = jax.lax.optimization_barrier(moments)
    mean, square = (
        optax.tree.bias_correction(m, b, count)
        for m, b in zip(moments, (config.adam_b1, config.adam_b2), strict=True)
    )
    moved = {}
    for name, old in params.items():
        step_size = rate * (config.zip_lr_multiplier if name == "zip_rows" else 1.0)

        def move(
            p: jax.Array, m: jax.Array, v: jax.Array, step_size: jax.Array = step_size
        ) -> jax.Array:
            return jnp.where(
                is_finite, p - step_size * (m / (jnp.sqrt(v) + 1e-8) + config.weight_decay * p), p
            )

        moved[name] = jax.tree.map(move, old, mean[name], square[name])
    return moved, (
        clipping,
        optax.ScaleByAdamState(jnp.where(is_finite, count, adam.count), *moments),
        decay,
    )


def trained_part(params: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The parameters that move: all, or for ZIP-RC-Lite the reserved rows alone."""
    return params if config.trainable == "all" else {"zip_rows": params["zip_rows"]}


def init_state(params: dict[str, Any], config: TrainConfig) -> TrainState:
    return TrainState(params, init_adamw(trained_part(params, config)), jnp.int32(0), jnp.int32(0))


def cast_teacher(body: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The teacher's parameters as the step takes them: in the compute dtype, for nothing moves
    them."""
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), body)


def losses(
    settings: TrainSpec, params: dict[str, Any], teacher: dict[str, Any] | None, batch: TrainBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss of a packed batch and its parts, each a mean over labelled positions (see
    `TrainConfig.mean_over`).

    Args:
      teacher: body parameters of the frozen starting policy (see `cast_teacher`); None without KL,
        or where the batch holds its ids.
    """
    model, head, layout, config = settings.model, settings.head, settings.layout, settings.train

    dtype = jnp.dtype(config.compute_dtype)

    def forward(body: dict[str, Any]) -> jax.Array:
        return forward_packed(
            model,
            body,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            layout=layout,
            remat=config.remat,
            dtype=dtype,
            attention=config.attention,
            unrolled=settings.unrolled,
        )

    body = params["body"] if config.trainable == "all" else jax.lax.stop_gradient(params["body"])
    hidden = forward(body) if batch.hidden is None else batch.hidden
    weight = batch.weight
    if weight is None:
        weight = batch.labelled / jnp.maximum(jnp.sum(batch.labelled), 1)
    loss, parts = jnp.float32(0), {}
    if config.joint_weight:
        rows = params["zip_rows"]
        log_joint = cell_log_probs(
            logits(model, hidden, rows.astype(hidden.dtype), rows), head.grid
        )
        at_each = joint_loss(log_joint, batch.reward, batch.remaining, batch.censored, head.grid)
        parts["joint"] = jnp.sum(jnp.where(batch.labelled, weight * at_each, 0))
        loss += config.joint_weight * parts["joint"]
    if config.kl_weight or config.lm_weight:
        reference: FullTeacher | TopK | None = batch.teacher and TopK(*batch.teacher)
        if teacher is not None:
            reference = _teacher_policy(settings, forward(teacher), teacher, batch.labelled)
        vocabulary = VocabChunking(model, layout, config.loss_chunk)
        objective = PolicyLoss(
            vocabulary, config.kl_kind, kl_weight=config.kl_weight, nll_weight=config.lm_weight
        )
        ids = policy_ids(head, model, config)
        policy, means = policy_loss(
            objective,
            hidden,
            unembedding(model, body),
            batch.targets,
            weight,
            ids,
            reference,
        )
        parts |= {"nll": means.nll, "kl": means.kl}
        loss += policy
    return loss, parts | {"loss": loss}


def _teacher_policy(
    settings: TrainSpec, hidden: jax.Array, body: dict[str, Any], labelled: jax.Array
) -> FullTeacher | TopK:
    """The frozen policy of a batch, as the divergence needs it, from its final hidden states `[B,
    S, d]`."""
    model, config = settings.model, settings.train
    teacher = FullTeacher(hidden, unembedding(model, body))
    if config.kl_kind != "forward_topk":
        return teacher
    vocabulary = VocabChunking(model, settings.layout, config.loss_chunk)
    ids = policy_ids(settings.head, model, config)
    return teacher_top_k(vocabulary, teacher, labelled, ids, config.kl_top_k)


def policy_ids(head: ZipHead, model: ModelConfig, config: TrainConfig) -> np.ndarray:
    """`[V]` bool: ids over which teacher and student are normalised, see `TrainConfig.kl_mask`."""
    size = model.vocab_size
    return head.outside_cells(size) if config.kl_mask == "cells" else head.sampleable(size)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def train_step(
    settings: TrainSpec, state: TrainState, teacher: dict[str, Any] | None, batch: TrainBatch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. A step with a non-finite loss or gradient changes nothing but the counters.

    Returns:
      the new state, and float32 scalars: loss parts, gradient norm, learning rate, labelled
        positions.
    """
    config = settings.train
    trained = trained_part(state.params, config)

    def objective(trained: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return losses(settings, {**state.params, **trained}, teacher, batch)

    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trained)
    norm = optax.tree.norm(grads)
    rate = learning_rate(state.step, config)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    moved, opt_state = adamw_update(settings, state, grads, norm, rate, is_finite)
    metrics |= {
        "grad_norm": norm,
        "learning_rate": rate,
        "labelled": jnp.sum(batch.labelled).astype(jnp.float32),
    }
    return TrainState(
        {**state.params, **moved}, opt_state, state.step + 1, state.skipped + ~is_finite
    ), metrics
