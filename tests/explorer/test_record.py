"""What is recorded for the page: the numbers of `predict` and of the search, after JSON too."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from zip_rc_jax import Decoder, UsageError, predict
from zip_rc_jax.explorer.record import CELL, introspections, packed_joint

PROMPTS = ["1 + 2 =", "3 + 4 = 7 so"]
OPTIONS = {"n": 4, "interval": 4, "window": 3, "max_tokens": 24, "alpha": 1.0, "beta": 0.4}


@pytest.fixture(scope="module")
def recorded(lm):
    decoder = Decoder(lm, **OPTIONS, candidates="branching")
    results = decoder(PROMPTS, return_joints=True)
    assert any(p.parent >= 0 for r in results for p in r.prefixes), "none is forked"
    rows = [json.loads(json.dumps(x)) for x in introspections(lm, results, decoder.config)]
    return results, rows


def floats(text, dtype="<f4"):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_every_token_of_a_prefix_has_what_predict_says_after_it(lm, recorded):
    for result, row in zip(*recorded, strict=True):
        for prefix, kept in zip(result.prefixes, row["prefixes"], strict=True):
            (read,) = predict(lm, [(result.prompt_token_ids, prefix.token_ids)])
            own = slice(read.prompt_tokens + prefix.fork_position, None)
            assert kept["pieces"] == list(read.pieces[own])
            p, remaining = floats(kept["p_correct"]), floats(kept["remaining"])
            known = slice(None, -1 if prefix.state == "finished" else None)
            np.testing.assert_allclose(p[known], read.p_correct[own][known], atol=1e-6)
            np.testing.assert_allclose(remaining[known], read.remaining[own][known], rtol=1e-5)
            joint = floats(kept["joint"], "<u2").reshape(-1, *read.joint.shape[1:]) / CELL
            np.testing.assert_allclose(joint, read.joint[own], atol=1 / CELL)


def test_what_the_head_says_after_the_end_is_not_told(recorded):
    """It was not trained there, and the decoder does not read it."""
    ends = 0
    for result, row in zip(*recorded, strict=True):
        for prefix, kept in zip(result.prefixes, row["prefixes"], strict=True):
            last = floats(kept["p_correct"])[-1], floats(kept["remaining"])[-1]
            assert all(np.isnan(last)) == (prefix.state == "finished")
            ends += prefix.state == "finished"
    assert ends


def test_the_mean_of_the_last_tokens_is_what_the_decision_was_made_on(recorded):
    """Two ways to the same number: the decoder's running mean, and a forward pass afterwards."""
    compared = 0
    for result, row in zip(*recorded, strict=True):
        for decision in result.trace:
            for place, number in enumerate(decision.prefix_ids):
                tokens = decision.tokens[place]
                if number < 0 or decision.finished[place] or tokens < OPTIONS["window"]:
                    continue
                prefix, kept = result.prefixes[number], row["prefixes"][number]
                first = tokens - OPTIONS["window"] - prefix.fork_position
                if first < 0:
                    continue
                mean = floats(kept["p_correct"])[first : first + OPTIONS["window"]].mean()
                assert mean == pytest.approx(decision.expected_reward[place], abs=1e-5)
                compared += 1
    assert compared > 5


def test_every_decision_has_the_actions_that_were_weighed_the_taken_one_first(recorded):
    for result, row in zip(*recorded, strict=True):
        for decision, told in zip(result.trace, row["decisions"], strict=True):
            assert told["multiplicity"][0] == list(decision.multiplicity)
            assert told["utility"][0] == pytest.approx(decision.utility, abs=1e-6)
            assert (
                len({len(told[name]) for name in ("utility", "value", "compute", "latency")}) == 1
            )


def test_a_joint_keeps_its_cells_to_sixteen_bits():
    joint = np.random.default_rng(0).dirichlet(np.full(56, 0.3), 100).reshape(100, 7, 8)
    read = floats(packed_joint(joint), "<u2").reshape(joint.shape) / CELL
    np.testing.assert_allclose(read, joint, atol=0.5001 / CELL)


def test_results_without_joints_are_refused(lm):
    decoder = Decoder(lm, **OPTIONS)
    with pytest.raises(UsageError, match="return_joints"):
        list(introspections(lm, decoder(PROMPTS), decoder.config))
