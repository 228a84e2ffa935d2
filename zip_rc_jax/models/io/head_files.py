"""Trained heads in files of their own: the reserved rows, and which model they belong to.

ZIP-RC-Lite changes no weight of the policy. So a published model and a file of some hundred
kilobytes make up the whole trained model.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as tensors_to_bytes

from zip_rc_jax.head import ZipHead
from zip_rc_jax.models.io.digests import array_digest, json_digest, named_leaves
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.buckets import is_bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest
from zip_rc_jax.runtime.storage import fix_for, in_short, writing
from zip_rc_jax.runtime.temporaries import whole_file
from zip_rc_jax.runtime.working_copy import fetched

FORMAT = "zip_rc_jax/head/1"
BUILTIN = "builtin:"
SHIPPED = pathlib.Path(str(resources.files("zip_rc_jax"))) / "assets" / "heads"
ENDING = ".safetensors"
_META = "zip_rc_head"
_DAMAGED = "copy or write the file again"


@dataclasses.dataclass(frozen=True)
class StoredHead:
    """What a head file holds.

    Attributes:
      head: grid, label and reserved range.
      rows: `[cells, d_model]` float32.
      body: `body_digest` of the model that the rows were trained on.
      info: how they were made, for people.
    """

    head: ZipHead
    rows: np.ndarray
    body: str
    info: dict[str, Any]


def body_digest(lm: LanguageModel) -> str:
    """Which policy this is: a hash of its weights, rounded to bfloat16.

    It is the same for float32 and bfloat16 in memory, and with and without a head. Rows past the
    ids of the tokenizer do not count, for they say nothing about the policy.
    """
    body = lm.without_head().params["body"]
    digests = {name: array_digest(x.astype(jnp.bfloat16)) for name, x in named_leaves(body)}
    return json_digest(digests)


def save_head(lm: LanguageModel, path: str | pathlib.Path) -> None:
    """Writes the head of a model to a file that `load(..., head=path)` attaches to its policy.

    The file is complete or absent. A file of that name is replaced.

    Raises:
      UsageError: the model has no head, or the file cannot be written.
    """
    if lm.head is None:
        raise UsageError(
            "model without a ZIP head",
            "there are no rows to write",
            "train one with `zip-rc train`",
        )
    target = pathlib.Path(path).absolute()
    rows = np.asarray(lm.params["zip_rows"], np.float32)
    meta = {
        "format": FORMAT,
        "head": lm.head.to_dict(),
        "body": body_digest(lm),
        "rows": array_digest(rows),
        "info": lm.info,
    }
    with writing(f"head {path}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            file.write(tensors_to_bytes({"zip_rows": rows}, {_META: json.dumps(meta)}))


def attach_head(lm: LanguageModel, source: str | pathlib.Path) -> LanguageModel:
    """The model with the head of a file, which was trained on exactly this policy.

    Args:
      source: the file, or "builtin:NAME" for one that ships with the package.

    Raises:
      UsageError: no such file or name, a damaged file, a model that has a head already, or rows
        that were trained on another model.
    """
    stored = read_head(source)
    name = f"head {source}"
    if lm.head is not None:
        raise UsageError(
            name,
            "the model has a head of its own",
            "leave head out, or pass the model without one (`lm.without_head()`)",
        )
    if stored.rows.shape[1] != lm.config.d_model:
        wanted = f"its rows have {stored.rows.shape[1]} numbers, and the model {lm.config.d_model}"
        raise UsageError(name, f"it belongs to another model: {wanted}", _other(stored))
    if stored.head.used_ids != lm.tokenizer.used:
        raise UsageError(
            name,
            f"it belongs to another model: its tokenizer uses {stored.head.used_ids} ids, and this "
            f"one {lm.tokenizer.used}",
            _other(stored),
        )
    if stored.body != (found := body_digest(lm)):
        raise UsageError(
            name,
            f"it was trained on other weights (digest {stored.body}, and these have {found})",
            _other(stored),
        )
    head = stored.head
    lm = lm.with_head(head.grid, head.label, head.first_id, defaults=head.defaults)
    dtype = lm.params["body"]["embed"].dtype
    rows = jax.device_put(
        stored.rows.astype(dtype), lm.layout.sharding(("cells", "embed"), stored.rows.shape)
    )
    return dataclasses.replace(lm, params={**lm.params, "zip_rows": rows})


def _other(stored: StoredHead) -> str:
    made = stored.info.get("source") or stored.info.get("policy")
    of = f" ({str(made)[:100]})" if made else ""
    return f"load the model that it was trained on{of}, in the same quantisation, or train a head"


def read_head(source: str | pathlib.Path) -> StoredHead:
    """The head that a file holds, or one that ships. Raises as `attach_head`."""
    path, name = _path(str(source)), f"head {source}"
    if not path.is_file():
        fix = "pass a file that `zip-rc export --head-only` wrote, or builtin:NAME"
        raise UsageError(name, "there is no such file", fix)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(name, in_short(error), fix_for(error)) from None
    try:
        rows = read_tensors(data)["zip_rows"]
        meta = json.loads(_metadata(data)[_META])
        known = meta["format"] == FORMAT
        if known:
            head = ZipHead.from_dict(meta["head"])
            body, info, digest = str(meta["body"]), dict(meta["info"]), meta["rows"]
    except (SafetensorError, KeyError, TypeError, ValueError, UsageError) as error:
        raise UsageError(
            name, f"it is no head file, or damaged ({in_short(error)})", _DAMAGED
        ) from None
    if not known:
        raise UsageError(
            name,
            f"its format is {str(meta['format'])[:60]!r}, and {FORMAT!r} is read",
            "use the version of this package that wrote it",
        )
    if rows.shape[:1] != (head.grid.n_cells,) or rows.ndim != 2 or array_digest(rows) != digest:
        raise UsageError(name, "its rows do not fit their digest: it was damaged", _DAMAGED)
    return StoredHead(head, rows, body, info)


def _metadata(data: bytes) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]).get("__metadata__", {})


def _path(source: str) -> pathlib.Path:
    if is_bucket(source):
        return fetched(source, "head")
    if not source.startswith(BUILTIN):
        return pathlib.Path(source)
    name = source.removeprefix(BUILTIN)
    known = sorted(path.name.removesuffix(ENDING) for path in SHIPPED.glob(f"*{ENDING}"))
    if name not in known:
        fix = nearest(name, known, "known are", 3) if known else "pass a file"
        raise UsageError(f"head {source!r:.100}", "the package ships no such head", fix)
    return SHIPPED / f"{name}{ENDING}"
