"""Decode throughput against the sampler of `google-tunix`, side by side in one run: SmolLM2-135M's
sizes, random weights, float32.

    python benchmarks/against_tunix.py [--prompts 8] [--samples 8 1] [--tokens 64] [--runs 3]

Plain sampling (temperature 1) of `--prompts` prompts with `--samples` samples each, `--tokens` new
tokens per sample, from text to text. Both engines have the same weights and end-of-sequence
disabled, and must continue the prompts with the same tokens at temperature 0, or nothing is timed.
They take turns within every run, so a busy machine slows both alike; medians over runs. Freed
memory stays in the process (`runtime.malloc`), which they share. tunix gets what suits it best:
prompts padded to the longest and no further, and a cache of exactly the slots that are used. Its
sampler takes a prompt once per sample, as its own GRPO rollouts do, and so prefills it as often;
ours prefills it once.

tunix declares an older `safetensors` than our `transformers` needs, but works with the newer one.
So it goes first into an environment of its own, and pip's warning about `safetensors` is expected:

    python -m venv tunix-env && tunix-env/bin/pip install google-tunix==0.1.7 && tunix-env/bin/pip install -e '.[dev]'
    tunix-env/bin/python benchmarks/against_tunix.py

Needs `make smollm2`, for sizes and tokenizer.
"""  # noqa: E501

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import dataclasses
import pathlib
import statistics
import tempfile

import jax.numpy as jnp
import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors

from decode import MODEL, TOPICS, Ours
from machine import description, timed
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.api import decode
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.language_model import LanguageModel

ROPE_THETA = 1e6  # tunix's Llama applies this one, whatever its config says
NEVER = [-1]  # no id ends a sample
CHECKED = 8  # tokens that both must agree on


@dataclasses.dataclass(frozen=True)
class TokenizerOfTunix:
    """Our tokenizer with the methods that tunix calls."""

    tokenizer: Tokenizer
    padding: int

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def bos_id(self) -> None:
        """None: nothing is put before a prompt."""

    def eos_id(self) -> int:
        return self.padding

    def pad_id(self) -> int:
        return self.padding


class Tunix:
    """tunix's sampler, each prompt as often as it has samples."""

    def __init__(self, directory: pathlib.Path, lm: LanguageModel, prompts: list[str], tokens: int):
        c = lm.config
        config = ModelConfig(
            num_layers=c.n_layers,
            vocab_size=lm.tokenizer.size,
            embed_dim=c.d_model,
            hidden_dim=c.d_ff,
            num_heads=c.n_heads,
            head_dim=c.head_dim,
            num_kv_heads=c.n_kv_heads,
            rope_theta=int(c.rope_theta),
            norm_eps=c.rms_eps,
            weight_tying=c.tied,
        )
        ids = [lm.tokenizer.encode(prompt) for prompt in prompts]
        padding = next(
            i for i in range(lm.tokenizer.size) if not any(i in prompt for prompt in ids)
        )
        self.longest, self.tokens = max(map(len, ids)), tokens
        self.sampler = Sampler(
            create_model_from_safe_tensors(str(directory), config, dtype=jnp.float32),
            TokenizerOfTunix(lm.tokenizer, padding),
            CacheConfig(self.longest + tokens, c.n_layers, c.n_kv_heads, c.head_dim),
        )

    def greedy(self, prompts: list[str]) -> list[tuple[int, ...]]:
        """The likeliest `CHECKED` tokens of each prompt."""
        found = self.sampler(prompts, CHECKED, self.longest, eos_tokens=NEVER)
        return [tuple(np.asarray(ids).tolist()) for ids in found.tokens]

    def __call__(self, prompts: list[str], samples: int) -> None:
        rows = [prompt for prompt in prompts for _ in range(samples)]
        self.sampler(
            rows, self.tokens, self.longest, eos_tokens=NEVER, temperature=1.0, top_p=1.0, seed=0
        )


def random_model(seed: int = 0) -> LanguageModel:
    """Random weights in the sizes of SmolLM2-135M, with its tokenizer and a fresh head."""
    sizes = load(MODEL)
    config = dataclasses.replace(sizes.config, rope_theta=ROPE_THETA)
    return LanguageModel.create(config, sizes.tokenizer, seed).with_head(
        Grid.authors("value"), "value"
    )


def check_same_tokens(lm: LanguageModel, theirs: Tunix, prompts: list[str]) -> None:
    """Both engines do the same work: the same weights give the same likeliest tokens."""
    greedy = DecodeConfig(strategy="fixed", n=1, window=1, max_tokens=CHECKED, temperature=0.0)
    found = decode(lm, prompts, greedy, max_num_seqs=len(prompts))
    ours = [result.prefixes[0].token_ids for result in found]
    if ours != theirs.greedy(prompts):
        raise SystemExit(
            f"the engines continue the same prompts differently: {ours} and "
            f"{theirs.greedy(prompts)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    lm = random_model()
    prompts = [
        lm.tokenizer.chat([{"role": "user", "content": f"Write a story about {topic}."}])
        for topic in TOPICS[: arguments.prompts]
    ]
    print(
        f"{description()}; {len(prompts)} prompts, {arguments.tokens} new tokens, random weights, "
        f"medians of {arguments.runs} runs\n"
    )
    print("| rows | ours, tokens/s | first call, s | tunix, tokens/s | first call, s | ratio |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model"
        export(lm.without_head(), path, dtype=np.float32)
        theirs = Tunix(path, lm, prompts, arguments.tokens)
        check_same_tokens(lm, theirs, prompts)
        for samples in arguments.samples:
            rows = len(prompts) * samples
            ours = Ours(lm, samples, arguments.tokens, rows)
            calls = {
                "ours": lambda ours=ours: ours(prompts),
                "theirs": lambda samples=samples: theirs(prompts, samples),
            }
            first = {name: timed(call) for name, call in calls.items()}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(arguments.runs):
                for name, call in calls.items():
                    seconds[name].append(timed(call))
            rate = {
                name: rows * arguments.tokens / statistics.median(times)
                for name, times in seconds.items()
            }
            print(
                f"| {rows} | {rate['ours']:.0f} | {first['ours']:.1f} | {rate['theirs']:.0f} | "
                f"{first['theirs']:.1f} "
                f"| {rate['ours'] / rate['theirs']:.2f} |"
            )


if __name__ == "__main__":
    main()
