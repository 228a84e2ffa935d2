"""The mesh, and one table from logical axis names to mesh axes.

Every weight carries the names of its axes (`nnx.Param(..., axes=...)`), activations are named where they are constrained, and the
tables below say which mesh axis each name is laid over. Training shards parameters over `fsdp` and `tensor` and batches over
`data` and `fsdp`; decoding keeps whole layers per device except for `tensor`, and lays rows over `data`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zip_rc_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

TRAIN_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("sequence", None),
    ("layers", None),
    ("vocab", "tensor"),
    ("cells", None),
    ("embed", "fsdp"),
    ("embed_act", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("channels", "tensor"),
)
DECODE_RULES: Rules = (
    ("batch", "data"),
    ("sequence", None),
    ("layers", None),
    ("vocab", "tensor"),
    ("cells", None),
    ("embed", None),
    ("embed_act", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("channels", "tensor"),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first `data * fsdp * tensor` devices.

    Raises:
      UsageError: more devices are asked for than there are.
    """
    shape = (data, fsdp, tensor)
    wanted, devices = int(np.prod(shape)), jax.devices()
    if wanted > len(devices):
        raise UsageError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor}",
            f"it needs {wanted} devices and {len(devices)} are visible",
            "use a smaller mesh",
        )
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), MESH_AXES)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its rules. Hashable: static in jitted functions."""

    mesh: Mesh
    rules: Rules

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Mesh axes of an array whose dimensions have these logical names (None = replicated).

        Raises:
          UsageError: a name without a rule, or two dimensions on one mesh axis.
        """
        table = dict(self.rules)
        used: list[str] = []
        parts = []
        for name in axes:
            if name is not None and name not in table:
                raise UsageError(f"logical axis {name!r}", f"the rules know {', '.join(table)}", "add a rule in sharding.py")
            part = table[name] if name is not None else None
            used += [part] if isinstance(part, str) else list(part or ())
            parts.append(part)
        if len(used) != len(set(used)):
            raise UsageError(
                f"axes {axes}", f"two dimensions fall on one mesh axis ({parts})", "change a rule so that each mesh axis is used once"
            )
        return PartitionSpec(*parts)

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
        """Sharding for logical `axes`; with `shape`, checks divisibility.

        Raises:
          UsageError: a dimension does not divide over its mesh axes.
        """
        spec = self.spec(axes)
        for size, name, part in zip(shape or (), axes, spec, strict=False):
            parts = [part] if isinstance(part, str) else list(part or ())
            ways = int(np.prod([self.mesh.shape[p] for p in parts]))
            if size % ways:
                raise UsageError(
                    f"axis {name!r} of size {size}",
                    f"it does not divide over mesh axes {parts} of {ways} devices",
                    "use another mesh shape",
                )
        return NamedSharding(self.mesh, spec)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins the layout of an activation inside a jitted function."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def shard(self, tree: Any, axes: Any) -> Any:
        """Puts every array of `tree` on the mesh; `axes` is the matching tree of name tuples."""
        return jax.tree.map(lambda x, a: jax.device_put(x, self.sharding(a, x.shape)), tree, axes)


def single_device(rules: Rules = DECODE_RULES) -> Layout:
    """The layout of one device, the default everywhere."""
    return Layout(make_mesh(), rules)
