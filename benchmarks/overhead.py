"""What the head and the decisions cost: SmolLM2-135M float32, 64 rows, against plain sampling of
the same rows.

    python benchmarks/overhead.py [--rows 64] [--interval 16] [--runs 9]

The same model, cache and sampler in three loops of `--interval` decode steps, which take turns
within every run, so a busy machine slows all of them alike, on the same arrays, as where a cache
lies in memory makes a difference of several percent; medians of the runs, and of the ratios within
a run. Freed memory stays in the process (`runtime.malloc`):
- plain: a jitted loop that draws tokens and feeds them, and knows nothing of a head;
- head: the decoder's own program, which also reads the joint after every token, averages it, and
  looks for stop ids and faults;
- decisions: the same, and then one decision for 8 prompts of 8 prefixes: joints to the host,
  utilities, the choice.
Needs `make smollm2`.
"""

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from machine import description
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import policy_logits
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.sampler import Sampling, row_keys, sample
from zip_rc_jax.inference.state import (
    DecodeSpec,
    DecodeState,
    PoolSizes,
    StepInputs,
    advance,
    empty_pool,
)
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.paged_cache import pages_of
from zip_rc_jax.search.meta_actions import choose_meta_action

MODEL = pathlib.Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, SLOTS = 30, 96


@functools.partial(
    jax.jit, static_argnames=("settings", "rows"), donate_argnames=("cache", "logits")
)
def plain(
    settings: DecodeSpec,
    params: Any,
    cache: Any,
    logits: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    steps: jax.Array,
    rows: int,
) -> Any:
    """Draws and feeds `steps` tokens per row; returns logits, cache and the tokens `[rows,
    SLOTS]`."""
    numbers, live = jnp.arange(rows), jnp.ones(rows, bool)

    def body(i: jax.Array, carry: Any) -> Any:
        logits, cache, tokens = carry
        position = jnp.full(rows, PROMPT) + i
        keys = row_keys(key, jnp.zeros(rows, jnp.uint32), numbers, position)
        drawn = sample(keys, policy_logits(logits, settings.head), sampling, settings.filters)
        logits, cache = settings.network.logits(
            params,
            drawn[:, None],
            position[:, None],
            jnp.zeros(rows, jnp.int32),
            live,
            cache,
            SLOTS,
        )
        return logits, cache, tokens.at[numbers, position].set(drawn)

    return jax.lax.fori_loop(0, steps, body, (logits, cache, jnp.zeros((rows, SLOTS), jnp.int32)))


def pages(settings: DecodeSpec) -> int:
    """Of a row."""
    return pages_of(SLOTS, settings.network.page) if settings.network.page else 1


def lane_table(settings: DecodeSpec, rows: int) -> np.ndarray | None:
    """Every row has pages of its own; None where a page is a row."""
    count = rows * pages(settings)
    return np.arange(count).reshape(rows, -1) if settings.network.page else None


def started(engine: Engine, rows: int) -> DecodeState:
    """A pool whose rows all hold a prompt of zeros."""
    pool = empty_pool(engine.settings, PoolSizes(rows, SLOTS, rows * pages(engine.settings)))
    full = jnp.full_like(pool.length, PROMPT)
    return dataclasses.replace(
        pool, length=full, prompt_length=full, done=jnp.zeros_like(pool.done)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--interval", type=int, default=16)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    rows, steps = arguments.rows, arguments.interval
    config = DecodeConfig(n=8, max_num_seqs=rows, interval=steps, window=8)
    engine = Engine(load(MODEL).with_head(Grid.authors("value"), "value"), config, 0)
    settings, params, grid = engine.settings, engine.params, engine.head.grid
    sampling = jax.tree.map(jnp.asarray, Sampling.stack([engine.config.sampling] * rows))
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    inputs = StepInputs(
        slot=np.arange(rows),
        table=lane_table(settings, rows),
        active=np.ones(rows, bool),
        key=np.tile(key, (rows, 1)),
        prompt_hash=np.zeros(rows, np.uint32),
        branch=np.arange(rows),
        quota=np.full(rows, 10**6),
        max_tokens=np.full(rows, 10**6),
        stop_ids=np.full((rows, 4), -1, np.int32),
        sampling=sampling,
    )
    lanes = jax.tree.map(lambda x: jnp.asarray(x)[None], inputs)
    state = [started(engine, rows)]  # one, as every loop takes it away and leaves it

    def run_plain() -> None:
        pool = state.pop()
        logits, cache, tokens = plain(
            settings,
            params,
            pool.cache.lanes(lanes.slot, lanes.table),
            pool.logits[0, :rows],
            jax.random.key(0),
            sampling,
            jnp.int32(steps),
            rows,
        )
        cache = pool.cache.with_lanes(cache, lanes.slot)
        state.append(dataclasses.replace(pool, cache=cache))
        jax.block_until_ready((logits, tokens))

    def run_head() -> Any:
        pool = state.pop()
        pool = dataclasses.replace(pool, length=jnp.full_like(pool.length, PROMPT))
        pool, stepped = advance(settings, params, pool, lanes, jnp.int32(steps), SLOTS)
        state.append(pool)
        return jax.block_until_ready(stepped)

    def run_decisions() -> None:
        stepped = run_head()
        joint = np.asarray(stepped.joint).reshape(rows // 8, 8, grid.n_reward, grid.n_length)
        tokens = np.asarray(stepped.length).reshape(rows // 8, 8) - PROMPT
        choice = choose_meta_action(
            joint, np.ones(tokens.shape, bool), tokens, grid=grid, config=engine.config
        )
        np.asarray(choice.multiplicity)

    loops = {"plain": run_plain, "head": run_head, "decisions": run_decisions}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for run in range(arguments.runs + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if run:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{description()}; {rows} rows, {steps} steps per loop, medians of {arguments.runs} runs\n"
    )
    print("| | ms per step | tokens/s | against plain |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(t / p for t, p in zip(times, seconds["plain"], strict=True))
        median = statistics.median(times)
        print(
            f"| {name} | {1e3 * median / steps:.1f} | {rows * steps / median:.0f} | "
            f"{ratio - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
