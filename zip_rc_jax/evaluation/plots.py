"""Figures of an evaluation. What training draws too is in `drawing`.

Colours are the Okabe-Ito set, which stays distinct for colour-blind readers; lines also differ in
marker or dash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation.baselines import SELF_EVALUATION, BaselinePoint, SamplePool
from zip_rc_jax.evaluation.compare import restrict
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.drawing import new_figure, percent
from zip_rc_jax.evaluation.metrics import LengthCalibration, reliability
from zip_rc_jax.inference.outputs import Decision, Prefix, Result
from zip_rc_jax.runtime.extras import optional_import

with optional_import():
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#666666",
)
_BASELINES = {
    "majority": ("majority vote", GREY, "o"),
    "best_of_n": ("best-of-n", ORANGE, "s"),
    "weighted_best_of_n": ("weighted best-of-n", GREEN, "^"),
    SELF_EVALUATION: ("weighted best-of-n, self-evaluation", PURPLE, "v"),
}
_ADAPTIVE = (BLUE, RED, PURPLE)
_POINTS = (("D", SKY), ("P", PURPLE), ("X", ORANGE), ("v", GREEN))
_TRACES = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY, "#000000")


# offsets in points
_SIDES = (
    (-14, 13),
    (0, 14),
    (0, -14),
    (14, -13),
    (26, -8),
    (-26, 8),
    (28, 0),
    (-28, 0),
    (-14, -13),
    (14, 13),
)
Label = tuple[float, float, str, str]  # x, y, text, colour


def _spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """Moves positions apart until neighbours differ by `gap`, keeping their order and, in each
    cluster, their mean."""
    order = np.argsort(positions, kind="stable")
    clusters: list[list[float]] = []  # each: [sum of (position - rank * gap), count]
    for i in order:
        clusters.append([float(positions[i]), 1])
        while len(clusters) > 1 and _bottom(clusters[-1], gap) < _top(clusters[-2], gap) + gap:
            last = clusters.pop()
            merged = clusters[-1]
            merged[0], merged[1] = merged[0] + last[0], merged[1] + last[1]
    placed = (
        np.concatenate([_bottom(c, gap) + gap * np.arange(int(c[1])) for c in clusters])
        if clusters
        else np.zeros(0)
    )
    result = np.empty(len(order))
    result[order] = placed
    return result


def _bottom(cluster: list[float], gap: float) -> float:
    return cluster[0] / cluster[1] - gap * (cluster[1] - 1) / 2


def _top(cluster: list[float], gap: float) -> float:
    return cluster[0] / cluster[1] + gap * (cluster[1] - 1) / 2


def _margin_labels(axis: Axes, labels: list[Label]) -> None:
    """Direct labels in the right margin, pushed apart, each joined to its point by a thin line."""
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    at = right + 0.03 * (right - left)
    for (x, y, text, colour), place in zip(
        labels, _spread([label[1] for label in labels], 0.062 * (top - bottom)), strict=True
    ):
        axis.plot(
            [x, at], [y, place], color=colour, linewidth=0.6, alpha=0.6, clip_on=False, zorder=1
        )
        axis.text(
            at,
            place,
            f" {text}",
            color=colour,
            fontsize=9,
            va="center",
            clip_on=False,
            parse_math=False,
        )


def _near_labels(axis: Axes, labels: list[Label]) -> None:
    """Small labels next to their points, each on the side with most room to the lines, markers and
    labels already there."""
    to_points = 72 / axis.figure.dpi
    along = np.linspace(0, 1, 60)
    frame = axis.transAxes.transform([(0, 1), (0, 0), (1, 0)])
    taken = []
    for pixels in (frame, *(axis.transData.transform(line.get_xydata()) for line in axis.lines)):
        ends = pixels * to_points
        taken += [
            a + along[:, None] * (b - a)
            for a, b in zip(ends, ends[1:] if len(ends) > 1 else ends, strict=False)
        ]
    half_width, half_height = 17.0, 5.0
    for x, y, text, colour in labels:
        at = axis.transData.transform((x, y)) * to_points
        room = []
        for offset in _SIDES:
            away = np.abs(np.concatenate(taken) - (at + offset)) - (half_width, half_height)
            room.append(min(float(away.max(1).min()), 4.0))  # beyond 4 points any side is as good
        best = _SIDES[int(np.argmax(room))]
        taken.append(
            at
            + best
            + np.array([(i * half_width, j * half_height) for i in (-1, 0, 1) for j in (-1, 0, 1)])
        )
        axis.annotate(
            text, (x, y), best, textcoords="offset points", color=colour, fontsize=8, ha="center",
            va="center", zorder=5,
            path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()],
        )  # fmt: skip


def _pareto_panel(
    axis: Axes,
    alpha: float,
    curves: dict[str, tuple[BaselinePoint, ...]],
    runs: Sequence[OnlineRun],
    pool: SamplePool,
    answer: str,
) -> list[Label]:
    """Draws one panel; returns the labels of beta, which can be placed once the layout is known."""
    labels: list[Label] = []
    betas: list[Label] = []
    for method, (title, colour, marker) in _BASELINES.items():
        curve = curves.get(method, ())
        if curve:
            x = [float(point.cost(alpha).mean()) for point in curve]
            y = [float(point.accuracy.mean()) for point in curve]
            axis.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.5)
            labels.append((x[-1], y[-1], title, colour))
    sweep = [run for run in runs if run.adaptive and np.isclose(run.alpha, alpha)]
    for i, candidates in enumerate(dict.fromkeys(run.candidates for run in sweep)):
        colour = _ADAPTIVE[i % len(_ADAPTIVE)]
        points = sorted(
            (
                float(run.cost(pool.mean_length, alpha).gen_cost.mean()),
                float(run.correct(answer).mean()),
                run.beta,
            )
            for run in sweep
            if run.candidates == candidates
        )
        x, y = [p[0] for p in points], [p[1] for p in points]
        axis.plot(
            x,
            y,
            color=colour,
            marker="o",
            markersize=6.5,
            linewidth=2.2,
            zorder=4,
            linestyle="-" if i == 0 else "--",
        )
        labels.append((x[-1], y[-1], f"ZIP-RC {candidates}", colour))
        if i == 0:  # all sets are swept over the same betas: named once
            betas = [
                (cost, accuracy, rf"$\beta$={beta:g}", colour) for cost, accuracy, beta in points
            ]
    for i, run in enumerate(run for run in runs if not run.adaptive):
        marker, colour = _POINTS[i % len(_POINTS)]
        x0, y0 = (
            float(run.cost(pool.mean_length, alpha).gen_cost.mean()),
            float(run.correct(answer).mean()),
        )
        axis.plot(
            [x0],
            [y0],
            color=colour,
            marker=marker,
            markersize=8,
            linestyle="none",
            markeredgecolor="white",
            zorder=3,
        )
        labels.append((x0, y0, run.name, colour))
    axis.margins(0.08, 0.12)
    _count_axis(axis, alpha, curves)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.yaxis.set_major_formatter(percent)
    price = {0.0: "latency only", 1.0: "compute only"}.get(
        float(alpha), r"$\alpha\cdot$compute + $(1-\alpha)\cdot$latency"
    )
    axis.set_xlabel("GenCost (one sample = 1)", fontsize=10)
    axis.set_title(rf"$\alpha$ = {alpha:g}: {price}", fontsize=11)
    _margin_labels(axis, labels)
    return betas


def _count_axis(axis: Axes, alpha: float, curves: dict[str, tuple[BaselinePoint, ...]]) -> None:
    """Upper axis: the n of the fixed methods, which all cost the same at one n.

    Ticks closer than a digit is wide are dropped.
    """
    curve = next(iter(curves.values()), ())
    left, right = axis.get_xlim()
    ticks: list[tuple[float, int]] = []
    for point in curve:
        at = float(point.cost(alpha).mean())
        if not ticks or at - ticks[-1][0] > 0.035 * (right - left):
            ticks.append((at, point.n))
    upper = axis.secondary_xaxis("top")
    upper.set_xticks([t[0] for t in ticks], [str(t[1]) for t in ticks], fontsize=8, color=GREY)
    upper.set_xlabel("n of the fixed methods", fontsize=8, color=GREY)
    upper.spines["top"].set_visible(False)


def pareto_figure(
    curves: dict[str, tuple[BaselinePoint, ...]],
    runs: Sequence[OnlineRun],
    pool: SamplePool,
    alphas: Sequence[float],
    *,
    level: int | None = None,
    answer: str = "value",
) -> Figure:
    """Accuracy against GenCost, one panel per alpha: fixed methods over n, ZIP-RC over beta per
    candidate set, pruning as points.

    Args:
      curves: method -> points ascending in n (see `baseline_curves`).
      runs: adaptive runs are drawn in the panel of their alpha, the others in every panel.
      pool: gives mean lengths (the unit of cost) and levels.
      alphas: panels.
      level: only prompts of this level; None takes all.
      answer: which answer of the runs, "value" or "vote".
    """
    if level is not None:
        curves, runs, pool = restrict(curves, runs, pool, level)
    figure, axes = new_figure(6.6 * len(alphas), 5.0, 1, len(alphas), sharey=True)
    where = "" if level is None else f" on {pool.level_title(level)}"
    axes[0, 0].set_ylabel(f"accuracy{where} (searches: answer by {answer})", fontsize=10)
    betas = [
        _pareto_panel(axis, alpha, curves, runs, pool, answer)
        for axis, alpha in zip(axes[0], alphas, strict=True)
    ]
    figure.draw_without_rendering()  # fixes the layout, so that distances in points are known
    for axis, labels in zip(axes[0], betas, strict=True):
        _near_labels(axis, labels)
    return figure


def calibration_figure(prob: Any, outcome: Any, length: LengthCalibration) -> Figure:
    """Left: reliability of P(correct) with item counts; right: predicted against observed remaining
    tokens, per quantile bin.

    Args:
      prob, outcome: items as in `metrics.reliability`.
      length: from `metrics.length_calibration`.
    """
    figure, axes = new_figure(10, 4.4, 1, 2)
    left, right = axes[0]
    table = reliability(prob, outcome)
    largest = max((b.count for b in table), default=1)
    left.bar(
        [(b.low + b.high) / 2 for b in table],
        [0.25 * b.count / largest for b in table],
        width=0.09,
        color="#cccccc",
    )
    left.text(
        0.04,
        0.96,
        f"bars: items, at most {largest:,}",
        transform=left.transAxes,
        fontsize=9,
        color=GREY,
        va="top",
    )
    left.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    left.plot(
        [b.predicted for b in table],
        [b.observed for b in table],
        color=BLUE,
        marker="o",
        linewidth=1.8,
    )
    left.set(
        xlim=(0, 1),
        ylim=(0, 1.02),
        xlabel="predicted P(correct)",
        ylabel="observed share correct",
        title="Reward",
    )
    predicted, observed = [b.predicted for b in length.table], [b.observed for b in length.table]
    end = 1.05 * max([*predicted, *observed, 1.0])
    right.plot([0, end], [0, end], color=GREY, linewidth=1, linestyle=":")
    right.plot(predicted, observed, color=RED, marker="s", linewidth=1.8)
    note = (
        f"mean error {length.mean_error:+.1f} tokens\nmean absolute error "
        f"{length.mean_absolute_error:.1f} tokens"
    )
    right.text(0.04, 0.96, note, transform=right.transAxes, fontsize=9, va="top")
    right.set(
        xlim=(0, end),
        ylim=(0, end),
        xlabel="predicted remaining tokens",
        ylabel="observed remaining tokens",
        title="Length",
    )
    for axis in (left, right):
        axis.grid(color="#dddddd", linewidth=0.6)
    return figure


def _history(result: Result, prefix: Prefix) -> tuple[list[float], list[float], list[int]]:
    """Steps and values of a prefix at every decision since its fork and at its end, and the indices
    at which it was paused."""
    steps: list[float] = []
    values: list[float] = []
    paused: list[int] = []
    before: Decision | None = None
    for decision in result.trace:
        if prefix.id in decision.prefix_ids:
            i = decision.prefix_ids.index(prefix.id)
            if (
                not steps
                and before is not None
                and prefix.parent in before.prefix_ids
                and prefix.parent >= 0
            ):
                steps.append(before.step)
                values.append(before.expected_reward[before.prefix_ids.index(prefix.parent)])
            if decision.multiplicity[i] == 0 and not decision.finished[i]:
                paused.append(len(steps))
            steps.append(decision.step)
            values.append(decision.expected_reward[i])
            if decision.finished[i]:
                return steps, values, paused
        before = decision
    steps.append(result.usage.serial_steps)
    values.append(prefix.expected_reward)
    return steps, values, paused


def trace_figure(result: Result) -> Figure:
    """Expected reward of every prefix over the serial steps of one prompt.

    Solid: generating. Dotted: paused (hollow square where a pause began). Circle: finished. Star:
      the answer.
    """
    figure, axes = new_figure(8.6, 4.6)
    axis = axes[0, 0]
    labels = []
    for prefix in result.prefixes:
        colour = _TRACES[prefix.id % len(_TRACES)]
        steps, values, paused = _history(result, prefix)
        for i in range(len(steps) - 1):
            style = (
                {"linestyle": ":", "linewidth": 1.2, "alpha": 0.8}
                if i in paused
                else {"linestyle": "-", "linewidth": 1.8}
            )
            axis.plot(steps[i : i + 2], values[i : i + 2], color=colour, **style)
        starts = [i for i in paused if i - 1 not in paused]
        x, y = [steps[i] for i in starts], [values[i] for i in starts]
        if starts:  # an empty unclipped line would count as a point at the corner of the canvas
            axis.plot(
                x,
                y,
                color=colour,
                marker="s",
                markersize=7,
                markerfacecolor="white",
                linestyle="none",
                zorder=4,
                clip_on=False,
            )
        end = f"{len(prefix.token_ids)} tokens"
        if prefix.state == "finished":
            answer = prefix.id == result.prefix_id
            axis.plot(
                steps[-1:],
                values[-1:],
                color=colour,
                marker="*" if answer else "o",
                markersize=17 if answer else 7,
                zorder=5,
                clip_on=False,
            )
            end += ", answer" if answer else ", finished"
        else:
            end += ", paused"
        fork = f" (fork of {prefix.parent})" if prefix.parent >= 0 else ""
        labels.append((steps[-1], values[-1], f"{prefix.id}{fork}: {end}", colour))
    axis.set(
        xlabel="serial decode steps",
        ylabel="expected reward",
        ylim=(-0.03, 1.03),
        xlim=(0, max(1, result.usage.serial_steps)),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(
        "dotted: paused, from the square on; circle: finished; star: answer",
        fontsize=8,
        color=GREY,
        loc="left",
    )
    axis.grid(color="#dddddd", linewidth=0.6)
    _margin_labels(axis, labels)
    return figure
