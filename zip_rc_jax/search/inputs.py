"""What a decision is made from, and what it is: `SearchInputs` and `MetaAction`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchInputs:
    """The prefixes of `P` prompts in `n` slots each: all that a policy sees.

    A pytree of arrays, of NumPy or of JAX.

    A prompt without prefixes is padding; so is a slot where `exists` is False.

    Attributes:
      joint: [P, n, B_V, B_T] float32 or float64, probability of each (final reward, remaining
        length) cell. The decoder gives the mean over a prefix's last `window` tokens.
      unfinished: [P, n] bool. The others have ended: they count for reward and cost nothing more.
      tokens_so_far: [P, n] int32 or float, generated tokens (0 for the root).
      exists: [P, n] bool, slots that hold a prefix.
      max_new_prefixes: [P] int32, most prefixes that the action may add: copies beyond the first of
        a live prefix, and samples from the root.
      alpha, beta: [P] float, prices of each prompt.
      must_extend: [P] bool, prompts that may not end yet; None if all may.
      normalizer: [P] float, tokens that one unit of cost stands for; None for the mean over the
        prompt's prefixes.
      answer: [P, n] int32, equal for finished prefixes of a prompt that give equal answers, below 0
        for none; None where nothing asked for it.
      has_root: the last slot is the root: the prompt itself, an unfinished prefix of no tokens. Its
        multiplicity counts new samples. A Python bool, part of the tree's structure.
    """

    joint: Any
    unfinished: Any
    tokens_so_far: Any
    exists: Any
    max_new_prefixes: Any
    alpha: Any
    beta: Any
    must_extend: Any = None
    normalizer: Any = None
    answer: Any = None
    has_root: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def live(self) -> Any:
        """[P, n] bool, prefixes that can be extended, the root included."""
        return self.exists & self.unfinished

    @property
    def finished(self) -> Any:
        """[P, n] bool, prefixes that have ended."""
        return self.exists & ~self.unfinished

    @property
    def is_root(self) -> np.ndarray:
        """[n] bool, the slot of the root."""
        slots = self.joint.shape[1]
        return np.arange(slots) == (slots - 1 if self.has_root else -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MetaAction:
    """One decision for each of `P` prompts: what a policy returns.

    Attributes:
      multiplicity: [P, n] int32. 0 pauses a prefix, 1 continues it, 2 and more branch it; at the
        root, how many new samples start. A finished prefix has 1, or 0 where the policy drops it;
        an empty slot has 0.
      planned_pause_bin: [P] int32, the length bin at which the action plans to pause everything, -1
        for none. For the record only.
      utility: [P] float, `U` of the action, in the dtype of the joint; NaN if the policy has none.
        For the record only.
    """

    multiplicity: Any
    planned_pause_bin: Any
    utility: Any

    @classmethod
    def of(cls, multiplicity: Any) -> MetaAction:
        """An action without a plan or a utility.

        `multiplicity` [P, n] may be bool (continue or pause).
        """
        if not isinstance(multiplicity, (np.ndarray, jax.Array)):
            multiplicity = np.asarray(multiplicity)
        multiplicity = multiplicity.astype(np.int32) if multiplicity.dtype == bool else multiplicity
        prompts = multiplicity.shape[:1]
        return cls(
            multiplicity, np.full(prompts, -1, np.int32), np.full(prompts, np.nan, np.float32)
        )

    @property
    def keep(self) -> Any:
        """[P, n] bool, prefixes of the action: the extended ones and the finished ones."""
        return self.multiplicity > 0


def search_inputs(
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
) -> SearchInputs:
    """Checked `SearchInputs` of arrays or lists.

    Arguments and errors as in `choose_meta_action`.
    """
    if not isinstance(grid, Grid):
        raise UsageError(
            f"grid={shown(grid)}",
            "it is no Grid",
            "pass the grid that the joints are of, such as lm.head.grid",
        )
    if not isinstance(config, DecodeConfig):
        raise UsageError(f"config={shown(config)}", "it is no DecodeConfig", "pass a DecodeConfig")
    joint = _array("joint", joint, "number")
    if not isinstance(joint, jax.core.Tracer) and jnp.issubdtype(joint.dtype, jnp.floating):
        joint = np.asarray(joint)
    # float64 stays float64 only inside `jax.enable_x64`; canonicalize_dtype knows.
    double = joint.dtype == np.float64
    joint = joint.astype(jax.dtypes.canonicalize_dtype(np.float64) if double else np.float32)
    check_joint(joint, grid)
    prompts, slots = joint.shape[:2]

    def array(name: str, value: Any, kind: str, shape: tuple[int, ...]) -> Any:
        converted = _array(name, value, kind)
        if name in ("alpha", "beta") and not converted.ndim:
            converted = (
                converted * np.ones(shape, converted.dtype)
                if isinstance(converted, jax.core.Tracer)
                else np.full(shape, converted)
            )
        if converted.shape != shape:
            each = f" or {name} as one number" if name in ("alpha", "beta") else ""
            raise UsageError(
                f"{name} of shape {converted.shape}",
                f"joint has shape {joint.shape}, {prompts} prompts of {slots} prefixes",
                f"pass {name} of shape {shape}{each}",
            )
        return converted

    def optional(name: str, value: Any, kind: str, shape: tuple[int, ...]) -> Any:
        return None if value is None else array(name, value, kind, shape)

    per_slot, per_prompt = (prompts, slots), (prompts,)
    exists = optional("exists", exists, "bool", per_slot)
    budget = optional("max_new_prefixes", max_new_prefixes, "count", per_prompt)
    inputs = SearchInputs(
        joint=joint,
        unfinished=array("unfinished", unfinished, "bool", per_slot),
        tokens_so_far=array("tokens_so_far", tokens_so_far, "number", per_slot),
        exists=np.ones(per_slot, bool) if exists is None else exists,
        max_new_prefixes=np.full(prompts, config.n, np.int32) if budget is None else budget,
        alpha=array("alpha", config.alpha if alpha is None else alpha, "number", per_prompt),
        beta=array("beta", config.beta if beta is None else beta, "number", per_prompt),
        must_extend=optional("must_extend", must_extend, "bool", per_prompt),
        normalizer=optional("normalizer", normalizer, "number", per_prompt),
        answer=optional("answer", answer, "count", per_slot),
        has_root=config.candidates == "branching",
    )
    _check_price(
        "alpha", inputs.alpha, 1, "it weighs compute against latency", "use numbers in [0, 1]"
    )
    _check_price("beta", inputs.beta, 1e30, "it is a price", "use numbers from 0 to 1e30")
    return inputs


def check_joint(joint: Any, grid: Grid) -> None:
    """Raises UsageError unless `joint` has the shape [P, n, B_V, B_T] of the grid."""
    if joint.ndim != 4 or joint.shape[1] == 0 or joint.shape[2:] != (grid.n_reward, grid.n_length):
        raise UsageError(
            f"joint of shape {joint.shape}",
            f"the grid has {grid.n_reward} reward bins and {grid.n_length} length bins",
            f"pass joints of shape [prompts, prefixes, {grid.n_reward}, {grid.n_length}]",
        )


def _check_price(name: str, price: Any, most: float, reason: str, fix: str) -> None:
    if isinstance(price, jax.core.Tracer):
        return
    wrong = ~((np.asarray(price) >= 0) & (np.asarray(price) <= most))
    if wrong.any():
        raise UsageError(f"{name}={np.asarray(price)[wrong][0]:g}", reason, fix)


def _array(name: str, value: Any, kind: str) -> Any:
    """`value` as an array of NumPy (one of JAX stays one) of truth values, whole numbers or
    numbers.

    Raises:
      UsageError: it is none. Truth values may be given as 0 and 1, and whole numbers as floating
        ones.
    """
    words = {"bool": "truth values", "count": "whole numbers", "number": "numbers"}[kind]
    if not isinstance(value, (np.ndarray, jax.Array)):
        try:
            value = np.asarray(value)
        # lists of unequal length, or anything that cannot become an array
        except Exception as error:
            raise UsageError(
                f"{name}={shown(value)}",
                f"it is no array of {words} ({in_short(error)})",
                f"pass {words}",
            ) from None
    dtype = value.dtype
    logical = jnp.issubdtype(dtype, np.bool_)
    if not (logical or jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)):
        raise UsageError(f"{name} of type {dtype}", f"it holds no {words}", f"pass {words}")
    if isinstance(value, jax.core.Tracer):
        return (
            value.astype(bool)
            if kind == "bool"
            else value.astype(np.int32)
            if kind == "count"
            else value
        )
    if kind == "bool" and not logical:
        if not ((value == 0) | (value == 1)).all():
            raise UsageError(
                f"{name} of type {dtype}", "it holds other values than 0 and 1", f"pass {words}"
            )
        return np.asarray(value).astype(bool)
    if kind == "count":
        if not (np.asarray(value) == np.floor(np.asarray(value))).all():
            raise UsageError(f"{name} of type {dtype}", f"it holds no {words}", f"pass {words}")
        return np.clip(np.asarray(value), -1, 2**31 - 1).astype(np.int32)
    return value


def checked_action(action: Any, inputs: SearchInputs, grid: Grid, policy: str) -> MetaAction:
    """`action` with arrays of NumPy, once it is one that the decoder can carry out for `inputs`.

    Args:
      policy: what returned it, for messages.

    Raises:
      UsageError: no MetaAction; a wrong shape or dtype; a multiplicity below 0, above 1 of a
        finished prefix, or above 0 of an empty slot; more new prefixes than allowed; a prompt that
        ends although it may not; or a future bin that the grid does not have.
    """
    value = f"policy {policy}"
    if not isinstance(action, MetaAction):
        kind = type(action).__name__
        raise UsageError(
            f"{value} returned a {kind}",
            "a decision is a MetaAction",
            "return MetaAction.of(multiplicity)",
        )
    multiplicity, planned_pause_bin, utility = _action_arrays(action, inputs, value)
    _check_copies(multiplicity, inputs, value)
    _check_new_prefixes(multiplicity, inputs, value)
    _check_endings(multiplicity, inputs, value)
    _check_planned_pause_bins(planned_pause_bin, grid, value)
    return MetaAction(multiplicity.astype(np.int32), planned_pause_bin.astype(np.int32), utility)


def _action_arrays(
    action: MetaAction, inputs: SearchInputs, value: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`multiplicity`, `planned_pause_bin` and `utility` of the right shapes and kinds of dtype."""
    per_slot, per_prompt = inputs.unfinished.shape, inputs.unfinished.shape[:1]
    shapes = {"multiplicity": per_slot, "planned_pause_bin": per_prompt, "utility": per_prompt}
    arrays = {name: np.asarray(getattr(action, name)) for name in shapes}
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            names = "[prompts, prefixes]" if len(shapes[name]) == 2 else "[prompts]"
            raise UsageError(
                f"{value} returned {name} of shape {array.shape}",
                f"the inputs have {shapes[name]}, {names}",
                "return the shape of the inputs",
            )
        integral = name != "utility"
        if not np.issubdtype(array.dtype, np.integer if integral else np.floating):
            words = "whole" if integral else "floating-point"
            raise UsageError(
                f"{value} returned {name} of dtype {array.dtype}",
                f"it holds {words} numbers",
                "convert it with astype",
            )
    return arrays["multiplicity"], arrays["planned_pause_bin"], arrays["utility"]


def _check_copies(multiplicity: np.ndarray, inputs: SearchInputs, value: str) -> None:
    """Every slot may have as many copies as `multiplicity` says."""

    def refuse(wrong: np.ndarray, reason: str, fix: str) -> None:
        if wrong.any():
            p, slot = (int(i) for i in np.argwhere(wrong)[0])
            raise UsageError(
                f"{value} returned multiplicity {multiplicity[p, slot]} for prefix {slot} of "
                f"prompt {p}",
                reason,
                fix,
            )

    exists, unfinished = np.asarray(inputs.exists), np.asarray(inputs.unfinished)
    refuse(multiplicity < 0, "it counts copies", "return 0 to pause a prefix")
    refuse(
        (multiplicity > 0) & ~exists, "the slot is empty", "return 0 where inputs.exists is False"
    )
    refuse(
        (multiplicity > 1) & ~unfinished,
        "the prefix has finished, so nothing can extend it",
        "return 1 where inputs.finished",
    )


def _live(inputs: SearchInputs) -> np.ndarray:
    return np.asarray(inputs.exists) & np.asarray(inputs.unfinished)


def _budget(inputs: SearchInputs) -> np.ndarray:
    return np.maximum(np.asarray(inputs.max_new_prefixes), 0)


def _check_new_prefixes(multiplicity: np.ndarray, inputs: SearchInputs, value: str) -> None:
    """No prompt adds too many prefixes: copies beyond the first, and every copy of the root."""
    forks = np.where(inputs.is_root, multiplicity, np.maximum(multiplicity - 1, 0))
    new, budget = np.where(_live(inputs), forks, 0).sum(1), _budget(inputs)
    if (new > budget).any():
        p = int(np.argmax(new > budget))
        raise UsageError(
            f"{value} adds {new[p]} prefixes to prompt {p}",
            f"max_new_prefixes allows {budget[p]}"
            + ("" if inputs.has_root else ", as a prompt begins with all its samples"),
            "stay within inputs.max_new_prefixes"
            + ("" if inputs.has_root else ", or set candidates='branching'"),
        )


def _check_endings(multiplicity: np.ndarray, inputs: SearchInputs, value: str) -> None:
    """A prompt that may not end extends a prefix, if it has one that can be extended."""
    if inputs.must_extend is None:
        return
    # A joint that is no distribution takes no part in a search, so its prefix need not go on.
    joint, live = np.asarray(inputs.joint), _live(inputs)
    usable = live & (np.isfinite(joint) & (joint >= 0)).all((-2, -1)) & (joint.sum((-2, -1)) > 0)
    able = (usable & (~inputs.is_root | (_budget(inputs) > 0)[:, None])).any(1)
    ends = np.asarray(inputs.must_extend) & able & ~((multiplicity > 0) & live).any(1)
    if ends.any():
        raise UsageError(
            f"{value} extends nothing of prompt {int(np.argmax(ends))}",
            "none of its prefixes has finished, so there is no answer yet",
            "extend a prefix where inputs.must_extend, or set allow_no_answer=True",
        )


def _check_planned_pause_bins(planned_pause_bin: np.ndarray, grid: Grid, value: str) -> None:
    """Every planned pause is a length bin of the grid, or -1."""
    outside = (planned_pause_bin < -1) | (planned_pause_bin >= grid.n_length)
    if outside.any():
        raise UsageError(
            f"{value} returned planned_pause_bin {planned_pause_bin[int(np.argmax(outside))]}",
            f"the grid has bins 0 to {grid.n_length - 1}",
            "return -1 for no plan",
        )
