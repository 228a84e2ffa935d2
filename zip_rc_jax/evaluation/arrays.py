"""Baselines and comparisons from plain arrays, without a model, a run or a file.

P prompts have n samples each. `correct` [P, n] holds rewards in [0, 1], `value` [P, n] what the
head expects, `tokens` [P, n] lengths with the end token, `answers` [P, n] what each sample answers:
texts, numbers, or None (NaN) for no answer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.evaluation import baselines, metrics
from zip_rc_jax.evaluation.baselines import METHODS, BaselinePoint, SamplePool, baseline_curves
from zip_rc_jax.evaluation.cost import Cost, normalised_cost
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.runtime.errors import UsageError

NO_ANSWER = -1


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """Two methods on the same prompts.

    Attributes:
      mean_a, mean_b: means over the prompts.
      difference: mean of a minus b.
      low, high: its 95% interval, from a paired bootstrap over prompts.
      prompts: how many.
    """

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    prompts: int


def majority_vote(correct: Any, answers: Any, n: int | None = None) -> np.ndarray:
    """Expected reward [P] of the most frequent answer; ties are split evenly between answers.

    Args:
      correct: [P, n] rewards.
      answers: [P, n]; equal ones vote together. See `answer_ids` for answers that are written
        differently.
      n: how many samples vote, on average over the subsets of that size; default all.

    Raises:
      UsageError: arrays that do not fit together, NaN, or an n that is impossible.
    """
    correct = _matrix("correct", correct)
    return _reward(
        "majority", correct, correct, answer_ids(_fitting("answers", answers, correct, None)), n
    )


def weighted_vote(correct: Any, value: Any, answers: Any, n: int | None = None) -> np.ndarray:
    """Expected reward [P] of the answer with the largest sum of values; ties are split evenly.

    As `majority_vote`, with `value` [P, n]. Where there are too many subsets, they are drawn with a
    fixed seed; `curves` states the standard error.
    """
    correct = _matrix("correct", correct)
    ids = answer_ids(_fitting("answers", answers, correct, None))
    return _reward("weighted_best_of_n", correct, _fitting("value", value, correct), ids, n)


def best_of_n(correct: Any, value: Any, answers: Any = None, n: int | None = None) -> np.ndarray:
    """Expected reward [P] of the sample of the highest value; ties are split evenly.

    With `answers`, samples without one win last.
    """
    correct = _matrix("correct", correct)
    ids = (
        np.zeros(correct.shape, np.int64)
        if answers is None
        else answer_ids(_fitting("answers", answers, correct, None))
    )
    return _reward("best_of_n", correct, _fitting("value", value, correct), ids, n)


def pass_at_k(correct: Any, k: int) -> np.ndarray:
    """Unbiased pass@k [P]: the probability that one of k samples is right (reward above 0.5).

    `correct` [P, n], k from 1 to n.
    """
    correct = _matrix("correct", correct)
    _check_count("k", k, correct.shape[1])
    return metrics.pass_at_k(correct, int(k))


def within_prompt_auc(value: Any, correct: Any, mask: Any = None) -> float:
    """Probability that of two samples of one prompt the right one has the higher value, on average
    over prompts that have both kinds.

    0.5 says that the head cannot select. NaN if no prompt has a right and a wrong sample.

    Args:
      value, correct: [P, n].
      mask: [P, n] bool, which samples exist; default all. The others may hold anything.
    """
    correct = _matrix("correct", correct, finite=mask is None)
    value = _fitting("value", value, correct, finite=mask is None)
    if mask is not None:
        mask = _fitting("mask", mask, correct, None).astype(bool)
        for name, array in (("value", value), ("correct", correct)):
            _check_numbers(name, np.where(mask, array, 0))
    return metrics.within_prompt_auc(value, correct, mask)[0]


def normalized_cost(tokens: Any, serial_steps: Any, mean_length: Any, alpha: float) -> Cost:
    """Compute, latency and their mix in units of one mean sample of each prompt; all arrays [P],
    see `normalised_cost`."""
    tokens, serial_steps, mean_length = (
        _vector("tokens", tokens),
        _vector("serial_steps", serial_steps),
        _vector("mean_length", mean_length),
    )
    for name, array in (("serial_steps", serial_steps), ("mean_length", mean_length)):
        if array.shape != tokens.shape:
            raise UsageError(
                f"{name} of shape {array.shape}",
                f"tokens has shape {tokens.shape}",
                "give one number per prompt",
            )
    return normalised_cost(tokens, serial_steps, mean_length, alpha)


def curves(
    correct: Any, value: Any, tokens: Any, answers: Any, methods: tuple[str, ...] = METHODS
) -> dict[str, tuple[BaselinePoint, ...]]:
    """Every baseline at 1 to n samples, with its accuracy and cost per prompt.

    Arrays [P, n] as above.

    Raises:
      UsageError: arrays that do not fit together, or an unknown method.
    """
    correct = _matrix("correct", correct)
    pool = SamplePool(
        correct=correct,
        answer_id=answer_ids(_fitting("answers", answers, correct, None)),
        value=_fitting("value", value, correct),
        self_length=_fitting("tokens", tokens, correct),
        level=np.zeros(len(correct), np.int64),
    )
    return baseline_curves(pool, methods)


def paired_comparison(a: Any, b: Any, *, resamples: int = 2000, seed: int = 0) -> PairedComparison:
    """Whether method a is better than b on the same prompts.

    Args:
      a, b: [P], what each method reaches on each prompt, such as its reward.
      resamples, seed: of the bootstrap; the same seed gives the same interval.
    """
    a, b = _vector("a", a), _vector("b", b)
    if a.shape != b.shape:
        raise UsageError(
            f"a of shape {a.shape} with b of shape {b.shape}",
            "they are compared prompt by prompt",
            "give the same prompts",
        )
    _check_count("resamples", resamples, 10**7)
    difference, low, high = metrics.paired_bootstrap(a - b, resamples, seed)
    return PairedComparison(float(a.mean()), float(b.mean()), difference, low, high, len(a))


def answer_ids(answers: Any) -> np.ndarray:
    """[P, n] int64: equal numbers for equal answers of one prompt, `NO_ANSWER` for None and NaN.

    Texts are compared as they are. For answers that are written differently call
    `grading.answer_groups` on each prompt's responses, and pass its numbers here: -1 is no answer
    there, too.
    """
    answers = np.asarray(answers)
    numbers = np.full(answers.shape, NO_ANSWER, np.int64)
    whole = np.issubdtype(answers.dtype, np.integer)
    for p, row in enumerate(answers.tolist()):
        seen: dict[Any, int] = {}
        for i, answer in enumerate(row):
            absent = (
                answer is None
                or (isinstance(answer, float) and math.isnan(answer))
                or (whole and answer == NO_ANSWER)
            )
            if not absent:
                numbers[p, i] = seen.setdefault(answer, len(seen))
    return numbers


def _reward(
    method: str, correct: np.ndarray, value: np.ndarray, ids: np.ndarray, n: int | None
) -> np.ndarray:
    """Expected reward [P] of a method on n of the samples."""
    total = correct.shape[1]
    n = total if n is None else n
    _check_count("n", n, total)
    return baselines.mean_reward(method, correct, ids, value, int(n), Draws(), len(correct))[0]


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name}={shown(values)}",
            f"it is no array of numbers ({in_short(error)})",
            "pass numbers",
        ) from None


def _check_numbers(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise UsageError(name, "it holds NaN or infinity", "drop or repair these samples")


def _matrix(name: str, values: Any, finite: bool = True) -> np.ndarray:
    """float64 [P, n], neither empty."""
    array = _numbers(name, values)
    if array.ndim != 2 or not array.size:
        raise UsageError(
            f"{name} of shape {array.shape}",
            "it has one row per prompt and one column per sample",
            "pass [prompts, samples]",
        )
    if finite:
        _check_numbers(name, array)
    return array


def _fitting(
    name: str, values: Any, correct: np.ndarray, dtype: Any = np.float64, finite: bool = True
) -> np.ndarray:
    """An array of the shape of `correct`; as numbers unless `dtype` is None."""
    if dtype is not None:
        array = _numbers(name, values)
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:  # rows of unequal length
            raise UsageError(
                f"{name}={shown(values)}",
                f"it is no matrix ({in_short(error)})",
                "pass [prompts, samples]",
            ) from None
    if array.shape != correct.shape:
        raise UsageError(
            f"{name} of shape {array.shape}",
            f"correct has shape {correct.shape}",
            "give one entry per sample of each",
        )
    if dtype is not None and finite:
        _check_numbers(name, array)
    return array


def _vector(name: str, values: Any) -> np.ndarray:
    """float64 [P], not empty."""
    array = _numbers(name, values)
    if array.ndim != 1 or not array.size:
        raise UsageError(
            f"{name} of shape {array.shape}", "it has one number per prompt", "pass [prompts]"
        )
    _check_numbers(name, array)
    return array


def _check_count(name: str, value: Any, most: int) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or not 1 <= value <= most
    ):
        raise UsageError(
            f"{name}={shown(value)}", f"it is no whole number from 1 to {most}", "use one of them"
        )
