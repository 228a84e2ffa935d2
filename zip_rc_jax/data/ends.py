"""Which rollouts of a foreign table ended, where the table knows only one end token."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from zip_rc_jax.data.rollouts import Rollout


def finish_at_ends(
    rollouts: Iterable[Rollout], end_ids: Collection[int]
) -> tuple[list[Rollout], int]:
    """The rollouts, those finished whose last token is an end token, and how many these are.

    The authors' sampler stops at every end token of the model, but its column `finished` compares
    with the tokenizer's own one alone. So a response that ended with `<|endoftext|>` counts there
    as cut off. A rollout that is finished stays so: a stop string may have ended it.

    Args:
      end_ids: ids of all tokens that end a sequence, `Tokenizer.eos_ids`.
    """
    found, changed = [], 0
    for rollout in rollouts:
        output = rollout.output_token_ids
        if not rollout.finished and len(output) and int(output[-1]) in end_ids:
            rollout, changed = dataclasses.replace(rollout, finished=True), changed + 1
        found.append(rollout)
    return found, changed
