"""Scripts, prompts and checks of decodes, shared by the tests of the decoder."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from harness import scripted
from harness.scripted import EOS, FILLERS, FIRST_FILLER, GRID, Plan, Script
from zip_rc_jax.config import DecodeConfig

CONFIG = DecodeConfig(n=4, max_num_seqs=16, interval=4, window=3, max_tokens=24)


BRANCHING = dataclasses.replace(CONFIG, candidates="branching")


MIXED = Script(
    [
        Plan(6, lambda t: 0.6 + 0.05 * t),
        Plan(11, lambda t: 0.4 - 0.02 * t),
        Plan(21, lambda t: 0.1 + 0.01 * t),
    ]
)


def check(result, config):
    """Conservation, and a trace that tells the whole story."""
    prefixes = {p.id: p for p in result.prefixes}
    assert list(prefixes) == list(range(len(prefixes)))
    assert len(prefixes) <= config.n
    assert result.usage.tokens == sum(len(p.token_ids) - p.fork_position for p in result.prefixes)
    for p in result.prefixes:
        shared = prefixes[p.parent].token_ids[: p.fork_position] if p.parent >= 0 else ()
        assert p.token_ids[: p.fork_position] == shared
        assert p.parent < p.id
        assert (p.state, p.finish_reason) in [
            ("finished", "stop"),
            ("finished", "length"),
            ("paused", "paused"),
        ]
        assert (p.finish_reason == "stop") == (p.token_ids[-1:] == (EOS,))
        assert (p.finish_reason == "length") == (
            len(p.token_ids) == config.max_tokens and p.token_ids[-1] != EOS
        )
        assert EOS not in p.token_ids[:-1]
    assert any(p.state == "finished" for p in result.prefixes) or (
        config.allow_no_answer and result.finish_reason == "abstain"
    )

    trace = result.trace
    first, last = trace[0], trace[-1]
    assert (first.step, last.step) == (0, result.usage.serial_steps)
    roots = [p.id for p in result.prefixes if p.parent == -1]
    branching = config.candidates == "branching" and config.strategy == "zip_rc"
    assert first.prefix_ids == ((-1,) if branching else tuple(roots)), (
        "published starts with n samples of the root, branching with none"
    )
    assert [i for i in last.prefix_ids if i >= 0] == list(prefixes), (
        "the last decision saw every prefix"
    )
    assert {i: n for i, n in zip(last.prefix_ids, last.tokens, strict=True) if i >= 0} == {
        p.id: len(p.token_ids) for p in result.prefixes
    }
    assert not any(
        m
        for i, m, done in zip(last.prefix_ids, last.multiplicity, last.finished, strict=True)
        if not done
    )

    for before, after in itertools.pairwise(trace):
        was = {
            i: (t, m, done)
            for i, t, m, done in zip(
                before.prefix_ids, before.tokens, before.multiplicity, before.finished, strict=True
            )
        }
        now = {
            i: (t, done)
            for i, t, done in zip(after.prefix_ids, after.tokens, after.finished, strict=True)
        }
        copies = sum((m - (i >= 0)) for i, (_, m, done) in was.items() if m and not done)
        born = sorted(set(now) - set(was))
        assert len(born) == copies, "a multiplicity above one is what creates prefixes"
        assert sorted(
            i for i, (_, m, done) in was.items() for _ in range(m - (i >= 0)) if not done
        ) == sorted(prefixes[i].parent for i in born)
        grown = []
        for i in [j for j in now if j >= 0]:
            start, extended, done = was.get(i, (prefixes[i].fork_position, 1, False))
            grown.append(now[i][0] - start)
            if extended and not done:
                assert grown[-1] == config.interval or (
                    0 < grown[-1] <= config.interval and now[i][1]
                )
            else:
                assert grown[-1] == 0, "paused and finished prefixes do not grow"
        assert after.step - before.step == max(grown), (
            "serial steps: the longest growth of the interval"
        )


def check_script(result, script, config):
    """The model saw the right history everywhere, and the predictions are means over the right
    windows."""
    prompt = scripted.TOKENIZER.encode(result.prompt)
    window = config.window
    for p in result.prefixes:
        if not p.token_ids:
            continue
        plan = script.plans[script.plan_of(p.token_ids)]
        for t, token in enumerate(p.token_ids[1:], 1):
            assert (token == EOS) == (t == plan.length - 1)
            if token != EOS:
                assert token != FIRST_FILLER + sum(prompt + list(p.token_ids[:t])) % FILLERS
    for decision in result.trace:
        columns = zip(
            decision.prefix_ids,
            decision.tokens,
            decision.finished,
            decision.expected_reward,
            decision.expected_remaining,
            strict=True,
        )
        for i, tokens, finished, reward, remaining in columns:
            ids = result.prefixes[i].token_ids if i >= 0 else ()
            # The joint after the last token of a finished prefix is never read.
            at = range(tokens + (not finished))[-window:]
            joint = np.mean([script.joint_after(ids, t) for t in at], axis=0)
            assert reward == pytest.approx(float(joint.sum(1) @ GRID.reward_centres), abs=1e-5)
            expected = 0.0 if finished else float(joint.sum(0) @ GRID.length_midpoints)
            assert remaining == pytest.approx(expected, rel=1e-4)


def exact(result):
    return {
        k: v
        for k, v in result.to_dict().items()
        if k in ("prompt", "text", "prefix_id", "finish_reason")
    } | {
        "tokens": [p.token_ids for p in result.prefixes],
        "actions": [
            (d.step, d.prefix_ids, d.multiplicity, d.planned_pause_bin, d.tokens)
            for d in result.trace
        ],
    }


# One sample is enough at the root, whose value is low; a prefix of plan 0 is worth copying.
FORKING = Script([Plan(18, 0.5), Plan(18, 0.02)], root=(0.02, 20), draw=(0.9, 0.1, 1e-9))


FORKS = dataclasses.replace(BRANCHING, alpha=1.0, beta=0.1, max_num_seqs=32, n=6)


HOPELESS = Script([Plan(20, 0.01)], root=(0.01, 30))


PRICED = dataclasses.replace(CONFIG, alpha=0.5, beta=0.1)


REAL = DecodeConfig(n=4, max_num_seqs=16, interval=3, window=4, max_tokens=20, beta=0.02, alpha=0.2)


REAL_PROMPTS = ["1 + 2 =", "wait so check", "a b c d 7 + 8 =", "3", "11 + 10 + 9 ="]
