"""Decode throughput on SmolLM2-135M float32, side by side in one run: ours, `transformers` on the
same cores, and the machine's own limit.

    python benchmarks/decode.py [--prompts 8] [--tokens 64] [--runs 3]

Plain sampling (temperature 1) of `--prompts` prompts with 8 samples and with 1, `--tokens` new
tokens each, end-of-sequence disabled, so that every engine does the same work. The engines take
turns within every run, so a busy machine slows all of them alike; medians over runs. Freed memory
stays in the process (`runtime.malloc`), which they share.

The limit of a decode step is the slower of its multiply-adds at the matmul rate measured here and
of its bytes (weights and cache, read once) at the bandwidth measured here. The last column is how
near to it a decoder would come that did nothing but the step's products with the weights, in the
same program form. Needs `make smollm2` and the dev extra (torch).
"""

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from machine import bandwidth, description, matmul_rate, timed
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.inference.prepared import transformer_network
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.stacks import KERNELS
from zip_rc_jax.models.transformer import logits, project_output_major

MODEL = pathlib.Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = (
    "the sea",
    "prime numbers",
    "a lost key",
    "winter",
    "bread",
    "the moon",
    "trains",
    "an old map",
    "rain",
    "chess",
    "glass",
    "honey",
)


def limit(lm: LanguageModel, rows: int, context: int) -> float:
    """Tokens per second of `rows` rows that no decoder on this machine can exceed."""
    c = lm.config
    weights = sum(x.size for x in jax.tree.leaves(lm.params["body"]))
    cache = rows * context * c.n_layers * c.n_kv_heads * c.head_dim * 2
    flops = 2 * rows * weights + 4 * rows * context * c.n_layers * c.n_heads * c.head_dim
    return rows / max(flops / matmul_rate(max(rows, 8)), 4 * (weights + cache) / bandwidth())


def products_alone(lm: LanguageModel, rows: int, runs: int) -> float:
    """Tokens per second of a decoder that only multiplies one hidden state a row with every weight
    of the model, one after the other."""
    _, params = transformer_network(lm)
    blocks = params["body"]["blocks"].values()
    kernels = [
        x.reshape(*x.shape[1 : x.ndim - inputs], -1)
        for b in blocks
        for name, x in b.items()
        if (inputs := KERNELS.get(name, 0))
    ]

    @jax.jit
    def step(hidden: jax.Array, kernels: list[jax.Array], table: jax.Array) -> jax.Array:
        done = jnp.float32(0)
        for kernel in kernels:
            width = kernel.shape[-1]
            # What comes in depends on the product before, so that no two run at the same time.
            out = project_output_major(hidden[:, None, :width] + done, kernel)
            done = 1e-30 * out.ravel()[0]
        return logits(lm.config, hidden[:, : lm.config.d_model] + done, table)

    hidden, table = jnp.ones((rows, max(k.shape[-1] for k in kernels))), params["table"]
    step(hidden, kernels, table).block_until_ready()
    return rows / statistics.median(
        timed(lambda: step(hidden, kernels, table)) for _ in range(max(runs, 3))
    )


class Ours:
    """Our engine with the strategy that samples `n` continuations to the end."""

    def __init__(self, lm: LanguageModel, samples: int, tokens: int, rows: int):
        config = DecodeConfig(
            strategy="fixed",
            n=samples,
            max_num_seqs=rows,
            interval=tokens,
            window=1,
            max_tokens=tokens,
        )
        self.engine = Engine(lm, config, 0)
        self.engine.eos_ids = ()  # every sample has all its tokens

    def __call__(self, prompts: list[str]) -> None:
        run_all(self.engine, prompts)


class Transformers:
    """`generate` of torch on the same cores."""

    def __init__(self, directory: pathlib.Path, samples: int, tokens: int):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.options = {
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": True,
            "top_k": 0,
            "num_return_sequences": samples,
        }

    def __call__(self, prompts: list[str]) -> None:
        batch = self.tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        with torch.inference_mode():
            self.model.generate(**batch, **self.options, pad_token_id=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    lm = load(MODEL).with_head(Grid.authors("value"), "value")
    prompts = [
        lm.tokenizer.chat([{"role": "user", "content": f"Write a story about {topic}."}])
        for topic in TOPICS[: arguments.prompts]
    ]
    context = len(lm.tokenizer.encode(prompts[0])) + arguments.tokens
    print(
        f"{description()}; {len(prompts)} prompts, {arguments.tokens} new tokens, medians of "
        f"{arguments.runs} runs\n"
    )
    print(
        "| rows | ours, tokens/s | first call, s | transformers, tokens/s | ratio | limit, "
        "tokens/s | of the limit | products alone |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model"
        export(lm.without_head(), path, dtype=np.float32)
        for samples in (8, 1):
            rows = len(prompts) * samples
            ours, theirs = (
                Ours(lm, samples, arguments.tokens, rows),
                Transformers(path, samples, arguments.tokens),
            )
            first = timed(lambda ours=ours: ours(prompts))
            theirs(prompts)
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(arguments.runs):
                seconds["ours"].append(timed(lambda ours=ours: ours(prompts)))
                seconds["theirs"].append(timed(lambda theirs=theirs: theirs(prompts)))
            rate = {
                name: rows * arguments.tokens / statistics.median(times)
                for name, times in seconds.items()
            }
            best = limit(lm, rows, context)
            print(
                f"| {rows} | {rate['ours']:.0f} | {first:.1f} | {rate['theirs']:.0f} | "
                f"{rate['ours'] / rate['theirs']:.2f} "
                f"| {best:.0f} | {rate['ours'] / best:.0%} | "
                f"{products_alone(lm, rows, arguments.runs) / best:.0%} |"
            )


if __name__ == "__main__":
    main()
