"""Policies: what decides at every decision of a decode.

The adaptive search, and the baselines on the same engine and the same meter.

A policy sees the prefixes of every prompt (`SearchInputs`) and answers with multiplicities
(`MetaAction`). It is a setting, `DecodeConfig.strategy`: a name, "package.module:function", or the
function itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.plugins import POLICIES, register_policy
from zip_rc_jax.grid import Grid
from zip_rc_jax.search.inputs import MetaAction, SearchInputs, checked_action
from zip_rc_jax.search.meta_actions import search

__all__ = ["Policy", "decide", "register_policy", "starts_from_root"]


class Policy(Protocol):
    """Decides which prefixes are extended.

    Called on the host once per decision, for all prompts that wait for one. Their number is padded
    to a few sizes, so a jitted policy compiles seldom. It must not depend on the company: a
    prompt's decision reads only that prompt's row.

    Args:
      inputs: the prefixes, as arrays of NumPy. Slots are in order of prefix id; with
        candidates="branching" the last one is the root.
      grid: of the joints.
      config: the engine's; a prompt's own prices are in `inputs`.

    Returns:
      the decision, such as `MetaAction.of(multiplicity)`. A prompt ends when it extends nothing.
    """

    def __call__(self, inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction: ...


zip_rc: Policy = search


def fixed(inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction:
    """n full samples."""
    return MetaAction.of(inputs.live | inputs.finished)


def reward_threshold(inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction:
    """Drops prefixes whose expected reward is below `config.reward_threshold`."""
    live, finished = inputs.live, inputs.finished
    reward = np.asarray(grid.expected_reward(inputs.joint))
    keep = live & (reward >= config.reward_threshold)
    # Never prune the whole prompt: the most promising prefix goes on while nothing has finished.
    best = np.where(live, reward, -np.inf).argmax(axis=1)
    alone = ~keep.any(axis=1) & ~finished.any(axis=1) & live.any(axis=1)
    keep[alone, best[alone]] = True
    return MetaAction.of(keep | finished)


def length_budget(inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction:
    """Drops prefixes of `config.length_budget` tokens or more; while nothing has finished, none
    where it would drop all."""
    live, finished = inputs.live, inputs.finished
    keep = live & (inputs.tokens_so_far < config.length_budget)
    stuck = ~keep.any(axis=1) & ~finished.any(axis=1)
    keep[stuck] = live[stuck]
    return MetaAction.of(keep | finished)


def half_finished(inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction:
    """Drops the rest once half of the prefixes have finished."""
    finished = inputs.finished
    half = finished.sum(axis=1) * 2 >= inputs.exists.sum(axis=1)
    return MetaAction.of((inputs.live & ~half[:, None]) | finished)


BASELINES = ("fixed", "reward_threshold", "length_budget", "half_finished")


def starts_from_root(config: DecodeConfig) -> bool:
    """Whether a prompt begins with the root alone (`SearchInputs.has_root`), not with n samples.

    The baselines always have n.
    """
    return config.candidates == "branching" and config.strategy not in BASELINES


def decide(inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction:
    """The decision of `config.strategy`, as arrays of NumPy.

    Raises:
      UsageError: there is no such policy, or it returned what no decoder can carry out, see
        `checked_action`.
    """
    policy = POLICIES.resolve(config.strategy)
    return checked_action(
        policy(inputs, grid=grid, config=config), inputs, grid, _name(config.strategy)
    )


def _name(strategy: Any) -> str:
    return (
        repr(strategy)
        if isinstance(strategy, str)
        else getattr(strategy, "__qualname__", shown(strategy))
    )
