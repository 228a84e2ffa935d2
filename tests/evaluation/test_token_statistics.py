"""Confidence and self-certainty of every token, against a softmax over all logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.company import on_mesh
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.baselines import SamplePool
from zip_rc_jax.evaluation.method_curves import method_curves
from zip_rc_jax.evaluation.rollout_predictions import final_values, predict_rollouts
from zip_rc_jax.evaluation.token_statistics import _statistics, token_statistics
from zip_rc_jax.models.transformer import forward_packed, logits, unembedding
from zip_rc_jax.predictions import ScoringConfig, api
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import single_device

SETTINGS = ScoringConfig(128)


def samples():
    rng = np.random.default_rng(0)
    sizes = ((3, 7), (9, 20), (1, 1), (5, 12))
    return [
        Rollout(
            task="", prompt_index=i, sample_index=0, level=0, seed=0, prompt="", question="",
            answer="", entry_json="", response="", finished=True,
            prompt_token_ids=rng.integers(0, 20, p), output_token_ids=rng.integers(0, 20, m),
        )
        for i, (p, m) in enumerate(sizes)
    ]  # fmt: skip


def by_softmax(lm, rollouts, top_k):
    """The papers' formulas from the probabilities of every id, one token at a time."""
    tokens = np.zeros((len(rollouts), 32), np.int32)
    for row, r in zip(tokens, rollouts, strict=True):
        ids = np.concatenate([r.prompt_token_ids, r.output_token_ids])[:-1]
        row[: len(ids)] = ids  # what follows is not seen: attention is causal

    @jax.jit
    def all_logits(body):
        at = jnp.broadcast_to(jnp.arange(32), tokens.shape)
        ones = jnp.ones_like(tokens)
        hidden = forward_packed(lm.config, body, tokens, at, ones, layout=single_device())
        return logits(lm.config, hidden, unembedding(lm.config, body))

    found = np.asarray(all_logits(lm.params["body"]), np.float64)
    reserved = [] if lm.head is None else range(lm.head.first_id, lm.head.last_id)
    last = lm.tokenizer.size if lm.head is None else lm.head.used_ids
    emitted = [v for v in range(last) if v not in reserved]
    for row, r in zip(found, rollouts, strict=True):
        start = len(r.prompt_token_ids) - 1
        confidence, certainty = [], []
        for z in row[start : start + len(r.output_token_ids), emitted]:
            p = np.exp(z) / np.exp(z).sum()
            confidence.append(-np.mean(np.log(sorted(p)[-top_k:])))
            certainty.append(-np.mean(np.log(len(emitted) * p)))
        yield confidence, certainty


@pytest.mark.parametrize(("tied", "softcap", "top_k"), [(True, 0.0, 5), (False, 2.0, 500)])
def test_they_are_the_papers_formulas_on_the_probabilities_of_all_ids(tied, softcap, top_k):
    lm = tiny_lm(dataclasses.replace(TINY_MODEL, tied=tied, logit_softcap=softcap))
    found = token_statistics(lm, samples(), SETTINGS, top_k=top_k)
    expected = by_softmax(lm, samples(), top_k)
    for one, rollout, (confidence, certainty) in zip(found, samples(), expected, strict=True):
        np.testing.assert_allclose(one.confidence, confidence, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(one.certainty, certainty, rtol=2e-5, atol=1e-5)
        assert one.self_certainty == pytest.approx(np.mean(certainty), rel=1e-4)
        assert len(one.confidence) == len(rollout.output_token_ids)
        assert (one.certainty > 0).all()


def test_what_the_head_says_changes_nothing():
    """Reserved ids have no probability, whatever their logits."""
    lm = tiny_lm()
    loud = dataclasses.replace(lm, params=lm.params | {"zip_rows": lm.params["zip_rows"] * 50})
    for a, b in zip(
        token_statistics(lm, samples(), SETTINGS),
        token_statistics(loud, samples(), SETTINGS),
        strict=True,
    ):
        np.testing.assert_array_equal(a.confidence, b.confidence)
        np.testing.assert_array_equal(a.certainty, b.certainty)


def test_a_policy_without_a_head_has_them_too():
    lm = dataclasses.replace(tiny_lm(), head=None)
    (one,) = token_statistics(lm, samples()[:1], SETTINGS, top_k=3)
    ((confidence, certainty),) = by_softmax(lm, samples()[:1], 3)
    np.testing.assert_allclose(one.confidence, confidence, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(one.certainty, certainty, rtol=2e-5, atol=1e-5)


def test_chunks_change_nothing_and_no_array_of_all_logits_exists(monkeypatch):
    lm = tiny_lm()
    whole = token_statistics(lm, samples(), SETTINGS)
    monkeypatch.setattr(api, "LOGITS", 2**10)
    for a, b in zip(token_statistics(lm, samples(), SETTINGS), whole, strict=True):
        np.testing.assert_allclose(a.confidence, b.confidence, rtol=1e-5)
    rows, width, size = 4, 32, lm.config.vocab_size
    table = unembedding(lm.config, lm.params["body"])
    hidden = jnp.zeros((rows, width, lm.config.d_model))
    allowed = jnp.ones(size, bool)
    jaxpr = jax.make_jaxpr(lambda t, a, h: _statistics(lm.config, 8, 3, t, a, h))(
        table, allowed, hidden
    )

    def largest(jaxpr):
        here = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
        inner = [
            largest(getattr(value, "jaxpr", value))
            for e in jaxpr.eqns
            for value in e.params.values()
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        return max([0, *here, *inner])

    assert largest(jaxpr.jaxpr) <= max(rows * width * size // 8, table.size)


def test_all_devices_of_a_mesh_give_the_same_statistics():
    lm = tiny_lm()
    spread = token_statistics(on_mesh(lm, data=2, tensor=2), samples(), SETTINGS, top_k=5)
    for a, b in zip(spread, token_statistics(lm, samples(), SETTINGS, top_k=5), strict=True):
        np.testing.assert_allclose(a.confidence, b.confidence, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a.certainty, b.certainty, rtol=1e-4, atol=1e-5)


def test_samples_with_their_statistics_and_predictions_have_all_curves():
    """From finished samples to every curve, as an evaluation goes."""
    lm = tiny_lm()
    found = token_statistics(lm, samples(), SETTINGS)
    read = predict_rollouts(lm, samples(), SETTINGS)
    pool = SamplePool(
        correct=[[1, 0], [0, 1]],
        answer_id=[[0, 1], [0, 0]],
        value=final_values(read, 4).reshape(2, 2),
        self_length=[[len(r.output_token_ids) for r in samples()[i : i + 2]] for i in (0, 2)],
        level=[0, 1],
    )
    curves = method_curves(
        pool,
        statistics=[found[:2], found[2:]],
        window=4,
        traces=[[p.reward for p in read[:2]], [p.reward for p in read[2:]]],
        interval=2,
    )
    assert {"deepconf_online", "self_certainty", "reward_pruning", "cges"} <= set(curves)
    for point in (point for points in curves.values() for point in points):
        assert np.isfinite(point.cost(0.1)).all()
        assert (point.cost(0.1) > 0).all()
    best = curves["self_certainty"][1].accuracy
    certain = np.array([s.self_certainty for s in found]).reshape(2, 2)
    np.testing.assert_array_equal(best, pool.correct[[0, 1], certain.argmax(1)])


def test_a_top_k_of_nothing_is_refused():
    with pytest.raises(UsageError, match="top_k=0"):
        token_statistics(tiny_lm(), samples(), SETTINGS, top_k=0)
