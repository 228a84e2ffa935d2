"""Why a decision was made: what each action is worth, and what it would have cost.

The search returns the best action alone. Here the terms of its utility are computed again, from the
same inputs and by the same functions, for the action that was taken, for the actions that it was
compared with, and for those that treat one prefix otherwise. So "why was 3 paused?" has a numeric
answer. Nothing here runs during a search.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.plugins import UTILITIES
from zip_rc_jax.grid import Grid
from zip_rc_jax.search.candidates import published_keep_sets, tie
from zip_rc_jax.search.inputs import MetaAction, SearchInputs
from zip_rc_jax.search.meta_actions import MAX_EXHAUSTIVE, SearchSettings, search_problem
from zip_rc_jax.search.utility import (
    expected_compute,
    expected_latency,
    expected_max,
    expected_value,
    planned_pause_bins,
)

BEST = -2  # stands for the best planned pause
MOST_COMPARED = 32  # of the compared actions, the best ones that are told


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The actions of one prompt at one decision, the one that was taken first, then the best.

    Attributes:
      multiplicity: [C, n] int32, as in `MetaAction`.
      planned_pause_bin: [C] int32, the best one of each action (of the first one: its own).
      value: [C] float, what the action is expected to give: `E[max]`, or with another
        `selection_exponent` what it makes of it.
      compute, latency: [C] float, expected tokens: all of them, and those of the longest prefix.
      utility: [C] float. That of the paper is `value - beta * (alpha * compute + (1 - alpha) *
        latency) / normalizer`. -inf for what may not be done.
      compared: [C] bool, actions of the candidate set. The others are the taken one, where the
        search changed a candidate further, and those that treat one prefix otherwise.
      count: actions of the candidate set in all, equal ones counted once; 0 where the strategy
        compares none, and where the search climbs (branching).
      normalizer: tokens that one unit of cost stands for.
    """

    multiplicity: np.ndarray
    planned_pause_bin: np.ndarray
    value: np.ndarray
    compute: np.ndarray
    latency: np.ndarray
    utility: np.ndarray
    compared: np.ndarray
    count: int
    normalizer: float


def explain(
    inputs: SearchInputs, action: MetaAction, *, grid: Grid, config: DecodeConfig
) -> list[Explanation]:
    """What the action of each prompt was weighed against.

    Args:
      inputs: as NumPy arrays, what was decided on.
      action: what was decided.
      grid, config: as in `search`. For a strategy that compares no actions the numbers are what the
        utility would have said.
    """
    branching = inputs.has_root
    if config.candidates == "branching" and not branching:
        config = dataclasses.replace(config, candidates="published")
    dtype = inputs.joint.dtype
    inputs = dataclasses.replace(
        inputs,
        tokens_so_far=inputs.tokens_so_far.astype(dtype),
        alpha=inputs.alpha.astype(dtype),
        beta=inputs.beta.astype(dtype),
        answer=inputs.answer if config.evidence == "answers" else None,
    )
    settings = SearchSettings.of(config)
    taken = np.asarray(action.multiplicity)
    bins = np.asarray(action.planned_pause_bin)
    found = []
    # One prompt at a time, so that one program serves any number of decisions.
    for p in range(len(inputs.joint)):
        one = jax.tree.map(lambda x, p=p: np.asarray(x)[p : p + 1], inputs)
        sets = np.zeros((0, taken.shape[1]), np.int32)
        if config.strategy == "zip_rc" and not branching:
            sets = np.asarray(_candidate_set(one, grid=grid, settings=settings))[0]
        found.append(_explained(one, taken[p], int(bins[p]), sets, grid, settings))
    return found


def _explained(
    one: SearchInputs,
    taken: np.ndarray,
    planned: int,
    sets: np.ndarray,
    grid: Grid,
    settings: SearchSettings,
) -> Explanation:
    """The explanation of one prompt, whose `one` is the inputs and `sets` [C, n] the candidates."""
    compared = {tuple(row) for row in sets.astype(np.int32).tolist()}
    first = tuple(taken.tolist())
    others = dict.fromkeys([*sorted(compared), *_one_change(one, taken, settings.n)])
    others.pop(first, None)
    rows = [first, *others]
    # Padded to few shapes with copies of the first action.
    size = 1 << max(4, (len(rows) - 1).bit_length())
    multiplicity = np.array([*rows, *[first] * (size - len(rows))], np.int32)
    pauses = np.full(size, BEST, np.int32)
    pauses[0] = planned
    read = _terms(one, multiplicity[None], pauses[None], grid=grid, settings=settings)
    bins, value, compute, latency, utility, scale = (np.asarray(x)[0] for x in read)
    # The best of those compared, and every action of one change.
    in_set = np.array([row in compared for row in rows])
    order = np.argsort(-utility[: len(rows)], kind="stable")
    kept, near = [0], set(_one_change(one, taken, settings.n))
    for i in order.tolist():
        if i and (rows[i] in near or len(kept) <= MOST_COMPARED):
            kept.append(i)
    return Explanation(
        multiplicity[kept],
        bins[kept],
        value[kept],
        compute[kept],
        latency[kept],
        utility[kept],
        in_set[kept],
        len(compared),
        float(scale),
    )


def _one_change(one: SearchInputs, taken: np.ndarray, n: int) -> list[tuple[int, ...]]:
    """The actions that treat one live prefix otherwise than `taken` [n], within the budget."""
    live, root = np.asarray(one.live)[0], one.is_root
    samples = int((np.asarray(one.exists)[0] & ~root).sum())
    budget = max(0, min(int(np.asarray(one.max_new_prefixes)[0]), n - samples))
    budget = budget if one.has_root else 0
    rows = []
    for slot in np.flatnonzero(live).tolist():
        for copies in range(budget + (0 if root[slot] else 1) + 1):
            row = taken.copy()
            row[slot] = copies
            new = np.where(root, row, np.maximum(row - 1, 0))[live].sum()
            if copies != taken[slot] and new <= budget:
                rows.append(tuple(row.tolist()))
    return rows


@functools.partial(jax.jit, static_argnames=("grid", "settings"))
def _candidate_set(inputs: SearchInputs, *, grid: Grid, settings: SearchSettings) -> jax.Array:
    """The candidates [P, C, n] bool of a search without branching."""
    problem, _ = search_problem(inputs, grid, settings)
    slots = problem.live.shape[1]
    if settings.candidates == "exhaustive" and slots <= MAX_EXHAUSTIVE:
        subsets = jnp.asarray((np.arange(2**slots)[:, None] >> np.arange(slots)) & 1, bool)
        return (subsets & problem.live[:, None]) | problem.finished[:, None]
    return published_keep_sets(problem.joint, problem.samples, problem.finished, grid)


@functools.partial(jax.jit, static_argnames=("grid", "settings"))
def _terms(
    inputs: SearchInputs, multiplicity: Any, pauses: Any, *, grid: Grid, settings: SearchSettings
) -> tuple[jax.Array, ...]:
    """Planned pause, value, compute, latency and utility [P, C] of `multiplicity` [P, C, n], and
    the unit of cost [P].

    `pauses` [P, C] are planned pauses, or `BEST`.
    """
    problem, scale = search_problem(inputs, grid, settings)
    terms, all_bins = problem.terms, jnp.asarray(planned_pause_bins(grid))
    utility = problem.score(terms, multiplicity)
    # As in the search, the earliest of equal bins.
    best = (utility >= utility.max(-1, keepdims=True) - tie(utility.dtype)).argmax(-1)
    given = (all_bins == pauses[..., None]).argmax(-1)
    index = jnp.where(pauses == BEST, best, given)[..., None]
    weights = multiplicity.astype(terms.value.dtype)
    extended = weights * problem.live[:, None]
    value = expected_max(terms.log_reward_cdf, weights, grid)
    if UTILITIES.resolve("sampling") is settings.utility and settings.selection_exponent != 1:
        mean = expected_value(terms.value, weights, grid)
        ratio = jnp.where(value > 0, mean / jnp.where(value > 0, value, 1), 0)
        power = jnp.where(ratio > 0, ratio, 1) ** (1 - settings.selection_exponent)
        value = value * jnp.where(ratio > 0, power, 0)
    columns = (
        value,
        expected_compute(terms.length, extended),
        expected_latency(terms, extended),
        utility,
    )
    read = [jnp.take_along_axis(x, index, -1)[..., 0] for x in columns]
    return (all_bins[index[..., 0]], *read, scale)
