"""The result tables, as plain text cells, so that the console and the HTML report show the same
numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool
from zip_rc_jax.evaluation.compare import Comparison, HeadlineRow, compare
from zip_rc_jax.evaluation.cost import OnlineRun


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table.

    Attributes:
      title: shown above.
      columns: headers; the first `text_columns` are text (left-aligned), the rest numbers.
      rows: cells as text, one per column.
      note: shown below, "" for none.
      text_columns: number of leading text columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1


def percent(x: float) -> str:
    """A share as percent with one decimal; "-" for NaN."""
    return "-" if np.isnan(x) else f"{100 * x:.1f}"


def number(x: float, form: str = ".2f") -> str:
    """A number; "-" for NaN."""
    return "-" if np.isnan(x) else format(x, form)


def _difference(c: Comparison) -> str:
    return f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"


def _baseline(c: Comparison) -> str:
    n = f"{c.n:g}" if c.kind == "strict" else f"{c.n:.2f}"
    return (
        f"{percent(c.baseline_accuracy)} @{n}, cost "
        f"{c.baseline_cost:.2f}{'*' if c.spends_less else ''}"
    )


def headline_table(rows: Sequence[HeadlineRow]) -> Table:
    """Per alpha and answer, on all prompts and on the hardest level: the run against baselines that
    spend at least as much."""
    cells = []
    for row in rows:
        for majority, weighted in (
            (row.majority, row.weighted),
            (row.majority_hardest, row.weighted_hardest),
        ):
            cells.append(
                (
                    f"{row.run.alpha:g}",
                    f"{row.run.beta:g}",
                    row.run.candidates,
                    row.answer,
                    majority.group,
                    str(majority.prompts),
                    percent(majority.run_accuracy),
                    number(majority.run_cost),
                    _baseline(majority),
                    _difference(majority),
                    _baseline(weighted),
                    _difference(weighted),
                )
            )
    columns = ("alpha", "beta", "candidates", "answer", "prompts", "count", "accuracy", "GenCost")
    return Table(
        "Headline: predeclared beta, against baselines that spend at least as much",
        (*columns, "majority vote", "difference", "weighted best-of-n", "difference"),
        tuple(cells),
        "Accuracies in %, differences in points with a 95% paired bootstrap interval over "
        "prompts. @n: samples of the baseline. "
        "* the baseline spends less: the pool has no more samples. On the hardest level, costs "
        "are equalised on that level.",
        5,
    )


def _drawn(point: BaselinePoint) -> str:
    """The standard error behind a mean accuracy; "" for an exact one."""
    return f" ±{number(100 * point.mean_error)}" if point.mean_error else ""


def full_table(
    runs: Sequence[OnlineRun],
    curves: Mapping[str, tuple[BaselinePoint, ...]],
    pool: SamplePool,
    alphas: Sequence[float],
) -> Table:
    """Every fixed method at every n and every run: accuracy of every answer, compute, latency,
    GenCost per alpha, seconds."""
    cells = []
    for curve in curves.values():
        for point in curve:
            costs = [number(float(point.cost(alpha).mean())) for alpha in alphas]
            means = [number(float(point.compute.mean())), number(float(point.latency.mean()))]
            cells.append(
                (
                    point.name,
                    percent(float(point.accuracy.mean())) + _drawn(point),
                    "-",
                    "-",
                    *means,
                    *costs,
                    f"{point.n}",
                    "-",
                )
            )
    for run in runs:
        cost = run.cost(pool.mean_length, alphas[0])
        costs = [
            number(float(run.cost(pool.mean_length, alpha).gen_cost.mean())) for alpha in alphas
        ]
        answers = (run.correct_by_value, run.correct_by_vote, run.correct_by_majority)
        accuracy = [percent(float(correct.mean())) for correct in answers]
        means = [number(float(cost.compute.mean())), number(float(cost.latency.mean()))]
        cells.append(
            (
                run.name,
                *accuracy,
                *means,
                *costs,
                number(float(run.n_started.mean()), ".1f"),
                number(run.seconds, ".1f"),
            )
        )
    return Table(
        "All methods",
        (
            "method",
            "accuracy",
            "by vote",
            "by majority",
            "compute",
            "latency",
            *(f"GenCost, alpha {alpha:g}" for alpha in alphas),
            "prefixes",
            "seconds",
        ),
        tuple(cells),
        "Fixed methods are expectations over the subsets of the pool. They are exact, or, where "
        "subsets were drawn, ± the standard error of drawing. Runs: accuracy of the answer by "
        "value, by weighted vote, and by the majority of what finished. "
        "Compute and latency: 1 = one mean sample of the prompt. Seconds: wall-clock of the whole "
        "run.",
    )


def level_table(
    runs: Sequence[OnlineRun],
    curves: Mapping[str, tuple[BaselinePoint, ...]],
    pool: SamplePool,
    *,
    answer: str = "value",
    resamples: int = 2000,
    seed: int = 0,
) -> Table:
    """Every adaptive run on every level against majority vote: strict and interpolated."""
    cells = []
    for run in runs:
        for level in sorted(set(pool.level.tolist())) if run.adaptive else ():
            strict, exact = (
                compare(
                    run,
                    curves["majority"],
                    pool,
                    alpha=run.alpha,
                    answer=answer,
                    kind=kind,
                    level=level,
                    resamples=resamples,
                    seed=seed,
                )
                for kind in ("strict", "interpolated")
            )
            cells.append(
                (run.name, strict.group.removeprefix("level "), str(strict.prompts),
                 percent(strict.run_accuracy), number(strict.run_cost),
                 _baseline(strict), _difference(strict), _baseline(exact), _difference(exact))
            )  # fmt: skip
    return Table(
        f"By level (answer by {answer})",
        (
            "run",
            "level",
            "prompts",
            "accuracy",
            "GenCost",
            "majority at >= cost",
            "difference",
            "majority at equal cost",
            "difference",
        ),
        tuple(cells),
        "Costs are equalised within the level. At equal cost: the mixture of two neighbouring n "
        "that spends exactly as much.",
    )


def metric_table(title: str, metrics: Mapping[str, float], note: str = "") -> Table:
    """Named numbers, one per row."""
    return Table(
        title,
        ("metric", "value"),
        tuple((name, number(float(value), ".4g")) for name, value in metrics.items()),
        note,
    )


def prediction_table(predictions: Mapping[str, Mapping[str, float]], title: str = "") -> Table:
    """Prediction quality, one column per head."""
    heads = list(predictions)
    names = list(predictions[heads[0]])
    return Table(
        f"Prediction quality{f', {title}' if title else ''}",
        ("metric", *heads),
        tuple(
            (name, *(number(float(predictions[head][name]), ".3f") for head in heads))
            for name in names
        ),
        "TV: total variation between the joint before the first token and that of all samples. "
        "Its noise floor is what the same predictions would show if each were exactly right: the "
        "expected distance to as many samples drawn from them. The rest is of the final value of "
        "all samples, at threshold 0.5.",
    )


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table to the console (standard output if None).

    Cells are literal text, never rich markup.
    """
    console = console or Console()
    caption = Text(table.note) if table.note else None
    rich = RichTable(
        title=Text(table.title), caption=caption, title_justify="left", caption_justify="left"
    )
    for i, column in enumerate(table.columns):
        rich.add_column(Text(column), justify="left" if i < table.text_columns else "right")
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    console.print(rich)
