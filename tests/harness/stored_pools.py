"""Pools of samples of tiny models, and the online decodes that replays are compared with."""

from __future__ import annotations

import numpy as np
import pytest

from zip_rc_jax.config import DecodeConfig, to_dict
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.sample_pool import PartialPool, PoolFiles
from zip_rc_jax.evaluation.baselines import majority_reward
from zip_rc_jax.evaluation.replay import check_replayable, replay
from zip_rc_jax.grading.votes import answer_groups
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.pipeline.pool import SHAPING, JointRecorder, decode_with_joints, pool_samples
from zip_rc_jax.pipeline.seeds import with_own_samples


def make_pool(
    directory, lm, prompts, decode, *, samples, stride, seed, kind="float32", network=None, files=2
):
    """A pool as the pipeline makes it, graded by a rule: a text is right if its length is even."""
    decode = DecodeConfig(**vars(decode) | {
        "strategy": "fixed", "n": samples, "interval": stride, "length_budget": 0,
        "token_budget": 0, "candidates": "published", "max_num_seqs": 2 * samples,
    })  # fmt: skip
    recorder = JointRecorder()
    engine = Engine(lm, decode, seed, network=network, observer=recorder)
    found = [Problem(i, i % 2, 0, text, "", "math") for i, text in enumerate(prompts)]
    results = decode_with_joints(engine, with_own_samples(prompts, seed), recorder)
    grades = [grade(x.text) for r in results for x in r.prefixes]
    grid = lm.head.grid
    rows = list(pool_samples(found, results, recorder, grades, decode, grid, kind))
    options = to_dict(decode)
    shaping = {name: options[name] for name in SHAPING}
    partial = PartialPool(directory, {"decode": shaping, "model": lm.digest()})
    size = -(-len(prompts) // files) * samples
    for number in range(files):
        partial.add(number, rows[number * size : (number + 1) * size])
    partial.finish(files, len(rows), {
        "grid": grid.to_dict(), "prompts": len(prompts), "samples": samples, "stride": stride,
        "window": decode.window, "joints": kind,
    })  # fmt: skip
    return PoolFiles(directory), rows


def grade(text):
    return float(len(text) % 2 == 0)


def online(lm, prompts, decode, seed, network=None):
    engine = Engine(lm, decode, seed, network=network)
    return run_all(engine, with_own_samples(prompts, seed))


def assert_replay_is_online(files, pool, rows, lm, prompts, decode, seed, network=None):
    """Every decision, every token, every answer and the whole cost."""
    check_replayable(decode, files.metadata)
    results = online(lm, prompts, decode, seed, network)
    [found] = replay(pool, decode, np.arange(decode.n)[None], traces=True)
    for p, result in enumerate(results):
        texts = [row.text for row in rows if row.prompt_index == p]
        ids = [tuple(row.token_ids.tolist()) for row in rows if row.prompt_index == p]
        assert [_plain(d) for d in found.traces[p][0]] == [_plain(d) for d in result.trace]
        mine = [d.utility for d in found.traces[p][0]]
        np.testing.assert_allclose(mine, [d.utility for d in result.trace], rtol=0, atol=1e-6)
        for k, prefix in enumerate(result.prefixes):
            assert prefix.token_ids == ids[k][: found.lengths[p, 0, k]]
        assert found.tokens[p, 0] == result.usage.tokens
        assert found.serial_steps[p, 0] == result.usage.serial_steps
        assert found.n_started[p, 0] == sum(bool(x.token_ids) for x in result.prefixes)
        assert found.n_finished[p, 0] == sum(x.state == "finished" for x in result.prefixes)
        assert (found.reason[p, 0] == "token_budget") == (result.finish_reason == "token_budget")
        cut = [texts[k] for k in range(decode.n)]
        if found.reason[p, 0]:
            cut = [x.text for x in result.prefixes]
        for slot, text in (
            (found.by_value[p, 0], result.value_text),
            (found.by_vote[p, 0], result.vote_text),
        ):
            assert (cut[slot] if slot >= 0 else "") == text
        chosen = {"value": found.by_value, "vote": found.by_vote}[decode.answer][p, 0]
        assert chosen == result.prefix_id
        ended = [x for x in result.prefixes if x.state == "finished"]
        groups = answer_groups([x.text for x in ended])
        majority = majority_reward(np.array([grade(x.text) for x in ended]), np.array(groups))
        assert found.correct_by_majority[p, 0] == pytest.approx(majority)
    return results, found


def _plain(decision):
    return tuple(
        getattr(decision, name)
        for name in ("step", "multiplicity", "planned_pause_bin", "tokens", "finished")
    )
