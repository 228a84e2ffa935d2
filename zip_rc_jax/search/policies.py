"""What happens at a decision: the adaptive search, or one of the baselines on the same engine and the same meter.

A strategy sees the prefixes of each prompt as numpy arrays and answers with multiplicities. Slots are in order of prefix id; when
branching, one more slot at the end is the root.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.search.meta_actions import choose_meta_action


@dataclasses.dataclass(frozen=True)
class View:
    """The prefixes of `P` prompts in `n` slots.

    Attributes:
      joint: `[P, n, B_V, B_T]` float32, mean over the window.
      unfinished: `[P, n]` bool.
      tokens: `[P, n]` int32 generated so far.
      exists: `[P, n]` bool.
      free_rows: `[P]` int32, rows that branching may take.
      must_extend: `[P]` bool: the prompt may not stop yet.
      alpha, beta: `[P]` float32, prices of the prompt.
    """

    joint: np.ndarray
    unfinished: np.ndarray
    tokens: np.ndarray
    exists: np.ndarray
    free_rows: np.ndarray
    must_extend: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray


@dataclasses.dataclass(frozen=True)
class Choice:
    """`multiplicity [P, n]` int, `future_bin [P]` int (-1 = none), `utility [P]` float (NaN where the strategy has none)."""

    multiplicity: np.ndarray
    future_bin: np.ndarray
    utility: np.ndarray


def choose(view: View, grid: Grid, config: DecodeConfig) -> Choice:
    """The multiplicities that `config.strategy` gives to every prefix of every prompt."""
    if config.strategy == "zip_rc":
        return _search(view, grid, config)
    live = view.unfinished & view.exists
    finished = ~view.unfinished & view.exists
    if config.strategy == "fixed":
        keep = live
    elif config.strategy == "reward_threshold":
        reward = np.asarray(grid.expected_reward(view.joint))
        keep = live & (reward >= config.reward_threshold)
        # Never prune the whole group: the most promising prefix goes on while nothing has finished.
        best = np.where(live, reward, -np.inf).argmax(axis=1)
        alone = ~keep.any(axis=1) & ~finished.any(axis=1)
        keep[alone, best[alone]] = True
    elif config.strategy == "length_budget":
        keep = live & (view.tokens < config.length_budget)
        stuck = ~keep.any(axis=1) & ~finished.any(axis=1)
        keep[stuck] = live[stuck]
    else:
        half = finished.sum(axis=1) * 2 >= view.exists.sum(axis=1)
        keep = live & ~half[:, None]
    nothing = np.full(len(keep), np.nan)
    return Choice((keep | finished).astype(np.int32), np.full(len(keep), -1, np.int32), nothing)


def _search(view: View, grid: Grid, config: DecodeConfig) -> Choice:
    action = choose_meta_action(
        view.joint,
        view.unfinished,
        view.tokens,
        grid=grid,
        config=config,
        exists=view.exists,
        free_rows=view.free_rows,
        must_extend=view.must_extend,
        alpha=view.alpha,
        beta=view.beta,
    )
    return Choice(np.asarray(action.multiplicity), np.asarray(action.future_bin), np.asarray(action.utility))
