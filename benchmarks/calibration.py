"""How often a guarantee fails, and what it costs: many calibrations of one population of problems.

    zip-rc replay configs/chain_sum.yaml run_dir=RUN_DIR evaluate.prompts=2000 replay.samples=8
    python benchmarks/calibration.py RUN_DIR/pool [--runs 200] [--problems 300 1000]

Without a pool, a made-up population is calibrated. The problems of a pool are the population, so
every risk is known. A run draws `--problems` of them with replacement, and calibrates on these. A
promise fails where the true risk of the chosen setting exceeds it. Reported are the share of runs
that fail, beside epsilon, and of runs that choose nothing; then, over the runs that chose, the
mean true risk, the risk on fresh problems (those that were not drawn), the share answered,
accuracy and GenCost of what they chose, and the same of the decode without a promise (threshold
0, at beta 0.05 for errors and at the smallest beta for losses).
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.data.sample_pool import PoolFiles
from zip_rc_jax.evaluation.calibration import (
    BETAS,
    THRESHOLDS,
    Outcomes,
    Promise,
    Tested,
    chosen,
    full_samples,
    replayed_outcomes,
    try_settings,
)
from zip_rc_jax.evaluation.replay import load_pool
from zip_rc_jax.pipeline.calibrate import pool_options
from zip_rc_jax.runtime.errors import UsageError

BETA = 0.05  # of the promises about errors
HEADER = (
    "| promise | problems | failed % | epsilon % | chose nothing % | risk % | fresh risk % "
    "| answered % | accuracy % | GenCost | without: risk % | accuracy % | GenCost |"
)


def made_up(problems: int, seed: int) -> tuple[list[Outcomes], Outcomes]:
    """A population of easy and hard problems with noisy values; a dearer search is better."""
    rng = np.random.default_rng(seed)
    chance, noise = rng.choice([0.995, 0.6], problems, p=[0.8, 0.2]), rng.normal(0, 0.1, problems)
    value, luck = np.clip(chance + noise, 0, 1), rng.random(problems)

    def outcome(beta: float) -> Outcomes:
        correct = (luck < chance - 0.3 * beta) * 1.0
        cost = 1 + 0.6 / (1 + 10 * beta) + 0.1 * chance
        decode = DecodeConfig(beta=beta)
        return Outcomes(decode, *(x[:, None] for x in (correct, value, cost)))

    return [outcome(beta) for beta in BETAS], outcome(0.0)


def of_pool(path: pathlib.Path, n: int) -> tuple[list[Outcomes], Outcomes]:
    """All problems of a pool, at every beta and with full samples."""
    files = PoolFiles(path)
    decode = pool_options(files.metadata, {"n": n, "answer": "vote"})
    pool = load_pool(files)
    settings = [dataclasses.replace(decode, beta=beta) for beta in BETAS]
    return replayed_outcomes(pool, settings), full_samples(pool, decode)


def truth(promise: Promise, one: Outcomes, threshold: float, full: Outcomes) -> tuple[float, ...]:
    """Risk, share answered, accuracy and GenCost over the whole population."""
    answered = (one.value >= threshold) & np.isfinite(one.value)
    right = (answered * one.correct).mean()
    wrong = (answered * (1 - one.correct)).mean()
    risk = full.correct.mean() - right
    if promise.risk == "errors":
        risk = wrong / max(answered.mean(), 1e-300)
    return float(risk), float(answered.mean()), float(right), float(one.gen_cost.mean())


def calibrations(
    promise: Promise, prices: list[Outcomes], full: Outcomes, problems: int, runs: int, seed: int
) -> list[tuple[float, ...] | None]:
    """What each run chose, as `truth` says, with the risk on fresh problems in second place; None
    where it chose nothing."""
    rng, found = np.random.default_rng(seed), list[tuple[float, ...] | None]()
    errors = promise.risk == "errors"
    tested = [one for one in prices if one.decode.beta == BETA] if errors else prices
    thresholds = THRESHOLDS if errors else (0.0,)
    by_beta = {one.decode.beta: one for one in prices}
    for _ in range(runs):
        drawn = rng.integers(0, len(full.correct), problems)
        mine, reference = [one.part(drawn) for one in tested], full.part(drawn)
        settings: list[Tested] = try_settings(promise, mine, thresholds, reference, details=False)
        choice = chosen(promise, settings)
        if choice is None:
            found.append(None)
            continue
        one, threshold = by_beta[choice.decode.beta], choice.decode.abstain_below
        fresh = np.setdiff1d(np.arange(len(full.correct)), drawn)
        risk, *rest = truth(promise, one, threshold, full)
        unseen = truth(promise, one.part(fresh), threshold, full.part(fresh))[0]
        found.append((risk, unseen, *rest))
    return found


def row(promise: Promise, problems: int, found: list, without: tuple[float, ...]) -> str:
    """One line of the table."""
    chose = np.array([one for one in found if one is not None]).reshape(-1, 5)
    failed = (chose[:, 0] > promise.delta + 1e-12).sum() / len(found)
    means = [f"{x:.{digits}f}" for x, digits in zip(
        chose.mean(0) * (100, 100, 100, 100, 1), (1, 1, 1, 1, 2), strict=True
    )] if len(chose) else ["-"] * 5  # fmt: skip
    plain = f"{100 * without[0]:.1f} | {100 * without[2]:.1f} | {without[3]:.2f}"
    nothing = 100 * (1 - len(chose) / len(found))
    return (
        f"| {promise.risk} <= {100 * promise.delta:g}% | {problems} | {100 * failed:.1f} "
        f"| {100 * promise.epsilon:.1f} | {nothing:.1f} | {' | '.join(means)} | {plain} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pool", type=pathlib.Path, nargs="?")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--problems", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--error-rates", type=float, nargs="*", default=[0.02, 0.03, 0.05])
    parser.add_argument("--losses", type=float, nargs="*", default=[0.02, 0.05])
    parser.add_argument("--confidence", type=float, default=0.9)
    options = parser.parse_args()
    prices, full = of_pool(options.pool, options.n) if options.pool else made_up(2000, 0)
    epsilon = round(1 - options.confidence, 12)
    promises = [Promise("errors", delta, epsilon) for delta in options.error_rates]
    promises += [Promise("loss", delta, epsilon) for delta in options.losses]
    size = len(full.correct)
    print(f"{options.runs} calibrations of a population of {size} problems")
    print(f"{HEADER}\n|{'---|' * 13}")
    for promise in promises:
        first = next(one for one in prices if promise.risk == "loss" or one.decode.beta == BETA)
        without = truth(promise, first, 0.0, full)
        for problems in options.problems:
            try:
                found = calibrations(promise, prices, full, problems, options.runs, problems)
            except UsageError as error:
                print(f"{problems} problems are too few: {error}")
                continue
            print(row(promise, problems, found, without))


if __name__ == "__main__":
    main()
