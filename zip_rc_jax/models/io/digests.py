"""Digests of what a checkpoint holds, so that a bit that flips on a disk is found before anybody
computes with it.

The digest of an array is a sum over its elements of a hash of bits and position. So it is the same
on every mesh, for any number of processes and in any order; each device reads its own shard once,
and nothing is gathered. A change of one element always changes it. Any other damage escapes with a
probability of about 2**-64. It guards against accidents, and not against an attacker.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Odd, so that multiplying by them loses nothing: 2**32 / golden ratio, and a constant of
# MurmurHash3.
_SPREAD, _MIX = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)
_ON_HOST = 2**22  # bytes: NumPy is done with so few before XLA has compiled a program


def array_digests(tree: Any) -> dict[str, str]:
    """Digest of every array of a pytree by its path, such as `{"body/embed":
    "float32[128,32]:0123456789abcdef"}`.

    With several processes all must call it if the arrays lie on the devices of all.
    """
    return {name: array_digest(leaf) for name, leaf in named_leaves(tree)}


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, such as ("body/embed", array)."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def array_digest(x: Any) -> str:
    """Type, shape and digest of an array; see the head of this file."""
    small = x.nbytes <= _ON_HOST and (
        not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    )
    first, second = (_sums_on_host(np.asarray(x)) if small else _sums(x)) if x.size else (0, 0)
    shape = ",".join(map(str, x.shape))
    return f"{jnp.dtype(x.dtype).name}[{shape}]:{int(first):08x}{int(second):08x}"


def stored_dtype(digest: str) -> Any:
    """The type of the array that a digest of `array_digest` is of.

    Raises ValueError if it is no such digest.
    """
    stored = (
        re.fullmatch(r"(\w+)\[[\d,]*\]:[0-9a-f]{16}", digest) if isinstance(digest, str) else None
    )
    if stored is None:
        raise ValueError(f"{str(digest)[:50]!r} is no digest")
    return jnp.dtype(stored[1])


def differing(stored: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Names of the first arrays whose digests differ; "" if all are the same."""
    names = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def json_digest(value: Any) -> str:
    """Digest of a value as JSON gives it back. Spaces and the order of keys do not count."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _hashes(words: Any, index: Any) -> tuple[Any, Any]:
    """Two hashes of every element, uint32, from its bits and its position.

    Each is a bijection of the bits.
    """
    place = index * _SPREAD
    mixed = (words ^ place) * _MIX
    mixed = mixed ^ (mixed >> np.uint32(15))
    return mixed * _SPREAD, mixed * (place | np.uint32(1))


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both sums of the hashes, modulo 2**32.

    One reduction of two operands, so that XLA reads `x` once and keeps no hash.
    """
    width = min(4, x.dtype.itemsize)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    # 8 bytes: one dimension more
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    strides = [math.prod(words.shape[d + 1 :]) % 2**32 for d in range(words.ndim)]
    index = sum(
        (
            jax.lax.broadcasted_iota(jnp.uint32, words.shape, d) * np.uint32(stride)
            for d, stride in enumerate(strides)
        ),
        jnp.uint32(0),
    )
    zero = np.uint32(0)
    return jax.lax.reduce(
        _hashes(words, index),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(words.ndim)),
    )


def _sums_on_host(x: np.ndarray) -> tuple[int, int]:
    """The same with NumPy."""
    width = min(4, x.dtype.itemsize)
    words = np.ascontiguousarray(x).reshape(-1).view(f"u{width}").astype(np.uint32)
    first, second = _hashes(words, np.arange(words.size, dtype=np.uint32))
    return int(first.sum(dtype=np.uint64) % 2**32), int(second.sum(dtype=np.uint64) % 2**32)
