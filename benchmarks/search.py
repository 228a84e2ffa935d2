"""Cost of one decision of the search: 64 prompts of 8 prefixes, jitted against the loops of the
written reference.

    python benchmarks/search.py [--prompts 64] [--prefixes 8] [--runs 31]

Prints microseconds per prompt. The variants take turns within every run, so a busy machine slows
all of them alike; medians over runs. Inputs are numpy arrays on the host, so the times hold the
transfer and the dispatch. Freed memory stays in the process (`runtime.malloc`). The reference is
timed on two prompts (published: the whole search with the no-harm pass; exhaustive: all subsets;
branching has no reference that ends in reasonable time).
"""

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import functools
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from machine import description, timed
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.search.meta_actions import choose_meta_action

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from harness import reference_search as reference

ALPHA, BETA = 0.1, 0.05


def groups(
    prompts: int, slots: int, grid: Grid, branching: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Joint, unfinished, tokens so far; and which slots exist.

    When branching: half the slots taken, the last one is the root.
    """
    rng = np.random.default_rng(0)
    joint = rng.dirichlet(np.full(grid.n_cells, 0.3), (prompts, slots)).reshape(
        prompts, slots, grid.n_reward, grid.n_length
    )
    unfinished = rng.random((prompts, slots)) < 0.75
    tokens = rng.integers(0, 4000, (prompts, slots))
    exists = np.ones((prompts, slots), bool)
    if branching:
        exists[:, slots // 2 : -1] = False
        unfinished[:, -1], tokens[:, -1] = True, 0
    return [joint.astype(np.float32), unfinished, tokens], exists


def reference_seconds(name: str, arrays: list[np.ndarray], grid: Grid, prompts: int = 2) -> float:
    """Seconds per prompt of the written search."""
    start = time.perf_counter()
    for joint, unfinished, tokens in zip(*(a[:prompts] for a in arrays), strict=True):
        options = {
            "alpha": ALPHA,
            "beta": BETA,
            "scale": reference.normaliser(joint, tokens, grid.length_edges),
            "centres": grid.reward_centres,
            "edges": grid.length_edges,
        }
        if name == "published":
            keep, future_bin, _ = reference.published(joint, unfinished, **options)
            reference.no_harm(joint, unfinished, keep, future_bin, **options)
        else:
            reference.exhaustive(joint, unfinished, **options)
    return (time.perf_counter() - start) / prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=31)
    args = parser.parse_args()

    calls, references = {}, {}
    for label in ("correct", "value"):
        grid = Grid.authors(label)
        for name in ("published", "exhaustive", "branching"):
            branching = name == "branching"
            arrays, exists = groups(args.prompts, args.prefixes + branching, grid, branching)
            config = DecodeConfig(alpha=ALPHA, beta=BETA, n=args.prefixes, candidates=name)
            call = functools.partial(
                choose_meta_action, *arrays, grid=grid, config=config, exists=exists
            )
            calls[label, name] = lambda call=call: jax.block_until_ready(call())
            references[label, name] = None if branching else reference_seconds(name, arrays, grid)

    compiling = {key: timed(call) for key, call in calls.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(args.runs):
        for key, call in calls.items():
            seconds[key].append(timed(call))

    print(
        f"{args.prompts} prompts x {args.prefixes} prefixes, float32, {description()}, median of "
        f"{args.runs} runs"
    )
    print(
        f"{'grid':<10}{'candidates':<13}{'us/prompt':>10}{'fastest':>10}{'reference':>12}{'ratio':>9}{'first call s':>14}"  # noqa: E501
    )
    for (label, name), runs in seconds.items():
        median, fastest = (f(runs) / args.prompts * 1e6 for f in (statistics.median, min))
        slow = references[label, name]
        compared = (
            f"{slow * 1e6:>12.0f}{slow * 1e6 / median:>9.0f}" if slow else f"{'-':>12}{'-':>9}"
        )
        print(
            f"{label:<10}{name:<13}{median:>10.1f}{fastest:>10.1f}{compared}{compiling[label, name]:>14.1f}"  # noqa: E501
        )


if __name__ == "__main__":
    main()
