"""Comparison at equal cost, with a paired bootstrap over prompts (and over tries, where there are
several: see `intervals`).

Two ways to equalise, both reported:
- `strict`: the smallest n whose mean GenCost is at least the run's, so the baseline never spends
  less. If even the largest n spends less, that one is used and the comparison is flagged.
- `interpolated`: the mixture of two neighbouring n whose mean GenCost equals the run's (a coin
  decides n per prompt).
Costs are equalised within the group compared: on the hardest level against what the run spends
*there*, because an adaptive method that moves its budget to hard prompts must not be credited for
outspending the baseline on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import ANSWERS
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.intervals import interval
from zip_rc_jax.runtime.errors import UsageError

KINDS = ("strict", "interpolated")
_TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One run against one baseline at equal cost on one group of prompts.

    Accuracies are means over prompts, in [0, 1].

    Attributes:
      run, alpha, beta, answer: which run, and which of its answers ("value" or "vote").
      method, kind, n: the baseline; `n` is fractional for "interpolated".
      level: the group; None is the whole mixture.
      group: the same for people: "all", "level 2", or the level's name.
      prompts: prompts in the group.
      run_accuracy, run_cost: of the run; cost is mean GenCost.
      baseline_accuracy, baseline_cost: of the baseline.
      difference, low, high: run minus baseline and its 95% interval (paired bootstrap over prompts,
        n held fixed).
      spends_less: the baseline spends less than the run, since the pool has no more samples.
    """

    run: str
    alpha: float
    beta: float
    answer: str
    method: str
    kind: str
    n: float
    level: int | None
    prompts: int
    run_accuracy: float
    run_cost: float
    baseline_accuracy: float
    baseline_cost: float
    difference: float
    low: float
    high: float
    spends_less: bool
    group: str = "all"

    def to_dict(self) -> dict[str, Any]:
        """Plain scalars, ready for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class HeadlineRow:
    """The predeclared row of one alpha, for one candidate set and one kind of answer.

    Attributes:
      run: the run at the headline beta.
      answer: "value" or "vote".
      accuracy, cost, compute, latency: means over prompts.
      majority, weighted: against majority vote and weighted best-of-n on the mixture.
      majority_hardest, weighted_hardest: the same on the hardest level.
    """

    run: OnlineRun
    answer: str
    accuracy: float
    cost: float
    compute: float
    latency: float
    majority: Comparison
    weighted: Comparison
    majority_hardest: Comparison
    weighted_hardest: Comparison


def _equal_cost(
    curve: Sequence[BaselinePoint], cost: float, alpha: float, kind: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """Accuracy `[P]` and GenCost `[P]` of the baseline that matches a mean GenCost of `cost`, and
    its n."""
    costs = np.array([point.cost(alpha).mean() for point in curve])
    enough = np.flatnonzero(costs >= cost - _TOLERANCE)
    upper = int(enough[0]) if len(enough) else len(curve) - 1
    lower, weight = upper, 1.0
    if kind == "interpolated" and len(enough) and upper > 0:
        lower = upper - 1
        weight = min(1.0, float((cost - costs[lower]) / (costs[upper] - costs[lower])))
    low, high = curve[lower], curve[upper]
    accuracy = (1 - weight) * low.accuracy + weight * high.accuracy
    spent = (1 - weight) * low.cost(alpha) + weight * high.cost(alpha)
    return accuracy, spent, float((1 - weight) * low.n + weight * high.n)


def restrict(
    curves: dict[str, tuple[BaselinePoint, ...]],
    runs: Sequence[OnlineRun],
    pool: SamplePool,
    level: int,
) -> tuple[dict[str, tuple[BaselinePoint, ...]], tuple[OnlineRun, ...], SamplePool]:
    """The same curves, runs and pool with only the prompts of one level.

    Raises:
      UsageError: a level without prompts.
    """
    group = pool.level == level
    if not group.any():
        raise UsageError(
            f"level={level}",
            f"the pool has levels {sorted(set(pool.level.tolist()))}",
            "use one of them",
        )

    def rows(record: Any) -> Any:
        arrays = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        return dataclasses.replace(
            record, **{name: a[group] for name, a in arrays.items() if isinstance(a, np.ndarray)}
        )

    return (
        {m: tuple(rows(point) for point in curve) for m, curve in curves.items()},
        tuple(rows(run) for run in runs),
        rows(pool),
    )


def compare(
    run: OnlineRun,
    curve: Sequence[BaselinePoint],
    pool: SamplePool,
    *,
    alpha: float,
    answer: str = "value",
    kind: str = "strict",
    level: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares a run with one baseline at equal GenCost.

    Args:
      run: `P` prompts.
      curve: points of one method, ascending in n.
      pool: the pool behind the curve; its mean lengths are the unit of the run's cost.
      alpha: price of compute against latency, in [0, 1].
      answer: which answer of the run, "value" or "vote".
      kind: "strict" or "interpolated".
      level: only prompts of this level; None takes all.
      resamples, seed: of the paired bootstrap.

    Raises:
      UsageError: an unknown kind or answer, a level without prompts, or a run of other prompts than
        the pool.
    """
    if kind not in KINDS:
        raise UsageError(
            f"kind={kind!r}", f"comparisons are one of {', '.join(KINDS)}", "use one of them"
        )
    if len(run.tokens) != pool.n_prompts:
        raise UsageError(
            f"run {run.name!r}",
            f"it has {len(run.tokens)} prompts and the pool {pool.n_prompts}",
            "decode the same prompts",
        )
    if level is not None:
        restricted, (run,), pool = restrict({"": tuple(curve)}, (run,), pool, level)
        curve = restricted[""]
    correct = run.correct(answer)
    run_cost = float(run.cost(pool.mean_length, alpha).gen_cost.mean())
    accuracy, spent, n = _equal_cost(curve, run_cost, alpha, kind)
    difference, low, high = interval(correct - accuracy, pool.tries, resamples, seed)
    return Comparison(
        run=run.name,
        alpha=alpha,
        beta=run.beta,
        answer=answer,
        method=curve[0].method,
        kind=kind,
        n=n,
        level=level,
        prompts=pool.n_problems,
        run_accuracy=float(correct.mean()),
        run_cost=run_cost,
        baseline_accuracy=float(accuracy.mean()),
        baseline_cost=float(spent.mean()),
        difference=difference,
        low=low,
        high=high,
        spends_less=bool(spent.mean() < run_cost - _TOLERANCE),
        group="all" if level is None else pool.level_title(level),
    )


def headline(
    runs: Sequence[OnlineRun],
    curves: dict[str, tuple[BaselinePoint, ...]],
    pool: SamplePool,
    *,
    alphas: Sequence[float],
    headline_beta: Sequence[float],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[HeadlineRow, ...]:
    """The rows that the README quotes: per alpha the run at its predeclared beta, strict
    comparisons.

    Rows are in the order of `alphas`, then of `runs` (one per candidate set), then value before
    vote.

    Raises:
      UsageError: an alpha without a run at its headline beta.
    """
    hardest = int(pool.level.max())
    rows = []
    for alpha, beta in zip(alphas, headline_beta, strict=True):
        chosen = [
            r
            for r in runs
            if r.adaptive and np.isclose(r.alpha, alpha) and np.isclose(r.beta, beta)
        ]
        if not chosen:
            raise UsageError(
                f"headline alpha={alpha}, beta={beta}",
                "no run was decoded with these prices",
                "add the beta to the sweep",
            )
        for run in chosen:
            cost = run.cost(pool.mean_length, alpha)
            for answer in ANSWERS:

                def against(
                    method: str,
                    level: int | None,
                    run: OnlineRun = run,
                    answer: str = answer,
                    alpha: float = alpha,
                ) -> Comparison:
                    return compare(
                        run,
                        curves[method],
                        pool,
                        alpha=alpha,
                        answer=answer,
                        level=level,
                        resamples=resamples,
                        seed=seed,
                    )

                rows.append(
                    HeadlineRow(
                        run=run,
                        answer=answer,
                        accuracy=float(run.correct(answer).mean()),
                        cost=float(cost.gen_cost.mean()),
                        compute=float(cost.compute.mean()),
                        latency=float(cost.latency.mean()),
                        majority=against("majority", None),
                        weighted=against("weighted_best_of_n", None),
                        majority_hardest=against("majority", hardest),
                        weighted_hardest=against("weighted_best_of_n", hardest),
                    )
                )
    return tuple(rows)
