"""Which prefixes to extend next: the meta-action with the highest sampling utility (paper, section 4).

All candidates of all prompts under all planned pauses are scored in one jitted call (`utility.candidate_utility`). Three candidate sets:

- `published`, the authors' search: the `k1` prefixes with the smallest expected remaining length united with the `k2` of the highest
  expected value and all finished ones, for all `k1, k2`; then a no-harm pass in index order.
- `exhaustive`: every subset of the unfinished prefixes together with all finished ones. The exact maximum over multiplicities 0 and 1.
- `branching`: multiplicities above 1 and new samples from the root, which is itself a prefix. The product set is far too large to list,
  so it is climbed: a step sets the multiplicity of one prefix to any value (the cost of latency makes the second copy of a long prefix
  almost free once the first is paid, so steps of +1 would get stuck) and re-optimises the planned pause; the best such step is taken
  until none helps. Four starts: the published action (so it is never worse than that), the same with all new samples that fit, extending
  nothing, and extending every live prefix. Against every multiplicity vector of 4 samples, 99.6% of random groups reach the exact
  optimum and the worst loses 0.008 of utility (see the tests).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.utility import PrefixTerms, candidate_utility, future_bins, normaliser, prefix_terms, sharpen

MAX_EXHAUSTIVE = 10
BLOCK = 16  # prompts that are scored in one call; the program is the same for any number of prompts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MetaAction:
    """One decision per prompt. `P` prompts, `n` prefix slots (the last one is the root when branching).

    Attributes:
      keep: [P, n] bool, prefixes of the action: extended ones and all finished ones.
      future_bin: [P] int32, planned pause bin, -1 for none.
      utility: [P], `U` of the action, in the dtype of the joint.
      multiplicity: [P, n] int32: 0 = pause, 1 = continue (or finished), 2+ = branch; at the root, how many new samples to start.
    """

    keep: jax.Array
    future_bin: jax.Array
    utility: jax.Array
    multiplicity: jax.Array


def choose_meta_action(
    joint: Any,
    unfinished: Any,
    tokens_so_far: Any,
    *,
    grid: Grid,
    config: DecodeConfig,
    exists: Any = None,
    free_rows: Any = None,
    normaliser: Any = None,
    must_extend: Any = None,
    alpha: Any = None,
    beta: Any = None,
) -> MetaAction:
    """The best meta-action of each prompt, from the candidate set `config.candidates`.

    Args:
      joint: [P, n, B_V, B_T] float, the joint of each prefix (scaled here to sum to 1). float64 is used where given and enabled, else
        float32. A slot whose joint is not finite, is negative somewhere or has no mass is treated as empty: it is neither kept nor
        counted, and nothing fails. Lists of numbers will do, here and below.
      unfinished: [P, n] bool. The others are finished: always kept, they count for reward and cost nothing.
      tokens_so_far: [P, n], tokens generated so far (0 for the root).
      grid: of the joints.
      config: reads alpha, beta, candidates, no_harm, skill, joint_temperature, joint_top_p and (branching) n. New values of alpha and beta
        do not recompile.
      exists: [P, n] bool, slots that hold a prefix; default all.
      free_rows: [P] int, most prefixes that branching may add to the prompt; default as many as `config.n` allows. Added are the copies
        beyond the first of a live prefix and every sample from the root. The prompt never exceeds `config.n` prefixes, finished and
        paused ones included, the root not.
      normaliser: [P], tokens that one unit of cost stands for; default the mean over the group of tokens so far plus expected remaining
        tokens. When branching the root does not count, unless it is alone.
      must_extend: [P] bool, prompts that may not choose to extend nothing (where they can extend anything); default none.
      alpha, beta: [P], prices of each prompt; default the config's.

    With `candidates="branching"` the last slot is the root, an unfinished prefix of no tokens; 0 there starts no new sample. An action that
    extends nothing has multiplicity 0 at every unfinished slot.

    Memory: of each prompt at most 2.5 C (B_V B_T + n) numbers at once, with `C` = n^2 + 1 candidates (published), 2^n (exhaustive) or
    (config.n + 2) (config.n + 5) (branching, per step). On the authors' 7 x 8 grid in float32: 42 KB, 164 KB and 85 KB for 8 prefixes,
    and 0.9 MB (published) and 1.1 MB (branching) for 32.

    Outside of `jax.jit` a prompt's decision is the same, bit by bit, alone and in any company. No prompts give an empty decision.

    Raises:
      UsageError: no grid or configuration, what is no array of numbers or truth values, shapes that do not fit together or to the grid, or
        `exhaustive` with more than 10 slots.
    """
    if not isinstance(grid, Grid):
        raise UsageError(f"grid={shown(grid)}", "it is no Grid", "pass the grid that the joints are of, such as lm.head.grid")
    if not isinstance(config, DecodeConfig):
        raise UsageError(f"config={shown(config)}", "it is no DecodeConfig", "pass a DecodeConfig")
    joint = _array("joint", joint, "number")
    if not isinstance(joint, jax.core.Tracer) and jnp.issubdtype(joint.dtype, jnp.floating):
        joint = np.asarray(joint)
    # float64 stays float64 only inside `jax.enable_x64`; canonicalize_dtype knows.
    double = joint.dtype == np.float64
    joint = joint.astype(jax.dtypes.canonicalize_dtype(np.float64) if double else np.float32)
    if joint.ndim != 4 or joint.shape[1] == 0 or joint.shape[2:] != (grid.n_reward, grid.n_length):
        raise UsageError(
            f"joint of shape {joint.shape}",
            f"the grid has {grid.n_reward} reward bins and {grid.n_length} length bins",
            f"pass joints of shape [prompts, prefixes, {grid.n_reward}, {grid.n_length}]",
        )
    prompts, slots = joint.shape[:2]
    per_slot = {"unfinished": (unfinished, "bool"), "tokens_so_far": (tokens_so_far, "number"), "exists": (exists, "bool")}
    per_prompt = {"free_rows": (free_rows, "count"), "normaliser": (normaliser, "number"), "must_extend": (must_extend, "bool")}
    per_prompt |= {"alpha": (alpha, "number"), "beta": (beta, "number")}
    given: dict[str, Any] = {}
    for name, (value, kind) in (per_slot | per_prompt).items():
        if value is None and name not in ("unfinished", "tokens_so_far"):
            continue
        given[name] = _array(name, value, kind)
        expected = (prompts, slots) if name in per_slot else (prompts,)
        if given[name].shape != expected:
            raise UsageError(
                f"{name} of shape {given[name].shape}",
                f"joint has shape {joint.shape}, {prompts} prompts of {slots} prefixes",
                f"pass {name} of shape {expected}",
            )
    if config.candidates == "exhaustive" and slots > MAX_EXHAUSTIVE:
        raise UsageError(
            f"{slots} prefixes with candidates='exhaustive'",
            f"all 2^{slots} subsets would be scored at every decision",
            f"use at most {MAX_EXHAUSTIVE} prefixes or candidates='published'",
        )
    # One set of types, so that there is one program for it.
    arrays = {
        "joint": joint,
        "unfinished": given["unfinished"],
        "tokens_so_far": given["tokens_so_far"].astype(joint.dtype),
        "exists": given.get("exists", np.ones((prompts, slots), bool)),
        "free_rows": given.get("free_rows", np.full(prompts, config.n, np.int32)),
        "scale": given["normaliser"].astype(joint.dtype) if "normaliser" in given else None,
        "must_extend": given.get("must_extend"),
        "alpha": given.get("alpha", np.full(prompts, config.alpha)).astype(joint.dtype),
        "beta": given.get("beta", np.full(prompts, config.beta)).astype(joint.dtype),
    }
    decide = functools.partial(
        _choose,
        grid=grid,
        candidates=config.candidates,
        n=config.n,
        no_harm=config.no_harm,
        skill=config.skill,
        temperature=config.joint_temperature,
        top_p=config.joint_top_p,
    )
    if any(isinstance(x, jax.core.Tracer) for x in arrays.values()):
        return decide(**arrays)
    return _in_blocks(decide, {name: None if x is None else np.asarray(x) for name, x in arrays.items()}, prompts)


def _in_blocks(decide: Callable[..., MetaAction], arrays: dict[str, np.ndarray | None], prompts: int) -> MetaAction:
    """`decide` for `BLOCK` prompts at a time, the last block filled up with copies of its first prompt.

    So the compiled program never depends on how many prompts there are, and nothing of one prompt's decision on the others: in programs of
    other shapes the same sums are rounded otherwise, which shows where two actions are as good as each other.
    """
    found: list[MetaAction] = []
    for start in range(0, max(prompts, 1), BLOCK):
        # Without any prompt an empty one is decided for, whose results are cut away.
        index = np.arange(start, start + BLOCK)
        index[index >= prompts] = start
        block = {
            name: None if x is None else x[index] if prompts else np.zeros((BLOCK, *x.shape[1:]), x.dtype) for name, x in arrays.items()
        }
        found.append(decide(**block))
    return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate([np.asarray(x) for x in parts])[:prompts]), *found)


def _array(name: str, value: Any, kind: str) -> Any:
    """`value` as an array of NumPy (one of JAX stays one) of truth values, whole numbers or numbers.

    Raises:
      UsageError: it is none. Truth values may be given as 0 and 1, and whole numbers as floating ones.
    """
    words = {"bool": "truth values", "count": "whole numbers", "number": "numbers"}[kind]
    if not isinstance(value, (np.ndarray, jax.Array)):
        try:
            value = np.asarray(value)
        except Exception as error:  # lists of unequal length, or anything that cannot become an array
            raise UsageError(f"{name}={shown(value)}", f"it is no array of {words} ({in_short(error)})", f"pass {words}") from None
    dtype = value.dtype
    logical = jnp.issubdtype(dtype, np.bool_)
    if not (logical or jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)):
        raise UsageError(f"{name} of type {dtype}", f"it holds no {words}", f"pass {words}")
    if isinstance(value, jax.core.Tracer):
        return value.astype(bool) if kind == "bool" else value.astype(np.int32) if kind == "count" else value
    if kind == "bool" and not logical:
        if not ((value == 0) | (value == 1)).all():
            raise UsageError(f"{name} of type {dtype}", "it holds other values than 0 and 1", f"pass {words}")
        return np.asarray(value).astype(bool)
    if kind == "count":
        if not (np.asarray(value) == np.floor(np.asarray(value))).all():
            raise UsageError(f"{name} of type {dtype}", f"it holds no {words}", f"pass {words}")
        return np.clip(np.asarray(value), -1, 2**31 - 1).astype(np.int32)
    return value


@functools.partial(jax.jit, static_argnames=("candidates", "grid", "n", "no_harm", "skill", "temperature", "top_p"))
def _choose(
    joint: jax.Array,
    unfinished: jax.Array,
    tokens_so_far: jax.Array,
    exists: jax.Array,
    free_rows: jax.Array,
    scale: jax.Array | None,
    must_extend: jax.Array | None,
    alpha: jax.Array,
    beta: jax.Array,
    *,
    grid: Grid,
    candidates: str,
    n: int,
    no_harm: bool,
    skill: float,
    temperature: float,
    top_p: float,
) -> MetaAction:
    slots = exists.shape[1]
    exists = exists & (jnp.isfinite(joint) & (joint >= 0)).all((-2, -1)) & (joint.sum((-2, -1)) > 0)
    # Empty slots get any distribution at all, so that nothing in them can turn into a NaN next to a multiplicity of 0.
    joint = sharpen(jnp.where(exists[..., None, None], joint, 1), temperature, top_p)
    finished, live = exists & ~unfinished, exists & unfinished
    root = jnp.arange(slots) == (slots - 1 if candidates == "branching" else -1)
    samples = exists & ~root
    if scale is None:
        alone = ~samples.any(-1, keepdims=True)
        scale = normaliser(joint, tokens_so_far, jnp.where(alone, exists, samples), grid)
    scale = scale.astype(joint.dtype)
    alpha, beta = (x.astype(joint.dtype)[:, None, None] for x in (alpha, beta))
    terms = prefix_terms(joint, grid)
    budget = jnp.clip(jnp.minimum(free_rows, n - samples.sum(-1)), 0)
    if must_extend is not None:
        must_extend = must_extend & ((live & ~root).any(-1) | ((live & root).any(-1) & (budget > 0)))

    def score(terms: PrefixTerms, multiplicity: jax.Array) -> jax.Array:
        """Utility [P, C, F] of `multiplicity` [P, C, n]; -inf where a prompt that must extend something would not."""
        u = candidate_utility(terms, multiplicity, live, alpha, beta, scale, skill, grid)
        if must_extend is None:
            return u
        idle = must_extend[:, None] & ~((multiplicity > 0) & live[:, None]).any(-1)
        return jnp.where(idle[..., None], -jnp.inf, u)

    if candidates == "exhaustive":
        subsets = jnp.asarray((np.arange(2**slots)[:, None] >> np.arange(slots)) & 1, bool)
        keep = (subsets & live[:, None]) | finished[:, None]
    else:
        keep = _published_keep_sets(joint, samples, finished, grid)
    multiplicity, bin_index, utility = _best(score(terms, keep), keep)
    no_harm = no_harm and candidates != "exhaustive"  # the exhaustive maximum already prefers the larger set
    if no_harm:
        multiplicity, utility = _no_harm(functools.partial(score, terms.at_bin(bin_index)), multiplicity, utility, live & ~root)
    if candidates == "branching":
        grown = multiplicity + jnp.where(root & live, budget[:, None], 0)
        starts = jnp.stack([multiplicity, grown, finished.astype(jnp.int32), (finished | (live & ~root)).astype(jnp.int32)], 1)
        multiplicity, bin_index, utility = _climb(functools.partial(score, terms), starts, live, root, budget, n)
        if no_harm:
            multiplicity, utility = _no_harm(functools.partial(score, terms.at_bin(bin_index)), multiplicity, utility, live & ~root)
    return MetaAction(multiplicity > 0, jnp.asarray(future_bins(grid))[bin_index], utility, multiplicity)


def _published_keep_sets(joint: jax.Array, candidates: jax.Array, finished: jax.Array, grid: Grid) -> jax.Array:
    """The authors' keep-sets, bool [P, n^2 + 1, n], ordered by (k1, k2). Orderings take finished prefixes too; empty slots come last.

    All prefixes are the keep-set of every (n, k2) and (k1, n): only the first of them, (0, n), is listed.
    """
    slots = candidates.shape[1]
    counts = np.arange(slots + 1)[:, None]
    shortest = _rank(jnp.where(candidates, grid.expected_length(joint), jnp.inf))[:, None] < counts  # [P, k1, n]
    best = _rank(jnp.where(candidates, -grid.expected_reward(joint), jnp.inf))[:, None] < counts  # [P, k2, n]
    k1, k2 = np.transpose([(a, b) for a in range(slots) for b in range(slots + (a == 0))])
    return (shortest & candidates[:, None])[:, k1] | ((best & candidates[:, None]) | finished[:, None])[:, k2]


def _rank(key: jax.Array) -> jax.Array:
    """Position [P, n] of each key [P, n] in ascending order; equal keys keep index order."""
    mine, other = key[:, :, None], key[:, None, :]
    index = np.arange(key.shape[-1])
    return ((other < mine) | ((other == mine) & (index < index[:, None]))).sum(-1)


def _tie(dtype: Any) -> float:
    """Utilities this close are equal: the authors' 1e-12, and in float32 the rounding error of the sums."""
    return max(1e-12, 4 * float(jnp.finfo(dtype).eps))


def _best(utility: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Best of `utility` [P, C, F] with keep-sets [P, C, n]: (multiplicity [P, n], index on the F axis [P], utility [P]).

    Ties prefer the larger keep-set, then the earlier future bin, then the earlier candidate.
    """
    prompts, count, bins = utility.shape
    # Over bins without a reduction, see `_climb`.
    top = functools.reduce(jnp.maximum, [utility[..., f] for f in range(bins)]).max(-1)[:, None, None]
    tied = utility >= top - _tie(utility.dtype)
    # One number orders them: the larger keep-set, then the earlier bin, then the earlier candidate.
    place = np.arange(bins, dtype=np.int32) * count + np.arange(count, dtype=np.int32)[:, None]
    rank = (keep.shape[-1] - keep.sum(-1, dtype=jnp.int32))[..., None] * (bins * count) + place
    rank = jnp.where(tied, rank, np.iinfo(np.int32).max)
    first = functools.reduce(jnp.minimum, [rank[..., f] for f in range(bins)]).min(-1) % (bins * count)
    bin_index, candidate = first // count, first % count
    row = jnp.arange(prompts)
    return keep[row, candidate].astype(jnp.int32), bin_index, utility[row, candidate, bin_index]


def _no_harm(
    score: Callable[[jax.Array], jax.Array], multiplicity: jax.Array, utility: jax.Array, allowed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns dropped prefixes among `allowed` [P, n] in index order wherever that does not lower the utility, at the same future bin."""

    def consider(state: tuple[jax.Array, jax.Array], slot: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        multiplicity, utility = state
        here = jnp.arange(allowed.shape[-1]) == slot
        trial = jnp.where(here, 1, multiplicity)
        with_it = score(trial[:, None])[:, 0, 0]
        better = ((multiplicity == 0) & allowed & here).any(-1) & (with_it >= utility - _tie(utility.dtype))
        return (jnp.where(better[:, None], trial, multiplicity), jnp.where(better, with_it, utility)), None

    state, _ = jax.lax.scan(consider, (multiplicity, utility), jnp.arange(allowed.shape[-1]))
    return state


def _climb(
    score: Callable[[jax.Array], jax.Array], starts: jax.Array, live: jax.Array, root: jax.Array, budget: jax.Array, n: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Coordinate ascent over multiplicities from `starts` [P, A, n]; the best end: (multiplicity [P, n], F index [P], utility [P]).

    A step sets one live prefix (or the root) to any multiplicity that adds at most `budget` [P] prefixes in all.
    """
    State: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
    prompts, count, slots = starts.shape
    where, value = _settings(live, root, budget, n)

    def step(state: State) -> State:
        multiplicity, utility, _ = state
        trial = jnp.where(where[:, None], value[:, None, :, None], multiplicity[:, :, None])  # [P, A, T, n]
        added = jnp.where(live[:, None, None], jnp.where(root, trial, jnp.maximum(trial - 1, 0)), 0).sum(-1)
        # A step that may not be taken becomes no step, which never improves anything.
        allowed = added <= budget[:, None, None]
        trial = jnp.where(allowed[..., None], trial, multiplicity[:, :, None])
        by_bin = score(trial.reshape(prompts, -1, slots))
        # Maxima without a reduction: XLA on CPU fuses `max` and `argmax` with every exp before them and then vectorises none (3x slower).
        u = functools.reduce(jnp.maximum, [by_bin[..., f] for f in range(by_bin.shape[-1])]).reshape(prompts, count, -1)
        top, index = (x[..., 0] for x in jax.lax.top_k(u, 1))
        better = top > utility + _tie(utility.dtype)
        moved = jnp.take_along_axis(trial, index[..., None, None], 2)[:, :, 0]
        return jnp.where(better[..., None], moved, multiplicity), jnp.where(better, top, utility), better.any()

    multiplicity, utility, _ = jax.lax.while_loop(lambda state: state[-1], step, (starts, score(starts).max(-1), jnp.array(True)))
    row = jnp.arange(prompts)
    multiplicity = multiplicity[row, utility.argmax(-1)]
    by_bin = score(multiplicity[:, None])[:, 0]
    return multiplicity, by_bin.argmax(-1).astype(jnp.int32), by_bin.max(-1)


def _settings(live: jax.Array, root: jax.Array, budget: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """What a step of `_climb` may try: the slot it sets, bool [P, T, n] (none: no step), and the multiplicity, int32 [P, T].

    A live prefix takes 0 .. budget + 1 and the root 0 .. budget, slots in index order. Every prefix that exists leaves one place less
    for new ones, so `T` is about a third of all pairs of a slot and a multiplicity of 0 .. n.
    """
    places = [(taken, max(n - taken, 0)) for taken in range(live.shape[1])]
    number = jnp.arange(max(taken * (left + 2) + left + 1 for taken, left in places), dtype=jnp.int32)
    prefixes = (live & ~root).sum(-1, keepdims=True, dtype=jnp.int32)
    choices = budget[:, None] + 2
    # Live prefixes in index order, then the root.
    place = jnp.where(root, prefixes, jnp.cumsum(live & ~root, -1) - 1)
    mine = jnp.minimum(number // choices, prefixes)  # [P, T]
    value = number - mine * choices
    return live[:, None] & (place[:, None] == mine[..., None]) & (value < choices)[..., None], value
