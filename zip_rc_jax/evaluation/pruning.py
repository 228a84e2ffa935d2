"""Baselines that run samples in parallel and end some of them early: by value, by length, or when
enough of them have finished.

These are functions of arrays: what each full sample would have done. Where the samples of a decode
all start at the root, its decisions are the same; the replay of a stored pool repeats them from the
joints, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool, check_size, knob_points
from zip_rc_jax.evaluation.draws import Draws, mean_and_error
from zip_rc_jax.evaluation.exact import exact_best, expected_maximum
from zip_rc_jax.evaluation.selection import vote_rewards
from zip_rc_jax.evaluation.sequential import Drawn, check_knobs, drawn_samples
from zip_rc_jax.runtime.errors import UsageError

VOTES = ("majority", "value")

# ---- the first ones to finish


def shortest_curve(pool: SamplePool) -> tuple[BaselinePoint, ...]:
    """The first of n parallel samples to finish, at n = 1..N; the others end with it.

    Source: Hassid et al., "Don't Overthink it" (arXiv 2505.17813), short-1@k. Exact, by order
    statistics of the lengths: latency is the expected minimum, compute n times as much. Samples
    that finish at the same step are equally likely to be taken. Chosen here: it is taken whether it
    has an answer or not, since the others have not finished.
    """
    nobody = np.zeros(pool.answer_id.shape, np.int64)
    points = []
    for n in range(1, pool.n_samples + 1):
        shortest = -expected_maximum(-pool.self_length, n) / pool.mean_length
        accuracy = exact_best(pool.correct, nobody, -pool.self_length, n)
        points.append(BaselinePoint("shortest", n, accuracy, n * shortest, shortest))
    return tuple(points)


def first_finished(
    pool: SamplePool,
    finished: Sequence[int],
    *,
    n: int | None = None,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """The majority of the first m of n parallel samples to finish; the others end with the m-th.

    Source: Hassid et al., "Don't Overthink it" (arXiv 2505.17813), short-m@k. With m = n - 1 the
    longest sample is left out. Chosen here: samples that finish in the same step as the m-th vote,
    too; ties are split evenly between answers, where the paper prefers the shortest.

    Args:
      finished: m, one point for each.
      n: samples that start; default all of the pool.

    Raises:
      UsageError: an m that is no number from 1 to n.
    """
    n = pool.n_samples if n is None else n
    check_size(pool, n)
    for m in finished:
        if isinstance(m, bool) or not isinstance(m, (int, np.integer)) or not 1 <= m <= n:
            raise UsageError(
                f"finished={shown(m)}", f"{n} samples start", f"use a number from 1 to {n}"
            )

    def run(drawn: Drawn, m: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        end = np.sort(drawn.length, axis=1)[:, int(m) - 1 : int(m)]
        reward = vote_rewards(
            drawn.ids, np.ones(drawn.ids.shape), drawn.correct, drawn.length <= end
        )
        return reward, np.minimum(drawn.length, end).sum(1), end[:, 0]

    return _parallel(pool, "first_finished", run, "finished", finished, n, draws)


def _parallel(
    pool: SamplePool,
    method: str,
    run: Callable[[Drawn, float], tuple[np.ndarray, np.ndarray, np.ndarray]],
    knob_name: str,
    knobs: Sequence[float],
    n: int,
    draws: Draws | None,
) -> tuple[BaselinePoint, ...]:
    """A method that starts n samples at once.

    Args:
      run: of K subsets and a knob the reward, the tokens and the serial steps, `[K]` each.
    """
    draws = draws or Draws()
    chosen = draws.all_subsets(pool.n_samples, n)
    accuracy, error, tokens, steps = measured = np.zeros((4, len(knobs), pool.n_prompts))
    for p in range(pool.n_prompts):
        order = draws.drawn(p, pool.n_samples, n) if chosen is None else chosen
        drawn = drawn_samples(pool, p, order)
        for k, knob in enumerate(knobs):
            reward, token, step = run(drawn, knob)
            accuracy[k, p], error[k, p] = mean_and_error(reward, chosen is not None)
            tokens[k, p], steps[k, p] = token.mean(), step.mean()
    return knob_points(pool, method, n, knob_name, knobs, measured)


# ---- decisions every few tokens


def reward_pruning(
    pool: SamplePool,
    traces: Sequence[Sequence[Any]],
    thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    interval: int,
    n: int | None = None,
    vote: str = "value",
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Ends samples whose expected reward lies below a threshold.

    Source: ZIP-RC reward pruning (arXiv 2512.01457; the paper's threshold is 0.4), as the policy
    `reward_threshold` of the decoder decides: every `interval` steps, samples below the threshold
    pause; while nothing has finished and all would pause, the best one goes on. Chosen here: the
    first decision comes after `interval` tokens, and a trace holds values as they are, so average
    them over the decoder's window first if it has one.

    Args:
      traces: `[P][N]` arrays `[T]`: the expected reward after 0, 1, ..., T - 1 tokens, as in
        `RolloutPredictions.reward`.
      thresholds: one point for each.
      interval: tokens between decisions.
      n: samples that start; default all of the pool.
      vote: how the finished samples choose an answer: "value" (weighted by final values) or
        "majority".

    Raises:
      UsageError: a trace that has not one value for each token, or an impossible setting.
    """
    n = _checked(pool, n, interval, vote)
    check_knobs("threshold", thresholds, 0, 1)
    for p in range(pool.n_prompts):
        for i in range(pool.n_samples):
            if len(traces[p][i]) != pool.self_length[p, i]:
                raise UsageError(
                    f"trace of sample {i} of prompt {p}",
                    f"it has {len(traces[p][i])} values, and the sample "
                    f"{pool.self_length[p, i]:g} tokens",
                    "give the value before each generated token, the root first",
                )

    def run(drawn: Drawn, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row = [np.asarray(trace, np.float64) for trace in traces[drawn.prompt]]
        padded = np.zeros((len(row), max(map(len, row)) + 1))
        for i, trace in enumerate(row):
            padded[i, : len(trace)] = trace

        def keep(at: np.ndarray, live: np.ndarray) -> np.ndarray:
            value = padded[drawn.order, at.astype(np.int64)]
            kept = live & (value >= threshold)
            best = np.where(live, value, -np.inf).argmax(axis=1)
            alone = ~kept.any(axis=1) & live.all(axis=1)
            kept[alone, best[alone]] = True
            return kept

        return _run(drawn, interval, keep, vote)

    return _parallel(pool, "reward_pruning", run, "threshold", thresholds, n, draws)


def length_pruning(
    pool: SamplePool,
    budgets: Sequence[float],
    *,
    interval: int,
    n: int | None = None,
    vote: str = "majority",
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Ends samples that have a budget of tokens; while nothing has finished, none where it would
    end all.

    Source: majority voting with length pruning, a baseline of ZIP-RC (arXiv 2512.01457), as the
    policy `length_budget` of the decoder decides every `interval` steps.

    Args:
      budgets: tokens, one point for each.
      interval, n, vote: as in `reward_pruning`.
    """
    n = _checked(pool, n, interval, vote)
    check_knobs("budget", budgets, 1, np.inf)

    def run(drawn: Drawn, budget: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        def keep(at: np.ndarray, live: np.ndarray) -> np.ndarray:
            kept = live & (at < budget)
            stuck = ~kept.any(axis=1) & live.all(axis=1)
            kept[stuck] = live[stuck]
            return kept

        return _run(drawn, interval, keep, vote)

    return _parallel(pool, "length_pruning", run, "budget", budgets, n, draws)


def _checked(pool: SamplePool, n: int | None, interval: Any, vote: str) -> int:
    n = pool.n_samples if n is None else n
    check_size(pool, n)
    if isinstance(interval, bool) or not isinstance(interval, (int, np.integer)) or interval < 1:
        raise UsageError(
            f"interval={shown(interval)}", "it counts tokens between decisions", "use 1 or more"
        )
    if vote not in VOTES:
        raise UsageError(
            f"vote={shown(vote)}", f"votes are one of {', '.join(VOTES)}", "use one of them"
        )
    return n


def _run(
    drawn: Drawn,
    interval: int,
    keep: Callable[[np.ndarray, np.ndarray], np.ndarray],
    vote: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward, tokens and serial steps `[K]` of samples that go on while `keep` says so.

    Args:
      keep: of the tokens so far `[K, n]` and the unfinished samples `[K, n]` bool, which go on.
    """
    going = np.ones(drawn.ids.shape, bool)
    at, steps = np.zeros(drawn.ids.shape), np.zeros(len(drawn.ids))
    while going.any():
        new = np.where(going, np.minimum(interval, drawn.length - at), 0.0)
        at, steps = at + new, steps + new.max(axis=1)
        live = at < drawn.length
        going = live & keep(at, live)
    finished = at >= drawn.length
    weights = drawn.value if vote == "value" else np.ones(drawn.ids.shape)
    return vote_rewards(drawn.ids, weights, drawn.correct, finished), at.sum(1), steps
