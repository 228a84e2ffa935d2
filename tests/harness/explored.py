"""Results, reports and pages that the explorer is tested with."""

from __future__ import annotations

import time

import numpy as np

from zip_rc_jax.evaluation import metrics, report
from zip_rc_jax.evaluation.baselines import SamplePool, baseline_curves
from zip_rc_jax.evaluation.compare import headline
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.explorer.record import packed, packed_joint
from zip_rc_jax.inference.outputs import Decision, Prefix, Result, Usage
from zip_rc_jax.runtime import storage

ALPHAS = (0.1, 1.0)
LENGTH_EDGES = [0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CENTRES = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]


def made_evaluation(prompts=40, samples=5, seed=0, searches=()):
    """A report of random numbers, in which the searches are better than they cost."""
    rng = np.random.default_rng(seed)
    level = np.arange(prompts) % 2 + 1
    correct = (rng.random((prompts, samples)) < 0.7).astype(float)
    value = np.clip(0.4 * correct + 0.6 * rng.random((prompts, samples)), 0, 1)
    length = rng.integers(10, 60, (prompts, samples))
    pool = SamplePool(correct, 1 - correct, value, length, level)

    def run(alpha, beta, candidates, cost):
        right = rng.random(prompts) < 0.8
        tokens, count = cost * pool.mean_length, np.full(prompts, 4)
        name = f"zip_rc/{candidates}/{alpha:g}/{beta:g}"
        return OnlineRun(
            name, alpha, beta, candidates, "zip_rc", right, right, right, tokens,
            pool.mean_length, count, count, 3.25,
        )  # fmt: skip

    runs = tuple(
        run(alpha, beta, candidates, cost)
        for alpha in ALPHAS
        for candidates in ("published", "branching")
        for beta, cost in ((0.1, 1.3), (0.05, 2.1))
    )
    curves = baseline_curves(pool)
    rows = headline(runs, curves, pool, alphas=ALPHAS, headline_beta=(0.05, 0.05), resamples=50)
    config = {
        "decode": {"n": 8, "answer": "value"},
        "evaluate": {
            "alphas": list(ALPHAS), "headline_beta": [0.05, 0.05], "seed": 0, "bootstrap": 50,
        },
    }  # fmt: skip
    command = ["zip-rc", "evaluate", "name=<b>&"]
    return report.Evaluation(
        metadata=storage.run_metadata(config, command, time.time() - 2),
        pool=pool,
        curves=curves,
        runs=runs,
        alphas=ALPHAS,
        headline=rows,
        quality={**metrics.binary_metrics(value, correct), "auc/none": np.nan},
        drift={"drift/kl": 0.00123},
        predictions={"full": {"F1": 0.9}, "Lite": {"F1": 0.8}},
        lengths=metrics.length_calibration(length * 1.1, length),
        searches=tuple(searches),
        resamples=50,
    )


def write_files(directory, evaluation, prompts=()):
    """The files of a report beside its page."""
    report.write_report(directory, evaluation, "A report", prompts)
    rows = report.result_rows(evaluation.runs, evaluation.pool, prompts)
    storage.write_jsonl(directory / "results.jsonl", rows)
    storage.write_jsonl(directory / "pool.jsonl", report.pool_rows(evaluation.pool))
    record = {"quality": evaluation.quality, "drift": evaluation.drift}
    record |= {"predictions": evaluation.predictions}
    storage.write_json(directory / "metadata.json", {**evaluation.metadata, **record})


def made_result(prompt="1 + 1 =", text="2", name="x"):
    """Four prefixes: 0 is paused for good, 1 is paused and resumed, 2 is forked into 3 and
    answers."""

    def decision(step, ids, multiplicity, reward, tokens, finished):
        remaining = (9.0,) * len(ids)
        return Decision(step, ids, multiplicity, -1, 0.5, reward, remaining, tokens, finished)

    def prefix(number, parent, fork, tokens, state, reward):
        ids, reason = tuple(range(tokens)), "stop" if state == "finished" else state
        return Prefix(number, parent, fork, ids, f"{name}{number}", state, reason, reward, 0.0)

    trace = (
        decision(0, (-1,), (3,), (0.5,), (0,), (False,)),
        decision(
            16, (0, 1, 2, -1), (0, 0, 2, 0), (0.3, 0.5, 0.8, 0.5),
            (16, 16, 16, 0), (False,) * 4,
        ),
        decision(
            32, (0, 1, 2, 3, -1), (0, 1, 1, 1, 0), (0.3, 0.5, 0.85, 0.7, 0.5),
            (16, 16, 32, 32, 0), (False,) * 5,
        ),
        decision(
            48, (0, 1, 2, 3, -1), (0, 1, 1, 1, 0), (0.3, 0.6, 0.9, 0.75, 0.5),
            (16, 32, 48, 44, 0), (False, False, False, True, False),
        ),
        decision(
            60, (0, 1, 2, 3, -1), (0, 1, 1, 1, 0), (0.3, 0.55, 0.95, 0.75, 0.5),
            (16, 40, 60, 44, 0), (False, True, True, True, False),
        ),
    )  # fmt: skip
    prefixes = (
        prefix(0, -1, 0, 16, "paused", 0.3),
        prefix(1, -1, 0, 40, "finished", 0.55),
        prefix(2, -1, 0, 60, "finished", 0.95),
        prefix(3, 2, 16, 44, "finished", 0.75),
    )
    usage = Usage(6, 144, 60, 0.5)
    return Result(prompt, text, 2, "stop", 0.95, 0.0, text, text, prefixes, trace, usage)


def large_row(tokens, prefixes, interval, number, introspected):
    """A result of random numbers, as large as one of a real model."""
    rng = np.random.default_rng(number)
    decisions, words = tokens // interval + 1, [" the", " value", " of", " x", " 4", "2", "\n"]

    def along():
        joint = rng.dirichlet(np.ones(56), tokens).reshape(tokens, 7, 8)
        return {
            "pieces": [words[i] for i in rng.integers(len(words), size=tokens)],
            "p_correct": packed(rng.random(tokens), "<f4"),
            "remaining": packed(np.linspace(tokens, 1, tokens), "<f4"),
            "joint": packed_joint(joint),
        }

    def actions():
        numbers = {name: [0.9] * 40 for name in ("value", "compute", "latency", "utility")}
        return numbers | {
            "multiplicity": rng.integers(0, 2, (40, prefixes)).tolist(),
            "planned_pause_bin": [-1] * 40, "compared": [1] * 40, "count": 65, "normalizer": 99.0,
        }  # fmt: skip

    row = {
        "prompt": f"problem {number}", "text": "42", "prefix_id": 0, "finish_reason": "stop",
        "expected_reward": 0.9, "answer": "42", "correct": float(rng.random() < 0.8),
        "usage": {
            "prompt_tokens": 9, "tokens": tokens * prefixes, "serial_steps": tokens, "seconds": 1.0,
        },
        "prefixes": [
            {
                "id": k, "parent": -1, "fork_position": 0, "token_ids": list(range(tokens)),
                "text": "42", "state": "finished", "finish_reason": "stop",
                "expected_reward": 0.8, "expected_remaining": 0.0,
            }
            for k in range(prefixes)
        ],
        "trace": [
            {
                "step": d * interval, "prefix_ids": list(range(prefixes)),
                "multiplicity": [1] * prefixes, "planned_pause_bin": -1, "utility": 0.9,
                "expected_reward": rng.random(prefixes).tolist(),
                "expected_remaining": [float(tokens - d * interval)] * prefixes,
                "tokens": [d * interval] * prefixes, "finished": [d == decisions - 1] * prefixes,
            }
            for d in range(decisions)
        ],
    }  # fmt: skip
    if introspected:
        row["introspection"] = {
            "settings": {"alpha": 0.1, "beta": 0.02, "n": prefixes},
            "grid": {"reward_centres": CENTRES, "length_edges": LENGTH_EDGES},
            "decisions": [actions() for _ in range(decisions)],
            "root": None,
            "prefixes": [along() for _ in range(prefixes)],
        }
    return row
