"""What results say beside the tokens: log-probabilities, and the joints of all decisions."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from harness.engines import REAL, REAL_PROMPTS
from harness.forwards import full
from zip_rc_jax import Request, Result, StepEvent, decode, decode_stream

BRANCHING = dataclasses.replace(REAL, candidates="branching", alpha=1.0, beta=0.1, n=6)
LENGTH = 48  # of a padded forward


def reference(lm, prompt_ids, ids):
    """Log-softmax over the ids that the policy may emit, from one forward without a cache."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(prompt_ids) + len(ids)] = (*prompt_ids, *ids)
    logits = full(lm.config, lm.params["body"], tokens)[0].astype(np.float64)
    logits[:, ~lm.head.sampleable(lm.config.vocab_size)] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(ids)) + len(prompt_ids) - 1
    return logprobs[at, list(ids)]


@pytest.mark.parametrize(
    "config",
    [
        REAL,
        BRANCHING,
        dataclasses.replace(REAL, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3),
    ],
    ids=["published", "branching", "sampling options"],
)
def test_they_are_those_of_a_full_forward_of_the_policy(lm, config):
    """Before temperature, filters and penalty, whatever these are."""
    forks = 0
    for result in decode(lm, REAL_PROMPTS, config):
        for p in result.prefixes:
            assert len(p.logprobs) == len(p.token_ids)
            expected = reference(lm, result.prompt_token_ids, p.token_ids)
            np.testing.assert_allclose(p.logprobs, expected, atol=1e-4)
            if p.parent >= 0:
                parent = result.prefixes[p.parent]
                assert p.logprobs[: p.fork_position] == parent.logprobs[: p.fork_position]
                forks += 1
    assert bool(forks) == (config is BRANCHING)


def test_they_and_the_joints_are_written_when_asked_for(lm):
    (result,) = decode(lm, REAL_PROMPTS[:1], REAL, return_joints=True)
    small, large = result.to_dict(), result.to_dict(logprobs=True, joints=True)
    assert "logprobs" not in small["prefixes"][0]
    assert "joints" not in small["trace"][0]
    again = Result.from_dict(json.loads(json.dumps(large)))
    assert again == result, "with every log-probability"
    for a, b in zip(again.trace, result.trace, strict=True):
        np.testing.assert_array_equal(a.joints, b.joints)
    assert Result.from_dict(json.loads(json.dumps(small))).prefixes[0].logprobs == ()


@pytest.mark.parametrize("config", [REAL, BRANCHING], ids=["published", "branching"])
def test_every_decision_carries_the_joints_that_it_was_made_on(lm, config):
    grid = lm.head.grid
    results = decode(lm, [REAL_PROMPTS[0], Request(REAL_PROMPTS[1])], config, return_joints=True)
    for decision in (d for r in results for d in r.trace):
        assert decision.joints.shape == (len(decision.prefix_ids), grid.n_reward, grid.n_length)
        np.testing.assert_allclose(decision.joints.sum((1, 2)), 1, atol=1e-5)
        reward = decision.joints.sum(2) @ np.asarray(grid.reward_centres, np.float32)
        np.testing.assert_allclose(reward, decision.expected_reward, atol=1e-6)
        remaining = decision.joints.sum(1) @ np.asarray(grid.length_midpoints, np.float32)
        remaining[list(decision.finished)] = 0
        np.testing.assert_allclose(remaining, decision.expected_remaining, rtol=1e-5)
    plain = decode(lm, REAL_PROMPTS[:2], config)
    assert [r.trace for r in plain] == [r.trace for r in results], "the rest is the same"
    assert all(d.joints is None for r in plain for d in r.trace)


def test_a_stream_has_them_too(lm):
    events = decode_stream(lm, REAL_PROMPTS[:2], REAL, return_joints=True)
    steps = [e for e in events if isinstance(e, StepEvent)]
    assert all(e.decision.joints is not None for e in steps)
