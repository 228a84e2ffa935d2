"""Training whose layers have arrays of their own, and the optimizer in one pass: the same numbers
as the stacked form and as optax."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from harness.configs import CONFIGS, EACH_MODEL, parameters
from harness.runs import (
    CONFIG,
    LITE,
    assert_equal,
    batches,
    copied,
    interrupt,
    records,
    rollouts,
    settings,
    sigterm,
    without_clock,
)
from harness.tiny import tiny_lm
from zip_rc_jax.models.stacks import restack, unstack
from zip_rc_jax.runtime.sharding import MESH_AXES, TRAIN_RULES, Layout, single_device
from zip_rc_jax.training.checkpoint import Checkpoints
from zip_rc_jax.training.step import (
    adamw_update,
    change_bodies,
    init_state,
    prefers_unrolled,
    train_step,
)
from zip_rc_jax.training.trainer import Interrupted, stacked, train

KEPT = dataclasses.replace(CONFIG, remat=False)


@pytest.mark.parametrize("config", CONFIGS, ids=["tiny", "other", "mixed"])
def test_restacking_gives_back_what_was_unstacked(config):
    assert_equal(restack(config, unstack(config, parameters(config))), parameters(config))


@pytest.mark.slow
def test_unrolled_steps_are_the_stacked_ones():
    lm = tiny_lm(EACH_MODEL)
    found = []
    for unrolled in (False, True):
        setting = dataclasses.replace(settings(lm, KEPT), unrolled=unrolled)
        state, teacher, losses = init_state(copied(lm.params), KEPT), lm.params["body"], []
        if unrolled:
            unstacked = functools.partial(unstack, lm.config)
            state, teacher = change_bodies(state, unstacked), unstacked(teacher)
        for batch in batches(KEPT, 3):
            state, metrics = train_step(setting, state, teacher, batch)
            if not losses:  # of later steps, Adam makes much of the smallest differences
                gradients = jax.tree.map(np.array, stacked(setting, state).opt_state[1].mu)
            losses.append(
                [float(metrics[name]) for name in ("loss", "joint", "kl", "nll", "grad_norm")]
            )
        found.append((losses, gradients, stacked(setting, state)))
    (losses, gradients, state), (own_losses, own_gradients, own_state) = found
    assert losses[2][0] != losses[0][0], "the weights moved"
    np.testing.assert_allclose(own_losses, losses, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(own_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-8)
    assert jax.tree.map(jnp.shape, own_state) == jax.tree.map(jnp.shape, state)


def test_interrupted_and_resumed_unrolled_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    whole = train(tiny_lm(), rollouts(), KEPT, tmp_path / "whole", source={})
    interrupt(monkeypatch, 3, sigterm)
    with pytest.raises(Interrupted):
        train(tiny_lm(), rollouts(), KEPT, tmp_path / "run", source={})
    monkeypatch.undo()
    resumed = train(tiny_lm(), rollouts(), KEPT, tmp_path / "run", source={})
    assert_equal(resumed.params, whole.params)
    assert without_clock(records(tmp_path / "run")) == without_clock(records(tmp_path / "whole"))
    stacked_run = train(tiny_lm(), rollouts(), CONFIG, tmp_path / "stacked", source={})
    assert jax.tree.map(jnp.shape, whole.params) == jax.tree.map(jnp.shape, stacked_run.params)
    losses = [[r["train/loss"] for r in records(tmp_path / name)] for name in ("whole", "stacked")]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_a_checkpoint_holds_stacked_arrays_whatever_the_step_works_on(tmp_path, monkeypatch):
    interrupt(monkeypatch, 2, sigterm)
    with pytest.raises(Interrupted):
        train(tiny_lm(), rollouts(), KEPT, tmp_path, source={})
    lm = tiny_lm()
    template = init_state(copied(lm.params), KEPT)
    checkpoints = Checkpoints(
        tmp_path / "checkpoints",
        json.loads((tmp_path / "settings.json").read_text()),
        KEPT.keep_checkpoints,
    )
    state, _ = checkpoints.restore(template)
    checkpoints.close()
    assert int(state.step) == 2
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, template)


def test_only_one_cpu_device_that_keeps_activations_in_float32_is_unrolled():
    one, two = (
        single_device(TRAIN_RULES),
        Layout(Mesh(np.asarray(jax.devices()[:2]).reshape(1, 2, 1), MESH_AXES), TRAIN_RULES),
    )
    assert prefers_unrolled(one, KEPT)
    assert not prefers_unrolled(two, KEPT)
    for other in (
        CONFIG,
        dataclasses.replace(LITE, remat=False),
        dataclasses.replace(KEPT, compute_dtype="bfloat16"),
    ):
        assert not prefers_unrolled(one, other)


@pytest.mark.parametrize("size", [1e-3, 1.0], ids=["below the clip", "clipped"])
def test_the_update_is_that_of_the_optax_chain(size):
    lm, rate = tiny_lm(), 0.01
    setting, state = settings(lm), init_state(copied(lm.params), CONFIG)
    chain = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip),
        optax.scale_by_adam(b1=CONFIG.adam_b1, b2=CONFIG.adam_b2),
        optax.add_decayed_weights(CONFIG.weight_decay),
    )
    params, theirs = state.params, chain.init(state.params)
    assert jax.tree.structure(theirs) == jax.tree.structure(state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, theirs, state.opt_state)
    rng = np.random.default_rng(0)
    for _ in range(3):
        grads = jax.tree.map(
            lambda p: jnp.asarray(size * rng.standard_normal(p.shape), jnp.float32), params
        )
        norm = optax.tree.norm(grads)
        assert (norm > CONFIG.clip) == (size == 1.0)
        moved, opt_state = adamw_update(
            setting, state, grads, norm, jnp.float32(rate), jnp.bool_(True)
        )
        state = dataclasses.replace(state, params=moved, opt_state=opt_state)
        updates, theirs = chain.update(grads, theirs, params)
        scale = {"body": -rate, "zip_rows": -rate * CONFIG.zip_lr_multiplier}
        params = {
            name: jax.tree.map(lambda p, u, s=scale[name]: p + s * u, params[name], updates[name])
            for name in params
        }
    assert jax.tree.structure(opt_state) == jax.tree.structure(theirs)
    for a, b in zip(
        jax.tree.leaves((moved, opt_state)), jax.tree.leaves((params, theirs)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
