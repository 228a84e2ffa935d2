"""Chips and hours of the paper's runs: estimates from the configs. Nothing is run or loaded.

    python benchmarks/paper_hours.py [--configs configs/qwen3_1.7b.yaml ...]
                                     [--mean-tokens gsm8k=2000 math500=5000 ...]
                                     [--prompt-tokens 200] [--train-share 0.4]
                                     [--decode-share 0.7]

Training: operations counted by hand (`aot/analytic.py`, which the compiled programs equal) at
`--train-share` of the chip's peak, or the HBM bytes of the compiled step (the table of
docs/tpu.md) at its bandwidth, whichever takes longer.

Decoding: weights and cache are read once a step, at `--decode-share` of the bandwidth, and every
sequence as far as it is long: half a mean response on average. As many sequences as have pages for
that in the engine's pool (`inference/memory.py`, 90% of the memory), and at most 1,024.

Prompts, samples, epochs and tries are those of the configs and of the table of benchmarks.
How long responses are is assumed (`--mean-tokens`), the same for every model: put in your own.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp

from zip_rc_jax.aot.analytic import train_flops
from zip_rc_jax.aot.topology import CHIPS, GIB, Chip
from zip_rc_jax.config import DecodeConfig, ModelConfig, PipelineConfig, TrainConfig
from zip_rc_jax.config.benchmarks import asked_benchmarks
from zip_rc_jax.config.files import load_config
from zip_rc_jax.head import ZipHead
from zip_rc_jax.inference import memory
from zip_rc_jax.inference.network import TransformerNetwork, page_size
from zip_rc_jax.inference.sampler import Filters
from zip_rc_jax.inference.state import DecodeSpec
from zip_rc_jax.models.paged_cache import pages_of
from zip_rc_jax.models.transformer import param_shapes
from zip_rc_jax.runtime.sharding import single_device

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("qwen3_1.7b", "lfm2_1.2b", "lfm2_350m")
PROBLEMS = {"aime24": 30, "amc23": 40, "math500": 500, "gsm8k": 1319}
MEAN_TOKENS = {"train": 5000, "aime24": 16000, "amc23": 9000, "math500": 5000, "gsm8k": 2000}
H200 = Chip("H200", 131 * GIB, 989e12, 4800e9)
# Where it is estimated: name of the column, chips, and what one is.
PLACES = (
    ("v5e:4x4", 16, CHIPS["v5e"]),
    ("v5p:2x2x4", 16, CHIPS["v5p"]),
    ("v6e:4x4", 16, CHIPS["v6e"]),
    ("8 H200", 8, H200),
)
MOST_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the configs do not say; see the options of the command."""

    mean_tokens: dict[str, int]
    prompt_tokens: int
    train_share: float
    decode_share: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", nargs="+", default=[str(ROOT / f"configs/{name}.yaml") for name in NAMES])
    add("--mean-tokens", nargs="+", default=[], metavar="NAME=TOKENS")
    add("--prompt-tokens", type=int, default=200)
    add("--train-share", type=float, default=0.4)
    add("--decode-share", type=float, default=0.7)
    arguments = parser.parse_args()
    given = dict(part.split("=") for part in arguments.mean_tokens)
    assumed = Assumed(
        MEAN_TOKENS | {name: int(tokens) for name, tokens in given.items()},
        arguments.prompt_tokens,
        arguments.train_share,
        arguments.decode_share,
    )
    print(f"| config | what | M tokens | {' | '.join(place[0] for place in PLACES)} |")
    print("|---|---|---|" + "---|" * len(PLACES))
    for path in arguments.configs:
        print_config(path, assumed)
    means = ", ".join(f"{name} {tokens:,}" for name, tokens in assumed.mean_tokens.items())
    print(f"\nAssumed: mean tokens of a response ({means}), {assumed.prompt_tokens} of a prompt;")
    print(
        f"{assumed.train_share:.0%} of the peak in training and "
        f"{assumed.decode_share:.0%} of the bandwidth in decoding."
    )


def print_config(path: str, assumed: Assumed) -> None:
    config = load_config(path, [])
    name = pathlib.Path(path).stem
    samples = config.rollout.prompts * config.rollout.samples
    mean = assumed.mean_tokens["train"]
    seen = samples * (mean + assumed.prompt_tokens)

    def row(what: str, tokens: float, hours: list[str]) -> None:
        print(f"| {name} | {what} | {tokens / 1e6:,.0f} | {' | '.join(hours)} |")

    def decoding(count: int, mean: int, max_tokens: int, together: int) -> list[str]:
        return [
            decode_hours(config, count, mean, max_tokens, together, chips, chip, assumed)
            for _, chips, chip in PLACES
        ]

    rollout = decoding(samples, mean, config.rollout.max_tokens, config.rollout.samples)
    row("rollout", samples * mean, rollout)
    for stage in ("critic", "final", "lite"):
        train: TrainConfig = getattr(config, stage)
        tokens = train.epochs * seen or train.steps * train.batch_rows * train.row_tokens
        row(f"train {stage}", tokens, train_hours(name, config.model, train, tokens, assumed))
        if stage == "critic":
            forward = dataclasses.replace(config.lite, cache_features=False)
            row("label", seen, train_hours(name, config.model, forward, seen, assumed))
    e = config.evaluate
    for one in asked_benchmarks(e.benchmarks, e.benchmark_table):
        if one.name not in PROBLEMS:
            continue  # a union is decoded as its parts, and only the shipped sets have a known size
        n, mean = one.samples or e.samples, assumed.mean_tokens[one.name]
        count = PROBLEMS[one.name] * n * one.tries
        found = decoding(count, mean, config.decode.max_tokens, n)
        row(f"all samples of {one.name}", count * mean, found)


def train_hours(
    name: str, model: ModelConfig, train: TrainConfig, tokens: float, assumed: Assumed
) -> list[str]:
    """Hours of training on that many tokens in full rows, at each of `PLACES`; none on GPUs, where
    no step was compiled."""
    steps = tokens / (train.batch_rows * train.row_tokens)
    cells = 56 if train.label == "value" else 16
    products = train_flops(model, train, cells, "tpu").total
    final = dataclasses.replace(train, trainable="all", kl_weight=10.0, cache_features=False)
    part = products / train_flops(model, final, cells, "tpu").total
    result = []
    for _, chips, chip in PLACES:
        if chip is H200:
            result.append("-")
            continue
        by_products = products / (chips * chip.flops * assumed.train_share)
        by_bytes = part * step_bytes(name) / chip.bandwidth
        result.append(f"{steps * max(by_products, by_bytes) / 3600:,.1f}")
    return result


def step_bytes(name: str) -> float:
    """HBM bytes of a chip in one step of stage final on 16 chips, as docs/tpu.md has them; 0 if it
    has none."""
    text = (ROOT / "docs/tpu.md").read_text()
    found = re.search(rf"^\| `{re.escape(name)}.yaml` .*\| ([\d.]+) GiB \|[^|]*\|$", text, re.M)
    return float(found[1]) * GIB if found else 0.0


def decode_hours(
    config: PipelineConfig,
    count: int,
    mean: int,
    max_tokens: int,
    together: int,
    chips: int,
    chip: Chip,
    assumed: Assumed,
) -> str:
    """Hours of `count` samples of `mean` tokens on all chips; or why not.

    Args:
      together: samples of a prompt.
    """
    settings, params = decode_spec(config, "gpu" if chip is H200 else "tpu")
    usual = assumed.prompt_tokens + mean // 2
    decode = DecodeConfig(n=together, max_tokens=assumed.prompt_tokens + max_tokens)
    rows = most_rows(settings, params, config.model, decode, usual, int(chip.hbm))
    if not rows:
        return "no prompt fits"
    held, folded = memory.shard_bytes(params), memory.shard_bytes(params["table"])
    weights = held - folded * (1 if config.model.tied else 2)
    page = memory.page_bytes(settings, usual)
    read = weights + rows * usual * page / settings.network.page
    seconds = read / (assumed.decode_share * chip.bandwidth)
    return f"{count * mean / (rows / seconds * chips) / 3600:,.1f} ({rows})"


def decode_spec(config: PipelineConfig, platform: str) -> tuple[DecodeSpec, dict]:
    """What the decoder holds of the config's model on one chip, as shapes."""
    model, layout = config.model, single_device()
    grid = config.grid.grid("value")
    used = model.vocab_size - grid.n_cells
    spec = DecodeSpec(
        TransformerNetwork(model, layout, config.dtype, page=page_size(platform), kernel=platform),
        ZipHead(grid, "value", used, used),
        model.vocab_size,
        Filters.of([config.rollout.sampling]),
        1,
    )
    table = jax.ShapeDtypeStruct((model.vocab_size, model.d_model), jnp.float32)
    shapes = {"body": param_shapes(model), "table": table}
    where = layout.sharding(())
    return spec, jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, config.dtype, sharding=where), shapes
    )


def most_rows(
    settings: DecodeSpec,
    params: dict,
    model: ModelConfig,
    decode: DecodeConfig,
    usual: int,
    limit: int,
) -> int:
    """How many sequences of `usual` tokens the engine's pool on one chip holds.

    Whole prompts of `decode.n` samples are counted. It is 0 where one sequence of the greatest
    length does not fit.
    """
    page, longest = settings.network.page, decode.max_tokens

    def fits(rows: int) -> bool:
        mine = dataclasses.replace(decode, max_num_seqs=rows)
        pool = memory.PoolMemory(settings, params, mine, model.max_positions, limit)
        sizes, _ = pool.sizes(longest, listed=False)
        return sizes.pages >= max(rows * pages_of(usual, page), pages_of(longest, page))

    return decode.n * memory.largest(
        lambda prompts: fits(decode.n * prompts), MOST_ROWS // decode.n
    )


if __name__ == "__main__":
    main()
