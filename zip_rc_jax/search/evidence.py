"""Finished prefixes that give the same answer share their evidence.

The published search takes finished prefixes for independent: it values them by the chance that at
least one is right, as if someone knew which. But one answer is given in the end. Two prefixes that
agree are worth more than either, and two that differ cannot both be right. So each answer has a
posterior probability (as in CGES, arXiv 2511.02603), and the best of these is what stopping now is
worth.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.grid import Grid

# No prefix is surer than that: a head that says 1 would silence all others.
LEAST = 1e-3


def agreement(votes: jax.Array, answer: jax.Array) -> jax.Array:
    """[P, n, n] bool, which votes are for the same answer; a vote agrees with itself.

    Args:
      votes: [P, n] bool, prefixes that have finished with an answer.
      answer: [P, n] int, equal for equal answers.
    """
    both = votes[:, :, None] & votes[:, None, :]
    return both & (answer[:, :, None] == answer[:, None, :])


def answer_posterior(p_correct: jax.Array, same: jax.Array, wrong_answers: float) -> jax.Array:
    """Probability that the answer of each finished prefix is right.

    A prefix is right with its own probability, independent of the others. If it is wrong, it gives
    each of `wrong_answers` answers with the same probability. So an answer's odds, against no
    answer being right, are the product of `wrong_answers p / (1 - p)` over its prefixes, divided
    by `wrong_answers`.

    Args:
      p_correct: [P, n], of every prefix.
      same: see `agreement`.
      wrong_answers: at least 1.

    Returns:
      [P, n], in the dtype of `p_correct`; 0 where there is no vote.
    """
    p = jnp.clip(p_correct, LEAST, 1 - LEAST)
    evidence = jnp.log(p) - jnp.log1p(-p) + np.log(wrong_answers)
    log_odds = jnp.where(same, evidence[:, None, :], 0).sum(-1) - np.log(wrong_answers)
    log_odds = jnp.where(same.any(-1), log_odds, -jnp.inf)
    # Each answer counts once, in its first prefix.
    each = jnp.where(is_first(same), log_odds, -jnp.inf)
    none = jnp.zeros((*each.shape[:-1], 1), each.dtype)
    total = jax.nn.logsumexp(jnp.concatenate([each, none], -1), -1, keepdims=True)
    return jnp.exp(log_odds - total)


def is_first(same: jax.Array) -> jax.Array:
    """[P, n] bool, the first prefix of each answer; `same` as in `agreement`."""
    n = same.shape[-1]
    earlier = same & np.tri(n, k=-1, dtype=bool)
    return same.any(-1) & ~earlier.any(-1)


def share_evidence(
    joint: jax.Array, finished: jax.Array, answer: jax.Array, grid: Grid, wrong_answers: float
) -> jax.Array:
    """`joint` with the posterior of their answer as the reward of finished prefixes.

    The first prefix of an answer gets it, and the others of that answer get the lowest reward: they
    add nothing. On the grid a probability lies between two neighbouring centres, so the mass is
    split between these. Finished prefixes without an answer, and unfinished ones, stay as they are.

    The expected reward is taken for the probability of being right, so it lies between 0 and 1.
    Prefixes that were forked from one another count as independent, although they are not quite.

    Args:
      joint: [P, n, B_V, B_T].
      finished: [P, n] bool.
      answer: [P, n] int, equal for equal answers; below 0 is none.
    """
    centres = np.asarray(grid.reward_centres)
    votes = finished & (answer >= 0)
    value = joint.sum(-1) @ jnp.asarray(centres, joint.dtype)
    same = agreement(votes, answer)
    worth = jnp.where(is_first(same), answer_posterior(value, same, wrong_answers), centres[0])
    # Between the two nearest centres: a triangle around each centre.
    left = np.diff(centres, prepend=centres[0] - 1)
    right = np.diff(centres, append=centres[-1] + 1)
    gap = jnp.clip(worth, centres[0], centres[-1])[..., None] - jnp.asarray(centres, joint.dtype)
    reward = jnp.clip(1 - jnp.where(gap < 0, -gap / left, gap / right), 0)
    # A finished prefix has nothing left to generate.
    ended = jnp.zeros_like(joint).at[..., 0].set(reward.astype(joint.dtype))
    return jnp.where(votes[..., None, None], ended, joint)
