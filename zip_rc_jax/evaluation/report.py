"""The report of an evaluation: one self-contained HTML page, and the JSON files next to it."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
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
from zip_rc_jax.evaluation.tables import (
    Table,
    full_table,
    headline_table,
    level_table,
    metric_table,
    prediction_table,
)
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.storage import plain, write_text

with optional_import():
    from matplotlib.figure import Figure

_CSS = """
:root{color-scheme:light dark;--fg:#1c1c1c;--bg:#fff;--line:#ccc;--soft:#f3f3f3}
@media(prefers-color-scheme:dark){:root{--fg:#e6e6e6;--bg:#161616;--line:#444;--soft:#222}}
body{color:var(--fg);background:var(--bg);font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.4rem;border-bottom:1px solid var(--line)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{text-align:right;background:var(--soft)}td{text-align:right}.text{text-align:left}
.note{font-size:.86rem;opacity:.8}img{max-width:100%;background:#fff;border-radius:6px}pre{background:var(--soft);padding:.8rem;overflow-x:auto}
"""  # noqa: E501


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


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="text"' if i < table.text_columns else "" for i in range(len(cells)))
        return (
            "<tr>"
            + "".join(
                f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
                for cell, kind in zip(cells, kinds, strict=True)
            )
            + "</tr>"
        )

    body = "".join(row(cells, "td") for cells in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f'<div class="wide"><table>{caption}<thead>{row(table.columns, "th")}</thead><tbody>{body}</tbody></table></div>{note}'  # noqa: E501


def _image(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(title, quote=True)}" src="data:image/png;base64,{data}">'


def _about(metadata: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    lines = {
        "command": metadata["command"],
        "commit": metadata["commit"] or "not a git checkout",
        "versions": f"{versions}; Python {metadata['python']}",
        "device": f"{', '.join(metadata['devices'])}; {metadata['platform']}",
        **({"problems": "; ".join(metadata["notes"])} if metadata.get("notes") else {}),
        "time": f"{metadata['time']}"
        + ("" if metadata["seconds"] is None else f", {metadata['seconds']:.1f} seconds"),
    }
    rows = "".join(
        f'<tr><th class="text">{name}</th><td class="text">{html.escape(value)}</td></tr>'
        for name, value in lines.items()
    )
    settings = html.escape(json.dumps(plain(metadata["config"]), indent=1, ensure_ascii=False))
    return (
        f'<div class="wide"><table>{rows}</table></div><details><summary>All '
        f"settings</summary><pre>{settings}</pre></details>"
    )


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
      joint, joints, calibration, trace: figures from `plots`; None leaves the section out. `joint`
        is the mean over the prompts of each level, `joints` has single prompts.
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
    resamples: int = 2000
    seed: int = 0


def write_report(
    directory: str | pathlib.Path, evaluation: Evaluation, title: str = "ZIP-RC evaluation"
) -> pathlib.Path:
    """Writes `report.html` (self-contained: no scripts, no network), `pareto.png`,
    `pareto_hardest.png` and the given figures.

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
    images = {
        name: _image(figure, name.replace("_", " "))
        for name, figure in figures.items()
        if figure is not None
    }
    for name in images:
        drawing.save(figures[name], directory / f"{name}.png")  # type: ignore[arg-type]
    levels = level_table(
        e.runs, e.curves, e.pool, answer=e.answer, resamples=e.resamples, seed=e.seed
    )
    quality = metric_table(
        "Prediction quality",
        e.quality,
        "The within-prompt AUC decides whether selection can help at all; 0.5 is chance.",
    )
    drift = (
        metric_table("Policy drift", e.drift, "The trained policy against the starting policy.")
        if e.drift
        else None
    )
    sections = [
        ("What ran", _about(e.metadata)),
        ("Headline", _html_table(headline_table(e.headline))),
        ("Accuracy against cost", images["pareto"]),
        (f"Hardest level ({e.pool.level_title(hardest)})", images["pareto_hardest"]),
        ("All methods", _html_table(full_table(e.runs, e.curves, e.pool, e.alphas))),
        ("Levels", _html_table(levels)),
        ("Prediction quality", _html_table(quality)),
        ("Heads", _html_table(prediction_table(e.predictions)) if e.predictions else ""),
        ("Policy drift", _html_table(drift) if drift else ""),
        ("Predicted against empirical joint", images.get("joint", "")),
        ("Joints of single problems", images.get("joint_prompts", "")),
        ("Calibration", images.get("calibration", "")),
        ("One problem, step by step", images.get("trace", "")),
    ]
    return _write_page(directory / "report.html", title, sections)


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
    links = "".join(
        f'<li><a href="{name}/report.html">{html.escape(table.titles[name])}</a></li>'
        for name in pages
    )
    sections = [
        ("What ran", _about(metadata)),
        ("Benchmarks", f"<ul>{links}</ul>"),
        *(
            (f"Alpha {alpha:g}", _html_table(text_table(table, alpha)))
            for alpha in alphas_of(table)
        ),
        ("Heads", "".join(_html_table(one) for one in prediction_tables(table))),
    ]
    return _write_page(directory / "report.html", "ZIP-RC benchmarks", sections)


def _write_page(
    path: pathlib.Path, title: str, sections: Sequence[tuple[str, str]]
) -> pathlib.Path:
    """A page of (heading, HTML); empty sections are left out."""
    body = "".join(
        f"<section><h2>{html.escape(heading)}</h2>{content}</section>\n"
        for heading, content in sections
        if content
    )
    name = html.escape(title)
    head = (
        '<meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{name}</title><style>{_CSS}</style>'
    )
    page = (
        "<!doctype html><html "
        f'lang="en"><head>{head}</head><body><h1>{name}</h1>\n{body}</body></html>\n'
    )
    return write_text(path, page)
