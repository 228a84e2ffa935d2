"""Meta-actions for the prompts in flight: one jitted call for all that are to be decided."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.arrays import search_inputs_of
from zip_rc_jax.inference.state import bucket
from zip_rc_jax.inference.tree import Action, SearchTree
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.search.policies import decide, starts_from_root


def decided(
    groups: list[SearchTree], config: DecodeConfig, grid: Grid, tokenizer: Tokenizer
) -> list[Action]:
    """What its strategy decides for each group.

    Args:
      config: the engine's.
      tokenizer: reads answers, where agreement is evidence.
    """
    strategies = list[Any]()
    for group in groups:
        if group.job.config.strategy not in strategies:
            strategies.append(group.job.config.strategy)
    actions = dict[int, Action]()
    for strategy in strategies:
        same = [g for g in groups if g.job.config.strategy == strategy]
        mine = config
        if strategy != config.strategy:
            mine = dataclasses.replace(config, strategy=strategy)
        numbers = [g.job.number for g in same]
        actions |= zip(numbers, _of_one_strategy(same, mine, grid, tokenizer), strict=True)
    return [actions[g.job.number] for g in groups]


def _of_one_strategy(
    groups: list[SearchTree], config: DecodeConfig, grid: Grid, tokenizer: Tokenizer
) -> list[Action]:
    branching = starts_from_root(config)
    # All prompts in one call, on arrays whose shapes come in buckets.
    inputs = search_inputs_of(
        groups,
        grid,
        config.n,
        branching,
        bucket(len(groups)),
        tokenizer if config.evidence == "answers" else None,
    )
    choice = decide(inputs, grid=grid, config=config)
    reward = inputs.joint.sum(-1) @ np.asarray(grid.reward_centres)
    remaining = inputs.joint.sum(-2) @ np.asarray(grid.length_midpoints)
    # Back to one record for each prompt, without the padding.
    columns = (choice.multiplicity, choice.planned_pause_bin, choice.utility, reward, remaining)
    return [
        Action(
            copies[: len(g.branches)],
            copies[-1] if branching else None,
            planned_pause_bin,
            utility,
            *expected,
        )
        for g, copies, planned_pause_bin, utility, *expected in zip(
            groups, *(c[: len(groups)].tolist() for c in columns), strict=True
        )
    ]


def extends(group: SearchTree, action: Action) -> bool:
    """Whether an action makes any prefix of the prompt longer, or starts one."""
    return bool(action.starts) or any(
        copies and not branch.finished
        for branch, copies in zip(group.branches, action.multiplicity, strict=True)
    )


def stopped(group: SearchTree, action: Action) -> Action:
    """What becomes of an action whose prompt was ended: finished prefixes stay, and nothing goes
    on."""
    return dataclasses.replace(
        action,
        multiplicity=[int(b.finished) for b in group.branches],
        starts=None if action.starts is None else 0,
        planned_pause_bin=-1,
        utility=math.nan,
    )
