"""A decode step against the device's memory bandwidth: a model's sizes with random weights, full
rows, on whatever JAX runs on.

    python benchmarks/decode_limit.py [--config configs/qwen3_1.7b.yaml] [--rows 64 16] [--context 8192 2048] [--dtype bfloat16]
                                      [--steps 32] [--runs 5]

The decoder's own program (`inference.state.advance`, which also samples and reads the joint) steps
`--rows` rows of a pool of as many. Each row holds nearly `--context` tokens. Medians over runs
of `--steps` steps.

The limit is what the step must read, the weights and the cache of these rows once, at the bandwidth
measured here.
"""  # noqa: E501

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import dataclasses
import itertools
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from machine import bandwidth, description, timed
from zip_rc_jax.aot.model_sizes import with_model
from zip_rc_jax.config.files import load_config
from zip_rc_jax.inference.memory import shard_bytes
from zip_rc_jax.inference.prepared import transformer_network
from zip_rc_jax.inference.sampler import Filters, Sampling
from zip_rc_jax.inference.state import DecodeSpec, PoolSizes, StepInputs, advance, empty_pool
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.paged_cache import pages_of

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "qwen3_1.7b.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=CONFIG,
        help="YAML file with a model section or a policy on this machine",
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 2048])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    config = with_model(load_config(arguments.config, []), arguments.config)
    # not used: random tokens are as long to compute as real ones
    tokenizer = load("embedded:chain_sum_zip").tokenizer
    lm = LanguageModel.create(config.model, tokenizer, 0)
    lm = dataclasses.replace(
        lm, params=jax.tree.map(lambda x: x.astype(arguments.dtype), lm.params)
    )
    lm = lm.with_head(config.grid.grid("value"), "value")
    network, params = transformer_network(lm)
    assert lm.head is not None
    settings = DecodeSpec(
        network,
        lm.head,
        lm.config.vocab_size,
        Filters.of([config.decode.sampling]),
        config.decode.window,
    )
    read = [
        params["table"],
        {name: x for name, x in params["body"].items() if name not in ("embed", "unembed")},
    ]
    weights = shard_bytes(read)
    rate = bandwidth()
    print(
        f"{description()}; {arguments.dtype}, {lm.config.n_layers} layers, d_model "
        f"{lm.config.d_model}; ",
        end="",
    )
    print(
        f"{rate / 1e9:.0f} GB/s read; {arguments.steps} steps, medians of {arguments.runs} runs\n"
    )
    print(
        "| rows | context | ms per step | tokens/s | limit, tokens/s | of the limit | first "
        "call, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for rows, context in itertools.product(arguments.rows, arguments.context):
        pages = pages_of(context, network.page) if network.page else 1
        pool = empty_pool(settings, PoolSizes(rows, context, rows * pages))
        length = jnp.full_like(pool.length, context - arguments.steps - 1)
        prompt = jnp.full_like(pool.prompt_length, 1)
        cache_bytes = shard_bytes(pool.cache) * (context - arguments.steps // 2) // context
        sampling = jax.tree.map(jnp.asarray, Sampling.stack([config.decode.sampling] * rows))
        key = np.tile(np.asarray(jax.random.key_data(jax.random.key(0))), (rows, 1))
        never = np.full(rows, 2**30)
        lanes = jax.tree.map(
            lambda x: jnp.asarray(x)[None],
            StepInputs(
                slot=np.arange(rows),
                table=np.arange(rows * pages).reshape(rows, pages) if network.page else None,
                active=np.ones(rows, bool),
                key=key,
                prompt_hash=np.zeros(rows, np.uint32),
                branch=np.arange(rows),
                quota=never,
                max_tokens=never,
                stop_ids=np.full((rows, 4), -1),
                sampling=sampling,
            ),
        )
        state = [
            dataclasses.replace(
                pool, length=length, prompt_length=prompt, done=jnp.zeros_like(pool.done)
            )
        ]
        del pool

        def step(
            state: list[Any] = state,
            lanes: StepInputs = lanes,
            length: jax.Array = length,
            context: int = context,
        ) -> Any:
            # the pool is given away, so nothing else may hold it
            before = dataclasses.replace(state.pop(), length=jnp.copy(length))
            after, stepped = advance(
                settings, params, before, lanes, jnp.int32(arguments.steps), context
            )
            state.append(after)
            return stepped

        first = timed(step)
        median = statistics.median(timed(step) for _ in range(arguments.runs)) / arguments.steps
        best = rows * rate / (weights + cache_bytes)
        print(
            f"| {rows} | {context} | {1e3 * median:.2f} | {rows / median:.0f} | {best:.0f} | "
            f"{rows / median / best:.0%} | {first:.1f} |",
            flush=True,
        )
        state.clear()


if __name__ == "__main__":
    main()
