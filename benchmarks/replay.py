"""Seconds and memory of a replay, on made-up joints: 500 problems x 64 samples.

    python benchmarks/replay.py [--prompts 500] [--samples 64] [--tokens 1024] [--stride 64] [--n 8]

A sample's length is log-normal about `--tokens`; its value drifts, and its joint narrows with what
is left. Every row replays one group of settings, each on `--subsets` subsets of `--n` samples, and
prints how many decodes that is, how many decisions they take, the seconds, and the peak memory of
the process so far. Then the bytes that a pool takes for 1,000 tokens, and how many answers change
when it stores joints in fewer bits.
"""

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import dataclasses
import resource
import sys
import time

import numpy as np

from machine import description
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.data.sample_pool import STORED, PoolSample, encode, packed
from zip_rc_jax.evaluation.baselines import baseline_point
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.method_curves import method_curves
from zip_rc_jax.evaluation.replay import Replayed, ReplayPool, replay
from zip_rc_jax.evaluation.subsets import choose_subsets, fixed_ns
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.tree import expectations

PRICES = [(alpha, beta) for alpha in (0.1, 1.0) for beta in (0.1, 0.05, 0.02, 0.01)]
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def synthetic_pool(prompts: int, samples: int, tokens: int, stride: int, seed: int) -> ReplayPool:
    """A pool in memory, with joints on the authors' 7 x 8 grid."""
    rng, grid = np.random.default_rng(seed), Grid.authors("value")
    shape = (prompts, samples)
    most = 8 * tokens
    hard = rng.normal(0, 0.4, (prompts, 1))
    length = np.clip(tokens * np.exp(hard + rng.normal(0, 0.4, shape)), 8, most).astype(np.int32)
    points = (length - 1) // stride
    first = np.concatenate([[0], np.cumsum(points.ravel())[:-1]]).reshape(shape)
    correct = (rng.random(shape) < 1 / (1 + np.exp(2 * hard))).astype(np.float64)
    final = np.clip(0.5 + 0.35 * (2 * correct - 1) + rng.normal(0, 0.15, shape), 0.02, 0.98)

    def joints(value: np.ndarray, left: np.ndarray, width: np.ndarray) -> np.ndarray:
        """`[..., C]`: reward near `value`, remaining length near `left` tokens."""
        centres = np.asarray(grid.reward_centres)
        reward = np.exp(-0.5 * ((centres - value[..., None]) / width[..., None]) ** 2) + 1e-4
        middle = np.log(np.asarray(grid.length_midpoints))
        near = np.exp(-0.5 * ((middle - np.log(left[..., None] + 64)) / 0.5) ** 2) + 1e-4
        table = reward[..., :, None] * near[..., None, :]
        flat = table.reshape(*table.shape[:-2], -1)
        return (flat / flat.sum(-1, keepdims=True)).astype(np.float32)

    who = np.repeat(np.arange(prompts * samples), points.ravel())
    after = stride * (np.arange(len(who)) - first.ravel()[who] + 1)
    share = after / length.ravel()[who]
    value = 0.5 + (final.ravel()[who] - 0.5) * share + rng.normal(0, 0.05, len(who))
    along = joints(value, length.ravel()[who] - after, 0.6 - 0.4 * share)
    end = joints(final, np.zeros(shape), np.full(shape, 0.1))
    rewards = [expectations(x, grid)[0] for x in end.reshape(-1, grid.n_cells)]
    answer = np.where(correct > 0, 0, rng.integers(1, 5, shape))
    return ReplayPool(
        grid=grid, stride=stride, window=512, max_tokens=most, stops=False, extractor="stated",
        equivalence="grader", length=length, computed=length, stopped=np.ones(shape, bool),
        correct=correct, value=np.reshape(rewards, shape), answer_id=answer,
        level=np.zeros(prompts, np.int64), texts={},
        root=joints(np.full(prompts, 0.5), np.full(prompts, tokens), np.full(prompts, 0.6)),
        end=end, joints=along, first=first.astype(np.int64), kind="float32",
    )  # fmt: skip


def peak_gib() -> float:
    """Largest memory of the process so far."""
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def bytes_per_thousand(kind: str, stride: int) -> tuple[float, float]:
    """Bytes of a sample for 1,000 tokens: of the joints, and in all, confidences included."""
    tokens, cells, rng = 1000 * stride, Grid.authors("value").n_cells, np.random.default_rng(0)
    some = packed(rng.dirichlet(np.ones(cells), (tokens - 1) // stride).astype(np.float32), kind)
    tail = packed(rng.dirichlet(np.ones(cells), -(-tokens // stride)).astype(np.float32), kind)
    numbers = np.zeros(tokens, np.float32)
    sample = PoolSample(
        0, 0, 0, 0, "", "", "", 0, True, True, 0.0, 0.0, tokens, np.zeros(tokens, np.int32),
        numbers, numbers, some[0], some, some[0], some, tail,
    )  # fmt: skip
    joints = 2 * some.nbytes + tail.nbytes + 2 * some[0].nbytes
    confidence = 4 * tokens  # in `readings.npz`
    return joints / stride, (len(encode(sample)) + confidence) / stride


def changed(found: list[Replayed], other: list[Replayed]) -> tuple[float, float]:
    """Share of decodes with another answer, and of those with another number of tokens."""
    answers = np.mean(
        [(a.by_value != b.by_value).mean() for a, b in zip(found, other, strict=True)]
    )
    tokens = np.mean([(a.tokens != b.tokens).mean() for a, b in zip(found, other, strict=True)])
    return float(answers), float(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--subsets", type=int, default=1)
    args = parser.parse_args()

    pool = synthetic_pool(args.prompts, args.samples, args.tokens, args.stride, 0)
    size = sum(x.nbytes for x in (pool.joints, pool.end, pool.root)) / 2**30
    print(f"{description()}")
    print(
        f"{args.prompts} problems x {args.samples} samples, {pool.length.sum():,} tokens, "
        f"joints of {size:.2f} GiB, n={args.n}, {args.subsets} subset(s)"
    )
    base = DecodeConfig(n=args.n, interval=args.stride, window=512, max_tokens=pool.max_tokens)
    members = choose_subsets(args.samples, args.n, args.subsets, 0).members[: args.subsets]
    print(f"\n{'replay':28} {'decodes':>9} {'decisions':>10} {'seconds':>8} {'peak GiB':>9}")

    def row(name: str, decodes: int, decisions: int, seconds: float) -> None:
        print(f"{name:28} {decodes:9,} {decisions:10,} {seconds:8.2f} {peak_gib():9.2f}")

    def timed(name: str, settings: list[DecodeConfig], prices: list | None = None) -> list:
        start = time.perf_counter()
        found = [x for setting in settings for x in replay(pool, setting, members, prices)]
        seconds = time.perf_counter() - start
        decodes = sum(x.tokens.size for x in found)
        # A decode decides once at the root, and after every interval.
        decisions = sum(int((-(-x.lengths.max(-1) // args.stride) + 1).sum()) for x in found)
        row(name, decodes, decisions, seconds)
        return found

    replay(dataclasses.replace(pool), base, members[:1, :])  # compiles
    searched = timed("search, published, 8 prices", [base], PRICES)
    every = dataclasses.replace(base, candidates="exhaustive")
    if args.n <= 8:
        timed("search, exhaustive, 8 prices", [every], PRICES)
    curve = {"strategy": "reward_threshold"}
    timed(
        f"reward threshold, {len(THRESHOLDS)} points",
        [dataclasses.replace(base, **curve, reward_threshold=x) for x in THRESHOLDS],
    )
    quantiles = np.quantile(pool.length, (0.1, 0.25, 0.5, 0.75, 0.9)).astype(int)
    budgets = [
        dataclasses.replace(base, strategy="length_budget", length_budget=int(x)) for x in quantiles
    ]
    timed("length budget, 5 points", budgets)
    timed("half finished", [dataclasses.replace(base, strategy="half_finished")])
    start = time.perf_counter()
    ns, samples = fixed_ns(args.samples), pool.samples()
    for method in ("majority", "weighted_best_of_n", "best_of_n", "pass"):
        for n in ns:
            baseline_point(samples, method, n, Draws(200, 200))
    row("fixed n, 4 methods", 4 * len(ns) * args.prompts, 0, time.perf_counter() - start)
    start = time.perf_counter()
    curves = method_curves(samples, interval=args.stride, draws=Draws(200, 200))
    points = sum(map(len, curves.values()))
    name = f"other baselines, {len(curves)} methods"
    row(name, points * args.prompts, 0, time.perf_counter() - start)

    names = ("joints", "bytes", "with the rest", "answers changed", "tokens changed")
    print(f"\n{names[0]:10} {names[1]:>8} {names[2]:>14} {names[3]:>16} {names[4]:>15}")
    for kind in STORED:
        less = dataclasses.replace(
            pool, kind=kind, joints=packed(pool.joints, kind), end=packed(pool.end, kind)
        )
        answers, tokens = changed(searched, replay(less, base, members, PRICES))
        joints, whole = bytes_per_thousand(kind, args.stride)
        print(f"{kind:10} {joints:8,.0f} {whole:14,.0f} {answers:16.2%} {tokens:15.2%}")


if __name__ == "__main__":
    main()
