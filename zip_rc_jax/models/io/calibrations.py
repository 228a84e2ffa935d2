"""What a calibration chose, stored beside the model that it was made with.

The record is a JSON file: `calibration.json` in a model's directory, and `NAME.calibration.json`
beside a head file or a GGUF file. It names the policy, the reserved rows and the grid that it
holds for, and is refused for any other.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from zip_rc_jax.models.io.digests import array_digest
from zip_rc_jax.models.io.head_files import BUILTIN, body_digest
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.buckets import is_bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import read_json, with_digest, without_digest, write_json
from zip_rc_jax.runtime.working_copy import fetched, publish, refresh

FORMAT = "zip_rc_jax/calibration/1"
FILE, ENDING = "calibration.json", ".calibration.json"
AGAIN = "delete it, and run `zip-rc calibrate` again"
RISKS = {"errors": "errors among answered", "loss": "loss against n full samples"}


def model_identity(lm: LanguageModel) -> dict[str, Any]:
    """Which policy and which head: digests, the same for float32 and bfloat16 parameters.

    Raises UsageError for a model without a head.
    """
    if lm.head is None:
        reason = "there is no head to calibrate"
        raise UsageError("model without a ZIP head", reason, "train one with `zip-rc train`")
    rows = array_digest(jnp.asarray(lm.params["zip_rows"]).astype(jnp.bfloat16))
    return {"body": body_digest(lm), "rows": rows, "head": lm.head.identity()}


def place_of(model: str, head: str | None = None) -> pathlib.Path | None:
    """Where the record of a model lies, given as on the command line.

    None where nothing is written: a model or a head of the package, and a model id of a hub.
    """
    if (head or "").startswith(BUILTIN) or model.startswith("embedded:"):
        return None
    if is_bucket(head or model):
        path = fetched(head or model, "model")
        refresh(path / FILE if path.is_dir() else path.with_name(path.name + ENDING))
    else:
        path = pathlib.Path(head or model)
    if path.is_dir():
        return path / FILE
    return path.with_name(path.name + ENDING) if path.is_file() else None


def write_calibration(
    lm: LanguageModel, path: str | pathlib.Path, record: Mapping[str, Any]
) -> pathlib.Path:
    """Writes a record of `lm`, complete or not at all. One that is there is replaced."""
    content = {"format": FORMAT, "model": model_identity(lm), **record}
    written = write_json(path, with_digest(content))
    publish(written)
    return written


def read_calibration(lm: LanguageModel, path: str | pathlib.Path) -> dict[str, Any]:
    """The record at `path`.

    Raises:
      UsageError: there is none, it is damaged, or it was made with another model or head.
    """
    what, stored = f"calibration {path}", read_json(path, fix=AGAIN)
    try:
        record = without_digest(stored)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {str(record['format'])[:60]!r}")
        given = record["model"]
        calibration_line(record)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(what, f"it is damaged ({str(error)[:200]})", AGAIN) from None
    own = model_identity(lm)
    names = {"body": "other weights", "rows": "another head", "head": "another grid or label"}
    for part, other in names.items():
        if own[part] != given[part]:
            shown = "" if part == "head" else f" (digest {given[part]}, and these have {own[part]})"
            raise UsageError(what, f"it was made with {other}{shown}", AGAIN)
    return record


def stored_calibration(
    lm: LanguageModel, model: str, head: str | None = None
) -> dict[str, Any] | None:
    """The record of a model that was loaded from `model` (and `head`); None if there is none.

    Raises UsageError as `read_calibration`.
    """
    place = place_of(model, head)
    return read_calibration(lm, place) if place is not None and place.is_file() else None


def calibration_line(record: Mapping[str, Any]) -> str:
    """What a record says, in one line."""
    data, options = record["data"], record["options"]
    settings = " ".join(f"{name}={value}" for name, value in options.items())
    counted = f"{data['problems']} problems of {data['name']}"
    cost = record["measured"]["cost"]
    promise = record["promise"]
    if promise is None:
        return f"calibrated for an average cost of {cost:.2f}: {settings} ({counted})"
    return (
        f"calibrated: {RISKS[promise['risk']]} at most {promise['delta']:.1%} with confidence "
        f"{1 - promise['epsilon']:.0%}: {settings} ({counted}; GenCost {cost:.2f})"
    )


def calibration_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What clients of a server are told: no paths, and no digests."""
    names = ("options", "promise", "average_cost", "measured")
    told = {name: record[name] for name in names if name in record}
    return told | {"says": calibration_line(record), "problems": record["data"]["problems"]}
