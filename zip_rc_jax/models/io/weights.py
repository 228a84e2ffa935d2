"""Checkpoint tensors <-> parameters, one tensor at a time, straight to and from the devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.io.families import Family, Tensor, leaf, tensors
from zip_rc_jax.models.transformer import Params, param_axes, param_shapes
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.sharding import Layout


class Source(Protocol):
    """The tensors of a checkpoint under their Hugging Face names.

    Attributes:
      where: path for messages.
      shapes: of every tensor, known without reading it.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor in host memory."""


def check_names(source: Source, wanted: list[Tensor], ignored: set[str]) -> None:
    """Compares what a checkpoint holds with what it must hold, without reading a tensor.

    Args:
      ignored: names that may be there and are not read.

    Raises:
      UsageError: missing, extra or mis-shaped tensors; names the first of them.
    """
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    missing = [name for name in shapes if name not in source.shapes]
    extra = [name for name in source.shapes if name not in shapes and name not in ignored]
    wrong = [
        f"{name} {source.shapes[name]} instead of {shape}"
        for name, shape in shapes.items()
        if source.shapes.get(name, shape) != shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for names, what in (
            (missing, "missing"),
            (extra, "not in this architecture"),
            (wrong, "of another shape"),
        )
        if names
    ]
    if problems:
        raise UsageError(
            f"tensors of {source.where}",
            "; ".join(problems),
            "check config.json, or download the checkpoint again",
        )


@functools.partial(jax.jit, donate_argnames=("stack",))
def _write(stack: jax.Array, part: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts one layer into its stack, in place; and whether all of it is finite.

    Not `stack.at[layer].set(part)`: in bfloat16, XLA's CPU backend makes that a pass over the whole
    stack, with a copy of it.
    """
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0), jnp.isfinite(part).all()


def _slice(array: np.ndarray, dtype: Any, index: Any) -> np.ndarray:
    """`array[index]`, contiguous and of `dtype`."""
    part = array[index]
    if part.flags.c_contiguous:
        return part.astype(dtype, copy=False)
    converted = np.empty(part.shape, dtype)
    # a transposed matrix: in one go, each number would be a cache line from memory
    for start in range(0, part.shape[-1], 32):
        converted[..., start : start + 32] = part[..., start : start + 32]
    return converted


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    """Zeros that are never in host memory."""
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def load_params(
    config: ModelConfig, family: Family, source: Source, dtype: Any, layout: Layout
) -> Params:
    """Reads a checkpoint tensor by tensor into sharded arrays of `dtype`.

    Beside the parameters, host memory holds one tensor at a time. With several processes each keeps
    only its own shards.

    Raises:
      UsageError: tensors are missing, extra, mis-shaped or not finite, or the file is damaged.
    """
    wanted = list(tensors(family, config))
    # Some files of tied models repeat the embedding as lm_head.
    repeated = {family.names["unembed"]} & set(source.shapes) if config.tied else set()
    check_names(source, wanted, repeated)
    for name in repeated:
        if not np.array_equal(source.read(name), source.read(family.names["embed"])):
            raise UsageError(
                f"{name} of {source.where}",
                "config.json says it is tied to the embedding, but they differ",
                "correct one",
            )
    shapes, axes = param_shapes(config), param_axes(config)
    params: Params = jax.tree.map(lambda _: None, shapes)
    flags: dict[str, jax.Array] = {}
    with progress("load", len(wanted)) as bar:
        for number, tensor in enumerate(wanted):
            array = tensor.to_ours(source.read(tensor.name))
            shape, names = leaf(shapes, tensor.path).shape, leaf(axes, tensor.path)
            part_sharding = layout.sharding(
                names if tensor.layer is None else names[1:], array.shape
            )
            part = jax.make_array_from_callback(
                array.shape, part_sharding, functools.partial(_slice, array, dtype)
            )
            parent = leaf(params, tensor.path[:-1])
            if tensor.layer is None:
                parent[tensor.path[-1]], flags[tensor.name] = part, _finite(part)
            else:
                if parent[tensor.path[-1]] is None:
                    parent[tensor.path[-1]] = _zeros(shape, dtype, layout.sharding(names, shape))
                stack, flags[tensor.name] = _write(
                    parent[tensor.path[-1]], part, jnp.int32(tensor.layer)
                )
                parent[tensor.path[-1]] = stack
                stack.block_until_ready()  # or many tensors would wait in host memory at once
            bar(number + 1, None)
    bad = [name for name, fine in flags.items() if not bool(fine)]
    if bad:
        raise UsageError(
            f"tensors {', '.join(bad[:5])} of {source.where}",
            "they hold NaN or infinite numbers",
            "download it again",
        )
    return params


def read_params(
    config: ModelConfig, family: Family, params: Params, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and contiguous array of every tensor of a checkpoint, one at a time in host memory: the
    inverse of `load_params`."""
    for tensor in tensors(family, config):
        array = leaf(params, tensor.path)
        array = np.asarray((array if tensor.layer is None else array[tensor.layer]).astype(dtype))
        yield tensor.name, np.ascontiguousarray(tensor.to_theirs(array))
