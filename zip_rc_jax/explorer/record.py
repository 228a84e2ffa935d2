"""What the page shows of a search beside its result: the actions that were weighed at every
decision, and what the head says after every token."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig, to_dict
from zip_rc_jax.inference.introspection import explain_decisions, texts_of
from zip_rc_jax.inference.outputs import Prefix, Result
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.predictions import TokenPredictions, predict
from zip_rc_jax.search.explain import Explanation

CELL = 65535  # joints are kept as whole numbers of this part: 16 bits a cell


def introspections(
    lm: LanguageModel, results: Sequence[Result], config: DecodeConfig, calibration: str = ""
) -> Iterator[dict[str, Any]]:
    """What `introspection` records of every result. One forward pass over its prefixes says what
    the decoder saw after every token, up to rounding.

    Args:
      calibration: what `zip-rc calibrate` promised of the model, in a line.

    Raises:
      UsageError: a result has no joints.
    """

    def items() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for result in results:
            for prefix in result.prefixes:
                if prefix.token_ids:
                    yield result.prompt_token_ids, prefix.token_ids

    read = predict(lm, items(), progress=False)
    assert lm.head is not None
    for result in results:
        along = [next(read) if prefix.token_ids else None for prefix in result.prefixes]
        explained = explain_decisions(result.trace, texts_of(result), config, lm.head.grid)
        told = introspection(result, along, explained, config, lm.head.grid.to_dict())
        yield told | ({"calibration": calibration} if calibration else {})


def introspection(
    result: Result,
    along: Sequence[TokenPredictions | None],
    explained: Sequence[Explanation],
    config: DecodeConfig,
    grid: dict[str, Any],
) -> dict[str, Any]:
    """A record for JSON.

    Args:
      along: predictions along every prefix; None for those without a token, or where nothing was
        predicted.
      explained: of every decision.
      grid: as a dict.
    """
    prefixes = [
        None if one is None else _tokens(one, prefix)
        for prefix, one in zip(result.prefixes, along, strict=True)
    ]
    first = next((one for one in along if one is not None), None)
    return {
        "settings": to_dict(config),
        "grid": grid,
        "decisions": [explanation_record(one) for one in explained],
        "root": None if first is None else _packed(first, first.start, first.start + 1),
        "prefixes": prefixes,
    }


def explanation_record(one: Explanation) -> dict[str, Any]:
    """An explanation for JSON; what may not be done has the utility null."""
    columns = {name: _short(getattr(one, name)) for name in ("value", "compute", "latency")}
    return {
        "multiplicity": one.multiplicity.tolist(),
        "planned_pause_bin": one.planned_pause_bin.tolist(),
        **columns,
        "utility": _short(one.utility),
        "compared": one.compared.astype(int).tolist(),
        "count": one.count,
        "normalizer": float(f"{one.normalizer:.7g}"),
    }


def _short(values: np.ndarray) -> list[float | None]:
    """Seven digits, which is what float32 has."""
    return [float(f"{x:.7g}") if np.isfinite(x) else None for x in values.tolist()]


def _tokens(one: TokenPredictions, prefix: Prefix) -> dict[str, Any]:
    """What the head says after the tokens of a prefix from its fork on. What it says after the end
    means nothing, and is NaN."""
    first = one.prompt_tokens + prefix.fork_position
    kept = _packed(one, first, len(one), ended=prefix.state == "finished")
    return {"pieces": list(one.pieces[first:]), **kept}


def _packed(one: TokenPredictions, first: int, last: int, ended: bool = False) -> dict[str, Any]:
    reward, remaining = one.p_correct[first:last].copy(), one.remaining[first:last].copy()
    if ended and len(reward):
        reward[-1] = remaining[-1] = np.nan
    return {
        "p_correct": packed(reward, "<f4"),
        "remaining": packed(remaining, "<f4"),
        "joint": packed_joint(one.joint[first:last]),
    }


def packed_joint(joint: np.ndarray) -> str:
    """Joints as 16-bit parts of `CELL`, in base64."""
    return packed(np.round(np.clip(joint, 0, 1) * CELL), "<u2")


def packed(array: np.ndarray, dtype: str) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(array.astype(dtype)).tobytes()).decode()
