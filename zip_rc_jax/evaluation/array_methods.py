"""The methods beyond plain votes from plain arrays: adaptive sampling, confidence and pruning.

Arrays are those of `evaluation.arrays`: P prompts have n samples each. `correct` [P, n] holds
rewards in [0, 1], `value` [P, n] what the head expects, `tokens` [P, n] lengths with the end token,
`answers` [P, n] what each sample answers: texts, numbers, or None (NaN) for no answer. Every
function returns `BaselinePoint`s, one for each knob. `settings` are those of the function that is
named behind "Settings", which also gives the source of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation import confidence as _confidence
from zip_rc_jax.evaluation import pruning as _pruning
from zip_rc_jax.evaluation import sequential as _sequential
from zip_rc_jax.evaluation.arrays import _fitting, _matrix, answer_ids
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool

Points = tuple[BaselinePoint, ...]


def sample_pool(correct: Any, tokens: Any, answers: Any, value: Any = None) -> SamplePool:
    """The samples of all prompts as one pool, as the functions of `evaluation.sequential`,
    `confidence` and `pruning` take it.

    Args:
      correct, tokens, answers, value: `[P, n]`, see above; values default to 0.

    Raises:
      UsageError: arrays that do not fit together, NaN, or a sample without a token.
    """
    correct = _matrix("correct", correct)
    return SamplePool(
        correct=correct,
        answer_id=answer_ids(_fitting("answers", answers, correct, None)),
        value=np.zeros(correct.shape) if value is None else _fitting("value", value, correct),
        self_length=_fitting("tokens", tokens, correct),
        level=np.zeros(len(correct), np.int64),
    )


def adaptive_consistency(
    correct: Any,
    tokens: Any,
    answers: Any,
    thresholds: Sequence[float] = (0.95,),
    **settings: Any,
) -> Points:
    """Samples until the leading answer is likely to stay in the lead; then takes the majority.

    Settings: `sequential.adaptive_consistency` (criterion, most, wave, draws).
    """
    pool = sample_pool(correct, tokens, answers)
    return _sequential.adaptive_consistency(pool, thresholds, **settings)


def early_stopping(
    correct: Any, tokens: Any, answers: Any, windows: Sequence[int] = (2, 3, 4, 5), **settings: Any
) -> Points:
    """Samples windows until all samples of one window agree; then takes the majority.

    Settings: `sequential.early_stopping` (most, draws).
    """
    pool = sample_pool(correct, tokens, answers)
    return _sequential.early_stopping(pool, windows, **settings)


def confidence_posterior(
    correct: Any,
    confidence: Any,
    tokens: Any,
    answers: Any,
    thresholds: Sequence[float] = (0.95,),
    **settings: Any,
) -> Points:
    """Samples until one answer has enough posterior probability, given `confidence` [P, n].

    Settings: `sequential.confidence_posterior` (most, wave, draws).
    """
    pool = sample_pool(correct, tokens, answers, confidence)
    return _sequential.confidence_posterior(pool, thresholds, **settings)


def pandora(
    correct: Any,
    value: Any,
    tokens: Any,
    answers: Any,
    costs: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    **settings: Any,
) -> Points:
    """Samples while one more is worth its price; then takes the sample of the highest value.

    Settings: `sequential.pandora` (known, delta, most, wave, draws).
    """
    pool = sample_pool(correct, tokens, answers, value)
    return _sequential.pandora(pool, costs, **settings)


def deepconf_offline(
    correct: Any,
    confidence: Any,
    tokens: Any,
    answers: Any,
    keep: Sequence[float] = (0.1, 0.9),
    **settings: Any,
) -> Points:
    """Keeps the most confident samples, by `confidence` [P, n]; then a vote weighted by it.

    Settings: `confidence.deepconf_offline` (n, draws).
    """
    pool = sample_pool(correct, tokens, answers)
    return _confidence.deepconf_offline(pool, confidence, keep, **settings)


def deepconf_online(
    correct: Any,
    token_confidence: Sequence[Sequence[Any]],
    answers: Any,
    keep: Sequence[float] = (0.1, 0.9),
    **settings: Any,
) -> Points:
    """Learns a threshold from full samples, then cuts the others where they fall below it.

    Args:
      token_confidence: `[P][n]` arrays of one number for each generated token.
    Settings: `confidence.deepconf_online` (window, warmup, consensus, most, wave, draws).
    """
    tokens = [[len(sample) for sample in row] for row in token_confidence]
    pool = sample_pool(correct, tokens, answers)
    return _confidence.deepconf_online(pool, token_confidence, keep, **settings)


def self_certainty(correct: Any, certainty: Any, tokens: Any, answers: Any) -> Points:
    """Best-of-n by self-certainty [P, n], at 1 to n samples.

    See `confidence.self_certainty_curve`.
    """
    return _confidence.self_certainty_curve(sample_pool(correct, tokens, answers), certainty)


def self_certainty_borda(
    correct: Any,
    certainty: Any,
    tokens: Any,
    answers: Any,
    power: Sequence[float] = (0.3, 0.7, 1.2),
    **settings: Any,
) -> Points:
    """A vote whose weights are ranks by self-certainty [P, n], to a power.

    Settings: `confidence.borda_curve` (n, draws).
    """
    pool = sample_pool(correct, tokens, answers)
    return _confidence.borda_curve(pool, certainty, power, **settings)


def shortest_response(correct: Any, tokens: Any) -> Points:
    """The first of n parallel samples to finish, at 1 to n samples.

    See `pruning.shortest_curve`.
    """
    correct = _matrix("correct", correct)
    return _pruning.shortest_curve(sample_pool(correct, tokens, np.zeros(correct.shape, int)))


def first_finished(
    correct: Any, tokens: Any, answers: Any, finished: Sequence[int], **settings: Any
) -> Points:
    """The majority of the first m of n parallel samples to finish, for each m of `finished`.

    Settings: `pruning.first_finished` (n, draws).
    """
    return _pruning.first_finished(sample_pool(correct, tokens, answers), finished, **settings)


def reward_pruning(
    correct: Any,
    value: Any,
    traces: Sequence[Sequence[Any]],
    answers: Any,
    thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    interval: int,
    **settings: Any,
) -> Points:
    """Ends samples whose expected reward lies below a threshold.

    Args:
      traces: `[P][n]` arrays: the expected reward before each generated token, the root first.
      interval: tokens between decisions.
    Settings: `pruning.reward_pruning` (n, vote, draws).
    """
    tokens = [[len(trace) for trace in row] for row in traces]
    pool = sample_pool(correct, tokens, answers, value)
    return _pruning.reward_pruning(pool, traces, thresholds, interval=interval, **settings)


def length_pruning(
    correct: Any,
    tokens: Any,
    answers: Any,
    budgets: Sequence[float],
    *,
    interval: int,
    **settings: Any,
) -> Points:
    """Ends samples that have a budget of tokens.

    Args:
      interval: tokens between decisions.
    Settings: `pruning.length_pruning` (n, draws).
    """
    pool = sample_pool(correct, tokens, answers)
    return _pruning.length_pruning(pool, budgets, interval=interval, **settings)
