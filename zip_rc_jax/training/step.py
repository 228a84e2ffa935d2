"""One optimizer step, as a pure jitted function of a train state."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.data.batches import TrainBatch
from zip_rc_jax.models.transformer import hidden_states, logits, unembedding
from zip_rc_jax.sharding import Layout
from zip_rc_jax.training.loss import FullTeacher, TopK, Unembedding, joint_loss, teacher_top_k, token_losses
from zip_rc_jax.zip_head import ZipHead, cell_log_probs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint must hold to continue exactly.

    Attributes:
      params: `{"body": ..., "zip_rows": [cells, d]}` float32, also where the step computes in bfloat16.
      opt_state: of the trained part of `params` only.
      step: int32, optimizer steps done.
      skipped: int32, steps whose loss or gradient was not finite and which changed nothing.
    """

    params: dict[str, Any]
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step is compiled for. Hashable."""

    model: ModelConfig
    head: ZipHead
    layout: Layout
    train: TrainConfig


def learning_rate(step: jax.Array, config: TrainConfig) -> jax.Array:
    """Linear warm-up whose first step already moves, then a cosine that reaches 0 where the run ends.

    Args:
      step: int32, steps done before this one.
    """
    warm = max(1, round(config.warmup * config.steps))
    done = step.astype(jnp.float32) + 1
    cosine = 0.5 * (1 + jnp.cos(math.pi * jnp.clip((done - warm) / max(1, config.steps - warm), 0, 1)))
    return config.learning_rate * jnp.where(done <= warm, done / warm, cosine)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipped AdamW; the learning rate is applied in the step, because it depends on the step count of the state."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2),
        optax.add_decayed_weights(config.weight_decay),
    )


def trained_part(params: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The parameters that move: all, or for ZIP-RC-Lite the reserved rows alone."""
    return params if config.trainable == "all" else {"zip_rows": params["zip_rows"]}


def init_state(params: dict[str, Any], config: TrainConfig) -> TrainState:
    return TrainState(params, optimizer(config).init(trained_part(params, config)), jnp.int32(0), jnp.int32(0))


def frozen(body: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The teacher's parameters as the step takes them: in the compute dtype, for nothing moves them."""
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), body)


def losses(
    settings: StepSettings, params: dict[str, Any], teacher: dict[str, Any] | None, batch: TrainBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss of a packed batch and its parts, each a mean over labelled positions.

    Args:
      teacher: body parameters of the frozen starting policy (see `frozen`); None without KL, or where the batch holds its ids.
    """
    model, head, layout, config = settings.model, settings.head, settings.layout, settings.train

    dtype = jnp.dtype(config.compute_dtype)

    def forward(body: dict[str, Any]) -> jax.Array:
        return hidden_states(
            model,
            body,
            batch.tokens,
            batch.positions,
            layout=layout,
            segment_ids=batch.segment_ids,
            remat=config.remat,
            dtype=dtype,
            attention=config.attention,
        )[0]

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(batch.labelled, x, 0)) / jnp.maximum(jnp.sum(batch.labelled), 1)

    body = params["body"] if config.trainable == "all" else jax.lax.stop_gradient(params["body"])
    hidden = forward(body) if batch.hidden is None else batch.hidden
    loss, parts = jnp.float32(0), {}
    if config.joint_weight:
        rows = params["zip_rows"]
        log_joint = cell_log_probs(logits(model, hidden, rows.astype(hidden.dtype), rows), head.grid)
        parts["joint"] = mean(joint_loss(log_joint, batch.reward, batch.remaining, batch.censored, head.grid))
        loss += config.joint_weight * parts["joint"]
    if config.kl_weight or config.lm_weight:
        reference: FullTeacher | TopK | None = batch.teacher and TopK(*batch.teacher)
        if teacher is not None:
            reference = _teacher_policy(settings, forward(teacher), teacher)
        nll, kl = token_losses(
            model,
            layout,
            hidden,
            Unembedding.of(unembedding(model, body), dtype, layout),
            batch.targets,
            head.sampleable(model.vocab_size),
            teacher=reference,
            kl_kind=config.kl_kind,
            chunk=config.loss_chunk,
        )
        parts["nll"], parts["kl"] = mean(nll), mean(kl)
        loss += config.kl_weight * parts["kl"] + config.lm_weight * parts["nll"]
    return loss, parts | {"loss": loss}


def _teacher_policy(settings: StepSettings, hidden: jax.Array, body: dict[str, Any]) -> FullTeacher | TopK:
    """The frozen policy of a batch, as the divergence needs it, from its final hidden states `[B, S, d]`."""
    model, layout, config = settings.model, settings.layout, settings.train
    found = FullTeacher(jax.lax.stop_gradient(hidden), Unembedding.of(unembedding(model, body), config.compute_dtype, layout))
    if config.kl_kind != "forward_topk":
        return found
    return teacher_top_k(model, layout, found, settings.head.sampleable(model.vocab_size), k=config.kl_top_k, chunk=config.loss_chunk)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def train_step(
    settings: StepSettings, state: TrainState, teacher: dict[str, Any] | None, batch: TrainBatch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. A step with a non-finite loss or gradient changes nothing but the counters.

    Returns:
      the new state, and float32 scalars: loss parts, gradient norm, learning rate, labelled positions.
    """
    config = settings.train
    trained = trained_part(state.params, config)

    def objective(trained: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return losses(settings, {**state.params, **trained}, teacher, batch)

    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trained)
    norm = optax.tree.norm(grads)
    rate = learning_rate(state.step, config)
    updates, opt_state = optimizer(config).update(grads, state.opt_state, trained)
    scale = {name: -rate * (config.zip_lr_multiplier if name == "zip_rows" else 1.0) for name in updates}
    moved = {name: jax.tree.map(lambda p, u, s=scale[name]: p + s * u, trained[name], updates[name]) for name in trained}
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)

    def select(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)

    metrics |= {"grad_norm": norm, "learning_rate": rate, "labelled": jnp.sum(batch.labelled).astype(jnp.float32)}
    params = {**state.params, **select(moved, trained)}
    return TrainState(params, select(opt_state, state.opt_state), state.step + 1, state.skipped + ~fine), metrics
