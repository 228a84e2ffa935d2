"""What a replay found, as rows, a table, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config.replay import ReplayedSetting
from zip_rc_jax.evaluation.baselines import METHODS, BaselinePoint, SamplePool
from zip_rc_jax.evaluation.cost import gen_cost
from zip_rc_jax.evaluation.drawing import new_figure, percent, save
from zip_rc_jax.evaluation.intervals import interval, mean_weights, two_level_intervals
from zip_rc_jax.evaluation.replay import Replayed, ReplayPool
from zip_rc_jax.evaluation.subsets import subset_error
from zip_rc_jax.evaluation.tables import Table, number
from zip_rc_jax.evaluation.tables import percent as share
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.storage import write_json, write_text

with optional_import():
    from matplotlib.figure import Figure

_CURVES = {
    "majority": ("majority vote", "#666666", "o"),
    "best_of_n": ("best-of-n", "#E69F00", "s"),
    "weighted_best_of_n": ("weighted best-of-n", "#009E73", "^"),
    "reward_threshold": ("reward threshold", "#56B4E9", "D"),
    "length_budget": ("length budget", "#CC79A7", "v"),
    "half_finished": ("half finished", "#000000", "X"),
}
_SEARCH = ("#0072B2", "#D55E00", "#CC79A7", "#009E73")


@dataclasses.dataclass(frozen=True)
class ReplayRow:
    """One setting. Shares are in [0, 1]; costs in mean samples of the prompt.

    Attributes:
      name: unique.
      kind: "fixed" for plain votes of n samples, "baseline" for all other curves of a pool, or as
        in `ReplayedSetting`.
      method: of the table of methods, or the strategy.
      n: samples that it starts with.
      candidates: of the search, else "".
      alpha, beta: prices that were optimized; NaN where there are none.
      value: of the threshold, of a baseline's knob, or of the option that an ablation varies; NaN
        where there is none.
      accuracy, low, high: mean over problems, tries and subsets, and its 95% interval (bootstrap
        over problems and tries).
      by_value, by_vote, by_majority: accuracy of each answer; NaN for baselines. `accuracy` is
        one of the first two.
      subset_error: standard error of `accuracy` that comes from drawing subsets; 0 where all were
        taken, NaN for one.
      compute, latency: means.
      costs: mean GenCost at each alpha of the report.
    """

    name: str
    kind: str
    method: str
    n: int
    candidates: str
    alpha: float
    beta: float
    value: float
    accuracy: float
    low: float
    high: float
    by_value: float
    by_vote: float
    by_majority: float
    subset_error: float
    compute: float
    latency: float
    costs: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayPoint:
    """One setting on one pool of `R` rows, before it is averaged over them.

    Attributes:
      name, kind, method, n, candidates, alpha, beta, value: as in `ReplayRow`.
      accuracy, compute, latency: float64 `[R]`.
      costs: float64 `[R]`, GenCost at each alpha of the report.
      answers: by value, by vote and by majority: float64 `[R]` each; () for baselines.
      error: standard error of the mean accuracy that comes from drawing subsets or orders.
      blocks: (problems, tries) of the pool.
    """

    name: str
    kind: str
    method: str
    n: int
    candidates: str
    alpha: float
    beta: float
    value: float
    accuracy: np.ndarray
    compute: np.ndarray
    latency: np.ndarray
    costs: tuple[np.ndarray, ...]
    answers: tuple[np.ndarray, ...]
    error: float
    blocks: tuple[int, int]


def baseline_replay_point(
    point: BaselinePoint, pool: SamplePool, alphas: Sequence[float]
) -> ReplayPoint:
    """A point of a baseline's curve."""
    nan = math.nan
    return ReplayPoint(
        name=point.name, kind="fixed" if point.method in METHODS else "baseline",
        method=point.method, n=point.n, candidates="", alpha=nan, beta=nan, value=point.knob,
        accuracy=point.accuracy, compute=point.compute, latency=point.latency,
        costs=tuple(point.cost(alpha) for alpha in alphas), answers=(), error=point.mean_error,
        blocks=(pool.n_problems, pool.tries),
    )  # fmt: skip


def replayed_point(
    setting: ReplayedSetting,
    found: Replayed,
    pool: ReplayPool,
    exact: bool,
    alphas: Sequence[float],
) -> ReplayPoint:
    """A replayed setting.

    Args:
      pool: gives the unit of cost.
      exact: whether all subsets were replayed.
    """
    decode, unit = setting.decode, pool.mean_length[:, None]
    answers = (found.correct_by_value, found.correct_by_vote, found.correct_by_majority)
    right = answers[0 if decode.answer == "value" else 1]
    compute, latency = found.tokens / unit, found.serial_steps / unit
    priced = decode.strategy == "zip_rc"
    return ReplayPoint(
        name=setting.name, kind=setting.kind, method=str(decode.strategy), n=decode.n,
        candidates=decode.variant if priced else "",
        alpha=decode.alpha if priced else math.nan, beta=decode.beta if priced else math.nan,
        value=float(setting.value), accuracy=right.mean(1), compute=compute.mean(1),
        latency=latency.mean(1),
        costs=tuple(gen_cost(compute, latency, alpha).mean(1) for alpha in alphas),
        answers=tuple(answer.mean(1) for answer in answers), error=subset_error(right, exact),
        blocks=(pool.n_prompts // pool.tries, pool.tries),
    )  # fmt: skip


def replay_row(parts: Sequence[ReplayPoint], resamples: int, seed: int) -> ReplayRow:
    """The row of one setting on one pool, or on those of a union, whose problems count alike."""
    first, blocks = parts[0], [part.blocks for part in parts]
    weights = mean_weights(blocks)

    def mean(columns: Sequence[np.ndarray]) -> float:
        return float(columns[0].mean() if len(parts) == 1 else weights @ np.concatenate(columns))

    accuracy = np.concatenate([part.accuracy for part in parts])
    if len(parts) == 1:
        bounds = interval(accuracy, blocks[0][1], resamples, seed)
    else:
        found = two_level_intervals(accuracy[:, None], blocks, resamples, seed)
        bounds = (float(found[0][0]), float(found[1][0]), float(found[2][0]))
    share = np.array([problems for problems, _ in blocks]) / sum(p for p, _ in blocks)
    error = float(np.sqrt(np.square(share * [part.error for part in parts]).sum()))
    answers = [mean(columns) for columns in zip(*(part.answers for part in parts), strict=True)]
    by_value, by_vote, by_majority = answers or [math.nan] * 3
    return ReplayRow(
        name=first.name, kind=first.kind, method=first.method, n=first.n,
        candidates=first.candidates, alpha=first.alpha, beta=first.beta, value=first.value,
        accuracy=bounds[0], low=bounds[1], high=bounds[2], by_value=by_value, by_vote=by_vote,
        by_majority=by_majority, subset_error=error,
        compute=mean([part.compute for part in parts]),
        latency=mean([part.latency for part in parts]),
        costs=tuple(mean(column) for column in zip(*(p.costs for p in parts), strict=True)),
    )  # fmt: skip


def replay_table(rows: Sequence[ReplayRow], alphas: Sequence[float], title: str) -> Table:
    """All rows, as the console shows them."""
    cells = [
        (
            row.name,
            f"{row.n}",
            share(row.accuracy),
            f"[{share(row.low)}, {share(row.high)}]",
            "exact" if row.subset_error == 0 else share(row.subset_error),
            number(row.compute),
            number(row.latency),
            *(number(cost) for cost in row.costs),
        )
        for row in rows
    ]
    costs = (f"GenCost, alpha {alpha:g}" for alpha in alphas)
    return Table(
        title,
        ("setting", "n", "accuracy", "95% interval", "± subsets", "compute", "latency", *costs),
        tuple(cells),
        "Accuracies in %; intervals from a bootstrap over problems. ± subsets: standard error that "
        "comes from averaging over some subsets or orders of the samples; exact: over all of "
        "them, or by a formula; -: one subset. Costs: 1 = one mean sample of the prompt.",
    )


def replay_figure(rows: Sequence[ReplayRow], alphas: Sequence[float]) -> Figure:
    """Accuracy against GenCost, one panel for each alpha."""
    figure, axes = new_figure(6.4 * len(alphas), 4.6, 1, len(alphas), sharey=True)
    for i, (axis, alpha) in enumerate(zip(axes[0], alphas, strict=True)):
        _panel(axis, rows, i, alpha)
        axis.set_title(f"alpha = {alpha:g}", fontsize=10)
        axis.set_xlabel("GenCost (mean samples of the prompt)", fontsize=9)
        axis.yaxis.set_major_formatter(percent)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("accuracy", fontsize=9)
    axes[0][-1].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _panel(axis: Any, rows: Sequence[ReplayRow], place: int, alpha: float) -> None:
    curves: dict[tuple[str, Any], list[ReplayRow]] = {}
    for row in rows:
        if row.kind == "search" and np.isclose(row.alpha, alpha):
            curves.setdefault(("search", (row.candidates, row.n)), []).append(row)
        elif row.kind == "fixed" and row.method in _CURVES:
            curves.setdefault((row.method, None), []).append(row)
        elif row.kind in _CURVES:
            curves.setdefault((row.kind, row.n), []).append(row)
    several = len({row.n for row in rows if row.kind == "search"}) > 1
    searches = [key for key in curves if key[0] == "search"]
    for key, points in curves.items():
        kind, of = key
        if kind == "search":
            label, marker = f"ZIP-RC {of[0]}, n={of[1]}", "o"
            color = _SEARCH[searches.index(key) % len(_SEARCH)]
            points = sorted(points, key=lambda row: row.costs[place])
        else:
            label, color, marker = _CURVES[kind]
            label = f"{label}, n={of}" if of is not None and several else label
            points = sorted(points, key=lambda row: (row.n, row.value))
        style = "none" if kind == "half_finished" else "-" if kind == "search" else "--"
        x, y = [row.costs[place] for row in points], [row.accuracy for row in points]
        width = 2.2 if kind == "search" else 1.3
        axis.plot(
            x, y, color=color, marker=marker, linestyle=style, linewidth=width, markersize=4.5,
            label=label, zorder=4 if kind == "search" else 2,
        )  # fmt: skip


def write_replay(
    directory: pathlib.Path,
    rows: Sequence[ReplayRow],
    alphas: Sequence[float],
    metadata: Mapping[str, Any],
) -> None:
    """Writes `results.json`, `results.csv` and `replay.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    plain = [dataclasses.asdict(row) for row in rows]
    write_json(directory / "results.json", {**metadata, "alphas": list(alphas), "rows": plain})
    text = io.StringIO()
    names = [f.name for f in dataclasses.fields(ReplayRow) if f.name != "costs"]
    costs = [f"gen_cost_alpha_{alpha:g}" for alpha in alphas]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *costs])
    for row in rows:
        cells = [getattr(row, name) for name in names]
        given = ["" if isinstance(x, float) and math.isnan(x) else x for x in cells]
        writer.writerow([*given, *row.costs])
    write_text(directory / "results.csv", text.getvalue())
    save(replay_figure(rows, alphas), directory / "replay.png")
