"""An evaluation as the explorer's page reads it, from memory or from the files of a report."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import in_short
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool, baseline_curves
from zip_rc_jax.evaluation.compare import HeadlineRow, headline
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.metrics import CalibrationBin, reliability
from zip_rc_jax.evaluation.tables import (
    Table,
    full_table,
    headline_table,
    level_table,
    metric_table,
    prediction_table,
)
from zip_rc_jax.explorer.page import page_data, table_data
from zip_rc_jax.explorer.searches import search_data
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import plain, read_json

NOT_ANSWERS = ("pass",)  # curves whose accuracy is that of no answer that could be given
MOST_POINTS = 12  # of a curve
MOST_TREES = 6_000_000  # bytes of a page
INTROSPECTION = "introspection.jsonl"
AGAIN = "run the same zip-rc evaluate again"


@dataclasses.dataclass(frozen=True)
class ExploredSearch:
    """A search whose tree a report shows.

    Attributes:
      run: its name.
      row: of the pool.
      introspection: what `explorer.record` made of it; None where nothing was recorded.
    """

    run: str
    row: int
    result: Result
    introspection: Mapping[str, Any] | None = None


def comparison_parts(
    pool: SamplePool,
    curves: Mapping[str, tuple[BaselinePoint, ...]],
    runs: Sequence[OnlineRun],
    alphas: Sequence[float],
    rows: Sequence[HeadlineRow],
    prompts: Sequence[str],
    answer: str,
) -> dict[str, Any]:
    """Parts of a page: every point of the picture with its problems, and what is compared first.

    Args:
      rows: the headline.
      prompts: a text per problem, or empty.
      answer: "value" or "vote", of the runs.
    """
    row = next((row for row in rows if row.answer == answer), rows[0]) if rows else None
    needed = set() if row is None else {f"weighted_best_of_n@{row.weighted.n:g}"}
    told = [
        _baseline(point)
        for name, curve in curves.items()
        for point in thinned(curve, needed)
        if name not in NOT_ANSWERS
    ]
    own = [_online(run, pool, answer) for run in runs]
    names = [run["name"] for run in (*own, *told)]
    first = None
    if row is not None and needed <= set(names):
        (baseline,) = needed
        first = {"run": names.index(row.run.name), "baseline": names.index(baseline)}
    return {
        "unit": "samples",
        "alphas": [float(alpha) for alpha in alphas],
        "headline": first,
        "runs": own + told,
        "problems": [_problem(pool, i, prompts) for i in range(pool.n_prompts)],
        "reward_bins": bin_rows(reliability(pool.value.ravel(), pool.correct.ravel())),
    }


def thinned(curve: Sequence[BaselinePoint], needed: Collection[str] = ()) -> list[BaselinePoint]:
    """At most `MOST_POINTS` points of a curve, closer together where they are few, and those whose
    names are `needed`. A page holds every problem of every point."""
    count = len(curve)
    if count <= MOST_POINTS:
        return list(curve)
    kept = {round(x) - 1 for x in np.geomspace(1, count, MOST_POINTS)}
    return [p for i, p in enumerate(curve) if i in kept or p.name in needed]


def _problem(pool: SamplePool, row: int, prompts: Sequence[str]) -> dict[str, Any]:
    number, attempt = divmod(row, pool.tries)
    text = prompts[number] if len(prompts) else f"problem {number}"
    if pool.tries > 1:
        text = f"{text} (try {attempt + 1})"
    level = pool.level_title(int(pool.level[row]))
    return {"prompt": text, "answer": None, "level": level}


def _baseline(point: BaselinePoint) -> dict[str, Any]:
    knob = f" over {point.knob_name}" if point.knob_name else ""
    return {
        "name": point.name,
        "series": f"{point.method}{knob}",
        "kind": "baseline",
        "alpha": None,
        "beta": None,
        "correct": _short(point.accuracy),
        "compute": _short(point.compute),
        "latency": _short(point.latency),
        "p": None,
    }


def _online(run: OnlineRun, pool: SamplePool, answer: str) -> dict[str, Any]:
    mean = pool.mean_length
    kind = "search" if run.adaptive else "other"
    return {
        "name": run.name,
        "series": f"zip_rc {run.candidates}".strip() if run.adaptive else run.strategy,
        "kind": kind,
        "alpha": None if math.isnan(run.alpha) else run.alpha,
        "beta": None if math.isnan(run.beta) else run.beta,
        "correct": _short(run.correct(answer)),
        "compute": _short(run.tokens / mean),
        "latency": _short(run.serial_steps / mean),
        "p": None,
    }


def _short(values: np.ndarray) -> list[float | None]:
    """Five digits: a picture and a table show no more."""
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values.tolist()]


def bin_rows(bins: Sequence[CalibrationBin]) -> list[dict[str, Any]]:
    """Bins of a calibration for the page."""
    return [{"predicted": b.predicted, "observed": b.observed, "count": b.count} for b in bins]


def about(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran, as names and values."""
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    seconds = metadata["seconds"]
    told = {
        "command": metadata["command"],
        "commit": metadata["commit"] or "not a git checkout",
        "versions": f"{versions}; Python {metadata['python']}",
        "device": f"{', '.join(metadata['devices'])}; {metadata['platform']}",
        "problems": "; ".join(metadata.get("notes") or ()),
        "time": f"{metadata['time']}" + ("" if seconds is None else f", {seconds:.1f} seconds"),
    }
    return [(name, str(value)) for name, value in told.items() if value]


def settings_text(metadata: Mapping[str, Any]) -> str:
    """All settings, for people."""
    return json.dumps(plain(metadata["config"]), indent=1, ensure_ascii=False)


def cells(table: Table) -> dict[str, Any]:
    """A table for the page."""
    return table_data(table.title, table.columns, table.rows, table.note, table.text_columns)


def report_tables(
    pool: SamplePool,
    curves: Mapping[str, tuple[BaselinePoint, ...]],
    runs: Sequence[OnlineRun],
    alphas: Sequence[float],
    rows: Sequence[HeadlineRow],
    quality: Mapping[str, float],
    drift: Mapping[str, float],
    predictions: Mapping[str, Mapping[str, float]],
    answer: str,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The tables of a report; those without data are left out."""
    levels = level_table(runs, curves, pool, answer=answer, resamples=resamples, seed=seed)
    note = "The within-prompt AUC decides whether selection can help at all; 0.5 is chance."
    told = [headline_table(rows), full_table(runs, curves, pool, alphas), levels]
    told.append(metric_table("Prediction quality", quality, note))
    if predictions:
        told.append(prediction_table(predictions, "heads"))
    if drift:
        note = "The trained policy against the starting policy."
        told.append(metric_table("Policy drift", drift, note))
    return [cells(table) for table in told if table.rows]


def search_parts(
    searches: Sequence[ExploredSearch], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Parts of a page: the trees of some searches. Those with an introspection are kept first, then
    the worst ones for the run, up to `MOST_TREES` bytes, at last without what the head says after
    every token. The page says how many are left out.

    Args:
      runs: of the page.
    """
    place = {run["name"]: i for i, run in enumerate(runs)}
    known = [one for one in searches if one.run in place]

    def worst(one: ExploredSearch) -> tuple[bool, float, int]:
        right = runs[place[one.run]]["correct"][one.row] or 0.0
        return one.introspection is None, right, one.row

    kept, size = [], 0
    for one in sorted(known, key=worst):
        row = one.result.to_dict() | {"introspection": one.introspection}
        for tokens in (True, False):
            data = plain(search_data(row, place[one.run], one.row, tokens=tokens))
            length = len(json.dumps(data))
            if size + length <= MOST_TREES:
                size += length
                kept.append(data)
                break
    notes = []
    if len(kept) < len(known):
        notes.append(
            f"The trees of {len(kept)} of {len(known)} searches are here, those that went wrong "
            "first; the page would be too large with all."
        )
    kept.sort(key=lambda one: (one["run"], one["problem"]))
    return {"searches": kept, "notes": notes}


# ---- from the files of a report


def report_page(
    directory: pathlib.Path,
    title: str = "",
    searches: Callable[[Sequence[str]], Sequence[ExploredSearch]] = lambda _: (),
) -> dict[str, Any]:
    """The page of a report, from its results.jsonl, pool.jsonl and metadata.json.

    Curves are computed from the pool again. Baselines that asked another model, and pictures, are
    in the page that `zip-rc evaluate` wrote.

    Args:
      searches: gives the results of the named runs, as far as they were kept.

    Raises:
      UsageError: a file is missing, damaged, or does not fit the others.
    """
    metadata = read_json(directory / "metadata.json", fix=AGAIN)
    try:
        config = metadata["config"]
        alphas = tuple(config["evaluate"]["alphas"])
        betas = tuple(config["evaluate"]["headline_beta"])
        answer = config["decode"]["answer"]
        seed, resamples = config["evaluate"]["seed"], config["evaluate"]["bootstrap"]
        pool = _pool(_rows(directory / "pool.jsonl"), _rows(directory / "results.jsonl"))
        runs, prompts = _runs(_rows(directory / "results.jsonl"), pool)
        quality = {k: _number(v) for k, v in metadata.get("quality", {}).items()}
        drift = {k: _number(v) for k, v in metadata.get("drift", {}).items()}
        predictions = {
            head: {k: _number(v) for k, v in values.items()}
            for head, values in metadata.get("predictions", {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"its files are not those of a report ({in_short(error)})"
        raise UsageError(f"report {directory}", reason, AGAIN) from None
    answer = answer if answer in ("value", "vote") else "value"
    curves = baseline_curves(pool)
    rows = headline(
        runs, curves, pool, alphas=alphas, headline_beta=betas, resamples=resamples, seed=seed
    )
    compared = comparison_parts(pool, curves, runs, alphas, rows, prompts, answer)
    told = _introspections(directory)
    first = list(dict.fromkeys(row.run.name for row in rows))
    return page_data(
        title or f"ZIP-RC evaluation: {directory.name or directory}",
        **compared
        | search_parts(
            [
                dataclasses.replace(one, introspection=told.get((one.run, one.row)))
                for one in searches(first)
            ],
            compared["runs"],
        ),
        tables=report_tables(
            pool, curves, runs, alphas, rows, quality, drift, predictions, answer, resamples, seed
        ),
        about=about(metadata),
        settings=settings_text(metadata),
    )


def _introspections(directory: pathlib.Path) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Of a run and a row, as `introspection_rows` wrote them; {} where nothing was written."""
    path = directory / INTROSPECTION
    if not path.exists():
        return {}
    return {(row["run"], row["row"]): row["introspection"] for row in _rows(path)}


def introspection_rows(searches: Sequence[ExploredSearch]) -> list[dict[str, Any]]:
    """Lines of `introspection.jsonl`."""
    return [
        {"run": one.run, "row": one.row, "introspection": one.introspection}
        for one in searches
        if one.introspection is not None
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"file {path}", f"it cannot be read ({in_short(error)})", AGAIN) from None


def _pool(samples: list[dict[str, Any]], results: list[dict[str, Any]]) -> SamplePool:
    tries = 1 + max(row.get("try_idx", 0) for row in samples)
    prompts = 1 + max(row["prompt_idx"] for row in samples)

    def column(name: str) -> np.ndarray:
        values = [math.nan if row[name] is None else row[name] for row in samples]
        return np.array(values).reshape(prompts * tries, -1)

    names = {row["level"]: row["level_name"] for row in results if "level_name" in row}
    level = column("level")[:, 0]
    return SamplePool(
        correct=column("correct"),
        answer_id=column("answer_id"),
        value=column("value"),
        self_length=column("tokens"),
        level=level,
        level_names=_level_names(names, level),
        tries=tries,
    )


def _level_names(names: Mapping[int, str], level: np.ndarray) -> tuple[str, ...]:
    """By level; () where they are numbers alone."""
    if all(name == f"level {number}" for number, name in names.items()):
        return ()
    return tuple(names.get(i, str(i)) for i in range(int(level.max()) + 1))


def _runs(rows: list[dict[str, Any]], pool: SamplePool) -> tuple[tuple[OnlineRun, ...], list[str]]:
    """The runs of results.jsonl, and a text per problem (none where they were left out)."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["run"], []).append(row)
    columns = {
        "correct_by_value": "correct/value",
        "correct_by_vote": "correct/vote",
        "correct_by_majority": "correct/majority",
        "tokens": "cost/tokens",
        "serial_steps": "cost/serial_steps",
        "n_started": "prefixes/started",
        "n_finished": "prefixes/finished",
    }
    runs = []
    for name, mine in by_name.items():
        if len(mine) != pool.n_prompts:
            reason = f"it has {len(mine)} results, and the pool {pool.n_prompts} problems"
            raise UsageError(f"run {name!r}", reason, AGAIN)
        runs.append(
            OnlineRun(
                name=name,
                alpha=_number(mine[0]["alpha"]),
                beta=_number(mine[0]["beta"]),
                candidates=mine[0]["candidates"],
                strategy=mine[0]["strategy"],
                seconds=math.nan,
                **{
                    field: np.array([_number(row[column]) for row in mine])
                    for field, column in columns.items()
                },
            )
        )
    first = next(iter(by_name.values()))
    prompts = [row["prompt"] for row in first if "prompt" in row][:: pool.tries]
    return tuple(runs), prompts
