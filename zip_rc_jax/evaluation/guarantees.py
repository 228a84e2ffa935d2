"""Guarantees that need no model of the data: is a risk at most delta, with confidence 1 - epsilon?

Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052). Every setting has a null hypothesis,
"its risk exceeds delta", and a p-value from calibration problems. A rule for many tests keeps the
probability of even one false rejection below epsilon. So any rejected setting may be chosen, by
any other criterion. The one assumption: calibration problems and later problems are drawn
independently from the same distribution. Wang et al. (2026, arXiv 2602.03814) stop reasoning by
such rules.

Two risks:
- errors among answered, `E[error * answered] / E[answered]`. It is a ratio of means. Where each
  problem has one try and grades are 0 or 1, the test is conditional on the number of answered
  problems: their errors are then independent and of that very probability, so the binomial
  p-value is exact. Else the ratio is at most delta just where `E[(error - delta) * answered]` is
  at most 0, and a test of a bounded mean is used.
- loss against a reference, `E[reference - reward]`: a bounded mean in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from zip_rc_jax.runtime.errors import UsageError

MOST_PROBLEMS = 2**22  # a guarantee that needs more is told as impossible
_LARGEST_BET = 0.75  # of what can be lost at once (Waudby-Smith and Ramdas recommend 1/2 to 3/4)
_BISECTIONS = 40


# ---- p-values


def binomial_p_value(errors: int, answered: int, delta: float) -> float:
    """`P(Binomial(answered, delta) <= errors)`: 1 where nothing was answered.

    Args:
      errors: wrong ones among the `answered` problems, one independent try each.
      delta: in (0, 1).
    """
    if not 0 <= errors <= answered:
        raise ValueError(f"{errors} errors among {answered} answered problems")
    if errors == answered:
        return 1.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, answered + 1)))])
    k = np.arange(errors + 1)
    ways = log_factorial[answered] - log_factorial[k] - log_factorial[answered - k]
    logs = ways + k * np.log(delta) + (answered - k) * np.log1p(-delta)
    return float(min(1.0, np.exp(logs).sum()))


def betting_p_value(losses: np.ndarray, delta: float, level: float) -> float:
    """P-value of "the mean is at least delta", of independent losses in [0, 1].

    A gambler bets on losses below delta, one after the other. Under the hypothesis the capital is
    a supermartingale, so it exceeds `1 / p` with probability at most `p` (Ville). Bets are those
    of Waudby-Smith and Ramdas (2024, arXiv 2010.09686) for a fixed number of losses. They profit
    from a small variance, unlike Hoeffding's bound.

    Args:
      losses: `[m]`. Their order matters, and must not depend on them.
      delta: in (0, 1).
      level: at which the p-value will be compared. It shapes the bets alone.
    """
    x = np.asarray(losses, np.float64)
    if x.ndim != 1 or np.isnan(x).any() or (x < 0).any() or (x > 1).any():
        raise ValueError("losses are one row of numbers in [0, 1]")
    if not len(x):
        return 1.0
    count = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    # A bet may depend on earlier losses alone.
    before = np.concatenate([[0.25], variance[:-1]])
    bets = np.sqrt(2 * np.log(1 / level) / (len(x) * before))
    bets = np.minimum(bets, _LARGEST_BET / (1 - delta))
    capital = np.cumsum(np.log1p(bets * (delta - x)))
    return float(np.exp(-max(0.0, capital.max())))


def error_p_value(error: np.ndarray, answered: np.ndarray, delta: float, level: float) -> float:
    """P-value of "more than delta of the answered ones are wrong".

    Args:
      error, answered: `[m]` in [0, 1], shares of a problem's tries that are wrong answers, and
        that are answered. Where all are 0 or 1 the test is exact.
    """
    error, answered = (np.asarray(a, np.float64) for a in (error, answered))
    if (error > answered).any() or (error < 0).any() or (answered > 1).any():
        raise ValueError("a problem has wrong answers only among its answers")
    if np.isin(answered, (0, 1)).all() and np.isin(error, (0, 1)).all():
        return binomial_p_value(int(error.sum()), int(answered.sum()), delta)
    # (error - delta) answered lies in [-delta, 1 - delta], and its mean is to be at most 0.
    return betting_p_value(delta + error - delta * answered, delta, level)


def loss_p_value(loss: np.ndarray, delta: float, level: float) -> float:
    """P-value of "the mean loss exceeds delta", of losses `[m]` in [-1, 1]."""
    return betting_p_value((np.asarray(loss, np.float64) + 1) / 2, (1 + delta) / 2, level)


def upper_bound(p_value: Callable[[float], float], level: float) -> float:
    """The smallest delta in (0, 1) that `p_value` rejects at `level`, from above; 1 if none.

    Args:
      p_value: of "the risk exceeds delta", falling in delta.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= level else (middle, high)
    return high


# ---- many tests


def start_weights(count: int, starts: int) -> np.ndarray:
    """Weights `[count]` of a path of tests: 1 / starts at evenly spaced places, the first among
    them."""
    starts = min(starts, count)
    weights = np.zeros(count)
    weights[[i * count // starts for i in range(starts)]] = 1 / starts
    return weights


def fallback(
    p_values: Sequence[float], weights: Sequence[float], epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tests a path of hypotheses in an order that was fixed beforehand.

    A test has `epsilon * weight` of its own. It adds the level of the one before if that was
    rejected, and passes its level on if it rejects. One weight of 1 at the start is a fixed
    sequence; equal weights are Bonferroni or better. The probability of any false rejection is at
    most `epsilon` (Wiens 2003; Bretz et al. 2009). Several paths whose weights add up to 1
    together keep it, too.

    Returns:
      levels `[T]` float64, and which are rejected `[T]` bool.
    """
    levels, rejected = np.zeros(len(p_values)), np.zeros(len(p_values), bool)
    carried = 0.0
    for i, (p, weight) in enumerate(zip(p_values, weights, strict=True)):
        levels[i] = carried + epsilon * weight
        rejected[i] = levels[i] > 0 and p <= levels[i]
        carried = levels[i] if rejected[i] else 0.0
    return levels, rejected


# ---- how many problems


def problems_needed(p_value: Callable[[int], float], level: float) -> int:
    """The least number of problems at which `p_value` of so many reaches `level`.

    Args:
      p_value: of the best case, falling in the number.

    Raises:
      UsageError: more than `MOST_PROBLEMS`.
    """
    high = 1
    while p_value(high) > level:
        high *= 2
        if high > MOST_PROBLEMS:
            reason = f"more than {MOST_PROBLEMS:,} problems would be needed"
            raise UsageError("the guarantee", reason, "allow a larger risk, or less confidence")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(middle) <= level else (middle, high)
    return high


def needed_for_errors(delta: float, level: float, *, exact: bool) -> int:
    """Answered problems that are needed even if none is wrong.

    Args:
      exact: one try a problem, and grades of 0 or 1.
    """

    def best(count: int) -> float:
        if exact:
            return binomial_p_value(0, count, delta)
        return betting_p_value(np.zeros(count), delta, level)

    return problems_needed(best, level)


def needed_for_loss(delta: float, level: float) -> int:
    """Problems that are needed by a setting that is exactly as good as the reference on each."""
    return problems_needed(lambda count: loss_p_value(np.zeros(count), delta, level), level)
