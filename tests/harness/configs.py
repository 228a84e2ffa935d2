"""Random models of every kind of layer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from harness.forwards import fast_jit
from harness.tiny import TINY_MODEL, randomised
from zip_rc_jax.config import ModelConfig, RopeScaling
from zip_rc_jax.models.transformer import init_params

# The first two differ in every switch that plain models have; the third mixes layer types
# irregularly and uses all the rest, and EACH_MODEL is its short form for what must be compiled
# often.
OTHER_MODEL = dataclasses.replace(
    TINY_MODEL,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=6,
    qk_norm=True,
    tied=False,
    rope_theta=77.0,
)


MIXED_MODEL = ModelConfig(
    vocab_size=128, d_model=32, n_layers=7, n_heads=6, n_kv_heads=3, head_dim=10, d_ff=40,
    layer_types=("conv", "conv", "attention", "conv", "sliding", "conv", "attention"),
    sliding_window=5, conv_kernel=4, conv_bias=True,
    rope_theta=321.0, rope_scaling=RopeScaling("llama3", 4.0, 1.5, 3.0, 150),
    sliding_rope_theta=50.0, rms_eps=1e-2, norm_plus_one=True,
    qk_norm=True, post_norms=True, attention_bias=True, mlp_bias=True, attention_scale=0.5,
    logit_softcap=2.0,
    activation="gelu_tanh", scale_embedding=True, tied=True, max_positions=96,
)  # fmt: skip


EACH_MODEL = dataclasses.replace(
    MIXED_MODEL, n_layers=3, layer_types=("conv", "attention", "sliding")
)


CONFIGS = [TINY_MODEL, OTHER_MODEL, MIXED_MODEL]


compiled_init = functools.partial(fast_jit, static_argnames=("config", "seed"))(init_params)


@functools.cache
def initialised(config, seed=3):
    return jax.tree.map(np.asarray, compiled_init(config, seed))


@functools.cache
def parameters(config):
    return randomised(initialised(config), 7)
