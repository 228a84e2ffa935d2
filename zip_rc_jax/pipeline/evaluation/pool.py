"""From decodes to what evaluation compares: the pool of samples, and the cost and answers of
runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.plugins import POLICIES
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.evaluation.baselines import SamplePool, majority_reward
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.grading.votes import answer_groups
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.pipeline.evaluation.runner import Decoded
from zip_rc_jax.runtime.errors import UsageError

DECODE = DecodeConfig()


def answer_ids(texts: Sequence[str], decode: DecodeConfig = DECODE) -> list[int]:
    """Equal numbers for equal answers of one prompt's samples, from 0; `NO_ANSWER` where there is
    none. Extractor and equivalence are those of `decode`."""
    return answer_groups(texts, decode.answer_extractor, decode.answer_equivalence)


def sample_pool(
    found: Sequence[Problem], decoded: Decoded, decode: DecodeConfig = DECODE
) -> SamplePool:
    """The baselines' pool from a decode with strategy "fixed".

    Args:
      decode: how answers are read and compared.

    Raises:
      UsageError: a sample that is not finished, whose value and length are those of a prefix.
    """
    for p, r in zip(found, decoded.results, strict=True):
        if unfinished := [x.id for x in r.prefixes if x.state != "finished"]:
            raise UsageError(
                f"samples {unfinished} of problem {p.index}",
                "they are not finished",
                "decode them with strategy='fixed' and without a budget",
            )
    return SamplePool(
        correct=np.array(decoded.grades),
        answer_id=np.array(
            [answer_ids([x.text for x in r.prefixes], decode) for r in decoded.results]
        ),
        value=np.array([[x.expected_reward for x in r.prefixes] for r in decoded.results]),
        self_length=np.array([[len(x.token_ids) for x in r.prefixes] for r in decoded.results]),
        level=np.array([p.level for p in found]),
        level_names=_level_names(found),
    )


def _level_names(found: Sequence[Problem]) -> tuple[str, ...]:
    """By level; those of levels without problems are their numbers."""
    names = {p.level: p.level_name for p in found}
    return tuple(names.get(level) or str(level) for level in range(max(names) + 1))


def online_run(name: str, decode: DecodeConfig, decoded: Decoded) -> OnlineRun:
    """The cost and the answers (by value, by vote, by majority) of a decode."""

    def graded(result: Result, grades: list[float], text: str) -> float:
        # Where a budget ended the search, the answer may be that of an unfinished prefix.
        return next(
            (g for x, g in zip(result.prefixes, grades, strict=True) if x.text == text), 0.0
        )

    def majority(result: Result, grades: list[float]) -> float:
        ended = [
            (g, x.text)
            for x, g in zip(result.prefixes, grades, strict=True)
            if x.state == "finished"
        ]
        return majority_reward(
            np.array([g for g, _ in ended]),
            np.array(answer_ids([text for _, text in ended], decode)),
        )

    pairs = list(zip(decoded.results, decoded.grades, strict=True))
    strategy = POLICIES.name_of(decode.strategy)
    adaptive = strategy == "zip_rc"
    priced = adaptive or not POLICIES.is_builtin(strategy)  # an own policy may read the prices
    return OnlineRun.from_results(
        decoded.results,
        [graded(r, g, r.value_text) for r, g in pairs],
        [graded(r, g, r.vote_text) for r, g in pairs],
        [majority(r, g) for r, g in pairs],
        name=name,
        alpha=decode.alpha if priced else math.nan,
        beta=decode.beta if priced else math.nan,
        candidates=decode.variant if adaptive else "",
        strategy=strategy,
        seconds=decoded.seconds,
    )


def joined_pools(pools: Sequence[SamplePool]) -> SamplePool:
    """The pools of some tries of the same problems as one: the tries of a problem follow each
    other."""
    first = pools[0]
    if len(pools) == 1:
        return first

    def rows(name: str) -> np.ndarray:
        found = np.stack([getattr(pool, name) for pool in pools], axis=1)
        return found.reshape(-1, *found.shape[2:])

    return SamplePool(
        correct=rows("correct"),
        answer_id=rows("answer_id"),
        value=rows("value"),
        self_length=rows("self_length"),
        level=rows("level"),
        level_names=first.level_names,
        tries=len(pools),
    )


def joined_runs(runs: Sequence[OnlineRun]) -> OnlineRun:
    """The runs of one setting in some tries as one, in the order of `joined_pools`."""
    if len(runs) == 1:
        return runs[0]
    changes: dict[str, Any] = {
        field.name: np.stack([getattr(run, field.name) for run in runs], axis=1).ravel()
        for field in dataclasses.fields(OnlineRun)
        if isinstance(getattr(runs[0], field.name), np.ndarray)
    }
    return dataclasses.replace(runs[0], **changes, seconds=sum(run.seconds for run in runs))


def most_eventful(decoded: Decoded, found: Sequence[Problem]) -> Result:
    """The result whose trace shows most: of the hardest level, right, with the most paused
    prefixes."""
    hardest = max(p.level for p in found)
    ranked = [
        (sum(x.state == "paused" for x in r.prefixes) + 10 * any(g), -i)
        for i, (p, r, g) in enumerate(zip(found, decoded.results, decoded.grades, strict=True))
        if p.level == hardest
    ]
    return decoded.results[-max(ranked)[1]]
