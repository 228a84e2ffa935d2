"""Whether rollouts can be trained on, and belong to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.data.rollouts import Rollout, RolloutSource, Selection, summary_of
from zip_rc_jax.runtime.errors import UsageError


def check_tokens(rollouts: Sequence[Rollout], used_ids: int) -> None:
    """An id past the tokenizer's would silently be read as another, or as a reserved one.

    Args:
      used_ids: of the tokenizer.

    Raises:
      UsageError: a rollout has such an id.
    """
    largest = summary_of(rollouts).largest_id
    if (foreign := largest >= used_ids).any():
        number = int(np.argmax(foreign))
        raise UsageError(
            f"rollout {number}",
            f"it has token id {largest[number]}, and the model's tokenizer has {used_ids} ids, so "
            "another model sampled it",
            "use the model that the rollouts come from (`policy.path` in a config)",
        )


def check_records(rollouts: object) -> Sequence[Rollout]:
    """`rollouts` if they are a sequence of `Rollout`. Those of a dataset are not read for it.

    Raises:
      UsageError: another type, an item of another type, none, or a negative token id.
    """
    if isinstance(rollouts, RolloutSource | Selection):
        return rollouts
    if not isinstance(rollouts, Sequence) or isinstance(rollouts, str | bytes):
        raise UsageError(
            f"rollouts of type {type(rollouts).__name__}",
            "they are read in many orders, so they are a sequence of `Rollout`",
            "pass a list of zip_rc_jax.Rollout, or read_rollouts(directory)",
        )
    if not rollouts:
        raise UsageError("rollouts", "there are none to train on", "pass at least one rollout")
    for number, rollout in enumerate(rollouts):
        if not isinstance(rollout, Rollout):
            raise UsageError(
                f"rollout {number}, {shown(rollout)}",
                "it is no Rollout",
                "make one with zip_rc_jax.Rollout(...)",
            )
        for name in ("prompt_token_ids", "output_token_ids"):
            ids = getattr(rollout, name)
            if ids.ndim != 1 or (ids < 0).any():
                raise UsageError(
                    f"rollout {number}, {name}={shown(ids.tolist())}",
                    "it is no list of token ids",
                    "pass ids >= 0",
                )
    return rollouts


def digest_of(rollouts: Sequence[Rollout]) -> str:
    """32 hex digits of all that a training sees of the rollouts, in their order. Reads each of
    them.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for r in rollouts:
        for ids in (r.prompt_token_ids, r.output_token_ids):
            hasher.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        hasher.update(np.array([r.correct, r.value, r.finished, r.prompt_index], "<f8").tobytes())
    return hasher.hexdigest()
