"""The mesh, and one table from logical axis names to mesh axes.

Every weight carries the names of its axes (`nnx.Param(..., axes=...)`). Activations are named where
they are constrained. The tables below say which mesh axis each name is laid over. Training shards
parameters over `fsdp` and `tensor` and batches over `data` and `fsdp`. Decoding keeps whole layers
per device except for `tensor`, and lays rows over `data`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zip_rc_jax.runtime.errors import UsageError

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
    """A mesh of `data * fsdp * tensor` devices, of all processes together; -1 on one axis takes
    what the others leave over.

    One process may use some of its devices. Of several, each must have its part in the mesh.

    Raises:
      UsageError: more devices are asked for than there are, or not all of several processes.
    """
    devices, asked = jax.devices(), f"mesh data={data} fsdp={fsdp} tensor={tensor}"
    shape = filled((data, fsdp, tensor), len(devices))
    wanted = math.prod(shape)
    if wanted > len(devices):
        raise UsageError(
            asked, f"it needs {wanted} devices and {len(devices)} are visible", "use a smaller mesh"
        )
    if jax.process_count() == 1:
        return Mesh(np.asarray(devices[:wanted]).reshape(shape), MESH_AXES)
    if wanted != len(devices):
        raise UsageError(
            asked,
            f"the {jax.process_count()} processes have {len(devices)} devices, and all must take "
            "part",
            "use them all",
        )
    # on a TPU, neighbours on the mesh are neighbours on the wire
    return Mesh(mesh_utils.create_device_mesh(shape, devices), MESH_AXES)


def filled(sizes: Sequence[int], devices: int) -> list[int]:
    """Sizes of the mesh axes. One size may be -1: it takes the devices that the others leave.

    Raises:
      UsageError: the devices do not divide by the others.
    """
    others = math.prod(abs(size) for size in sizes)
    if -1 in sizes and devices % others:
        asked = "mesh " + " ".join(
            f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True)
        )
        raise UsageError(
            asked,
            f"{devices} devices are visible, which do not divide by {others}",
            "use other sizes",
        )
    return [devices // others if size == -1 else size for size in sizes]


def mesh_sizes(text: str, axes: Sequence[str] = MESH_AXES) -> dict[str, int]:
    """Sizes of the mesh axes that a text such as `data=4,tensor=2` names.

    Raises:
      UsageError: an unknown axis, or no number.
    """
    sizes = {}
    for item in filter(None, text.replace(" ", ",").split(",")):
        name, _, size = item.partition("=")
        if name not in axes or not re.fullmatch(r"[1-9]\d*", size):
            raise UsageError(
                f"mesh {text!r}",
                f"{item!r} is no axis with a size",
                f"give axes of {', '.join(axes)}, e.g. {axes[0]}=16",
            )
        sizes[name] = int(size)
    return sizes


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One entry of a `PartitionSpec` as a tuple."""
    return (part,) if isinstance(part, str) else part or ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its rules. Hashable: static in jitted functions."""

    mesh: Mesh
    rules: Rules

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

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
                raise UsageError(
                    f"logical axis {name!r}",
                    f"the rules know {', '.join(table)}",
                    "add a rule in sharding.py",
                )
            part = table[name] if name is not None else None
            used += _axes(part)
            parts.append(part)
        if len(used) != len(set(used)):
            raise UsageError(
                f"axes {axes}",
                f"two dimensions fall on one mesh axis ({parts})",
                "change a rule so that each mesh axis is used once",
            )
        return PartitionSpec(*parts)

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None
    ) -> NamedSharding:
        """Sharding for logical `axes`; with `shape`, checks divisibility.

        Raises:
          UsageError: a dimension does not divide over its mesh axes.
        """
        spec = self.spec(axes)
        for size, name, part in zip(shape or (), axes, spec, strict=False):
            parts = list(_axes(part))
            ways = math.prod(self.mesh.shape[p] for p in parts)
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

    def ways(self, name: str) -> int:
        """Into how many parts an axis of this logical name is cut."""
        return math.prod(self.mesh.shape[p] for p in self.mesh_axes(name))

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """The axes of the mesh, of more than one device, that an axis of this logical name is cut
        over."""
        return tuple(axis for axis in _axes(self.spec((name,))[0]) if self.mesh.shape[axis] > 1)

    def rows_of(self, devices: Sequence[jax.Device], count: int) -> list[bool]:
        """For each of the `count` rows of a batch (which is padded at its end), whether one of the
        devices holds it."""
        shape = (self.padded(count, "batch"),)
        where = self.sharding(("batch",)).devices_indices_map(shape)
        held = np.zeros(shape, bool)
        for device in devices:
            if device in where:
                held[where[device]] = True
        return held[:count].tolist()

    def padded(self, size: int, name: str) -> int:
        """`size` rounded up to what divides over the mesh axes of `name`."""
        return -(-size // self.ways(name)) * self.ways(name)


def side_by_side(count: int, rules: Rules) -> Layout:
    """The layout of this process's first `count` devices, each with all parameters and a share of
    the rows."""
    return Layout(
        Mesh(np.asarray(jax.local_devices()[:count]).reshape(count, 1, 1), MESH_AXES), rules
    )


def single_device(rules: Rules = DECODE_RULES) -> Layout:
    """The layout of one device of this process, the default everywhere."""
    return side_by_side(1, rules)


def devices_worth_using() -> int:
    """How many devices of this process are faster side by side than one of them: all accelerators.

    CPU devices share the cores.
    """
    devices = jax.local_devices()
    return 1 if devices[0].platform == "cpu" else len(devices)
