"""The table of an evaluation: methods x benchmarks, accuracy and GenCost, as in the paper.

A row is a method, and a cell has accuracy and GenCost with their intervals. The search stands at
its predeclared beta. Every method with a curve stands at equal cost: at its cheapest setting that
costs at least as much as the search does there, else at its dearest, which is marked.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.intervals import mean_weights, two_level_intervals
from zip_rc_jax.evaluation.tables import Table, prediction_table
from zip_rc_jax.runtime.storage import plain, write_json, write_text

SEARCH = "zip_rc"
_TOLERANCE = 1e-9
# Fields of a cell: each a mean and its interval.
BOUNDED = tuple(
    f"{name}{end}" for name in ("accuracy", "cost", "difference") for end in ("", "_low", "_high")
)
NOTE = (
    "Accuracy in % and GenCost, each the mean over problems of the mean over tries, with a 95% "
    "interval of a two-level bootstrap over problems and tries. zip_rc stands at its predeclared "
    "beta. Methods with a curve stand at their cheapest setting that costs at least as much as "
    "the first zip_rc row does; * marks those that cost less at every setting."
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a benchmark gives the table.

    Attributes:
      name, title: of the benchmark.
      pool, curves, runs: of its problems and tries.
      parts: of a union: its benchmarks, whose problems count alike; then the rest is empty.
    """

    name: str
    title: str
    pool: SamplePool | None = None
    curves: Mapping[str, tuple[BaselinePoint, ...]] = dataclasses.field(default_factory=dict)
    runs: tuple[OnlineRun, ...] = ()
    parts: tuple[Measured, ...] = ()

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(problems, tries) of each part."""
        pools = [part.pool for part in self.parts or (self,)]
        return [(pool.n_problems, pool.tries) for pool in pools if pool is not None]

    @property
    def problems(self) -> int:
        return sum(problems for problems, _ in self.blocks)

    @property
    def tries(self) -> str:
        """Tries of a problem, such as "8", or "4 to 32" of a union."""
        tries = [t for _, t in self.blocks]
        return f"{min(tries)}" if min(tries) == max(tries) else f"{min(tries)} to {max(tries)}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method on one benchmark at one alpha.

    Attributes:
      benchmark, method: names.
      alpha: price of compute against latency.
      setting: of the method, such as "majority@3".
      accuracy, accuracy_low, accuracy_high: in [0, 1].
      cost, cost_low, cost_high: GenCost.
      difference, difference_low, difference_high: accuracy of the first search row minus this one,
        paired.
      spends_less: every setting costs less than the search.
      problems, tries: what the means are over.
    """

    benchmark: str
    method: str
    alpha: float
    setting: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    cost: float
    cost_low: float
    cost_high: float
    difference: float
    difference_low: float
    difference_high: float
    spends_less: bool
    problems: int
    tries: str


@dataclasses.dataclass(frozen=True)
class BenchmarkTable:
    """See the module.

    Attributes:
      titles: of the benchmarks by name, in order.
      cells: by alpha, method, benchmark.
      predictions: benchmark -> head -> metric -> value.
    """

    titles: dict[str, str]
    cells: tuple[Cell, ...]
    predictions: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A method at one setting: accuracy and GenCost of every row."""

    name: str
    accuracy: np.ndarray
    cost: np.ndarray


def benchmark_table(
    measured: Sequence[Measured],
    *,
    alphas: Sequence[float],
    headline_beta: Sequence[float],
    answer: str,
    resamples: int = 2000,
    seed: int = 0,
    predictions: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> BenchmarkTable:
    """The table of some benchmarks.

    Args:
      headline_beta: one per alpha, whose runs are the rows of the search.
      answer: which answer of the runs counts, "value" or "vote".
      resamples, seed: of the bootstrap.
      predictions: see `BenchmarkTable`.
    """
    cells = list[Cell]()
    for alpha, beta in zip(alphas, headline_beta, strict=True):
        columns = [
            _column(one, alpha, beta, answer=answer, resamples=resamples, seed=seed)
            for one in measured
        ]
        # A method stands where the first benchmark that has it puts it.
        methods = list(dict.fromkeys(cell.method for column in columns for cell in column))
        cells += [
            cell
            for method in methods
            for column in columns
            for cell in column
            if cell.method == method
        ]
    titles = {one.name: one.title for one in measured}
    return BenchmarkTable(titles, tuple(cells), predictions or {})


def _column(
    one: Measured, alpha: float, beta: float, *, answer: str, resamples: int, seed: int
) -> list[Cell]:
    """The cells of one benchmark at one alpha."""
    parts = [_settings(part, alpha, beta, answer) for part in one.parts or (one,)]
    common = [method for method in parts[0] if all(method in part for part in parts)]
    curve = (one.parts or (one,))[0].curves.__contains__
    blocks = one.blocks
    weights = mean_weights(blocks)
    target: float | None = None
    rows = list[tuple[str, _Setting, bool]]()
    for method in common:
        settings = [_joined(group) for group in zip(*(p[method] for p in parts), strict=False)]
        costs = np.array([weights @ setting.cost for setting in settings])
        target = float(costs[0]) if target is None else target  # the search is first
        at, less = _equal_cost(costs, target) if curve(method) else (0, False)
        rows.append((method, settings[at], less))
    first = rows[0][1].accuracy
    table = np.stack(
        [x for _, s, _ in rows for x in (s.accuracy, s.cost, first - s.accuracy)], axis=1
    )
    mean, low, high = two_level_intervals(table, blocks, resamples, seed)
    found = []
    bounds = np.stack([mean, low, high]).T.reshape(len(rows), 3, 3).tolist()
    for (method, setting, less), (accuracy, cost, difference) in zip(rows, bounds, strict=True):
        numbers = dict(zip(BOUNDED, (*accuracy, *cost, *difference), strict=True))
        size: dict[str, Any] = {"problems": one.problems, "tries": one.tries}
        place: dict[str, Any] = {"benchmark": one.name, "method": method, "alpha": alpha}
        found.append(Cell(**place, setting=setting.name, **numbers, spends_less=less, **size))
    return found


def _equal_cost(costs: np.ndarray, target: float) -> tuple[int, bool]:
    """The cheapest setting that costs at least the target, else the dearest; and whether that costs
    less."""
    enough = np.flatnonzero(costs >= target - _TOLERANCE)
    if not len(enough):
        return int(costs.argmax()), True
    return int(enough[costs[enough].argmin()]), False


def _joined(group: Sequence[_Setting]) -> _Setting:
    """One setting of the parts of a union."""
    names = list(dict.fromkeys(setting.name for setting in group))
    return _Setting(
        names[0] if len(names) == 1 else "; ".join(names),
        np.concatenate([setting.accuracy for setting in group]),
        np.concatenate([setting.cost for setting in group]),
    )


def _settings(one: Measured, alpha: float, beta: float, answer: str) -> dict[str, list[_Setting]]:
    """Method -> its settings at this alpha, the search first."""
    assert one.pool is not None
    found: dict[str, list[_Setting]] = {}
    searches = [run for run in one.runs if run.adaptive]
    for run in (*searches, *(run for run in one.runs if not run.adaptive)):
        priced = not np.isnan(run.alpha)
        if priced and not (np.isclose(run.alpha, alpha) and np.isclose(run.beta, beta)):
            continue
        method = f"{SEARCH} {run.candidates}" if run.adaptive else f"online {run.strategy}"
        cost = run.cost(one.pool.mean_length, alpha).gen_cost
        # Of two budgets of one rule the first stands in the table; the report has both.
        found.setdefault(method, [_Setting(run.name, run.correct(answer), cost)])
    for method, curve in one.curves.items():
        found[method] = [_Setting(p.name, p.accuracy, p.cost(alpha)) for p in curve]
    return found


# ---- as text


def _cells_at(table: BenchmarkTable, alpha: float) -> dict[str, dict[str, Cell]]:
    """method -> benchmark -> cell."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in table.cells:
        if cell.alpha == alpha:
            found.setdefault(cell.method, {})[cell.benchmark] = cell
    return found


def alphas_of(table: BenchmarkTable) -> list[float]:
    return list(dict.fromkeys(cell.alpha for cell in table.cells))


def accuracy_text(cell: Cell) -> str:
    """Such as "65.8 [60.1, 71.2]", in percent."""
    numbers = (100 * cell.accuracy, 100 * cell.accuracy_low, 100 * cell.accuracy_high)
    return "{:.1f} [{:.1f}, {:.1f}]".format(*numbers)


def cost_text(cell: Cell) -> str:
    """Such as "1.43 [1.40, 1.47]"; with a star where the method spends less than the search."""
    text = f"{cell.cost:.2f} [{cell.cost_low:.2f}, {cell.cost_high:.2f}]"
    return text + ("*" if cell.spends_less else "")


def text_table(table: BenchmarkTable, alpha: float) -> Table:
    """Two columns per benchmark: accuracy and GenCost."""
    sizes = {cell.benchmark: cell for cell in table.cells}
    columns = ["method"]
    for name, title in table.titles.items():
        size = sizes[name]
        tries = "" if size.tries == "1" else f", {size.tries} tries"
        columns += [f"{title} ({size.problems}{tries})", "GenCost"]
    rows = []
    for method, cells in _cells_at(table, alpha).items():
        row = [method]
        for name in table.titles:
            cell = cells.get(name)
            row += ["-", "-"] if cell is None else [accuracy_text(cell), cost_text(cell)]
        rows.append(tuple(row))
    return Table(f"Benchmarks, alpha {alpha:g}", tuple(columns), tuple(rows), NOTE)


def prediction_tables(table: BenchmarkTable) -> list[Table]:
    """One per benchmark that has a head's predictions."""
    return [
        prediction_table(heads, table.titles[name]) for name, heads in table.predictions.items()
    ]


def to_markdown(table: BenchmarkTable) -> str:
    """All tables, as Markdown."""
    tables = [text_table(table, alpha) for alpha in alphas_of(table)] + prediction_tables(table)
    return "\n".join(_markdown(one) for one in tables)


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = line(["---"] + ["---:"] * (len(table.columns) - 1))
    body = [line(row) for row in table.rows]
    note = table.note.replace("*", "\\*")
    return "\n".join([f"## {table.title}", "", line(table.columns), rule, *body, "", note, ""])


def to_latex(table: BenchmarkTable) -> str:
    """All tables, for LaTeX with the package booktabs."""
    tables = [text_table(table, alpha) for alpha in alphas_of(table)] + prediction_tables(table)
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex(one) for one in tables)


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {character: f"\\{character}" for character in "&%$#_"}


def latex_text(text: str) -> str:
    """A text whose special characters LaTeX prints as they are."""
    return re.sub(r"[\\{}~^&%$#_]", lambda match: _SPECIAL[match.group()], text)


def _latex(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(map(latex_text, cells)) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(f'{table.title}. {table.note}')}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            line(table.columns),
            r"\midrule",
            *(line(row) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(table: BenchmarkTable) -> str:
    """One line per cell, all digits."""
    names = [field.name for field in dataclasses.fields(Cell)]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(cell) for cell in table.cells)
    return out.getvalue()


def predictions_csv(table: BenchmarkTable) -> str:
    """One line per benchmark, head and metric, all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("benchmark", "head", "metric", "value"))
    for benchmark, heads in table.predictions.items():
        for head, values in heads.items():
            writer.writerows((benchmark, head, name, value) for name, value in values.items())
    return out.getvalue()


def write_table(
    directory: pathlib.Path, table: BenchmarkTable, metadata: Mapping[str, Any]
) -> None:
    """Writes `table.json`, `table.csv`, `table.md`, `table.tex` and `predictions.csv`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / "table.json",
        plain(
            {
                "benchmarks": table.titles,
                "note": NOTE,
                "cells": [dataclasses.asdict(cell) for cell in table.cells],
                "predictions": table.predictions,
                "metadata": metadata,
            }
        ),
    )
    texts = {
        "table.csv": to_csv(table),
        "table.md": to_markdown(table),
        "table.tex": to_latex(table),
        "predictions.csv": predictions_csv(table),
    }
    for name, text in texts.items():
        write_text(directory / name, text)


def read_cells(path: pathlib.Path) -> list[Cell]:
    """The cells of a `table.json`."""
    return [Cell(**cell) for cell in json.loads(path.read_bytes())["cells"]]
