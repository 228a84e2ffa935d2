"""The readings of a stored pool: as arrays of `readings.npz`, and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zip_rc_jax.data.sample_pool import PoolFiles
from zip_rc_jax.evaluation.pool_curves import Readings, in_rows


class StoredStatistics(NamedTuple):
    """What `TokenStatistics` says of one sample of `T` tokens.

    Attributes:
      confidence: float32 `[T]`.
      self_certainty: mean certainty over the tokens.
    """

    confidence: np.ndarray
    self_certainty: float


def stored_readings(readings: Readings) -> dict[str, np.ndarray]:
    """All that a pool does not hold already, as arrays. `rewards` are in its records.

    Samples lie one after the other, rows in order: `confidence` float32 `[tokens of all samples]`,
    `certainty` float64 `[R * N]`; `self_evaluation` and `reward_model` are `[2, R, N]`.
    """
    found: dict[str, np.ndarray] = {}
    if readings.statistics is not None:
        flat = [sample for row in readings.statistics for sample in row]
        found["confidence"] = np.concatenate([np.asarray(x.confidence, np.float32) for x in flat])
        found["certainty"] = np.array([x.self_certainty for x in flat], np.float64)
    for name in ("self_evaluation", "reward_model"):
        if (values := getattr(readings, name)) is not None:
            found[name] = np.asarray(values, np.float64)
    return found


def load_readings(files: PoolFiles, samples: int | None = None, *, along: bool = True) -> Readings:
    """The readings of a stored pool.

    Args:
      samples: the first so many of every row; None takes all.
      along: with those of every token, or with those of whole samples alone.

    Raises:
      UsageError: a damaged pool.
    """
    each = files.metadata["samples"]
    kept = slice(samples)
    stored = files.readings()
    rewards, statistics = None, None
    if along:
        rewards = in_rows([np.array(x["rewards"]) for x in files.records(("rewards",))], each)
    if rewards is not None and "confidence" in stored:
        ends = np.cumsum([len(x) for row in rewards for x in row])
        parts = np.split(stored["confidence"], ends[:-1])
        pairs = zip(parts, stored["certainty"].tolist(), strict=True)
        statistics = [row[kept] for row in in_rows([StoredStatistics(*x) for x in pairs], each)]
    judged = {
        name: stored[name][:, :, kept]
        for name in ("self_evaluation", "reward_model")
        if name in stored
    }
    return Readings(
        statistics=statistics,
        rewards=None if rewards is None else [row[kept] for row in rewards],
        parameter_ratio=files.metadata.get("readings", {}).get("parameter_ratio", 1.0),
        **judged,
    )
