"""Do saved tokens become saved seconds?

Adaptive decoding against fixed best-of-n in the same engine, over a queue of held-out problems.

    python benchmarks/adaptive.py [--config FILE] [--model PATH] [--prompts 240] [--alphas 1 0.1] [--betas 0.1 0.05 0.02]
                                  [--runs 3]

Without options: the embedded demo model and its tasks, at the price of compute (alpha 1, as a long
  queue takes as long as its tokens) and
at the config's alpha. The engines take turns within every run, so a busy machine slows all of them
alike; medians over runs, after one run that compiles. Freed memory stays in the process
(`runtime.malloc`). `serial steps` is the mean number of decode steps that a prompt waited for.
Accuracy is that of the answer by vote and of the one by value, which come from the same prefixes.
The last lines name, for each of the two, the cheapest adaptive setting that reaches best-of-n with
the same rule, and its share of best-of-n's seconds.
"""  # noqa: E501

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import dataclasses
import itertools
import pathlib
import statistics
import time

import numpy as np

from machine import description
from zip_rc_jax.config import DecodeConfig, PipelineConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.problems import Problem, problem_set
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.grading.grader import Grader, correct
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.io.load import load

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """Means over prompts: accuracy in [0, 1] of each rule, tokens, serial steps; and seconds for
    all prompts together."""

    name: str
    accuracy: dict[str, float]
    tokens: float
    steps: float
    seconds: float


def engines(
    config: PipelineConfig, model: str, alphas: list[float], betas: list[float]
) -> dict[str, Engine]:
    lm = load(model)
    fixed = dataclasses.replace(config.decode, strategy="fixed")
    found: dict[str, DecodeConfig] = {f"best of {config.decode.n}": fixed}
    for alpha, beta in itertools.product(alphas, betas):
        adaptive = dataclasses.replace(config.decode, strategy="zip_rc", alpha=alpha, beta=beta)
        found[f"adaptive, alpha {alpha:g}, beta {beta:g}"] = adaptive
    return {name: Engine(lm, decode, config.evaluate.seed) for name, decode in found.items()}


def measure(
    found: list[Problem], config: PipelineConfig, engines: dict[str, Engine], runs: int
) -> list[Row]:
    """Row 0 is best-of-n."""
    texts = prompt_texts(found, config, next(iter(engines.values())).lm.tokenizer)
    results: dict[str, list[Result]] = {
        name: run_all(engine, texts, name) for name, engine in engines.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for run in range(runs):
        for name, engine in engines.items():
            started = time.perf_counter()
            run_all(engine, texts, f"{name}, timed run {run + 1}")
            seconds[name].append(time.perf_counter() - started)
    rows = []
    with Grader() as grader:
        for name, answers in results.items():
            texts_of = {
                "vote": [r.vote_text for r in answers],
                "value": [r.value_text for r in answers],
            }
            scores = {
                rule: grader.grade_many(zip(found, said, strict=True))
                for rule, said in texts_of.items()
            }
            rows.append(
                Row(
                    name,
                    {
                        rule: float(np.mean([correct(s) for s in graded]))
                        for rule, graded in scores.items()
                    },
                    float(np.mean([r.usage.tokens for r in answers])),
                    float(np.mean([r.usage.serial_steps for r in answers])),
                    statistics.median(seconds[name]),
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default=str(ROOT / "zip_rc_jax" / "assets" / "chain_sum_demo.yaml")
    )
    parser.add_argument("--model", default="embedded:chain_sum_zip")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--alphas", type=float, nargs="+", default=[])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.05, 0.02])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    config = load_config(arguments.config, [])
    found = problem_set(config.problems, "heldout", arguments.prompts).problems
    alphas = arguments.alphas or list(dict.fromkeys([1.0, config.decode.alpha]))
    rows = measure(
        found, config, engines(config, arguments.model, alphas, arguments.betas), arguments.runs
    )
    best = rows[0]
    print(f"\n{description()}; {len(found)} prompts, medians of {arguments.runs} runs\n")
    print(
        "| | accuracy by vote | by value | tokens | serial steps | seconds | seconds / best of n |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        by_rule = " | ".join(f"{a:.3f}" for a in row.accuracy.values())
        share = row.seconds / best.seconds
        print(
            f"| {row.name} | {by_rule} | {row.tokens:.0f} | {row.steps:.0f} | {row.seconds:.2f} | "
            f"{share:.2f} |"
        )
    for rule, accuracy in best.accuracy.items():
        reached = [row for row in rows[1:] if row.accuracy[rule] >= accuracy]
        if reached:
            row = min(reached, key=lambda r: r.seconds)
            share = row.seconds / best.seconds
            print(
                f"\nby {rule}, {row.name} reaches the accuracy of {best.name} in {share:.2f} of "
                "its seconds"
            )
        else:
            print(f"\nby {rule}, no adaptive setting reaches the accuracy of {best.name}")


if __name__ == "__main__":
    main()
