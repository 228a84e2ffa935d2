"""The report of an evaluation: the explorer's page, and the JSON files and pictures next to it."""

from __future__ import annotations

import base64
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation import drawing, plots
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool
from zip_rc_jax.evaluation.benchmark_table import (
    BenchmarkTable,
    alphas_of,
    prediction_tables,
    text_table,
)
from zip_rc_jax.evaluation.compare import HeadlineRow
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.explored import (
    ExploredSearch,
    about,
    bin_rows,
    cells,
    comparison_parts,
    report_tables,
    search_parts,
    settings_text,
)
from zip_rc_jax.evaluation.metrics import LengthCalibration
from zip_rc_jax.explorer.page import page_data, page_text
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.storage import write_text

with optional_import():
    from matplotlib.figure import Figure


def result_rows(
    runs: Sequence[OnlineRun], pool: SamplePool, prompts: Sequence[str] = ()
) -> Iterable[dict[str, Any]]:
    """Lines of `results.jsonl`: one per run and prompt.

    With those of `pool_rows`, enough to recompute accuracies and costs of all methods but
    self-evaluation.

    Args:
      runs: of P prompts each.
      pool: gives level and mean length.
      prompts: a text per problem, or empty to leave them out.
    """
    mean = pool.mean_length
    for run in runs:
        for i in range(pool.n_prompts):
            yield {
                "run": run.name,
                "strategy": run.strategy,
                "candidates": run.candidates,
                "alpha": run.alpha,
                "beta": run.beta,
                **_place(i, pool.tries),
                **({"prompt": prompts[i // pool.tries]} if len(prompts) else {}),
                "level": pool.level[i],
                "level_name": pool.level_title(int(pool.level[i])),
                "correct/value": run.correct_by_value[i],
                "correct/vote": run.correct_by_vote[i],
                "correct/majority": run.correct_by_majority[i],
                "cost/tokens": run.tokens[i],
                "cost/serial_steps": run.serial_steps[i],
                "cost/compute": run.tokens[i] / mean[i],
                "cost/latency": run.serial_steps[i] / mean[i],
                "prefixes/started": run.n_started[i],
                "prefixes/finished": run.n_finished[i],
            }


def pool_rows(pool: SamplePool) -> Iterable[dict[str, Any]]:
    """Lines of `pool.jsonl`: one per sample of the pool, which the baselines and the unit of cost
    are made of."""
    for i, k in np.ndindex(pool.correct.shape):
        yield {
            **_place(i, pool.tries),
            "sample_idx": k,
            "level": pool.level[i],
            "correct": pool.correct[i, k],
            "answer_id": pool.answer_id[i, k],
            "value": pool.value[i, k],
            "tokens": pool.self_length[i, k],
        }


def _place(row: int, tries: int) -> dict[str, int]:
    """Prompt of a row, and which of its tries where it has several."""
    return {"prompt_idx": row // tries} | ({"try_idx": row % tries} if tries > 1 else {})


def _image(figure: Figure, title: str) -> dict[str, str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"title": title, "source": f"data:image/png;base64,{data}"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows. All runs and curves are of the pool's prompts.

    Attributes:
      metadata: from `run_metadata`.
      pool, curves, runs: see `baselines` and `cost`.
      alphas: panels and cost columns.
      headline: from `compare.headline`.
      quality: prediction metrics, slash keys.
      answer: which answer of the runs ("value" or "vote") the figures and the level table show.
      drift: how far the final policy moved from the starting one (accuracy, KL, ...), slash keys;
        {} if not measured.
      predictions: head ("full", "Lite") -> metric -> value: the prediction table.
      joint, joints, calibration, trace: figures from `plots`; None leaves them out. `joint` is the
        mean over the prompts of each level, `joints` has single prompts.
      lengths: calibration of the remaining length; None leaves it out.
      searches: whose trees the page shows.
      resamples, seed: of the bootstrap in the level table.
    """

    metadata: Mapping[str, Any]
    pool: SamplePool
    curves: dict[str, tuple[BaselinePoint, ...]]
    runs: tuple[OnlineRun, ...]
    alphas: tuple[float, ...]
    headline: tuple[HeadlineRow, ...]
    quality: Mapping[str, float]
    answer: str = "value"
    drift: Mapping[str, float] = dataclasses.field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    joint: Figure | None = None
    joints: Figure | None = None
    calibration: Figure | None = None
    trace: Figure | None = None
    lengths: LengthCalibration | None = None
    searches: tuple[ExploredSearch, ...] = ()
    resamples: int = 2000
    seed: int = 0


def write_report(
    directory: str | pathlib.Path,
    evaluation: Evaluation,
    title: str = "ZIP-RC evaluation",
    prompts: Sequence[str] = (),
) -> pathlib.Path:
    """Writes `report.html` (the explorer's page, self-contained), `pareto.png`,
    `pareto_hardest.png` and the given figures.

    Args:
      prompts: a text per problem, or empty.

    Returns:
      The path of `report.html`.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    e, hardest = evaluation, int(evaluation.pool.level.max())
    figures = {
        "pareto": plots.pareto_figure(e.curves, e.runs, e.pool, e.alphas, answer=e.answer),
        "pareto_hardest": plots.pareto_figure(
            e.curves, e.runs, e.pool, e.alphas, level=hardest, answer=e.answer
        ),
        "joint": e.joint,
        "joint_prompts": e.joints,
        "calibration": e.calibration,
        "trace": e.trace,
    }
    for name, figure in figures.items():
        if figure is not None:
            drawing.save(figure, directory / f"{name}.png")
    titles = {
        "joint": "Predicted against empirical joint",
        "joint_prompts": "Joints of single problems",
    }
    compared = comparison_parts(e.pool, e.curves, e.runs, e.alphas, e.headline, prompts, e.answer)
    parts = compared | search_parts(e.searches, compared["runs"])
    data = page_data(
        title,
        **parts,
        length_bins=[] if e.lengths is None else bin_rows(e.lengths.table),
        tables=report_tables(
            e.pool,
            e.curves,
            e.runs,
            e.alphas,
            e.headline,
            e.quality,
            e.drift,
            e.predictions,
            e.answer,
            e.resamples,
            e.seed,
        ),
        images=[
            _image(figure, titles[name])
            for name, figure in figures.items()
            if figure is not None and name in titles
        ],
        about=about(e.metadata),
        settings=settings_text(e.metadata),
    )
    return write_text(directory / "report.html", page_text(data))


def write_index(
    directory: pathlib.Path,
    table: BenchmarkTable,
    metadata: Mapping[str, Any],
    pages: Sequence[str],
) -> pathlib.Path:
    """Writes the page that has the table of all benchmarks and leads to the report of each.

    Args:
      pages: names of the benchmarks with a report.

    Returns:
      Its path, `report.html`.
    """
    by_alpha = [text_table(table, alpha) for alpha in alphas_of(table)]
    data = page_data(
        "ZIP-RC benchmarks",
        links=[{"title": table.titles[name], "href": f"{name}/report.html"} for name in pages],
        tables=[cells(one) for one in (*by_alpha, *prediction_tables(table))],
        about=about(metadata),
        settings=settings_text(metadata),
    )
    return write_text(directory / "report.html", page_text(data))
