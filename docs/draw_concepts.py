"""Draws the pictures of docs/concepts.md from the embedded model: `python docs/draw_concepts.py`.

joint.svg, prefixes.svg and utility.svg go to docs/images, or to the directory that is given.
Equal inputs give equal files.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import matplotlib
import numpy as np

import zip_rc_jax

matplotlib.use("svg")
from matplotlib import pyplot as plt

QUESTION = "State the final answer to the following arithmetic problem: 4 + 3 - 2 + 9 ="
SLIPPED = "4 + 3 = 7 ? 8 - 2 = 6 ;"  # the sum so far is 5
BETA = 0.05
MAP = "RdYlGn"


def heat_map(axis: Any, joint: np.ndarray, grid: zip_rc_jax.Grid, title: str) -> None:
    """One joint `[B_V, B_T]`, high rewards at the top."""
    axis.imshow(joint, origin="lower", aspect="auto", cmap="Blues", vmin=0)
    axis.set_title(title, fontsize=10)
    axis.set_yticks(range(grid.n_reward), [f"{v:g}" for v in grid.reward_centres])
    axis.set_xticks(np.arange(grid.n_length + 1) - 0.5, [f"{e:g}" for e in grid.length_edges])
    axis.set_xlabel("tokens still to come")
    axis.set_ylabel("final reward")


def draw_joint(lm: Any) -> Any:
    """What the head says before an answer, and after a slip in it."""
    (read,) = zip_rc_jax.predict(lm, [(QUESTION, SLIPPED)])
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    moments = (read.start, "after the question"), (-1, "after '... ? 8 - 2 = 6 ;'")
    for axis, (at, when) in zip(axes, moments, strict=True):
        title = (
            f"{when}\nP(correct) {read.p_correct[at]:.2f}, {read.remaining[at]:.0f} tokens to come"
        )
        heat_map(axis, read.joint[at], lm.head.grid, title)
    return figure


def draw_prefixes(lm: Any) -> Any:
    """Every prefix of one decode over its serial steps, colored by P(correct) at each decision."""
    (result,) = zip_rc_jax.decode(lm, [QUESTION], n=8, beta=BETA)
    colors = matplotlib.colormaps[MAP]
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    ends = [*(d.step for d in result.trace[1:]), result.usage.serial_steps]
    for decision, end in zip(result.trace, ends, strict=True):
        axis.axvline(decision.step, color="0.85", lw=1, zorder=0)
        for prefix, times, done, value, so_far in zip(
            decision.prefix_ids,
            decision.multiplicity,
            decision.finished,
            decision.expected_reward,
            decision.tokens,
            strict=True,
        ):
            if times and not done and end > decision.step:
                tokens = min(end - decision.step, len(result.prefixes[prefix].token_ids) - so_far)
                axis.barh(
                    prefix,
                    tokens,
                    left=decision.step,
                    height=0.6,
                    color=colors(value),
                    edgecolor="0.3",
                )
                axis.text(
                    decision.step + tokens / 2,
                    prefix,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
    for prefix in result.prefixes:
        at = len(prefix.token_ids)
        said = prefix.state if at else "never started"
        if prefix.id == result.prefix_id:
            said = f"finished, the answer: P(correct) {prefix.expected_reward:.2f}"
        elif prefix.state == "finished":
            said = f"finished: P(correct) {prefix.expected_reward:.2f}"
        last = max(
            [e for d, e in zip(result.trace, ends, strict=True) if d.multiplicity[prefix.id]],
            default=0,
        )
        axis.text(last + 0.4 if at else 0.4, prefix.id, said, va="center", fontsize=8)
    axis.set_yticks(range(len(result.prefixes)), [f"prefix {p.id}" for p in result.prefixes])
    axis.set_ylim(len(result.prefixes) - 0.4, -0.6)
    axis.set_xlim(0, result.usage.serial_steps * 1.5)
    axis.set_xticks([*(d.step for d in result.trace)])
    axis.set_xlabel("serial decode steps (a decision at every line)")
    axis.set_title(
        f"{result.usage.tokens} tokens in {result.usage.serial_steps} serial steps", fontsize=10
    )
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure


def draw_utility(lm: Any) -> Any:
    """Value, cost and utility of starting k samples, from the joint after the question."""
    grid = lm.head.grid
    (read,) = zip_rc_jax.predict(lm, [(QUESTION, SLIPPED)])
    joint = read.joint[read.start].astype(float)
    rewards, lengths = joint.sum(1).cumsum(), joint.sum(0).cumsum()
    centers, midpoints = np.array(grid.reward_centres), np.array(grid.length_midpoints)
    mean = float((joint.sum(0) * midpoints).sum())
    count = np.arange(1, 9)
    best = np.array([(np.diff(rewards**k, prepend=0) * centers).sum() for k in count])
    latency = np.array([(np.diff(lengths**k, prepend=0) * midpoints).sum() for k in count]) / mean
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharex=True)
    axes[0].plot(count, best, "o-", color="tab:green", label="E[max reward]")
    axes[0].set_title("what k samples give", fontsize=10)
    for alpha, color in ((0.1, "tab:blue"), (1.0, "tab:red")):
        cost = alpha * count + (1 - alpha) * latency
        utility = best - BETA * cost
        axes[0].plot(count, BETA * cost, ".--", color=color, label=f"beta * cost, alpha={alpha:g}")
        axes[1].plot(count, utility, "o-", color=color, label=f"alpha={alpha:g}")
        at = int(utility.argmax())
        axes[1].plot(count[at], utility[at], "o", ms=12, mfc="none", mec=color)
    axes[1].set_title(f"utility at beta={BETA:g}, the best k ringed", fontsize=10)
    for axis in axes:
        axis.set_xlabel("k, samples of the same prompt")
        axis.legend(fontsize=8)
    return figure


def main(directory: pathlib.Path) -> None:
    """Writes the pictures."""
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "zip_rc_jax",
            "font.family": "sans-serif",
            "font.size": 9,
        }
    )
    lm = zip_rc_jax.load("embedded:chain_sum_zip")
    for name, draw in (
        ("joint", draw_joint),
        ("prefixes", draw_prefixes),
        ("utility", draw_utility),
    ):
        figure = draw(lm)
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main(
        pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "images"
    )
