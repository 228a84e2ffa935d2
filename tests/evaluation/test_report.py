"""Figures, tables, and the written report of a synthetic evaluation."""

from __future__ import annotations

import io
import json
import re
import subprocess
import time

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from zip_rc_jax.evaluation import drawing, metrics, plots, report, tables
from zip_rc_jax.evaluation.baselines import SamplePool, baseline_curves
from zip_rc_jax.evaluation.compare import headline
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.outputs import Decision, Prefix, Result, Usage
from zip_rc_jax.runtime import storage

ALPHAS = (0.1, 1.0)
GRID = Grid((0.0, 0.5, 1.0), (0, 16, 32, 64))
RNG = np.random.default_rng(0)


def make_trace():
    """Four samples: 0 is paused for good, 1 is paused and resumed, 2 is forked into 3 and
    answers."""

    def decision(step, ids, multiplicity, reward, finished):
        return Decision(
            step,
            ids,
            multiplicity,
            -1,
            0.5,
            reward,
            (9.0,) * len(ids),
            (step,) * len(ids),
            finished,
        )

    def prefix(identity, parent, tokens, state, reward):
        return Prefix(
            identity,
            parent,
            16 if parent >= 0 else 0,
            tuple(range(tokens)),
            "x",
            state,
            "stop",
            reward,
            0.0,
        )

    trace = (
        decision(0, (-1,), (3,), (0.5,), (False,)),
        decision(16, (0, 1, 2), (0, 0, 2), (0.3, 0.5, 0.8), (False,) * 3),
        decision(32, (0, 1, 2, 3), (0, 1, 1, 1), (0.3, 0.5, 0.85, 0.7), (False,) * 4),
        decision(
            48, (0, 1, 2, 3), (0, 1, 1, 0), (0.3, 0.6, 0.9, 0.75), (False, False, False, True)
        ),
    )
    prefixes = (
        prefix(0, -1, 16, "paused", 0.3),
        prefix(1, -1, 40, "finished", 0.55),
        prefix(2, -1, 60, "finished", 0.95),
        prefix(3, 2, 44, "finished", 0.75),
    )
    return Result(
        "1 + 1 = ?", "2", 2, "stop", 0.95, 0.0, "2", "2", prefixes, trace, Usage(6, 130, 60, 0.5)
    )


@pytest.fixture(scope="module")
def evaluation():
    prompts, n = 40, 5
    level = np.arange(prompts) % 2 + 1
    correct = (RNG.random((prompts, n)) < 0.7).astype(float)
    value = np.clip(0.4 * correct + 0.6 * RNG.random((prompts, n)), 0, 1)
    length = RNG.integers(10, 60, (prompts, n))
    pool = SamplePool(correct, 1 - correct, value, length, level)

    def run(name, alpha, beta, candidates, strategy, cost):
        right, tokens, count = (
            RNG.random(prompts) < 0.8,
            cost * pool.mean_length,
            np.full(prompts, 4),
        )
        return OnlineRun(
            name,
            alpha,
            beta,
            candidates,
            strategy,
            right,
            right,
            right,
            tokens,
            pool.mean_length,
            count,
            count,
            3.25,
        )

    runs = [
        run(f"zip_rc/{candidates}/{alpha:g}/{beta:g}", alpha, beta, candidates, "zip_rc", cost)
        for alpha in ALPHAS
        for candidates in ("published", "branching")
        for beta, cost in ((0.1, 1.3), (0.05, 2.1))
    ]
    runs += [run(r"reward <0.4> $\x$", np.nan, np.nan, "", "reward_threshold", 2.5)]
    curves = baseline_curves(pool)
    calibration = metrics.length_calibration(length * 1.1, length)
    return report.Evaluation(
        metadata=storage.run_metadata(
            {"decode": {"n": 8}}, ["zip-rc", "evaluate", "name=<b>&"], time.time() - 2
        ),
        pool=pool,
        curves=curves,
        runs=tuple(runs),
        alphas=ALPHAS,
        headline=headline(
            runs, curves, pool, alphas=ALPHAS, headline_beta=(0.05, 0.05), resamples=100
        ),
        quality={
            **metrics.binary_metrics(value, correct),
            "calibration/ece": metrics.ece(value, correct),
            "auc/none": np.nan,
        },
        drift={"drift/kl": 0.00123},
        joint=drawing.joint_heatmaps(
            RNG.dirichlet(np.ones(9), 2).reshape(2, 3, 3),
            np.full((2, 3, 3), 1 / 9),
            GRID,
            ["costs $1", "costs $2"],
        ),
        calibration=plots.calibration_figure(value, correct, calibration),
        trace=plots.trace_figure(make_trace()),
        resamples=100,
    )


def data_of(path):
    """What the page of a report holds."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_report_is_self_contained_and_escaped(evaluation, tmp_path):
    path = report.write_report(tmp_path / "new", evaluation, title="A & B")
    data, source = data_of(path), path.read_text(encoding="utf-8")
    assert data["title"] == "A & B"
    assert "<title>A &amp; B</title>" in source
    assert "<0.4>" not in source
    assert dict(data["about"])["command"] == "zip-rc evaluate 'name=<b>&'"
    assert r"reward <0.4> $\x$" in [run["name"] for run in data["runs"]]
    assert [image["title"] for image in data["images"]] == ["Predicted against empirical joint"]
    assert all(image["source"].startswith("data:image/png;base64,") for image in data["images"])
    cells = {cell for table in data["tables"] for row in table["rows"] for cell in row}
    assert {"majority@5", "pass@1", "drift/kl", "0.00123", "binary/f1"} <= cells
    for row in evaluation.headline:
        assert tables.percent(row.accuracy) in cells
        assert any(cell.startswith(f"{100 * row.majority.difference:+.1f} [") for cell in cells)
    names = {
        "report.html",
        "pareto.png",
        "pareto_hardest.png",
        "joint.png",
        "calibration.png",
        "trace.png",
    }
    assert {p.name for p in path.parent.iterdir()} == names  # no temporary files left


def test_every_point_of_the_page_has_the_numbers_of_its_problems(evaluation, tmp_path):
    data, pool = data_of(report.write_report(tmp_path, evaluation)), evaluation.pool
    runs = {run["name"]: run for run in data["runs"]}
    for run in evaluation.runs:
        mine, cost = runs[run.name], run.cost(pool.mean_length, 0.5)
        assert mine["correct"] == run.correct_by_value.tolist()
        assert mine["compute"] == pytest.approx(cost.compute, rel=1e-4)
        assert mine["latency"] == pytest.approx(cost.latency, rel=1e-4)
    for method in ("majority", "best_of_n", "weighted_best_of_n"):
        for point in evaluation.curves[method]:
            assert runs[point.name]["correct"] == pytest.approx(point.accuracy, abs=1e-4)
    assert [p["level"] for p in data["problems"]] == [f"level {x}" for x in pool.level]
    bins = [(b["predicted"], b["observed"], b["count"]) for b in data["reward_bins"]]
    found = metrics.reliability(pool.value.ravel(), pool.correct.ravel())
    assert bins == [(b.predicted, b.observed, b.count) for b in found]


def test_sections_without_data_are_left_out(evaluation, tmp_path):
    bare = report.Evaluation(
        **{**vars(evaluation), "drift": {}, "joint": None, "calibration": None, "trace": None}
    )
    data = data_of(report.write_report(tmp_path, bare))
    assert "Policy drift" not in [table["title"] for table in data["tables"]]
    assert (data["images"], data["searches"], data["length_bins"]) == ([], [], [])


def test_figures_have_content_and_nothing_runs_off_the_canvas(evaluation, tmp_path):
    figures = {
        "pareto": plots.pareto_figure(evaluation.curves, evaluation.runs, evaluation.pool, ALPHAS),
        "vote": plots.pareto_figure(
            evaluation.curves, evaluation.runs, evaluation.pool, (0.1,), level=2, answer="vote"
        ),
        "joint": evaluation.joint,
        "calibration": evaluation.calibration,
        "trace": evaluation.trace,
    }
    for name, figure in figures.items():
        pixels = matplotlib.image.imread(drawing.save(figure, tmp_path / f"{name}.png"))[..., :3]
        ink = np.any(pixels < 0.9, axis=-1)
        assert ink.mean() > 0.01, name
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert not border.any(), f"{name}: something is cut off at the edge"
        colourful = np.ptp(pixels, axis=-1) > 0.2
        assert len(np.unique((pixels[colourful] * 7).astype(int), axis=0)) > 3, name


def test_direct_labels_do_not_overlap(evaluation):
    figure = plots.pareto_figure(evaluation.curves, evaluation.runs, evaluation.pool, ALPHAS)
    figure.canvas.draw()
    for axis in figure.axes[:2]:
        boxes = [text.get_window_extent() for text in axis.texts]
        # three fixed methods, two candidate sets, one pruning point; two betas
        assert len(boxes) == 8
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.01, 0.3))
def test_spread_keeps_order_and_gap(positions, gap):
    placed = plots._spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert np.all(np.diff(placed[order]) >= gap - 1e-9)
    assert placed.mean() == pytest.approx(np.mean(positions))
    apart = np.arange(3) * 0.5
    np.testing.assert_allclose(plots._spread(apart, 0.3), apart)


def test_trace_shows_pauses_forks_and_the_answer():
    result = make_trace()
    steps, values, paused = plots._history(result, result.prefixes[1])
    assert (steps, values, paused) == ([16, 32, 48, 60], [0.5, 0.5, 0.6, 0.55], [0])
    # starts on its parent's line, stops where it finished
    steps, values, paused = plots._history(result, result.prefixes[3])
    assert (steps, values, paused) == ([16, 32, 48], [0.8, 0.7, 0.75], [])
    axis = plots.trace_figure(result).axes[0]
    assert sum(line.get_marker() == "*" for line in axis.lines) == 1
    # pauses of 0 and of 1 began
    assert sum(len(line.get_xdata()) for line in axis.lines if line.get_marker() == "s") == 2
    labels = [text.get_text().strip() for text in axis.texts]
    assert labels == [
        "0: 16 tokens, paused",
        "1: 40 tokens, finished",
        "2: 60 tokens, answer",
        "3 (fork of 2): 44 tokens, finished",
    ]


def test_json_is_strict_and_complete(evaluation, tmp_path):
    path = storage.write_jsonl(
        tmp_path / "results.jsonl",
        report.result_rows(evaluation.runs, evaluation.pool, [f"p{i}" for i in range(40)]),
    )
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == len(evaluation.runs) * 40
    last = rows[-1]
    assert (last["alpha"], last["prompt_idx"], last["prompt"], last["level"]) == (
        None,
        39,
        "p39",
        2,
    )
    for run in evaluation.runs:  # the file alone gives the tables again
        mine = [row for row in rows if row["run"] == run.name]
        assert np.mean([row["correct/value"] for row in mine]) == pytest.approx(
            run.correct_by_value.mean()
        )
        assert [row["cost/compute"] for row in mine] == pytest.approx(
            run.cost(evaluation.pool.mean_length, 0.5).compute
        )
    path = storage.write_json(
        tmp_path / "deep" / "metadata.json",
        {**evaluation.metadata, "x": np.float32(np.inf), "y": np.arange(2), "g": GRID},
    )
    data = json.loads(path.read_text())
    assert (data["x"], data["y"], data["g"]["length_edges"]) == (None, [0, 1], [0, 16, 32, 64])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "results.jsonl"]


def test_the_baselines_can_be_computed_again_from_the_file_of_the_pool(evaluation, tmp_path):
    path = storage.write_jsonl(tmp_path / "pool.jsonl", report.pool_rows(evaluation.pool))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pool = evaluation.pool
    assert [(r["prompt_idx"], r["sample_idx"]) for r in rows] == list(
        np.ndindex(pool.correct.shape)
    )
    columns = {
        "correct": "correct",
        "answer_id": "answer_id",
        "value": "value",
        "self_length": "tokens",
    }
    read = {
        name: np.array([r[column] for r in rows]).reshape(pool.correct.shape)
        for name, column in columns.items()
    }
    again = SamplePool(**read, level=np.array([r["level"] for r in rows if not r["sample_idx"]]))
    for name, curve in baseline_curves(pool).items():
        for point, expected in zip(baseline_curves(again)[name], curve, strict=True):
            for field in ("accuracy", "compute", "latency"):
                np.testing.assert_array_equal(getattr(point, field), getattr(expected, field))


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = storage.write_jsonl(tmp_path / "results.jsonl", [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_jsonl(path, rows())
    assert path.read_text() == '{"a": 1}\n'


def test_metadata_names_what_ran(evaluation):
    data = evaluation.metadata
    assert data["command"] == "zip-rc evaluate 'name=<b>&'"
    assert set(data["versions"]) >= {"jax", "flax", "numpy"}
    assert data["devices"]
    assert 2 <= data["seconds"] < 600
    assert data["config"] == {"decode": {"n": 8}}
    assert storage.run_metadata({}, [])["seconds"] is None


def test_commit_is_that_of_the_package_only(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
            check=True,
            capture_output=True,
        )

    package = tmp_path / "zip_rc_jax"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    assert storage._git_commit(package) is None  # no repository
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    commit = storage._git_commit(package)
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (package / "a.py").write_text("2\n")
    assert storage._git_commit(package) == f"{commit}+changes"
    (package / "venv").mkdir()
    assert storage._git_commit(package / "venv") is None  # inside somebody else's repository


@pytest.mark.parametrize(
    ("origin", "variable", "expected"),
    [
        (
            {"url": "https://h/o/zip_rc_jax", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}},
            "3c4d",
            "1a2b",
        ),
        ({"url": "file:///src", "dir_info": {}}, "3c4d", "3c4d"),
        (None, "3c4d", "3c4d"),
        (None, "", None),
    ],
    ids=["git+https", "archive", "index", "unknown"],
)
def test_an_installed_package_has_the_commit_that_pip_or_the_launcher_recorded(
    tmp_path, monkeypatch, origin, variable, expected
):
    package, recorded = tmp_path / "zip_rc_jax", tmp_path / "zip_rc_jax-9.dist-info"
    package.mkdir()
    recorded.mkdir()
    (recorded / "METADATA").write_text("Metadata-Version: 2.1\nName: zip-rc-jax\nVersion: 9\n")
    if origin:
        (recorded / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert storage.package_commit(package, {"ZIP_RC_COMMIT": variable}) == expected
    assert storage.package_commit(tmp_path / "a copy" / "zip_rc_jax", {}) is None, (
        "the record is of what is installed there"
    )


def test_the_compiler_of_a_tpu_is_among_the_versions(monkeypatch):
    monkeypatch.setattr(storage, "_version", lambda package: f"{package} 1")
    assert {"jax", "libtpu"} <= storage.run_metadata({}, [])["versions"].keys()


def test_console_tables_show_the_same_cells(evaluation):
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    table = tables.full_table(evaluation.runs, evaluation.curves, evaluation.pool, ALPHAS)
    tables.print_table(table, console)
    tables.print_table(tables.metric_table("Quality [bold]", {"auc/none": np.nan}), console)
    shown = stream.getvalue()
    assert all(cell in shown for row in table.rows for cell in row)
    assert "Quality [bold]" in shown  # not rich markup
    assert {len(row) for row in table.rows} == {len(table.columns)}
    levels = tables.level_table(evaluation.runs, evaluation.curves, evaluation.pool, resamples=50)
    assert len(levels.rows) == 8 * 2  # adaptive runs only, two levels
    assert {len(row) for row in levels.rows} == {len(levels.columns)}
