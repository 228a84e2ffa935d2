"""Peak temporary memory and gradients of the token losses, chunked against all probabilities at
once.

    python benchmarks/loss.py [--vocab 151936] [--positions 4096] [--width 128] [--chunk 256] [--compare]

Prints, for every kind of divergence, the temporaries of the compiled gradient (XLA's memory
analysis; nothing is run). With --compare both gradients are computed too, for which the one at once
really needs its memory, and their largest difference is printed, relative to the largest gradient.
"""  # noqa: E501

from __future__ import annotations

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import KL_KINDS, ModelConfig
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training.loss import (
    FullTeacher,
    PolicyLoss,
    VocabChunking,
    policy_loss,
    teacher_top_k,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from harness.naive_loss import naive_losses

TOP_K = 32


def objectives(kind: str, vocab: int, chunk: int):
    """The chunked mean loss and the one at once, of (hidden, table, targets, teacher_hidden,
    teacher_table)."""
    vocabulary, sampleable = (
        VocabChunking(ModelConfig(), Layout(make_mesh(), TRAIN_RULES), chunk),
        np.ones(vocab, bool),
    )
    settings = PolicyLoss(vocabulary, kind, kl_weight=1, nll_weight=1)

    def chunked(hidden, table, targets, teacher_hidden, teacher_table):
        teacher = FullTeacher(teacher_hidden, teacher_table)
        if kind == "forward_topk":
            teacher = teacher_top_k(
                vocabulary, teacher, jnp.ones(targets.shape, bool), sampleable, TOP_K
            )
        weight = jnp.full(targets.shape, 1 / targets.size)
        return policy_loss(settings, hidden, table, targets, weight, sampleable, teacher)[0]

    def at_once(*arguments):
        nll, kl = naive_losses(*arguments, kind, TOP_K)
        return jnp.mean(nll + kl)

    return chunked, at_once


def compiled_gradient(objective, *arguments):
    """Of hidden states and table."""
    return jax.jit(jax.grad(objective, argnums=(0, 1))).lower(*arguments).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("vocab", 151936), ("positions", 4096), ("width", 128), ("chunk", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    hidden, teacher_hidden = rng.standard_normal((2, 1, options.positions, options.width)).astype(
        np.float32
    )
    table, teacher_table = (
        rng.standard_normal((2, options.vocab, options.width)) / options.width**0.5
    ).astype(np.float32)
    arguments = (
        hidden,
        table,
        rng.integers(0, options.vocab, (1, options.positions)),
        teacher_hidden,
        teacher_table,
    )
    print(
        f"{options.vocab:,} ids, {options.positions:,} positions, width {options.width}, chunks "
        f"of {options.chunk} positions, float32"
    )
    for kind in KL_KINDS:
        programs = [
            compiled_gradient(f, *arguments) for f in objectives(kind, options.vocab, options.chunk)
        ]
        chunked, at_once = (p.memory_analysis().temp_size_in_bytes / 2**30 for p in programs)
        line = (
            f"{kind:13} chunked {chunked:6.2f} GiB   at once {at_once:6.2f} GiB   "
            f"{at_once / chunked:5.1f} times less"
        )
        if options.compare:
            found, expected = (p(*arguments) for p in programs)
            worst = max(
                float(jnp.abs(a - b).max() / jnp.abs(b).max())
                for a, b in zip(found, expected, strict=True)
            )
            line += f"   gradients differ by {worst:.1e}"
        print(line)


if __name__ == "__main__":
    main()
