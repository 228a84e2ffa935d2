"""TPU chips, topologies and meshes over them, without any TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from zip_rc_jax.config import MeshConfig
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import MESH_AXES, filled, mesh_sizes

GIB = 2**30
MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, as its maker states it.

    Attributes:
      name: as in a topology.
      hbm: bytes of memory.
      flops: dense bfloat16 operations per second.
      bandwidth: HBM bytes per second.
    """

    name: str
    hbm: int
    flops: float
    bandwidth: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * GIB, 197e12, 819e9),
        Chip("v5p", 95 * GIB, 459e12, 2765e9),
        Chip("v6e", 32 * GIB, 918e12, 1640e9),
    )
}
EXAMPLES = "v5e:2x2, v5e:4x4, v5p:2x2x2 or v6e:2x4"


def parse_mesh(text: str, devices: int, default: MeshConfig) -> dict[str, int]:
    """Sizes of the mesh axes from `fsdp=8,tensor=2`; axes that are left out have size 1.

    Args:
      devices: chips of the topology, which the mesh must use up.
      default: the mesh if `text` is empty.

    Raises:
      UsageError: an unknown axis, no number, or a mesh of another size.
    """
    sizes = mesh_sizes(text) if text else dataclasses.asdict(default)
    shape = dict(
        zip(MESH_AXES, filled([sizes.get(name, 1) for name in MESH_AXES], devices), strict=True)
    )
    used = int(np.prod(list(shape.values())))
    if used != devices:
        asked = repr(text) if text else " ".join(f"{name}={size}" for name, size in shape.items())
        raise UsageError(
            f"mesh {asked}",
            f"it has {used} devices and the topology {devices}",
            f"make the product {devices}",
        )
    return shape


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:4x4`. Raises UsageError if it is not known."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UsageError(
            f"topology {topology!r}",
            f"the chips known here are {', '.join(CHIPS)}",
            f"use for example {EXAMPLES}",
        )
    return CHIPS[name]


def tpu_mesh(topology: str, mesh: str, default: MeshConfig) -> Mesh:
    """A mesh with all axes over the chips of a topology, in the order that libtpu gives them.

    Args:
      topology: such as `v5e:4x4`.
      mesh, default: as for `parse_mesh`.

    Raises:
      UsageError: libtpu is not installed, no such topology, or a mesh that does not fit it.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"topology {topology!r}",
            "libtpu, the TPU compiler, is not installed",
            "run pip install -e '.[tpu]' in a checkout, best into an environment of its own",
        )
    # Without the first three, libtpu asks the cloud's metadata server which machine this is, and
    # complains that there is none; without the last, one process at a time may load it, also where
    # none of them touches a chip.
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(key, value)
    # libtpu expects hosts of 2x2 chips unless told that there is one chip.
    single = set(re.findall(r"\d+", topology.partition(":")[2])) == {"1"}
    host = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu", **host).devices
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"topology {topology!r}",
            f"libtpu knows none of this name ({first})",
            f"use for example {EXAMPLES}",
        ) from None
    shape = parse_mesh(mesh, len(devices), default)
    return Mesh(np.asarray(devices).reshape([shape[name] for name in MESH_AXES]), MESH_AXES)
