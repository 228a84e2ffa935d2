"""Fixed-n baselines from a pool of full samples, averaged exactly over all subsets of the pool.

The usual estimate draws one subset per prompt and adds noise that the comparison then has to beat.
With N <= 10 samples there are at most 252 subsets of one size, so the expectation over subsets and
over tie-breaking is computed instead of sampled.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from zip_rc_jax.config import MAX_SAMPLES
from zip_rc_jax.data.problems import level_title
from zip_rc_jax.evaluation.cost import gen_cost
from zip_rc_jax.runtime.errors import UsageError

METHODS = ("majority", "best_of_n", "weighted_best_of_n", "pass")
SELF_EVALUATION = "self_evaluation"
_TIE = 1e-9  # sums of values in another order differ by rounding
CHUNK = 256  # prompts enumerated together


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

    Raises:
      UsageError: shapes that do not fit together, NaN, more than 10 samples, or an empty sample.
    """

    correct: np.ndarray
    answer_id: np.ndarray
    value: np.ndarray
    self_length: np.ndarray
    level: np.ndarray
    level_names: tuple[str, ...] = ()

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
        if self.n_samples > MAX_SAMPLES:
            raise UsageError(
                f"{self.n_samples} samples",
                f"all subsets are enumerated, for at most {MAX_SAMPLES} samples",
                "use fewer samples",
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
        return self.self_length.mean(1)


@dataclasses.dataclass(frozen=True)
class BaselinePoint:
    """One fixed method at one n.

    Arrays are float64 `[P]`, expectations over subsets and tie-breaking.

    Attributes:
      method: one of `METHODS`, or `SELF_EVALUATION`.
      n: samples per prompt.
      accuracy: expected reward of the answer ("pass": probability that a sample is correct).
      compute: normalised tokens; n exactly, as the unit is the mean over the same pool (and what
        self-evaluation reads besides).
      latency: normalised serial steps: the longest sample of the subset, since all run in parallel.
    """

    method: str
    n: int
    accuracy: np.ndarray
    compute: np.ndarray
    latency: np.ndarray

    @property
    def name(self) -> str:
        """`majority@3` and so on."""
        return f"{self.method}@{self.n}"

    def cost(self, alpha: float) -> np.ndarray:
        """`[P]` float64 GenCost."""
        return gen_cost(self.compute, self.latency, alpha)


def _winners(score: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which allowed entries reach the maximum, up to rounding: `[..., N]` bool."""
    score = np.where(allowed, score, -np.inf)
    return allowed & (score >= score.max(-1, keepdims=True) - _TIE)


def expected_reward(
    method: str, member: np.ndarray, correct: np.ndarray, answer_id: np.ndarray, value: np.ndarray
) -> np.ndarray:
    """Expected reward `[P]` over subsets `member` `[S, N]` bool of samples `[P, N]`."""
    if method == "pass":
        return np.where(member, correct[:, None], 0.0).max(-1).mean(1)
    answered = member & (answer_id >= 0)[:, None]  # [P, S, N]
    allowed = np.where(answered.any(-1, keepdims=True), answered, member)
    if method == "best_of_n":
        winner = _winners(np.broadcast_to(value[:, None], allowed.shape), allowed)
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
    share = np.where(_winners(score, allowed), 1 / np.maximum(votes, 1), 0.0)
    return ((share * correct[:, None]).sum(-1) / share.sum(-1)).mean(1)


def subsets(total: int, size: int) -> np.ndarray:
    """Membership `[C(total, size), total]` bool of all subsets."""
    chosen = np.array(list(itertools.combinations(range(total), size)))
    member = np.zeros((len(chosen), total), bool)
    np.put_along_axis(member, chosen, True, axis=1)
    return member


def baseline_point(pool: SamplePool, method: str, n: int) -> BaselinePoint:
    """One method at one n, averaged over all subsets of size n.

    - `majority`: the most frequent answer; `weighted_best_of_n`: the answer with the largest sum of
      values; ties are split evenly between answers.
    - `best_of_n`: the sample of the highest value; ties are split evenly between samples.
    - `pass`: whether any sample is correct.
    A sample without an answer (-1) wins only in a subset where no sample has one. Samples of one
    answer may differ in reward (a grader that reads more than the answer); the answer's reward is
    then their mean.

    Raises:
      UsageError: an unknown method, or n outside 1..N.
    """
    if method not in METHODS:
        raise UsageError(
            f"method={method!r}", f"known baselines are {', '.join(METHODS)}", "use one of them"
        )
    if not 1 <= n <= pool.n_samples:
        raise UsageError(
            f"n={n}",
            f"the pool has {pool.n_samples} samples per prompt",
            "use n from 1 to that number",
        )
    member = subsets(pool.n_samples, n)
    accuracy, latency = np.empty(pool.n_prompts), np.empty(pool.n_prompts)
    for start in range(0, pool.n_prompts, CHUNK):
        part: Any = slice(start, start + CHUNK)
        accuracy[part] = expected_reward(
            method, member, pool.correct[part], pool.answer_id[part], pool.value[part]
        )
        latency[part] = np.where(member, pool.self_length[part][:, None], 0.0).max(-1).mean(1)
    return BaselinePoint(
        method, n, accuracy, np.full(pool.n_prompts, float(n)), latency / pool.mean_length
    )


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
    pool: SamplePool, values: np.ndarray, extra: np.ndarray
) -> tuple[BaselinePoint, ...]:
    """Weighted best-of-n at n = 1..N by what the policy says of its own samples, which it is asked
    after each: ascending in n.

    With one sample there is nothing to choose, so nothing is asked.

    Args:
      values: `[P, N]`, how sure it is that the sample is right.
      extra: `[P, N]`, tokens that asking takes: the question's and the reply's. Compute counts
        them; they take one more serial step, as the question is known.
    """
    asked = dataclasses.replace(pool, value=values)
    more, unit = np.asarray(extra, np.float64).mean(1), pool.mean_length
    points = [baseline_point(asked, "weighted_best_of_n", n) for n in range(1, pool.n_samples + 1)]
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
    pool: SamplePool, methods: tuple[str, ...] = METHODS
) -> dict[str, tuple[BaselinePoint, ...]]:
    """Every method at n = 1..N: method -> points ascending in n."""
    return {
        method: tuple(baseline_point(pool, method, n) for n in range(1, pool.n_samples + 1))
        for method in methods
    }
