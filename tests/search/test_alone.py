"""The search is a library of its own: it imports JAX, NumPy, the grid, the settings and the error
type, and nothing else of ours."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import zip_rc_jax

# The package's root may import more; what its rooms need is what they import themselves.
BARE = """
import importlib, json, sys, types
root = types.ModuleType("zip_rc_jax")
root.__path__ = [sys.argv[1]]
sys.modules["zip_rc_jax"] = root
before = set(sys.modules)
module = importlib.import_module(sys.argv[2])
for name in module.__all__:
    getattr(module, name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = {
    "matplotlib",
    "tensorflow_datasets",
    "tensorflow",
    "grain",
    "orbax",
    "reasoning_gym",
    "flax",
    "transformers",
    "math_verify",
}


def imported_with(name: str) -> list[str]:
    """All modules that a new process loads for everything public in `name`, the package's root left
    empty."""
    root = str(pathlib.Path(zip_rc_jax.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", BARE, root, name],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout)


def test_the_search_imports_jax_numpy_and_what_lies_below_it():
    modules = imported_with("zip_rc_jax.search")
    ours = {name.split(".")[1] for name in modules if name.startswith("zip_rc_jax.")}
    assert ours == {"config", "grid", "runtime", "search"}
    assert not HEAVY & {name.split(".")[0] for name in modules}
    assert not {"yaml", "omegaconf", "rich", "huggingface_hub"} & {
        name.split(".")[0] for name in modules
    }


@pytest.mark.parametrize("room", ["grading", "evaluation"])
def test_grading_and_evaluation_import_nothing_heavy(room):
    modules = imported_with(f"zip_rc_jax.{room}")
    assert not HEAVY & {name.split(".")[0] for name in modules}
