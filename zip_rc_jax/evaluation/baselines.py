"""Fixed-n baselines from a pool of full samples, averaged over the subsets of the pool.

The usual estimate draws one subset per prompt and adds noise that the comparison then has to beat.
Here the expectation over subsets and over tie-breaking is computed. Three ways, the first that
applies:
  - all subsets, where they are few (`Draws.enumerated`);
  - exact formulas for any number of samples: pass@k, best-of-n and the longest of n by order
    statistics, majority by counting subsets (`exact_majority`);
  - seeded draws of subsets, with their standard error (weighted votes).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.data.problems import level_title
from zip_rc_jax.evaluation.cost import gen_cost
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.exact import (
    MOST_COUNTED,
    exact_best,
    exact_majority,
    exact_pass,
    expected_maximum,
)
from zip_rc_jax.evaluation.selection import drawn_votes, vote_rewards, winners
from zip_rc_jax.runtime.errors import UsageError

METHODS = ("majority", "best_of_n", "weighted_best_of_n", "pass")
SELF_EVALUATION = "self_evaluation"
CHUNK = 256  # prompts enumerated together
SMALL = 16  # samples up to which all subsets of all prompts are enumerated together


@dataclasses.dataclass(frozen=True)
class SamplePool:
    """N independent full samples of each of P prompts.

    Attributes:
      correct: `[P, N]` float64, reward of each sample.
      answer_id: `[P, N]` int64, equal ids = equal extracted answers within a prompt; -1 = no
        answer.
      value: `[P, N]` float64, expected reward from the head at the end of the sample.
      self_length: `[P, N]` float64, generated tokens, end token included.
      level: `[P]` int64, difficulty; larger is harder.
      level_names: `level_names[level]`, for people; () where levels are numbers alone.
      tries: how many rows in a row are tries of one problem. Every try is a prompt of its own but
        for the unit of cost, the mean over all samples of the problem, and for intervals.

    Raises:
      UsageError: shapes that do not fit together, NaN, or an empty sample.
    """

    correct: np.ndarray
    answer_id: np.ndarray
    value: np.ndarray
    self_length: np.ndarray
    level: np.ndarray
    level_names: tuple[str, ...] = ()
    tries: int = 1

    def level_title(self, level: int) -> str:
        """A level for people: "level 2", or its name."""
        return level_title(self.level_names[level] if self.level_names else "", level)

    def __post_init__(self) -> None:
        for field, dtype in (
            ("correct", np.float64),
            ("answer_id", np.int64),
            ("value", np.float64),
            ("self_length", np.float64),
        ):
            array = np.asarray(getattr(self, field), dtype)
            object.__setattr__(self, field, array)
            if array.ndim != 2 or array.shape != self.correct.shape or not array.size:
                raise UsageError(
                    f"pool.{field} of shape {array.shape}",
                    "all samples of all prompts form one [P, N] matrix",
                    "align the arrays",
                )
            if np.isnan(array).any():
                raise UsageError(f"pool.{field}", "it holds NaN", "drop or repair these prompts")
        object.__setattr__(self, "level", np.asarray(self.level, np.int64))
        if self.level.shape != (self.n_prompts,):
            raise UsageError(
                f"pool.level of shape {self.level.shape}",
                f"there are {self.n_prompts} prompts",
                "give one level per prompt",
            )
        if self.tries < 1 or self.n_prompts % self.tries:
            raise UsageError(
                f"pool.tries={self.tries}",
                f"there are {self.n_prompts} rows",
                "give as many tries of every problem",
            )
        if (self.self_length < 1).any():
            raise UsageError(
                "pool.self_length below 1",
                "a sample has at least its end token",
                "count the end token",
            )

    @property
    def n_prompts(self) -> int:
        return self.correct.shape[0]

    @property
    def n_samples(self) -> int:
        return self.correct.shape[1]

    @property
    def mean_length(self) -> np.ndarray:
        """`[P]` float64, mean tokens of one sample of each prompt: the unit of cost."""
        own = self.self_length.mean(1)
        return own if self.tries == 1 else own.reshape(-1, self.tries).mean(1).repeat(self.tries)

    @property
    def n_problems(self) -> int:
        return self.n_prompts // self.tries


@dataclasses.dataclass(frozen=True)
class BaselinePoint:
    """One method with one setting.

    Arrays are float64 `[P]`, expectations over subsets (or orders) and tie-breaking.

    Attributes:
      method: a name of `method_table.METHOD_TABLE`.
      n: samples per prompt; the most, where the method may stop earlier.
      accuracy: expected reward of the answer ("pass": probability that a sample is correct).
      compute: normalised tokens that were really generated. For n full samples it is n exactly, as
        the unit is the mean over the same pool (and what self-evaluation reads besides).
      latency: normalised serial steps. Samples of one wave run in parallel, so a wave takes as long
        as its longest sample; waves follow each other.
      standard_error: of the accuracy, from drawing subsets or orders; 0 where all were averaged or
        counted.
      knob_name, knob: the setting that a curve goes over, if it is not n; "" and NaN else.
    """

    method: str
    n: int
    accuracy: np.ndarray
    compute: np.ndarray
    latency: np.ndarray
    standard_error: np.ndarray = None  # type: ignore[assignment]  # zeros, see __post_init__
    knob_name: str = ""
    knob: float = math.nan

    def __post_init__(self) -> None:
        if self.standard_error is None:
            object.__setattr__(self, "standard_error", np.zeros(np.shape(self.accuracy)))

    @property
    def name(self) -> str:
        """`majority@3`, `adaptive_consistency@8 threshold=0.95` and so on."""
        setting = f" {self.knob_name}={self.knob:g}" if self.knob_name else ""
        return f"{self.method}@{self.n}{setting}"

    @property
    def mean_error(self) -> float:
        """Standard error of the mean accuracy over these prompts, from drawing alone: each prompt
        has draws of its own."""
        return float(np.sqrt(np.square(self.standard_error).sum()) / len(self.standard_error))

    def cost(self, alpha: float) -> np.ndarray:
        """`[P]` float64 GenCost."""
        return gen_cost(self.compute, self.latency, alpha)


def knob_points(
    pool: SamplePool,
    method: str,
    n: int,
    knob_name: str,
    knobs: Sequence[float],
    measured: np.ndarray,
) -> tuple[BaselinePoint, ...]:
    """The points of a curve over a knob.

    Args:
      measured: `[4, K, P]`, for each knob and prompt: the expected reward and its standard error,
        the tokens generated, and the serial steps.
    """
    accuracy, error, tokens, steps = measured
    compute, latency = tokens / pool.mean_length, steps / pool.mean_length
    return tuple(
        BaselinePoint(
            method, n, accuracy[k], compute[k], latency[k], error[k], knob_name, float(knob)
        )
        for k, knob in enumerate(knobs)
    )


def expected_reward(
    method: str, member: np.ndarray, correct: np.ndarray, answer_id: np.ndarray, value: np.ndarray
) -> np.ndarray:
    """Expected reward `[P]` over subsets `member` `[S, N]` bool of samples `[P, N]`."""
    if method == "pass":
        return np.where(member, correct[:, None], 0.0).max(-1).mean(1)
    answered = member & (answer_id >= 0)[:, None]  # [P, S, N]
    allowed = np.where(answered.any(-1, keepdims=True), answered, member)
    if method == "best_of_n":
        winner = winners(np.broadcast_to(value[:, None], allowed.shape), allowed)
        return (np.where(winner, correct[:, None], 0.0).sum(-1) / winner.sum(-1)).mean(1)
    same = (answer_id[:, :, None] == answer_id[:, None, :]).astype(np.float64)
    votes = np.einsum("sj,pij->psi", member.astype(np.float64), same)
    score = (
        votes
        if method == "majority"
        else np.einsum("sj,pij,pj->psi", member.astype(np.float64), same, value)
    )
    # 1 / votes gives every answer (not every sample) the same share of a tie. Without any answer
    # all scores belong to id -1.
    share = np.where(winners(score, allowed), 1 / np.maximum(votes, 1), 0.0)
    return ((share * correct[:, None]).sum(-1) / share.sum(-1)).mean(1)


def subsets(total: int, size: int) -> np.ndarray:
    """Membership `[C(total, size), total]` bool of all subsets."""
    chosen = np.array(list(itertools.combinations(range(total), size)))
    member = np.zeros((len(chosen), total), bool)
    np.put_along_axis(member, chosen, True, axis=1)
    return member


def baseline_point(
    pool: SamplePool, method: str, n: int, draws: Draws | None = None
) -> BaselinePoint:
    """One method at one n, averaged over the subsets of size n.

    - `majority`: the most frequent answer (self-consistency, Wang et al., arXiv 2203.11171);
      `weighted_best_of_n`: the answer with the largest sum of values, as in ZIP-RC (arXiv
      2512.01457); ties are split evenly between answers.
    - `best_of_n`: the sample of the highest value (also arXiv 2512.01457); ties are split evenly
      between samples.
    - `pass`: whether any sample is correct (pass@k, Chen et al., arXiv 2107.03374).
    A sample without an answer (-1) wins only in a subset where no sample has one. Samples of one
    answer may differ in reward (a grader that reads more than the answer); the answer's reward is
    then their mean.

    Args:
      draws: when subsets are drawn instead of enumerated; default `Draws()`.

    Raises:
      UsageError: an unknown method, or n outside 1..N.
    """
    if method not in METHODS:
        raise UsageError(
            f"method={method!r}", f"known baselines are {', '.join(METHODS)}", "use one of them"
        )
    check_size(pool, n)
    draws = draws or Draws()
    accuracy, error = mean_reward(
        method, pool.correct, pool.answer_id, pool.value, n, draws, pool.n_prompts
    )
    latency = mean_longest(pool.self_length, n, draws)
    return BaselinePoint(
        method, n, accuracy, np.full(pool.n_prompts, float(n)), latency / pool.mean_length, error
    )


def mean_longest(length: np.ndarray, n: int, draws: Draws) -> np.ndarray:
    """Expected longest `[P]` of n of the samples `[P, N]`.

    Few subsets are enumerated, so that figures of small pools keep every bit.
    """
    total = length.shape[1]
    if draws.all_subsets(total, n) is None or total > SMALL:
        return expected_maximum(length, n)
    member = subsets(total, n)
    return np.concatenate(
        [
            np.where(member, length[part][:, None], 0.0).max(-1).mean(1)
            for part in _parts(len(length))
        ]
    )


def _parts(prompts: int) -> list[slice]:
    """Prompts that are enumerated together."""
    return [slice(start, start + CHUNK) for start in range(0, prompts, CHUNK)]


def check_size(pool: SamplePool, n: Any, least: int = 1) -> None:
    """Raises UsageError unless n is a number of samples that the pool has."""
    if (
        isinstance(n, bool)
        or not isinstance(n, (int, np.integer))
        or not least <= n <= pool.n_samples
    ):
        raise UsageError(
            f"n={n}",
            f"the pool has {pool.n_samples} samples per prompt",
            f"use n from {least} to that number",
        )


def mean_reward(
    method: str,
    correct: np.ndarray,
    answer_id: np.ndarray,
    value: np.ndarray,
    n: int,
    draws: Draws,
    prompts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Expected reward `[P]` of a method on n of the samples `[P, N]`, and its standard error
    `[P]`."""
    total = correct.shape[1]
    chosen = draws.all_subsets(total, n)
    if chosen is not None and total <= SMALL:
        member = subsets(total, n)
        means = [
            expected_reward(method, member, correct[p], answer_id[p], value[p])
            for p in _parts(prompts)
        ]
        return np.concatenate(means), np.zeros(prompts)
    if method == "pass":
        return exact_pass(correct, n), np.zeros(prompts)
    if method == "best_of_n":
        return exact_best(correct, answer_id, value, n), np.zeros(prompts)
    if method == "majority" and total <= MOST_COUNTED:
        counted = [exact_majority(c, a)[n - 1] for c, a in zip(correct, answer_id, strict=True)]
        return np.array(counted), np.zeros(prompts)
    weights = np.ones_like(value) if method == "majority" else value
    if chosen is not None:
        rewards = [
            vote_rewards(a[chosen], w[chosen], c[chosen]).mean()
            for a, w, c in zip(answer_id, weights, correct, strict=True)
        ]
        return np.array(rewards), np.zeros(prompts)
    found = [
        drawn_votes(answer_id[p], weights[p], correct[p], p, draws)[:, n - 1]
        for p in range(prompts)
    ]
    means, errors = np.array(found).T
    return means, errors


def majority_reward(correct: np.ndarray, answer_id: np.ndarray) -> float:
    """Expected reward of the majority answer of the samples of one prompt, `correct [K]` and
    `answer_id [K]` as in `SamplePool`.

    As `majority` of `baseline_point`; 0 without any sample.
    """
    if not len(correct):
        return 0.0
    everyone, rewards = np.ones((1, len(correct)), bool), np.asarray(correct, np.float64)[None]
    return float(
        expected_reward("majority", everyone, rewards, np.asarray(answer_id)[None], rewards)[0]
    )


def self_evaluation_curve(
    pool: SamplePool,
    values: np.ndarray,
    extra: np.ndarray,
    draws: Draws | None = None,
    ns: Sequence[int] | None = None,
) -> tuple[BaselinePoint, ...]:
    """Weighted best-of-n at n = 1..N by what the policy says of its own samples, which it is asked
    after each: ascending in n.

    Source: a baseline of ZIP-RC (arXiv 2512.01457). With one sample there is nothing to choose, so
    nothing is asked.

    Args:
      values: `[P, N]`, how sure it is that the sample is right.
      extra: `[P, N]`, tokens that asking takes: the question's and the reply's. Compute counts
        them; they take one more serial step, as the question is known.
      draws: see `baseline_point`.
      ns: another choice of n.
    """
    asked = dataclasses.replace(pool, value=values)
    more, unit = np.asarray(extra, np.float64).mean(1), pool.mean_length
    sizes = range(1, pool.n_samples + 1) if ns is None else ns
    points = [baseline_point(asked, "weighted_best_of_n", n, draws) for n in sizes]
    return tuple(
        dataclasses.replace(
            p,
            method=SELF_EVALUATION,
            compute=p.compute + p.n * more / unit,
            latency=p.latency + 1 / unit,
        )
        if p.n > 1
        else dataclasses.replace(p, method=SELF_EVALUATION)
        for p in points
    )


def baseline_curves(
    pool: SamplePool,
    methods: tuple[str, ...] = METHODS,
    draws: Draws | None = None,
    ns: Sequence[int] | None = None,
) -> dict[str, tuple[BaselinePoint, ...]]:
    """Every method at n = 1..N (or at those of `ns`): method -> points ascending in n."""
    sizes = range(1, pool.n_samples + 1) if ns is None else ns
    return {
        method: tuple(baseline_point(pool, method, n, draws) for n in sizes) for method in methods
    }
