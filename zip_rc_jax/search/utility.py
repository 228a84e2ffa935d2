"""The sampling utility in closed form, for every candidate of every prompt at once (paper, section
4).

A group is all prefixes of one prompt. A candidate gives each prefix a multiplicity `k_i` (0 =
pause, 1 = continue, 2+ = branch into independent copies) and is planned with one future pause bin
`B`. Its utility is

    U = E[max] - beta * (alpha * E[compute] + (1 - alpha) * E[latency]) / N

`E[max]` runs over extended and finished prefixes, the costs over extended ones. Everything random
is an order statistic of independent variables, so a group's distribution function is `prod_i
CDF_i^{k_i}`: multiplicities are exponents, and all candidates are one matrix product of `k` with
log CDFs. `PrefixTerms` holds what depends on the joints only; `candidate_utility` adds the
candidates.

Axes: `P` prompts, `n` prefix slots, `C` candidates, `F` future bins (`F = B_T`: none, then 1 ..
  B_T-1), `B_V` x `B_T` the grid.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.grid import Grid

# Stands for log 0. Finite, so multiplicity 0 times it is 0 (a factor of exactly 1), and so low that
# any positive multiplicity of it gives exp(...) = 0.
LOG_ZERO = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixTerms:
    """What the joints contribute to the utility, per prefix and future bin.

    All in the joint's floating dtype.

    Attributes:
      log_reward_cdf: [P, n, B_V - 1, F], log CDF of the final reward when paused at each future
        bin. The last bin (CDF 1) is left out.
      log_length_cdf: [P, n, B_T - 1], log CDF of the remaining length, not paused. Pausing at `B`
        only sets it to 1 from bin `B` on.
      value: [P, n, F], expected final reward.
      length: [P, n, F], expected tokens still to generate.
      longest: [P, F], midpoint of the longest length bin a prefix can reach, in tokens.
      length_steps: [P, F, B_T - 1], tokens between neighbouring length midpoints, 0 from the future
        bin on.
    """

    log_reward_cdf: jax.Array
    log_length_cdf: jax.Array
    value: jax.Array
    length: jax.Array
    longest: jax.Array
    length_steps: jax.Array

    def at_bin(self, index: jax.Array) -> PrefixTerms:
        """The terms of one future bin per prompt (`index` [P] int, a position on the `F` axis):
        same shapes with F = 1."""

        def pick(x: jax.Array, axis: int) -> jax.Array:
            return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis)

        return PrefixTerms(
            pick(self.log_reward_cdf, 3),
            self.log_length_cdf,
            pick(self.value, 2),
            pick(self.length, 2),
            pick(self.longest, 1),
            pick(self.length_steps, 1),
        )


class Utility(Protocol):
    """What the search maximizes.

    `candidate_utility` is the paper's; a function of your own takes its place by `config.utility`.

    It is traced by JAX once per program, so it uses `jax.numpy` and no Python control flow on
    values.

    Args:
      terms: what the joints contribute, per prefix and future bin.
      multiplicity: [P, C, n] bool or int32, copies of each prefix in each candidate; 0 outside of
        it, and for empty slots.
      unfinished: [P, n] bool; the others are finished.
      alpha, beta: [P, 1, 1] prices of each prompt.
      normalizer: [P], tokens that one unit of cost stands for.
      selection_exponent: `config.selection_exponent`.
      grid: of the joints.

    Returns:
      [P, C, F] floating: utility of every candidate under every planned pause, `F` as in `terms`.
      No NaN.
    """

    def __call__(
        self,
        terms: PrefixTerms,
        multiplicity: jax.Array,
        unfinished: jax.Array,
        *,
        alpha: jax.Array,
        beta: jax.Array,
        normalizer: jax.Array,
        selection_exponent: float,
        grid: Grid,
    ) -> jax.Array: ...


def planned_pause_bins(grid: Grid) -> np.ndarray:
    """Planned pause bins in search order, int32 [F]: -1 (none), then 1 .. B_T - 1."""
    return np.array([-1, *range(1, grid.n_length)], np.int32)


def sharpen(joint: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Joints [..., B_V, B_T] raised to `1 / temperature`, then cut to the fewest likeliest cells
    holding `top_p`; each sums to 1."""
    cells = joint.reshape(*joint.shape[:-2], -1)
    if temperature != 1:
        # Dividing by the largest cell first keeps small temperatures from underflowing every cell.
        cells = (cells / cells.max(-1, keepdims=True)) ** (1 / temperature)
    cells = cells / cells.sum(-1, keepdims=True)
    if top_p < 1:
        order = jnp.argsort(-cells, axis=-1)
        descending = jnp.take_along_axis(cells, order, -1)
        kept = jnp.where(jnp.cumsum(descending, -1) - descending < top_p, descending, 0)
        cells = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)
        cells = cells / cells.sum(-1, keepdims=True)
    return cells.reshape(joint.shape)


def reward_marginals(joint: jax.Array, grid: Grid) -> jax.Array:
    """`R_i(b)` [..., B_V, F] of joints [..., B_V, B_T]: mass at or past the future bin is worth the
    lowest reward."""
    before = np.arange(grid.n_length)[:, None] < np.where(
        planned_pause_bins(grid) < 0, grid.n_length, planned_pause_bins(grid)
    )
    reached = _matmul("...bl,lf->...bf", joint, before)
    return reached.at[..., 0, :].add(_matmul("...l,lf->...f", joint.sum(-2), ~before))


def length_marginals(joint: jax.Array, grid: Grid) -> jax.Array:
    """`T_i(l)` [..., B_T, F] of joints [..., B_V, B_T]: mass at or past the future bin lies in the
    future bin."""
    ends_in = np.arange(grid.n_length) == _reached(grid)[..., None]  # [F, B_T, B_T]
    return _matmul("...l,flm->...mf", joint.sum(-2), ends_in)


def log_cdf(probabilities: jax.Array) -> jax.Array:
    """Log CDF [..., K - 1, F] of distributions [..., K, F]; the last entry, log 1, is left out.

    `LOG_ZERO` where the CDF is 0.
    """
    size = probabilities.shape[-2]
    cdf = _matmul("...kf,jk->...jf", probabilities, np.tri(size - 1, size))
    return jnp.maximum(jnp.log(jnp.minimum(cdf, 1)), LOG_ZERO)


def prefix_terms(joint: jax.Array, grid: Grid) -> PrefixTerms:
    """The terms of joints [P, n, B_V, B_T] (each summing to 1)."""
    dtype = joint.dtype
    reward, length = reward_marginals(joint, grid), length_marginals(joint, grid)
    midpoints = np.asarray(grid.length_midpoints)
    last = _reached(grid)[:, -1]
    steps = np.diff(midpoints) * (np.arange(grid.n_length - 1) < last[:, None])
    prompts = joint.shape[0]
    return PrefixTerms(
        log_reward_cdf=log_cdf(reward),
        log_length_cdf=log_cdf(length[..., :1])[..., 0],
        value=_matmul("...bf,b->...f", reward, np.asarray(grid.reward_centres)),
        length=_matmul("...lf,l->...f", length, midpoints),
        longest=jnp.broadcast_to(jnp.asarray(midpoints[last], dtype), (prompts, len(last))),
        length_steps=jnp.broadcast_to(jnp.asarray(steps, dtype), (prompts, *steps.shape)),
    )


def expected_max(log_reward_cdf: jax.Array, multiplicity: jax.Array, grid: Grid) -> jax.Array:
    """`E[max]` [P, C, F] over `multiplicity` [P, C, n] of prefixes with `log_reward_cdf` [P, n, B_V
    - 1, F].

    Summed by parts: `sum_b v_b (F(b) - F(b-1)) = v_last - sum_{b < last} (v_{b+1} - v_b) F(b)`.
      Without any prefix it is the lowest centre.
    """
    log_group = _matmul("pcn,pnbf->pcbf", multiplicity, log_reward_cdf)
    centres = np.asarray(grid.reward_centres)
    # Unrolled over the few reward bins: exp and sum become one pass, a third faster than a product
    # with a vector.
    return centres[-1] - sum(
        float(gap) * jnp.exp(log_group[:, :, b]) for b, gap in enumerate(np.diff(centres))
    )


def expected_value(value: jax.Array, multiplicity: jax.Array, grid: Grid) -> jax.Array:
    """`E[avg]` [P, C, F]: mean of `value` [P, n, F] weighted by `multiplicity` [P, C, n]; the
    lowest centre without any prefix."""
    count = multiplicity.sum(-1)[..., None]
    mean = _matmul("pcn,pnf->pcf", multiplicity, value) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, grid.reward_centres[0])


def expected_compute(length: jax.Array, extended: jax.Array) -> jax.Array:
    """`E[compute]` [P, C, F] in tokens: all tokens of `extended` [P, C, n] prefixes with expected
    `length` [P, n, F]."""
    return _matmul("pcn,pnf->pcf", extended, length)


def expected_latency(terms: PrefixTerms, extended: jax.Array) -> jax.Array:
    """`E[latency]` [P, C, F] in tokens: the longest of `extended` [P, C, n] prefixes; 0 where
    nothing is extended."""
    cdf = jnp.exp(_matmul("pcn,pnl->pcl", extended, terms.log_length_cdf))
    latency = terms.longest[:, None] - sum(
        terms.length_steps[:, None, :, i] * cdf[:, :, None, i] for i in range(cdf.shape[-1])
    )
    return jnp.where((extended > 0).any(-1)[..., None], latency, 0)


def normalizer(
    joint: jax.Array, tokens_so_far: jax.Array, counted: jax.Array, grid: Grid
) -> jax.Array:
    """`N` [P] in tokens: mean of tokens so far [P, n] plus expected remaining tokens over `counted`
    [P, n]; 1 where none is counted."""
    total = tokens_so_far.astype(joint.dtype) + grid.expected_length(joint)
    count = counted.sum(-1)
    return jnp.where(count > 0, jnp.where(counted, total, 0).sum(-1) / jnp.maximum(count, 1), 1)


def candidate_utility(
    terms: PrefixTerms,
    multiplicity: jax.Array,
    unfinished: jax.Array,
    alpha: jax.Array | float,
    beta: jax.Array | float,
    normalizer: jax.Array,
    selection_exponent: float,
    grid: Grid,
) -> jax.Array:
    """`U` [P, C, F] of candidates under every future bin. The utility "sampling".

    Args:
      terms: of the group's joints.
      multiplicity: [P, C, n] integers, 0 for a prefix outside the candidate (and for slots that
        hold no prefix).
      unfinished: [P, n] bool; finished prefixes count for reward and cost nothing.
      alpha, beta: prices, numbers or [P, 1, 1].
      normalizer: [P], `N` in tokens.
      selection_exponent: `s` of the value term `E[avg]^(1-s) E[max]^s`; both expectations are those
        under the planned pause.
      grid: of the joints.

    Memory: the largest arrays are [P, C, B_V - 1, F] and [P, C, n].
    """
    weights = multiplicity.astype(terms.value.dtype)
    extended = weights * unfinished[:, None]
    value = expected_max(terms.log_reward_cdf, weights, grid)
    if selection_exponent != 1:
        mean = expected_value(terms.value, weights, grid)
        # The ratio form needs no power of zero: E[max] = 0 only where E[avg] = 0, and then the
        # value term is 0.
        ratio = jnp.where(value > 0, mean / jnp.where(value > 0, value, 1), 0)
        power = jnp.where(ratio > 0, ratio, 1) ** (1 - selection_exponent)
        value = value * jnp.where(ratio > 0, power, 0)
    cost = alpha * expected_compute(terms.length, extended) + (1 - alpha) * expected_latency(
        terms, extended
    )
    return value - beta * cost / normalizer[:, None, None]


def _reached(grid: Grid) -> np.ndarray:
    """Length bin that each length bin becomes under each future bin, int [F, B_T]."""
    bins = np.arange(grid.n_length)
    return np.stack([bins if b < 0 else np.minimum(bins, b) for b in planned_pause_bins(grid)])


def _matmul(spec: str, a: jax.Array, b: jax.Array | np.ndarray) -> jax.Array:
    """Einsum in the dtype of `a` at full precision: accelerators would otherwise round log CDFs to
    8 or 10 bits."""
    return jnp.einsum(spec, a, jnp.asarray(b, a.dtype), precision=jax.lax.Precision.HIGHEST)
