"""Reading our own model checkpoints (Orbax), checked against the digests that lie in them.

Models that were written before there were digests are read unchecked.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.models.io.digests import (
    array_digest,
    array_digests,
    json_digest,
    named_leaves,
    stored_dtype,
)
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import fix_for, in_short

DIGESTS = "digests"  # in the meta: {"params": {path: digest}, "meta": digest of all the rest}
# bytes of arrays that are read at the same time, where others are on the devices too
TOGETHER = 2**30
COPY = "copy, download or train it again"
_UNLIKE = "it was damaged after it was written"


@dataclasses.dataclass(frozen=True)
class Unread:
    """Why something could not be read.

    Attributes:
      reason: in short.
      fix: what helps where the file system is at fault; "" where the files are.
    """

    reason: str
    fix: str


def try_to_read(read: Callable[[], Any]) -> tuple[Any, Unread | None]:
    """What `read` returns, and None; or None, and why it failed: Orbax raises all kinds of errors,
    a bare Exception among them.

    Raises:
      UsageError, MemoryError, JaxRuntimeError: what `read` raises of these.
    """
    _ignore_dropped_reads()
    try:
        return read(), None
    except (UsageError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        cause: BaseException = error
        while type(cause) is Exception and cause.__cause__ is not None:
            cause = cause.__cause__  # Orbax puts a page of settings around the reason
        at_fault = isinstance(cause, OSError) and not isinstance(
            cause, (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        )
        return None, Unread(in_short(cause), fix_for(cause) if at_fault else "")


@functools.cache
def _ignore_dropped_reads() -> None:
    """When one array cannot be read, Orbax drops the reads of the others, and Python would print
    pages of their errors.

    They come when Python destroys a coroutine, from threads of TensorStore that find no event loop
    any more, and from asyncio.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        dropped = code is not None and "orbax" in code.co_filename
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not (dropped or late):
            before(unraisable)

    def wanted(record: logging.LogRecord) -> bool:
        return "never retrieved" not in record.getMessage()

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(wanted)
    warnings.filterwarnings(
        "ignore", r"coroutine '(_read_|async_|Store\.).*' was never awaited", RuntimeWarning
    )


def with_digests(meta: dict[str, Any], params: Any) -> dict[str, Any]:
    """`meta` with digests of `params`, and of itself. With several processes all must call it."""
    meta = {**meta, DIGESTS: {"params": array_digests(params)}}
    return {**meta, DIGESTS: {**meta[DIGESTS], "meta": json_digest(meta)}}


def read_meta(path: pathlib.Path) -> Any:
    """The JSON of a checkpoint, checked against its digest if it has one.

    Raises:
      UsageError: there is none, or it is damaged.
    """

    import orbax.checkpoint as ocp  # a third of the time that JAX takes to import

    def read() -> Any:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    meta, failure = try_to_read(read)
    if failure:
        reason = f"it is no complete checkpoint ({failure.reason}), and it has no config.json"
        raise UsageError(f"model {path}", reason, failure.fix or COPY)
    if not isinstance(meta, dict) or DIGESTS not in meta:
        return meta
    digests = meta[DIGESTS]
    if not isinstance(digests, dict) or not isinstance(digests.get("params"), dict):
        raise UsageError(
            f"model {path}", f"the digests in its meta/metadata are damaged: {_UNLIKE}", COPY
        )
    own = digests.get("meta")
    if own != json_digest({**meta, DIGESTS: {"params": digests["params"]}}):
        raise UsageError(
            f"model {path}",
            f"its meta/metadata (sizes, tokenizer, head) does not fit its digest: {_UNLIKE}",
            COPY,
        )
    return meta


def read_model_params(path: pathlib.Path, wanted: Any, digests: Mapping[str, str] | None) -> Any:
    """The parameters of a checkpoint, laid out and typed as `wanted` says, and as its digests say
    if there are any.

    Arrays that are stored in another type are read a few at a time, so that only these lie on the
    devices in both types.

    Args:
      wanted: `jax.ShapeDtypeStruct` with a sharding for every array.

    Raises:
      UsageError: arrays are missing, damaged or of other shapes.
    """
    if digests is None:
        return _restored(path, wanted)
    leaves = dict(named_leaves(wanted))
    if leaves.keys() != digests.keys():
        raise UsageError(f"model {path}", f"its digests are those of other arrays: {_UNLIKE}", COPY)
    arrays = {
        name: array
        for group in _groups(leaves, digests, path)
        for name, array in read_arrays(path, group, digests).items()
    }
    return jax.tree.unflatten(jax.tree.structure(wanted), [arrays[name] for name in leaves])


def _groups(
    leaves: Mapping[str, Any], digests: Mapping[str, str], path: pathlib.Path
) -> list[dict[str, Any]]:
    """All at once if nothing is cast; else so few that they have `TOGETHER` bytes, or one."""
    if all(_dtype(path, name, digests) == leaf.dtype for name, leaf in leaves.items()):
        return [dict(leaves)]
    return groups(leaves)


def groups(leaves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arrays in groups of up to `TOGETHER` bytes; a larger one is a group of its own."""
    made: list[dict[str, Any]] = []
    size = TOGETHER
    for name, leaf in leaves.items():
        size += leaf.size * jnp.dtype(leaf.dtype).itemsize
        if size > TOGETHER:
            made.append({})
            size = leaf.size * jnp.dtype(leaf.dtype).itemsize
        made[-1][name] = leaf
    return made


def read_arrays(
    path: pathlib.Path, wanted: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, jax.Array]:
    """Some arrays of a checkpoint, by their names in `digests`, compared with these.

    Raises as `read_model_params`.
    """
    tree: dict[str, Any] = {}
    for name, leaf in wanted.items():
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = jax.ShapeDtypeStruct(
            leaf.shape, _dtype(path, name, digests), sharding=leaf.sharding
        )
    arrays = {}
    for name, x in named_leaves(_restored(path, tree)):
        if array_digest(x) != digests[name]:
            raise UsageError(
                f"model {path}",
                f"the array {name} in its params/ does not fit its digest: {_UNLIKE}",
                COPY,
            )
        arrays[name] = x if x.dtype == wanted[name].dtype else jnp.astype(x, wanted[name].dtype)
    return jax.block_until_ready(arrays)


def _dtype(path: pathlib.Path, name: str, digests: Mapping[str, str]) -> Any:
    try:
        return stored_dtype(digests[name])
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"model {path}", f"its digest of {name} is damaged ({in_short(error)})", COPY
        ) from None


def _restored(path: pathlib.Path, wanted: Any) -> Any:
    """The arrays of a part of the tree of parameters.

    Raises UsageError in all processes if one cannot read its shards.
    """
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )

    def read() -> Any:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            params = checkpointer.restore(path, ocp.args.Composite(params=args)).params
        if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
            raise ValueError("arrays are not in the index")
        return params

    params, failure = try_to_read(read)
    if (
        _spans_processes(wanted)
        and not distributed.all_processes(failure is None)
        and failure is None
    ):
        failure = Unread("by another process", "")
    if failure:
        raise UsageError(
            f"model {path}",
            f"its parameters are incomplete ({failure.reason})",
            failure.fix or COPY,
        )
    return params


def _spans_processes(wanted: Any) -> bool:
    return any(
        not x.sharding.is_fully_addressable
        for x in jax.tree.leaves(wanted)
        if x.sharding is not None
    )
