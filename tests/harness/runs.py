"""Small trainings, and how to interrupt them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import TrainConfig
from zip_rc_jax.data.batches import train_batches
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training import trainer
from zip_rc_jax.training.step import TrainSpec, train_step

CONFIG = TrainConfig(
    label="value", steps=7, batch_rows=4, row_tokens=24, learning_rate=1e-2, warmup=0.3,
    kl_weight=0.5, kl_top_k=5, lm_weight=0.25,
    joint_weight=1.5, zip_lr_multiplier=3.0, loss_chunk=40, log_every=1, eval_rollouts=0,
    weight_decay=0.01, adam_b1=0.8, clip=0.7,
)  # fmt: skip


LITE = dataclasses.replace(
    CONFIG, trainable="zip_rows", kl_weight=0.0, lm_weight=0.0, steps=6, learning_rate=0.03
)


def rollouts(n=30, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            prompt_index=i // 2, sample_index=i % 2, level=0, seed=0, task="chain_sum", prompt="",
            question="", answer="", entry_json="",
            prompt_token_ids=rng.integers(2, 20, 3), output_token_ids=[*rng.integers(2, 20,
            rng.integers(1, 14)), 0], response="",
            finished=bool(i % 4), correct=float(rng.random() < 0.5), value=float(rng.random()),
        )
        for i in range(n)
    ]  # fmt: skip


def batches(config=CONFIG, count=1):
    data = train_batches(
        rollouts(),
        label=config.label,
        batch_rows=config.batch_rows,
        row_tokens=config.row_tokens,
        seed=config.seed,
    )
    return [jax.tree.map(jnp.asarray, b) for b in itertools.islice(data, count)]


def settings(lm, config=CONFIG, layout=None):
    return TrainSpec(lm.config, lm.head, layout or Layout(make_mesh(), TRAIN_RULES), config)


def copied(params):
    return jax.tree.map(jnp.array, params)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def interrupt(monkeypatch, at, how):
    """After `at` steps of the process, `how` happens inside the loop."""
    count = itertools.count(1)

    def hooked(*args):
        result = train_step(*args)
        if next(count) == at:
            how()
        return result

    monkeypatch.setattr(trainer, "train_step", hooked)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def without_clock(found):
    return [{k: v for k, v in r.items() if "per_second" not in k} for r in found]
