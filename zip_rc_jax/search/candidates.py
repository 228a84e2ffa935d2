"""Candidate sets without branching: the authors' keep-sets, and all subsets. Traced by JAX.

A search takes a `SearchProblem` and returns a `Choice`. `published` and `exhaustive` are here,
`branching` in its own module.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.grid import Grid
from zip_rc_jax.search.utility import PrefixTerms

Choice: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""The best candidate of each prompt: multiplicity [P, n] int32, index on the `F` axis, utility."""


@dataclasses.dataclass(frozen=True)
class SearchProblem:
    """What a search needs of `P` prompts in `n` slots, inside of a traced function.

    Attributes:
      joint: [P, n, B_V, B_T], each summing to 1; any distribution in empty slots.
      live, finished: [P, n] bool, prefixes that can be extended (the root included), and those that
        have ended.
      root: [n] bool, the slot of the root.
      budget: [P] int, most prefixes to add.
      n: most prefixes of a prompt.
      grid: of the joints.
      terms: of the joints.
      score: utility [P, C, F] of terms and multiplicity [P, C, n].
      add_back: whether dropped prefixes return where that does not lower the utility.
    """

    joint: jax.Array
    live: jax.Array
    finished: jax.Array
    root: jax.Array
    budget: jax.Array
    n: int
    grid: Grid
    terms: PrefixTerms
    score: Callable[[PrefixTerms, jax.Array], jax.Array]
    add_back: bool

    @property
    def samples(self) -> jax.Array:
        """[P, n] bool, prefixes other than the root."""
        return (self.live | self.finished) & ~self.root


def published(problem: SearchProblem) -> Choice:
    """The authors' search: the best keep-set, then the no-harm pass."""
    keep = published_keep_sets(problem.joint, problem.samples, problem.finished, problem.grid)
    choice = best_keep_set(problem.score(problem.terms, keep), keep)
    return add_back(problem, choice) if problem.add_back else choice


def exhaustive(problem: SearchProblem) -> Choice:
    """The best of all subsets of live prefixes.

    It needs no no-harm pass, as it already prefers the larger of equal sets.
    """
    slots = problem.live.shape[1]
    subsets = jnp.asarray((np.arange(2**slots)[:, None] >> np.arange(slots)) & 1, bool)
    keep = (subsets & problem.live[:, None]) | problem.finished[:, None]
    return best_keep_set(problem.score(problem.terms, keep), keep)


def add_back(problem: SearchProblem, choice: Choice) -> Choice:
    """The no-harm pass, at the planned pause of `choice`."""
    multiplicity, bin_index, utility = choice
    score = functools.partial(problem.score, problem.terms.at_bin(bin_index))
    multiplicity, utility = _no_harm(score, multiplicity, utility, problem.live & ~problem.root)
    return multiplicity, bin_index, utility


def published_keep_sets(
    joint: jax.Array, candidates: jax.Array, finished: jax.Array, grid: Grid
) -> jax.Array:
    """The authors' keep-sets, bool [P, n^2 + 1, n], ordered by (k1, k2).

    Orderings take finished prefixes too; empty slots come last.

    All prefixes are the keep-set of every (n, k2) and (k1, n): only the first of them, (0, n), is
    listed.
    """
    slots = candidates.shape[1]
    counts = np.arange(slots + 1)[:, None]
    # [P, k1, n]
    shortest = _rank(jnp.where(candidates, grid.expected_length(joint), jnp.inf))[:, None] < counts
    # [P, k2, n]
    best = _rank(jnp.where(candidates, -grid.expected_reward(joint), jnp.inf))[:, None] < counts
    k1, k2 = np.transpose([(a, b) for a in range(slots) for b in range(slots + (a == 0))])
    return (shortest & candidates[:, None])[:, k1] | (
        (best & candidates[:, None]) | finished[:, None]
    )[:, k2]


def _rank(key: jax.Array) -> jax.Array:
    """Position [P, n] of each key [P, n] in ascending order; equal keys keep index order."""
    mine, other = key[:, :, None], key[:, None, :]
    index = np.arange(key.shape[-1])
    return ((other < mine) | ((other == mine) & (index < index[:, None]))).sum(-1)


def tie(dtype: Any) -> float:
    """Utilities this close are equal: the authors' 1e-12, and in float32 the rounding error of the
    sums."""
    return max(1e-12, 4 * float(jnp.finfo(dtype).eps))


def best_keep_set(utility: jax.Array, keep: jax.Array) -> Choice:
    """Best of `utility` [P, C, F] with keep-sets [P, C, n]: (multiplicity [P, n], index on the F
    axis [P], utility [P]).

    Ties prefer the larger keep-set, then the earlier future bin, then the earlier candidate.
    """
    prompts, count, bins = utility.shape
    # Over bins without a reduction, see `branching`.
    top = functools.reduce(jnp.maximum, [utility[..., f] for f in range(bins)]).max(-1)[
        :, None, None
    ]
    tied = utility >= top - tie(utility.dtype)
    # One number orders them: the larger keep-set, then the earlier bin, then the earlier candidate.
    place = np.arange(bins, dtype=np.int32) * count + np.arange(count, dtype=np.int32)[:, None]
    rank = (keep.shape[-1] - keep.sum(-1, dtype=jnp.int32))[..., None] * (bins * count) + place
    rank = jnp.where(tied, rank, np.iinfo(np.int32).max)
    first = functools.reduce(jnp.minimum, [rank[..., f] for f in range(bins)]).min(-1) % (
        bins * count
    )
    bin_index, candidate = first // count, first % count
    row = jnp.arange(prompts)
    return keep[row, candidate].astype(jnp.int32), bin_index, utility[row, candidate, bin_index]


def _no_harm(
    score: Callable[[jax.Array], jax.Array],
    multiplicity: jax.Array,
    utility: jax.Array,
    allowed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns dropped prefixes among `allowed` [P, n] in index order wherever that does not lower
    the utility, at the same future bin."""

    def consider(
        state: tuple[jax.Array, jax.Array], slot: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        multiplicity, utility = state
        here = jnp.arange(allowed.shape[-1]) == slot
        trial = jnp.where(here, 1, multiplicity)
        with_it = score(trial[:, None])[:, 0, 0]
        better = ((multiplicity == 0) & allowed & here).any(-1) & (
            with_it >= utility - tie(utility.dtype)
        )
        return (
            jnp.where(better[:, None], trial, multiplicity),
            jnp.where(better, with_it, utility),
        ), None

    state, _ = jax.lax.scan(consider, (multiplicity, utility), jnp.arange(allowed.shape[-1]))
    return state
