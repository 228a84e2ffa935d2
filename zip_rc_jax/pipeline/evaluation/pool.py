"""From decodes to what evaluation compares: the pool of samples, and the cost and answers of
runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.evaluation.baselines import SamplePool, majority_reward
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.votes import group_answers
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.pipeline.evaluation.runner import Decoded
from zip_rc_jax.runtime.errors import UsageError


def answer_ids(texts: Sequence[str]) -> list[int]:
    """Equal numbers for equal answers of one prompt's samples, from 0; `NO_ANSWER` where there is
    none."""
    return group_answers([extract_answer(text) for text in texts])


def sample_pool(found: Sequence[Problem], decoded: Decoded) -> SamplePool:
    """The baselines' pool from a decode with strategy "fixed".

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
        answer_id=np.array([answer_ids([x.text for x in r.prefixes]) for r in decoded.results]),
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
            np.array([g for g, _ in ended]), np.array(answer_ids([text for _, text in ended]))
        )

    pairs = list(zip(decoded.results, decoded.grades, strict=True))
    adaptive = decode.strategy == "zip_rc"
    return OnlineRun.from_results(
        decoded.results,
        [graded(r, g, r.value_text) for r, g in pairs],
        [graded(r, g, r.vote_text) for r, g in pairs],
        [majority(r, g) for r, g in pairs],
        name=name,
        alpha=decode.alpha if adaptive else math.nan,
        beta=decode.beta if adaptive else math.nan,
        candidates=decode.candidates if adaptive else "",
        strategy=decode.strategy,
        seconds=decoded.seconds,
    )


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
