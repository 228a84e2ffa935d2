"""Where every parameter and every field of a batch of each shipped config lies, against what was
stored.

A change in `sharding.py` or in the axes of a parameter shows here, for each config.
`PYTHONPATH=tests python tests/training/test_golden_shardings.py` stores them again.
"""

from __future__ import annotations

from harness import devices  # noqa: F401  (before JAX is imported)

# isort: split

import json
import pathlib

import jax
import pytest

from harness.processes import rollouts
from zip_rc_jax.aot.model_sizes import with_model
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.batches import train_batches
from zip_rc_jax.models.transformer import param_axes, param_shapes
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training.trainer import _on_mesh

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden_shardings"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def shardings(name):
    """Sizes of the mesh; and per parameter and batch field, shape, partition spec and the shape of
    one device's share.

    The mesh has two devices on `tensor` if key and value heads and vocabulary divide by two, else
    one.
    """
    path = ROOT / "configs" / f"{name}.yaml"
    config = with_model(load_config(path), path.name)
    tensor = 1 if config.model.n_kv_heads % 2 or config.model.vocab_size % 2 else 2
    layout = Layout(make_mesh(data=2, fsdp=4 // tensor, tensor=tensor), TRAIN_RULES)
    grid = config.grid.grid("value")
    shapes = {
        "body": param_shapes(config.model),
        "zip_rows": jax.ShapeDtypeStruct((grid.n_cells, config.model.d_model), "float32"),
    }
    axes = {"body": param_axes(config.model), "zip_rows": ("cells", "embed")}
    placed = jax.tree.map(
        lambda s, a: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout.sharding(a, s.shape)),
        shapes,
        axes,
    )
    train = config.policy.train if name.endswith("policy") else config.final
    batch = next(
        iter(
            train_batches(
                rollouts(), label="value", batch_rows=train.batch_rows, row_tokens=32, seed=0
            )
        )
    )
    return {
        "mesh": dict(layout.mesh.shape),
        "parameters": {
            jax.tree_util.keystr(path, simple=True, separator="/"): described(x)
            for path, x in _leaves(placed)
        },
        "batch": {
            name: described(x) for name, x in vars(_on_mesh(batch, layout)).items() if x is not None
        },
    }


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def described(x):
    spec = [list(part) if isinstance(part, tuple) else part for part in x.sharding.spec]
    return {"shape": list(x.shape), "spec": spec, "share": list(x.sharding.shard_shape(x.shape))}


def text(found):
    """JSON with one line per array."""
    parts = [f' "mesh": {json.dumps(found["mesh"])}']
    for part in ("parameters", "batch"):
        lines = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found[part].items()
        )
        parts.append(f' "{part}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def test_every_shipped_config_has_stored_shardings():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_batches_lie_where_they_did(name, request):
    if name.startswith(("smollm2", "tiny")):
        request.getfixturevalue("smollm2_gguf")  # its sizes stand in the model file
    if name.startswith("qwen2.5"):
        request.getfixturevalue("qwen_gguf")
    assert shardings(name) == json.loads((GOLDEN / f"{name}.json").read_text())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CONFIGS:
        (GOLDEN / f"{name}.json").write_text(text(shardings(name)))
