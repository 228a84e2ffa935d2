"""Which prefixes to extend next: the meta-action with the highest sampling utility (paper, section
4).

All candidates of all prompts under all planned pauses are scored in one jitted call. Three
candidate sets:

- `published`, the authors' search, one candidate for each `k1, k2`: the `k1` prefixes with the
  smallest expected remaining length, the `k2` with the highest expected value, and all finished
  ones. Then dropped prefixes are added back, in index order, where that
  does no harm.
- `exhaustive`: every subset of the unfinished prefixes together with all finished ones. The exact
  maximum over multiplicities 0 and 1.
- `branching`: multiplicities above 1 and new samples from the root, which is itself a prefix.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.config.plugins import UTILITIES
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search import branching, candidates
from zip_rc_jax.search.evidence import share_evidence
from zip_rc_jax.search.inputs import MetaAction, SearchInputs, check_joint, search_inputs
from zip_rc_jax.search.utility import (
    PrefixTerms,
    Utility,
    normalizer,
    planned_pause_bins,
    prefix_terms,
    sharpen,
)

MAX_EXHAUSTIVE = 10
BLOCK = 16  # prompts that are scored in one call; the program is the same for any number of prompts
SEARCHES = {
    "published": candidates.published,
    "exhaustive": candidates.exhaustive,
    "branching": branching.branching,
}


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """What is fixed in a compiled search: the fields of `DecodeConfig` that shape it.

    Prices are inputs instead.

    Attributes:
      candidates, n, add_back, evidence, wrong_answers, selection_exponent, joint_temperature,
        joint_top_p: as in `DecodeConfig`.
      utility: what is maximized.
    """

    candidates: str
    n: int
    add_back: bool
    evidence: str
    wrong_answers: float
    selection_exponent: float
    joint_temperature: float
    joint_top_p: float
    utility: Utility

    @classmethod
    def of(cls, config: DecodeConfig) -> SearchSettings:
        names = [f.name for f in dataclasses.fields(cls) if f.name != "utility"]
        return cls(
            **{name: getattr(config, name) for name in names},
            utility=UTILITIES.resolve(config.utility),
        )


def choose_meta_action(
    joint: Any,
    unfinished: Any,
    tokens_so_far: Any,
    *,
    grid: Grid,
    config: DecodeConfig,
    exists: Any = None,
    max_new_prefixes: Any = None,
    normalizer: Any = None,
    must_extend: Any = None,
    alpha: Any = None,
    beta: Any = None,
    answer: Any = None,
    **old_names: Any,
) -> MetaAction:
    """The best meta-action of each prompt, from the candidate set `config.candidates`.

    Args:
      joint: [P, n, B_V, B_T] float, the joint of each prefix (scaled here to sum to 1). float64 is
        used where given and enabled, else float32. A slot whose joint is not finite, is negative
        somewhere or has no mass is treated as empty: it is neither kept nor counted, and nothing
        fails. Lists of numbers will do, here and below.
      unfinished: [P, n] bool. The others are finished: always kept, they count for reward and cost
        nothing.
      tokens_so_far: [P, n], tokens generated so far (0 for the root).
      grid: of the joints.
      config: reads alpha, beta, candidates, add_back, evidence, wrong_answers, utility,
        selection_exponent, joint_temperature, joint_top_p and (branching) n. New values of alpha
        and beta do not recompile.
      exists: [P, n] bool, slots that hold a prefix; default all.
      max_new_prefixes: [P] int, most prefixes that branching may add to the prompt; default as many
        as `config.n` allows. Added are the copies beyond the first of a live prefix and every
        sample from the root. The prompt never exceeds `config.n` prefixes, finished and paused ones
        included, the root not.
      normalizer: [P], tokens that one unit of cost stands for; default the mean over the group of
        tokens so far plus expected remaining tokens. When branching the root does not count, unless
        it is alone.
      must_extend: [P] bool, prompts that may not choose to extend nothing (where they can extend
        anything); default none.
      alpha, beta: prices, one number or [P]; default the config's.
      answer: [P, n] int, equal for finished prefixes of a prompt with equal answers, below 0 for
        none. Read with `evidence="answers"` alone, and needed there.
      old_names: `free_rows` and `normaliser`, the names of max_new_prefixes and normalizer until
        0.1. They give a warning.

    With `candidates="branching"` the last slot is the root, an unfinished prefix of no tokens; 0
    there starts no new sample. An action that extends nothing has multiplicity 0 at every
    unfinished slot.

    Memory: of each prompt at most 2.5 C (B_V B_T + n) numbers at once, with `C` = n^2 + 1
      candidates (published), 2^n (exhaustive) or
    (config.n + 2) (config.n + 5) (branching, per step). On the authors' 7 x 8 grid in float32: 42
    KB, 164 KB and 85 KB for 8 prefixes, and 0.9 MB (published) and 1.1 MB (branching) for 32.

    Outside of `jax.jit` a prompt's decision is the same, bit by bit, alone and in any company. No
    prompts give an empty decision.

    Raises:
      UsageError: no grid or configuration, what is no array of numbers or truth values, shapes that
        do not fit together or to the grid, prices out of range, `exhaustive` with more than 10
        slots, or a utility that is wrong (see `Utility`).
    """
    renamed = {"free_rows": "max_new_prefixes", "normaliser": "normalizer"}
    arrays = {
        "exists": exists,
        "max_new_prefixes": max_new_prefixes,
        "normalizer": normalizer,
        "must_extend": must_extend,
    }
    arrays |= {"alpha": alpha, "beta": beta, "answer": answer}
    for old, value in old_names.items():
        if old not in renamed:
            parameters = [
                name
                for name in inspect.signature(choose_meta_action).parameters
                if name != "old_names"
            ]
            raise UsageError(
                f"argument {old!r} of choose_meta_action",
                "nothing reads it",
                f"use {', '.join(parameters)}",
            )
        if arrays[renamed[old]] is not None:
            raise UsageError(
                f"arguments {old} and {renamed[old]}", "they are the same one", f"leave out {old}"
            )
        warnings.warn(f"{old} is now called {renamed[old]}", DeprecationWarning, stacklevel=2)
        arrays[renamed[old]] = value
    inputs = search_inputs(joint, unfinished, tokens_so_far, grid=grid, config=config, **arrays)
    return search(inputs, grid=grid, config=config)


def search(inputs: SearchInputs, *, grid: Grid, config: DecodeConfig) -> MetaAction:
    """The best meta-action of each prompt, see `choose_meta_action`.

    A `Policy`; its name is "zip_rc".

    Raises:
      UsageError: joints of another grid, no root where branching needs one (or the reverse),
        `exhaustive` with more than 10 slots, or a utility that is wrong.
    """
    check_joint(inputs.joint, grid)
    slots = inputs.joint.shape[1]
    if inputs.has_root != (config.candidates == "branching"):
        raise UsageError(
            f"has_root={inputs.has_root} with candidates={config.candidates!r}",
            "the last slot is the root when branching, and only then",
            f"set has_root={not inputs.has_root}",
        )
    if config.candidates == "exhaustive" and slots > MAX_EXHAUSTIVE:
        raise UsageError(
            f"{slots} prefixes with candidates='exhaustive'",
            f"all 2^{slots} subsets would be scored at every decision",
            f"use at most {MAX_EXHAUSTIVE} prefixes or candidates='published'",
        )
    if config.evidence == "answers" and inputs.answer is None:
        raise UsageError(
            "evidence='answers' without answers",
            "nothing says which finished prefixes agree",
            "pass `answer`, such as grading.answer_groups of each prompt's texts",
        )
    settings = SearchSettings.of(config)
    # One set of types, so that there is one program for it.
    dtype = inputs.joint.dtype
    scale = inputs.normalizer
    inputs = dataclasses.replace(
        inputs,
        tokens_so_far=inputs.tokens_so_far.astype(dtype),
        alpha=inputs.alpha.astype(dtype),
        beta=inputs.beta.astype(dtype),
        normalizer=None if scale is None else scale.astype(dtype),
        answer=inputs.answer if config.evidence == "answers" else None,
    )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
        return _search(inputs, grid=grid, settings=settings)
    action = _in_blocks(inputs, grid, settings)
    if (
        not UTILITIES.is_builtin(config.utility)
        and (broken := np.isnan(np.asarray(action.utility))).any()
    ):
        p = int(np.argmax(broken))
        raise UsageError(
            f"utility {shown(config.utility)}",
            f"it is NaN for a candidate of prompt {p}",
            "return finite numbers, or -inf",
        )
    return action


def _in_blocks(inputs: SearchInputs, grid: Grid, settings: SearchSettings) -> MetaAction:
    """`_search` for `BLOCK` prompts at a time, the last block filled up with copies of its first
    prompt.

    So the compiled program never depends on how many prompts there are, and nothing of one prompt's
    decision on the others: in programs of other shapes the same sums are rounded otherwise, which
      shows where two actions are as good as each other.
    """
    inputs = jax.tree.map(np.asarray, inputs)
    prompts = len(inputs.joint)
    actions: list[MetaAction] = []
    for start in range(0, max(prompts, 1), BLOCK):
        # Without any prompt an empty one is decided for, whose results are cut away.
        index = np.arange(start, start + BLOCK)
        index[index >= prompts] = start
        block = jax.tree.map(
            lambda x, index=index: (
                x[index] if prompts else np.zeros((BLOCK, *x.shape[1:]), x.dtype)
            ),
            inputs,
        )
        actions.append(_search(block, grid=grid, settings=settings))
    return jax.tree.map(
        lambda *parts: jnp.asarray(np.concatenate([np.asarray(x) for x in parts])[:prompts]),
        *actions,
    )


@functools.partial(jax.jit, static_argnames=("grid", "settings"))
def _search(inputs: SearchInputs, *, grid: Grid, settings: SearchSettings) -> MetaAction:
    problem, _ = search_problem(inputs, grid, settings)
    multiplicity, bin_index, utility = SEARCHES[settings.candidates](problem)
    return MetaAction(multiplicity, jnp.asarray(planned_pause_bins(grid))[bin_index], utility)


def search_problem(
    inputs: SearchInputs, grid: Grid, settings: SearchSettings
) -> tuple[candidates.SearchProblem, jax.Array]:
    """What a search is given, and the unit of cost `N` [P] in tokens. Traced by JAX."""
    joint, dtype = inputs.joint, inputs.joint.dtype
    exists = (
        inputs.exists
        & (jnp.isfinite(joint) & (joint >= 0)).all((-2, -1))
        & (joint.sum((-2, -1)) > 0)
    )
    # Empty slots get any distribution at all, so that nothing in them can turn into a NaN next to a
    # multiplicity of 0.
    joint = sharpen(
        jnp.where(exists[..., None, None], joint, 1),
        settings.joint_temperature,
        settings.joint_top_p,
    )
    finished, live = exists & ~inputs.unfinished, exists & inputs.unfinished
    root = jnp.asarray(inputs.is_root)
    samples = exists & ~root

    # Prices, and the unit of cost.
    scale = inputs.normalizer
    if scale is None:
        alone = ~samples.any(-1, keepdims=True)
        scale = normalizer(joint, inputs.tokens_so_far, jnp.where(alone, exists, samples), grid)
    scale = scale.astype(dtype)
    alpha, beta = (x.astype(dtype)[:, None, None] for x in (inputs.alpha, inputs.beta))
    if settings.evidence == "answers":
        joint = share_evidence(joint, finished, inputs.answer, grid, settings.wrong_answers)

    # What the action may add, and which prompts it must go on with.
    budget = jnp.clip(jnp.minimum(inputs.max_new_prefixes, settings.n - samples.sum(-1)), 0)
    must_extend = inputs.must_extend
    if must_extend is not None:
        must_extend = must_extend & (
            (live & ~root).any(-1) | ((live & root).any(-1) & (budget > 0))
        )

    def score(terms: PrefixTerms, multiplicity: jax.Array) -> jax.Array:
        """Utility [P, C, F] of `multiplicity` [P, C, n]; -inf where a prompt that must extend
        something would not."""
        prices = {"alpha": alpha, "beta": beta, "normalizer": scale}
        u = _utility(settings, terms, multiplicity, live, prices, grid)
        if must_extend is None:
            return u
        idle = must_extend[:, None] & ~((multiplicity > 0) & live[:, None]).any(-1)
        return jnp.where(idle[..., None], -jnp.inf, u)

    problem = candidates.SearchProblem(
        joint,
        live,
        finished,
        root,
        budget,
        settings.n,
        grid,
        prefix_terms(joint, grid),
        score,
        settings.add_back,
    )
    return problem, scale


def _utility(
    settings: SearchSettings,
    terms: PrefixTerms,
    multiplicity: jax.Array,
    live: jax.Array,
    prices: dict[str, jax.Array],
    grid: Grid,
) -> jax.Array:
    """The utility [P, C, F] of `settings`.

    One NaN makes all of its prompt NaN, so that it shows in the decision.

    Raises:
      UsageError: the utility is not traceable, or its result has another shape or is no floating
        number.
    """
    utility = settings.utility
    if UTILITIES.resolve("sampling") is utility:
        return utility(
            terms,
            multiplicity,
            live,
            **prices,
            selection_exponent=settings.selection_exponent,
            grid=grid,
        )
    value = f"utility {shown(utility)}"
    try:
        utilities = jnp.asarray(
            utility(
                terms,
                multiplicity,
                live,
                **prices,
                selection_exponent=settings.selection_exponent,
                grid=grid,
            )
        )
    except jax.errors.JAXTypeError as error:
        raise UsageError(
            value,
            f"JAX cannot trace it ({in_short(error)})",
            "use jax.numpy, and no if or float() on values",
        ) from None
    shape = (*multiplicity.shape[:2], terms.value.shape[-1])
    if utilities.shape != shape or not jnp.issubdtype(utilities.dtype, jnp.floating):
        raise UsageError(
            f"{value} returned {utilities.dtype}{list(utilities.shape)}",
            f"every candidate has one floating number under every planned pause, {list(shape)}",
            "return [prompts, candidates, pauses] as candidate_utility does",
        )
    utilities = utilities.astype(terms.value.dtype)
    return jnp.where(jnp.isnan(utilities).any((1, 2), keepdims=True), jnp.nan, utilities)
