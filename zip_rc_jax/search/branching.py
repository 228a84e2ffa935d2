"""The candidate set `branching`: multiplicities above 1, and new samples from the root.

Traced by JAX.

The product set is far too large to list, so it is climbed. A step sets the multiplicity of one
prefix to any value and re-optimizes the planned pause; the best step is taken until none helps.
Steps of +1 would get stuck: once the latency of a long prefix is paid, its second copy is almost
free.

Four starts: the published action (so the result is never worse), the same with all new samples that
fit, extending nothing, and extending every live prefix. Against every multiplicity vector of 4
samples, 99.6% of random groups reach the exact optimum. The worst loses 0.008 of utility (see the
tests).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from zip_rc_jax.search.candidates import Choice, SearchProblem, add_back, published, tie


def branching(problem: SearchProblem) -> Choice:
    """The best end of the climb, then the no-harm pass once more."""
    live, root, budget = problem.live, problem.root, problem.budget
    multiplicity, _, _ = published(problem)
    grown = multiplicity + jnp.where(root & live, budget[:, None], 0)
    finished = problem.finished.astype(jnp.int32)
    starts = jnp.stack(
        [multiplicity, grown, finished, (problem.finished | (live & ~root)).astype(jnp.int32)], 1
    )
    choice = _climb(
        functools.partial(problem.score, problem.terms), starts, live, root, budget, problem.n
    )
    return add_back(problem, choice) if problem.add_back else choice


def _climb(
    score: Callable[[jax.Array], jax.Array],
    starts: jax.Array,
    live: jax.Array,
    root: jax.Array,
    budget: jax.Array,
    n: int,
) -> Choice:
    """Coordinate ascent over multiplicities from `starts` [P, A, n]; the best end: (multiplicity
    [P, n], F index [P], utility [P]).

    A step sets one live prefix (or the root) to any multiplicity that adds at most `budget` [P]
    prefixes in all.
    """
    State: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
    prompts, count, slots = starts.shape
    where, value = _step_settings(live, root, budget, n)

    def step(state: State) -> State:
        multiplicity, utility, _ = state
        # [P, A, T, n]
        trial = jnp.where(where[:, None], value[:, None, :, None], multiplicity[:, :, None])
        added = jnp.where(
            live[:, None, None], jnp.where(root, trial, jnp.maximum(trial - 1, 0)), 0
        ).sum(-1)
        # A step that may not be taken becomes no step, which never improves anything.
        allowed = added <= budget[:, None, None]
        trial = jnp.where(allowed[..., None], trial, multiplicity[:, :, None])
        by_bin = score(trial.reshape(prompts, -1, slots))
        # Maxima without a reduction: XLA on CPU fuses `max` and `argmax` with every exp before them
        # and then vectorises none (3x slower).
        u = functools.reduce(
            jnp.maximum, [by_bin[..., f] for f in range(by_bin.shape[-1])]
        ).reshape(prompts, count, -1)
        top, index = (x[..., 0] for x in jax.lax.top_k(u, 1))
        better = top > utility + tie(utility.dtype)
        moved = jnp.take_along_axis(trial, index[..., None, None], 2)[:, :, 0]
        return (
            jnp.where(better[..., None], moved, multiplicity),
            jnp.where(better, top, utility),
            better.any(),
        )

    multiplicity, utility, _ = jax.lax.while_loop(
        lambda state: state[-1], step, (starts, score(starts).max(-1), jnp.array(True))
    )
    row = jnp.arange(prompts)
    multiplicity = multiplicity[row, utility.argmax(-1)]
    by_bin = score(multiplicity[:, None])[:, 0]
    return multiplicity, by_bin.argmax(-1).astype(jnp.int32), by_bin.max(-1)


def _step_settings(
    live: jax.Array, root: jax.Array, budget: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """What a step of `_climb` may try: the slot it sets, bool [P, T, n] (none: no step), and the
    multiplicity, int32 [P, T].

    A live prefix takes 0 .. budget + 1 and the root 0 .. budget, slots in index order. Every prefix
    that exists leaves one place less for new ones, so `T` is about a third of all pairs of a slot
    and a multiplicity of 0 .. n.
    """
    places = [(taken, max(n - taken, 0)) for taken in range(live.shape[1])]
    number = jnp.arange(
        max(taken * (left + 2) + left + 1 for taken, left in places), dtype=jnp.int32
    )
    prefixes = (live & ~root).sum(-1, keepdims=True, dtype=jnp.int32)
    choices = budget[:, None] + 2
    # Live prefixes in index order, then the root.
    place = jnp.where(root, prefixes, jnp.cumsum(live & ~root, -1) - 1)
    mine = jnp.minimum(number // choices, prefixes)  # [P, T]
    value = number - mine * choices
    return live[:, None] & (place[:, None] == mine[..., None]) & (value < choices)[..., None], value
