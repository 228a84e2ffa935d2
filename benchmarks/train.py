"""A training step of SmolLM2-135M in float32, side by side in one run: ours, torch with
`transformers` on the same cores, and the limit.

    python benchmarks/train.py [--rows 2] [--tokens 256] [--segments 1] [--runs 5] [--remat] [--parts]

A step is: forward of the student and of a frozen teacher, joint cross-entropy on the reserved rows,
  KL to the teacher's 32 likeliest
ids, backward, clipping, AdamW. Both start from the same weights (the student a little away from the
teacher, so that the KL has a gradient), see the same batch and the same learning rates, and must
report the same losses for the first steps, or nothing is timed. They take turns within every run;
medians over runs. Freed memory stays in the process (`runtime.malloc`), which they share. Both keep
every activation (ours recomputes them with --remat, torch never does); torch has fused AdamW, and
with one segment a row (the default) needs no attention mask. Use a quiet machine: other work was
seen to slow torch far more than us. On a busy one, compare on one core each: `OMP_NUM_THREADS=1
taskset -c 0 python benchmarks/train.py`.

The limit counts the operations that no implementation can leave out (`aot.analytic`) at the matmul
rate measured here. `--parts` also times what a step consists of. Needs `make smollm2` and the dev
extra (torch).
"""  # noqa: E501

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory(one_arena=True)  # before other imports start threads

import argparse
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from decode import MODEL
from machine import description, matmul_rate, timed
from zip_rc_jax.aot.analytic import train_flops
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.data.batches import TrainBatch, train_batches
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.stacks import unstack
from zip_rc_jax.models.transformer import forward_packed
from zip_rc_jax.runtime.sharding import TRAIN_RULES, single_device
from zip_rc_jax.training.step import (
    TrainSpec,
    init_state,
    learning_rate,
    losses,
    prefers_unrolled,
    train_step,
)

PROMPT_TOKENS = 32
AWAY = 1.01  # factor from the teacher's weights to the student's
COMPARED = ("loss", "joint", "kl")


def batch_of(config: TrainConfig, segments: int, ids: int) -> TrainBatch:
    """A full batch of finished rollouts of random tokens, `segments` to a row."""
    rng = np.random.default_rng(0)
    length = config.row_tokens // segments
    texts = {
        "task": "",
        "prompt": "",
        "question": "",
        "answer": "",
        "entry_json": "",
        "response": "",
    }
    rollouts = [
        Rollout(
            prompt_index=i,
            sample_index=0,
            level=0,
            seed=0,
            prompt_token_ids=rng.integers(ids, size=PROMPT_TOKENS),
            output_token_ids=rng.integers(ids, size=length + 1 - PROMPT_TOKENS),
            finished=True,
            value=float(rng.random()),
            **texts,
        )
        for i in range(config.batch_rows * segments)
    ]
    data = train_batches(
        rollouts,
        label=config.label,
        batch_rows=config.batch_rows,
        row_tokens=config.row_tokens,
        seed=0,
        epochs=1,
    )
    return next(iter(data))


class Ours:
    """The jitted step of the training loop, compiled ahead so that compiling is timed alone."""

    def __init__(self, lm: LanguageModel, rows: np.ndarray, config: TrainConfig, batch: TrainBatch):
        assert lm.head is not None
        layout = single_device(TRAIN_RULES)
        self.settings = TrainSpec(
            lm.config, lm.head, layout, config, prefers_unrolled(layout, config)
        )
        self.teacher, self.batch = lm.params["body"], jax.tree.map(jnp.asarray, batch)
        if self.settings.unrolled:
            self.teacher = unstack(lm.config, self.teacher)
        self.state = init_state(
            {"body": jax.tree.map(lambda x: AWAY * x, self.teacher), "zip_rows": jnp.asarray(rows)},
            config,
        )
        start = time.perf_counter()
        self.compiled = train_step.lower(
            self.settings, self.state, self.teacher, self.batch
        ).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self) -> dict[str, float]:
        self.state, metrics = self.compiled(self.state, self.teacher, self.batch)
        return {name: float(metrics[name]) for name in COMPARED}

    def parts(self) -> dict[str, Callable[[], Any]]:
        c, b = self.settings, self.batch

        @jax.jit
        def body(body: Any) -> jax.Array:
            return forward_packed(
                c.model,
                body,
                b.tokens,
                b.positions,
                b.segment_ids,
                layout=c.layout,
                unrolled=c.unrolled,
            )

        loss = jax.jit(lambda p, t: losses(c, p, t, b)[0])
        grad = jax.jit(jax.grad(lambda p, t: losses(c, p, t, b)[0]))
        return {
            "body forward": lambda: jax.block_until_ready(body(self.teacher)),
            "losses": lambda: jax.block_until_ready(loss(self.state.params, self.teacher)),
            "losses and gradients": lambda: jax.block_until_ready(
                grad(self.state.params, self.teacher)
            ),
        }


class Theirs:
    """The same in torch, as one would write it there."""

    def __init__(
        self,
        directory: pathlib.Path,
        lm: LanguageModel,
        rows: np.ndarray,
        config: TrainConfig,
        batch: TrainBatch,
    ):
        assert lm.head is not None
        self.config, self.ids = config, lm.head.used_ids
        self.teacher = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).requires_grad_(False)
        self.student = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.mul_(AWAY)
        self.rows = torch.nn.Parameter(torch.tensor(rows))
        self.parameters = [*self.student.parameters(), self.rows]
        betas = (config.adam_b1, config.adam_b2)
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=betas, weight_decay=config.weight_decay, fused=True
        )
        self.steps = 0
        self.inputs = {
            "input_ids": torch.tensor(batch.tokens),
            "position_ids": torch.tensor(batch.positions),
        }
        if (batch.segment_ids != 1).any():
            same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None]
            self.inputs["attention_mask"] = torch.tensor(
                (same & np.tril(np.ones_like(same)))[:, None]
            )
        self.cells = torch.tensor(lm.head.grid.cell(batch.reward, batch.remaining).ravel()).long()
        self.weight = torch.tensor(
            batch.labelled.ravel() / batch.labelled.sum(), dtype=torch.float32
        )

    def hidden(self, model: Any) -> torch.Tensor:
        return model.model(**self.inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def losses(self) -> dict[str, torch.Tensor]:
        hidden = self.hidden(self.student)
        joint = F.cross_entropy(hidden @ self.rows.T, self.cells, reduction="none")
        with torch.no_grad():
            top, ids = (self.hidden(self.teacher) @ self.teacher.lm_head.weight[: self.ids].T).topk(
                self.config.kl_top_k
            )
            top = top.log_softmax(-1)
        logits = hidden @ self.student.lm_head.weight[: self.ids].T
        student = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
        kl = (top.exp() * (top - student)).sum(-1)
        parts = {"joint": self.weight @ joint, "kl": self.weight @ kl}
        return parts | {
            "loss": self.config.joint_weight * parts["joint"] + self.config.kl_weight * parts["kl"]
        }

    def backward(self) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad()
        parts = self.losses()
        parts["loss"].backward()
        return parts

    def step(self) -> dict[str, float]:
        parts = self.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = float(learning_rate(jnp.int32(self.steps), self.config))
        self.optimizer.step()
        self.steps += 1
        return {name: parts[name].item() for name in COMPARED}

    def parts(self) -> dict[str, Callable[[], Any]]:
        without_gradient = torch.no_grad()
        return {
            "body forward": without_gradient(functools.partial(self.hidden, self.teacher)),
            "losses": without_gradient(self.losses),
            "losses and gradients": self.backward,
        }


def check_equal(ours: Ours, theirs: Theirs, steps: int) -> None:
    """Raises if the losses of the first steps differ by more than rounding; from the second on they
    also depend on gradients and AdamW."""
    for i in range(steps):
        a, b = ours.step(), theirs.step()
        print(
            f"step {i + 1}: "
            + ", ".join(f"{name} {a[name]:.6f} and {b[name]:.6f}" for name in COMPARED)
        )
        for name in COMPARED:
            np.testing.assert_allclose(
                a[name], b[name], rtol=1e-4, err_msg=f"{name} of step {i + 1}"
            )


def medians(
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], runs: int
) -> dict[str, tuple[float, float]]:
    """Seconds of every pair of calls, which take turns."""
    # first calls, dropped below
    seconds = {name: ([timed(a)], [timed(b)]) for name, (a, b) in calls.items()}
    for _ in range(runs):
        for name, pair in calls.items():
            for call, found in zip(pair, seconds[name], strict=True):
                found.append(timed(call))
    return {
        name: (statistics.median(a[1:]), statistics.median(b[1:]))
        for name, (a, b) in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    config = TrainConfig(
        label="value",
        batch_rows=arguments.rows,
        row_tokens=arguments.tokens,
        kl_weight=10.0,
        learning_rate=3e-5,
    )
    config = dataclasses.replace(config, remat=arguments.remat)
    lm = load(MODEL).with_head(Grid.authors("value"), "value")
    assert lm.head is not None
    batch = batch_of(config, arguments.segments, lm.head.used_ids)
    rows = np.random.default_rng(1).normal(0, 0.02, lm.params["zip_rows"].shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model"
        export(lm.without_head(), path, dtype=np.float32)
        theirs = Theirs(path, lm, rows, config, batch)
    ours = Ours(lm, rows, config, batch)
    check_equal(ours, theirs, 3)
    calls = {"step": (ours.step, theirs.step)}
    if arguments.parts:
        mine, other = ours.parts(), theirs.parts()
        calls = {name: (mine[name], other[name]) for name in mine} | calls
    found = medians(calls, arguments.runs)
    tokens = arguments.rows * arguments.tokens
    speed = matmul_rate(tokens)
    flops = train_flops(lm.config, config, lm.head.grid.n_cells, jax.default_backend())
    seconds, others = found["step"]
    limit = flops.useful / speed
    print(
        f"\n{description()}; {arguments.rows} rows of {tokens // arguments.rows} tokens, "
        f"{arguments.segments} segments each, "
        f"remat {arguments.remat}; medians of {arguments.runs} runs; compiled in "
        f"{ours.compile_seconds:.1f} s; "
        f"{speed / 1e9:.0f} GFLOP/s in matmuls\n"
    )
    print(
        "| ours, tokens/s | torch, tokens/s | ratio | limit, tokens/s | of the limit | torch of "
        "the limit |"
    )
    print("|---|---|---|---|---|---|")
    print(
        f"| {tokens / seconds:.0f} | {tokens / others:.0f} | {others / seconds:.2f} | "
        f"{tokens / limit:.0f} "
        f"| {limit / seconds:.0%} | {limit / others:.0%} |"
    )
    if arguments.parts:
        print("\n| part | ours, s | torch, s | ratio |\n|---|---|---|---|")
        for name, (a, b) in found.items():
            print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} |")


if __name__ == "__main__":
    main()
