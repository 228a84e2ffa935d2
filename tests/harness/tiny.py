"""A tiny random language model with a head."""

from __future__ import annotations

from harness import devices  # noqa: F401  (before JAX is imported)

# isort: split

import dataclasses
import functools

import jax
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.models.language_model import LanguageModel

WORDS = [*map(str, range(12)), "+", "=", "wait", "so", "check", "Answer:", "a", "b", "c", "d"]
TINY_GRID = Grid((0.0, 0.3, 1.0), (0, 3, 7, 20))
# Every value is away from its default, so that a value that nobody reads fails a comparison.
TINY_MODEL = ModelConfig(
    vocab_size=128, d_model=32, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, d_ff=40,
    rope_theta=321.0, rms_eps=1e-2, qk_norm=False,
    tied=True, max_positions=96,
)  # fmt: skip


def randomised(tree, seed, scale=0.3):
    """Parameters with every leaf (norm scales too) moved away from where initialisation leaves
    it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (
            x
            + np.asarray(scale * x.std() + 0.05, x.dtype)
            * rng.standard_normal(x.shape).astype(x.dtype)
        ),
        tree,
    )


def tiny_lm(
    config: ModelConfig = TINY_MODEL, grid: Grid = TINY_GRID, label: str = "value", seed: int = 5
) -> LanguageModel:
    """A random model with a random head; its next-token distribution is far from uniform, and its
    samples end after about 20 tokens."""
    lm = LanguageModel.create(config, word_level(WORDS), seed).with_head(grid, label)
    params = randomised(lm.params, seed)
    rng = np.random.default_rng(seed + 1)
    params["zip_rows"] = jax.numpy.asarray(
        0.3 * rng.standard_normal(lm.params["zip_rows"].shape), jax.numpy.float32
    )
    table = "embed" if config.tied else "unembed"
    params["body"][table] = params["body"][table] * 3
    return dataclasses.replace(lm, params=params)


@functools.cache
def tiny_chat_lm(tokenizer, max_positions: int = 160) -> LanguageModel:
    """A random model with a random head for any tokenizer. Transformers can read its export."""
    sizes = {"vocab_size": tokenizer.size, "max_positions": max_positions, "n_heads": 4}
    config = dataclasses.replace(TINY_MODEL, **sizes)
    lm = LanguageModel.create(config, tokenizer, 5).with_head(TINY_GRID, "value")
    return dataclasses.replace(lm, params=randomised(lm.params, 5))
