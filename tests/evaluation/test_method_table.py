"""The table of methods is the page's, and names what the code really has."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest

from harness.documents import DOCS
from harness.pools import small_pool
from zip_rc_jax import evaluation
from zip_rc_jax.evaluation import baselines, confidence, pruning, sequential, tables
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.method_curves import method_curves
from zip_rc_jax.evaluation.method_table import METHOD_TABLE, markdown_table
from zip_rc_jax.evaluation.reward_model import reward_model_curves
from zip_rc_jax.evaluation.token_statistics import TokenStatistics
from zip_rc_jax.runtime.errors import UsageError

POOL = small_pool(1, prompts=4)
RNG = np.random.default_rng(0)
CERTAINTY = RNG.random(POOL.correct.shape)
TOKENS = [[RNG.random(int(n)) for n in row] for row in POOL.self_length]
JUDGED = ("reward_model_weighted", "reward_model_best_of_n")
CALLS = (
    {
        "self_evaluation": lambda: baselines.self_evaluation_curve(
            POOL, POOL.value, POOL.self_length
        ),
        "self_certainty": lambda: confidence.self_certainty_curve(POOL, CERTAINTY),
        "self_certainty_borda": lambda: confidence.borda_curve(POOL, CERTAINTY),
        "deepconf_offline": lambda: confidence.deepconf_offline(POOL, CERTAINTY),
        "deepconf_online": lambda: confidence.deepconf_online(POOL, TOKENS, window=3, warmup=2),
        "adaptive_consistency": lambda: sequential.adaptive_consistency(POOL),
        "adaptive_consistency_dirichlet": lambda: sequential.adaptive_consistency(
            POOL, criterion="dirichlet"
        ),
        "early_stopping": lambda: sequential.early_stopping(POOL),
        "cges": lambda: sequential.confidence_posterior(POOL),
        "pandora": lambda: sequential.pandora(POOL),
        "pandora_known": lambda: sequential.pandora(POOL, known=True),
        "shortest": lambda: pruning.shortest_curve(POOL),
        "first_finished": lambda: pruning.first_finished(POOL, (1, 4)),
        "reward_pruning": lambda: pruning.reward_pruning(POOL, TOKENS, interval=3),
        "length_pruning": lambda: pruning.length_pruning(POOL, (4, 9), interval=3),
    }
    | {
        name: lambda name=name: reward_model_curves(POOL, CERTAINTY, POOL.self_length)[name]
        for name in JUDGED
    }
    | {
        name: lambda name=name: baselines.baseline_curves(POOL, (name,))[name]
        for name in baselines.METHODS
    }
)


def test_the_page_has_the_table_of_the_code():
    assert markdown_table() in (DOCS / "baselines.md").read_text()


@pytest.mark.parametrize("method", METHOD_TABLE, ids=lambda m: m.name)
def test_every_method_of_the_table_is_computed_where_it_says(method):
    points = CALLS[method.name]()
    assert {point.method for point in points} == {method.name}
    knobs = {point.knob_name or "n" for point in points}
    assert knobs == {method.knob}
    for point in points:
        assert point.accuracy.shape == (4,)
        assert ((point.accuracy >= 0) & (point.accuracy <= 1)).all()
        parallel = point.latency <= POOL.self_length.max(1) / POOL.mean_length + 1e-9
        if method.rounds.startswith("one"):
            assert parallel.all(), "one round takes no longer than the longest sample"
        if method.rounds == "one":
            np.testing.assert_allclose(point.compute, point.n)
        if method.rounds == "one, cut":
            assert (point.compute <= point.n + 1e-9).all()
    module, function = method.where.split(".")
    found = getattr(importlib.import_module(f"zip_rc_jax.evaluation.{module}"), function)
    assert method.source in found.__doc__


def test_every_method_is_in_the_table_once():
    names = [method.name for method in METHOD_TABLE]
    assert sorted(names) == sorted(CALLS)
    assert all(re.fullmatch(r"\d{4}\.\d{5}", method.source) for method in METHOD_TABLE)


def test_plain_arrays_give_the_same_points():
    rows = (POOL.correct, POOL.self_length, np.where(POOL.answer_id < 0, np.nan, POOL.answer_id))
    correct, tokens, answers = rows
    scored = (correct, POOL.value, tokens, answers)
    certain = (correct, CERTAINTY, tokens, answers)
    pairs = {
        "adaptive_consistency": evaluation.adaptive_consistency(*rows),
        "early_stopping": evaluation.early_stopping(*rows),
        "cges": evaluation.confidence_posterior(*scored),
        "pandora": evaluation.pandora(*scored),
        "deepconf_offline": evaluation.deepconf_offline(*certain),
        "deepconf_online": evaluation.deepconf_online(correct, TOKENS, answers, window=3, warmup=2),
        "self_certainty": evaluation.self_certainty(*certain),
        "self_certainty_borda": evaluation.self_certainty_borda(*certain),
        "shortest": evaluation.shortest_response(correct, tokens),
        "first_finished": evaluation.first_finished(*rows, (1, 4)),
        "reward_pruning": evaluation.reward_pruning(
            correct, POOL.value, TOKENS, answers, interval=3
        ),
        "length_pruning": evaluation.length_pruning(*rows, (4, 9), interval=3),
    }
    for name, points in pairs.items():
        for a, b in zip(points, CALLS[name](), strict=True):
            assert a.name == b.name
            np.testing.assert_allclose(a.accuracy, b.accuracy)
            np.testing.assert_allclose(a.cost(0.3), b.cost(0.3))
    with pytest.raises(UsageError, match=r"tokens of shape \(4, 2\)"):
        evaluation.adaptive_consistency(correct, tokens[:, :2], answers)


def test_every_exported_name_is_there():
    for name in evaluation.__all__:
        assert getattr(evaluation, name) is not None, name


STATISTICS = [
    [TokenStatistics(t.astype(np.float32), t.astype(np.float32)) for t in row] for row in TOKENS
]


def test_all_curves_of_a_pool_come_from_one_call():
    found = method_curves(POOL, statistics=STATISTICS, window=3, traces=TOKENS, interval=3)
    plain = {*baselines.METHODS, "self_evaluation", *JUDGED}
    assert set(found) == {m.name for m in METHOD_TABLE} - plain
    for name, points in found.items():
        assert {point.method for point in points} == {name}
    (direct,) = sequential.confidence_posterior(POOL, (0.9,))
    same = next(point for point in found["cges"] if point.knob == 0.9)
    np.testing.assert_array_equal(same.accuracy, direct.accuracy)
    table = tables.full_table([], found, POOL, (0.1,))
    assert any(row[0] == "cges@5 threshold=0.9" for row in table.rows)


def test_what_a_method_lacks_leaves_its_curve_out_and_one_sample_is_a_pool():
    one = small_pool(0, n=1)
    for point in (point for points in method_curves(one).values() for point in points):
        np.testing.assert_allclose(point.accuracy, one.correct[:, 0])
        np.testing.assert_allclose(point.cost(0.3), 1)
    assert not {"reward_pruning", "self_certainty", "deepconf_online"} & set(method_curves(one))


def test_the_table_of_figures_states_the_error_of_draws_alone():
    drawn = Draws(enumerated=1, sampled=50)
    curves = baselines.baseline_curves(POOL, ("majority", "weighted_best_of_n"), drawn)
    rows = {row[0]: row[1] for row in tables.full_table([], curves, POOL, (0.1,)).rows}
    error = 100 * curves["weighted_best_of_n"][1].mean_error
    assert rows["weighted_best_of_n@2"].endswith(f" ±{error:.2f}")
    assert "±" not in rows["majority@2"]
