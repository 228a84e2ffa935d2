"""What shared evidence is worth: the published search, and the same with `evidence="answers"`.

    zip-rc replay CONFIG evaluate.prompts=2000 replay.samples=8
    python benchmarks/evidence.py RUN_DIR/pool [--skip 480] [--wrong-answers 5] [--n 8]

Every third problem of the pool chooses, and the others are reported. For every alpha, and every
beta of the published search, a beta of the other search is chosen: once the dearest one that spends
no more, and once the cheapest one that is as often right. Reported are accuracy and GenCost of
both, the difference in accuracy, and the ratio of the costs. Intervals are 95%, from a paired
bootstrap over problems.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.data.sample_pool import PoolFiles
from zip_rc_jax.evaluation.metrics import paired_bootstrap
from zip_rc_jax.evaluation.replay import ReplayPool, load_pool, replay

ALPHAS = (0.1, 1.0)
BETAS = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
Curve = dict[tuple[float, float], tuple[np.ndarray, np.ndarray]]


def curve(pool: ReplayPool, config: DecodeConfig, problems: np.ndarray) -> Curve:
    """By (alpha, beta): reward and GenCost of every one of `problems`."""
    prices = [(alpha, beta) for alpha in ALPHAS for beta in BETAS]
    found = {}
    for price, result in zip(prices, replay(pool, config, members(config), prices), strict=True):
        alpha, unit = price[0], pool.mean_length
        right = result.correct_by_vote if config.answer == "vote" else result.correct_by_value
        cost = alpha * result.tokens[:, 0] + (1 - alpha) * result.serial_steps[:, 0]
        found[price] = right[problems, 0], (cost / unit)[problems]
    return found


def members(config: DecodeConfig) -> np.ndarray:
    """The samples that an online decode draws."""
    return np.arange(config.n)[None]


def chosen(published: Curve, other: Curve, alpha: float, beta: float, equal_cost: bool) -> float:
    """The beta of the other search that compares with the published one; NaN if there is none."""
    right, cost = (x.mean() for x in published[alpha, beta])
    fitting = {
        b: (r.mean(), c.mean())
        for (a, b), (r, c) in other.items()
        if a == alpha and (c.mean() <= cost if equal_cost else r.mean() >= right)
    }
    if not fitting:
        return float("nan")
    return (max if equal_cost else min)(fitting, key=lambda b: fitting[b][1])


def ratio_interval(cost: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, ...]:
    """Ratio of mean costs, and its 95% interval."""
    draws = np.random.default_rng(seed).integers(0, len(cost), (2000, len(cost)))
    ratios = other[draws].mean(1) / cost[draws].mean(1)
    return (other.mean() / cost.mean(), *np.quantile(ratios, (0.025, 0.975)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pool", type=pathlib.Path)
    parser.add_argument("--skip", type=int, default=0, help="problems that were looked at before")
    parser.add_argument("--wrong-answers", nargs="+", type=float, default=[5.0])
    parser.add_argument("--n", type=int, default=8)
    options = parser.parse_args()
    files = PoolFiles(options.pool)
    pool, about = load_pool(files), files.metadata
    base = DecodeConfig(
        n=options.n,
        interval=about["stride"],
        window=about["window"],
        max_tokens=pool.max_tokens,
        answer="vote",
    )
    number = np.arange(options.skip, pool.n_prompts)
    parts = number[number % 3 == 0], number[number % 3 != 0]
    published = [curve(pool, base, part) for part in parts]
    print(f"{len(parts[0])} problems choose, {len(parts[1])} are reported")
    for wrong in options.wrong_answers:
        config = dataclasses.replace(base, evidence="answers", wrong_answers=wrong)
        answers = [curve(pool, config, part) for part in parts]
        for equal_cost in (True, False):
            rule = "no dearer" if equal_cost else "as often right"
            print(f"\nwrong_answers={wrong:g}, the beta of shared evidence that is {rule}")
            print("alpha  beta accuracy GenCost | beta accuracy GenCost | difference | cost ratio")
            for alpha, beta in published[0]:
                b = chosen(published[0], answers[0], alpha, beta, equal_cost)
                (right, cost), no = published[1][alpha, beta], np.isnan(b)
                row = f"{alpha:5g} {beta:5g} {100 * right.mean():8.1f} {cost.mean():7.2f} |"
                print(row, "none" if no else compared(right, cost, *answers[1][alpha, b], b))


def compared(right: np.ndarray, cost: np.ndarray, r: np.ndarray, c: np.ndarray, beta: float) -> str:
    """One row of the other search: reward `r` and cost `c` [P] at `beta`."""
    d = [100 * x for x in paired_bootstrap(r - right)]
    q = ratio_interval(cost, c)
    return (
        f"{beta:5g} {100 * r.mean():7.1f} {c.mean():7.2f} | {d[0]:+.1f} [{d[1]:+.1f}, {d[2]:+.1f}]"
        f" | {q[0]:.2f} [{q[1]:.2f}, {q[2]:.2f}]"
    )


if __name__ == "__main__":
    main()
