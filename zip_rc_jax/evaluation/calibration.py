"""Which setting keeps a promise, and which price spends a budget: decided on stored samples.

A pool of samples of calibration problems is replayed at every price. Thresholds on the answer's
expected reward change no search, so they are applied afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import one_of, require, shown
from zip_rc_jax.evaluation.cost import gen_cost
from zip_rc_jax.evaluation.guarantees import (
    error_p_value,
    fallback,
    loss_p_value,
    needed_for_errors,
    needed_for_loss,
    start_weights,
    upper_bound,
)
from zip_rc_jax.evaluation.intervals import interval
from zip_rc_jax.evaluation.replay import Replayed, ReplayPool, replay
from zip_rc_jax.inference.tree import expectations
from zip_rc_jax.runtime.errors import UsageError

RISKS = ("errors", "loss")
PREFERENCES = ("answered", "cost")
THRESHOLDS = (*(round(0.05 * i, 2) for i in range(20)), 0.975, 0.99)
BETAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
DEAREST, CHEAPEST = 1e-4, 10.0  # betas between which a price is looked for
_FIRST, _FINER, _ROUNDS = 11, 8, 2  # betas of the first grid, of a finer one, and how many of these
RESAMPLES = 2000
ORDER = 0  # seed of the order in which problems are tested


@dataclasses.dataclass(frozen=True)
class Promise:
    """What is to hold of later problems.

    Attributes:
      risk: "errors": the share of wrong answers among answered problems. "loss": the mean reward
        that is lost against n full samples, among which the answer is chosen the same way. A
        problem without an answer loses all of it.
      delta: what the risk is at most, in (0, 1).
      epsilon: probability that calibration problems mislead, in (0, 1).
      starts: places of a path of settings at which testing may begin, see `start_weights`.
      prefer: among settings that pass, the one that answers most problems ("answered") or that is
        cheapest ("cost"); the other one decides among equals.
    """

    risk: str
    delta: float
    epsilon: float = 0.1
    starts: int = 4
    prefer: str = "answered"

    def __post_init__(self) -> None:
        one_of("risk", self.risk, RISKS)
        one_of("prefer", self.prefer, PREFERENCES)
        name = {"errors": "max-error-rate", "loss": "max-loss"}[self.risk]
        reason = "it bounds a mean of numbers in [0, 1]"
        require(0 < self.delta < 1, f"{name}={self.delta}", reason, "use a number such as 0.05")
        require(
            0 < self.epsilon < 1,
            f"confidence={1 - self.epsilon:g}",
            "it is a probability, and no finite set of problems gives certainty",
            "use a number such as 0.9",
        )
        require(self.starts >= 1, f"starts={self.starts}", "a path begins somewhere", "use 4")


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """What one decode does on every calibration problem: `P` problems with `T` tries each.

    Attributes:
      decode: the setting, without a threshold.
      correct: float64 `[P, T]`, grade of its answer; 0 without one.
      value: float64 `[P, T]`, expected reward of the answer; -inf without one.
      gen_cost: float64 `[P, T]`.
    """

    decode: DecodeConfig
    correct: np.ndarray
    value: np.ndarray
    gen_cost: np.ndarray

    def part(self, problems: np.ndarray) -> Outcomes:
        """The same of some problems."""
        names = ("correct", "value", "gen_cost")
        return dataclasses.replace(self, **{name: getattr(self, name)[problems] for name in names})


@dataclasses.dataclass(frozen=True)
class Tested:
    """One setting and its test.

    Attributes:
      decode: the setting, with its threshold in `abstain_below`.
      risk: as measured on the calibration problems; NaN where nothing was answered.
      bound: upper confidence bound of the risk at `level`.
      p_value, level, passed: of the test.
      answered: share of problems (and tries) with an answer.
      accuracy: mean grade, where a problem without an answer counts 0.
      cost, cost_low, cost_high: mean GenCost and its 95% interval over problems.
    """

    decode: DecodeConfig
    risk: float
    bound: float
    p_value: float
    level: float
    passed: bool
    answered: float
    accuracy: float
    cost: float
    cost_low: float
    cost_high: float


# ---- replay


def replayed_outcomes(pool: ReplayPool, decodes: Sequence[DecodeConfig]) -> list[Outcomes]:
    """What each setting does with the samples that an online decode draws, threshold aside.

    The settings are as `check_replayable` allows. Those that differ in beta alone are replayed
    together.
    """
    found: dict[int, Outcomes] = {}
    groups: dict[DecodeConfig, list[int]] = {}
    plain = [dataclasses.replace(decode, abstain_below=0.0) for decode in decodes]
    for number, decode in enumerate(plain):
        groups.setdefault(dataclasses.replace(decode, beta=0.0), []).append(number)
    for numbers in groups.values():
        first = plain[numbers[0]]
        prices = [(first.alpha, plain[i].beta) for i in numbers]
        results = replay(pool, first, np.arange(first.n)[None], prices)
        for number, result in zip(numbers, results, strict=True):
            found[number] = _outcomes(pool, plain[number], result)
    return [found[number] for number in range(len(decodes))]


def full_samples(pool: ReplayPool, decode: DecodeConfig) -> Outcomes:
    """Best of n: all n samples to their end, among which the answer is chosen the same way."""
    full = dataclasses.replace(decode, strategy="fixed", token_budget=0, length_budget=0)
    [found] = replayed_outcomes(pool, [full])
    return found


def _outcomes(pool: ReplayPool, decode: DecodeConfig, result: Replayed) -> Outcomes:
    by_vote = decode.answer == "vote"
    chosen = (result.by_vote if by_vote else result.by_value)[:, 0]
    correct = (result.correct_by_vote if by_vote else result.correct_by_value)[:, 0]
    rows = np.arange(pool.n_prompts)
    value = np.where(chosen < 0, -np.inf, pool.value[rows, np.maximum(chosen, 0)])
    for row in np.flatnonzero(chosen >= 0):
        # A budget may have cut the answer short. Samples 0 to n-1 stand at their own numbers.
        tokens = result.lengths[row, 0, chosen[row]]
        if tokens < pool.length[row, chosen[row]]:
            at = (np.array([x]) for x in (row, chosen[row], tokens))
            value[row] = expectations(pool.joint_at(*at)[0], pool.grid)[0]
    unit = pool.mean_length
    cost = gen_cost(result.tokens[:, 0] / unit, result.serial_steps[:, 0] / unit, decode.alpha)
    shape = (-1, pool.tries)
    return Outcomes(decode, *(x.reshape(shape) for x in (correct, value, cost)))


# ---- guarantees


def levels_of(promise: Promise, paths: Sequence[int]) -> float:
    """The level of a test at a start: epsilon over all starts of `paths`, their lengths."""
    return promise.epsilon / (len(paths) * min(promise.starts, min(paths)))


def check_enough(promise: Promise, problems: int, paths: Sequence[int], *, tries: int = 1) -> None:
    """Raises UsageError for so few problems that no setting could pass; it says how many could."""
    level = levels_of(promise, paths)
    if promise.risk == "errors":
        needed = needed_for_errors(promise.delta, level, exact=tries == 1)
        what, best = "an error rate", "if all of them are answered, and none wrong"
    else:
        needed = needed_for_loss(promise.delta, level)
        what, best = "a loss", "for a setting that loses nothing on any of them"
    if problems < needed:
        raise UsageError(
            f"{problems} calibration problems",
            f"{what} of at most {promise.delta:g} with confidence "
            f"{1 - promise.epsilon:g} needs {needed} of them, even {best}",
            f"take at least {needed} problems, fewer betas and starts, a larger risk, or less "
            "confidence",
        )


def risk_paths(
    promise: Promise, outcomes: Sequence[Outcomes], thresholds: Sequence[float]
) -> list[list[tuple[Outcomes, float]]]:
    """Settings in the orders in which they are tested, the safest of a path first.

    Errors: a path for each price, from the highest threshold down. Loss: a path for each
    threshold, from the price that spends most up, by the order of `outcomes`.
    """
    falling = sorted(set(thresholds), reverse=True)
    if promise.risk == "errors":
        return [[(one, threshold) for threshold in falling] for one in outcomes]
    return [[(one, threshold) for one in outcomes] for threshold in falling]


def try_settings(
    promise: Promise,
    outcomes: Sequence[Outcomes],
    thresholds: Sequence[float],
    reference: Outcomes | None = None,
    *,
    details: bool = True,
) -> list[Tested]:
    """Tests every setting, path by path.

    Args:
      outcomes: of each price, those that spend most first. Their prices and `thresholds` must not
        depend on these problems.
      reference: full samples, for the risk "loss".
      details: bounds and intervals too, which take most of the time; NaN without.

    Raises:
      UsageError: too few problems for any setting to pass.
    """
    paths = risk_paths(promise, outcomes, thresholds)
    lengths = [len(path) for path in paths]
    problems, tries = outcomes[0].correct.shape
    check_enough(promise, problems, lengths, tries=tries)
    bet, found = levels_of(promise, lengths), list[Tested]()
    for path in paths:
        tests = [_test(promise, one, threshold, reference, bet) for one, threshold in path]
        p_values = [test(promise.delta) for test, _ in tests]
        weights = start_weights(len(path), promise.starts) / len(paths)
        levels, rejected = fallback(p_values, weights.tolist(), promise.epsilon)
        for i, (one, threshold) in enumerate(path):
            test, risk = tests[i]
            shown = functools.partial(upper_bound, test, levels[i] or bet)
            found.append(
                Tested(
                    decode=dataclasses.replace(one.decode, abstain_below=float(threshold)),
                    risk=risk,
                    bound=shown() if details else float("nan"),
                    p_value=p_values[i],
                    level=float(levels[i]),
                    passed=bool(rejected[i]),
                    **_measured(one, threshold, details),
                )
            )
    return found


def chosen(promise: Promise, settings: Sequence[Tested]) -> Tested | None:
    """The setting that passed and is preferred; None where none passed."""
    passed = [one for one in settings if one.passed]
    if promise.prefer == "cost":
        return min(passed, key=lambda x: (x.cost, -x.answered), default=None)
    return min(passed, key=lambda x: (-x.answered, x.cost), default=None)


def _test(
    promise: Promise, one: Outcomes, threshold: float, reference: Outcomes | None, bet: float
) -> tuple[Callable[[float], float], float]:
    """P-value of a setting as a function of delta, and its measured risk."""
    # Bets are placed in turn, and problems may lie in the order of their levels.
    order = np.random.default_rng(ORDER).permutation(len(one.value))
    one = one.part(order)
    answered = (one.value >= threshold) & np.isfinite(one.value)
    if promise.risk == "errors":
        share, error = answered.mean(1), (answered * (1 - one.correct)).mean(1)
        risk = error.sum() / share.sum() if share.any() else float("nan")
        return lambda delta: error_p_value(error, share, delta, bet), float(risk)
    if reference is None:
        raise ValueError("the loss is measured against full samples")
    loss = (reference.correct[order] - answered * one.correct).mean(1)
    return lambda delta: loss_p_value(loss, delta, bet), float(loss.mean())


def _measured(one: Outcomes, threshold: float, details: bool) -> dict[str, float]:
    answered = (one.value >= threshold) & np.isfinite(one.value)
    cost = float(one.gen_cost.mean())
    low = high = float("nan")
    if details:
        low, high = cost_interval(one)[1:]
    return {
        "answered": float(answered.mean()),
        "accuracy": float((answered * one.correct).mean()),
        "cost": cost,
        "cost_low": low,
        "cost_high": high,
    }


def cost_interval(one: Outcomes) -> tuple[float, float, float]:
    """Mean GenCost and its 95% interval over problems."""
    return interval(one.gen_cost.ravel(), one.gen_cost.shape[1], RESAMPLES, 0)


# ---- a price for a budget


def beta_that_spends(
    cost_of: Callable[[Sequence[float]], Sequence[float]], target: float
) -> tuple[float, dict[float, float]]:
    """The dual price of an average cost: the least beta that does not spend more.

    Cost falls as beta rises, up to ties of single decisions, until next to nothing is spent on
    answers. Far beyond, it may rise again: one prefix must go on, however long it is. So the
    first crossing is looked for: a grid of betas brackets it, and finer grids narrow it.

    Args:
      cost_of: mean GenCost at each of several betas.
      target: mean GenCost to spend at most.

    Returns:
      beta, with four digits, and the cost of every beta that was tried.

    Raises:
      UsageError: a target that is no positive number, or that no beta spends.
    """
    name = f"average-cost={shown(target)}"
    fix = "use a number such as 1.5: one sample costs 1"
    require(np.isfinite(target) and target > 0, name, "it is what a prompt may cost", fix)
    found: dict[float, float] = {}

    def look(low: float, high: float, count: int) -> None:
        grid = [float(f"{beta:.4g}") for beta in np.geomspace(low, high, count)]
        new = [beta for beta in dict.fromkeys(grid) if beta not in found]
        found.update(zip(new, map(float, cost_of(new)), strict=True) if new else ())

    look(DEAREST, CHEAPEST, _FIRST)
    least, most = min(found.values()), found[DEAREST]
    fix = f"use a number from {least:.3f} to {most:.3f}, or another n"
    if target < least:
        reason = f"the search spends at least {least:.3f} on these problems, whatever beta is"
        raise UsageError(name, reason, fix)
    if target > most:
        reason = f"the search spends at most {most:.3f} on these problems, whatever beta is"
        raise UsageError(name, reason, fix)
    for _ in range(_ROUNDS):
        below, beta = _crossing(found, target)
        look(below, beta, _FINER + 2)
    return _crossing(found, target)[1], dict(sorted(found.items()))


def _crossing(found: Mapping[float, float], target: float) -> tuple[float, float]:
    """The least beta that spends at most `target`, and the one before it (itself if none is)."""
    betas = sorted(found)
    first = next(i for i, beta in enumerate(betas) if found[beta] <= target)
    return betas[max(0, first - 1)], betas[first]
