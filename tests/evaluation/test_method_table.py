"""The table of methods is the page's, and names what the code really has."""

from __future__ import annotations

import importlib
import inspect
import re

import numpy as np
import pytest

from harness.documents import DOCS
from harness.pools import small_pool
from zip_rc_jax import evaluation
from zip_rc_jax.evaluation import baselines, confidence, pruning, sequential
from zip_rc_jax.evaluation.method_table import METHOD_TABLE, markdown_table
from zip_rc_jax.runtime.errors import UsageError

POOL = small_pool(1, prompts=4)
RNG = np.random.default_rng(0)
CERTAINTY = RNG.random(POOL.correct.shape)
TOKENS = [[RNG.random(int(n)) for n in row] for row in POOL.self_length]
CALLS = {
    "self_evaluation": lambda: baselines.self_evaluation_curve(POOL, POOL.value, POOL.self_length),
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
} | {
    name: lambda name=name: baselines.baseline_curves(POOL, (name,))[name]
    for name in baselines.METHODS
}


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
    if method.knob != "n" or method.name not in ("pass", "majority", "best_of_n"):
        source = f"{found.__doc__} {inspect.getmodule(found).__doc__}"
        assert method.source in source or "self_certainty_curve" in source or module == "baselines"


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
