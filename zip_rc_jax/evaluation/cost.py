"""The one cost meter, used by fixed baselines and by online runs alike.

Normalised compute = all generated tokens of a prompt (a shared prefix counts once) / mean length of
one sample of that prompt; normalised latency = serial decode steps / the same mean; `GenCost =
alpha * compute + (1 - alpha) * latency`. One sample costs 1. Wall-clock seconds are carried along
unchanged, because savings in tokens are not savings in time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import ANSWERS
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Cost:
    """Normalised cost per prompt; one mean sample of the prompt costs 1.

    Attributes:
      compute: `[P]` float64, all generated tokens.
      latency: `[P]` float64, serial decode steps.
      gen_cost: `[P]` float64, `alpha * compute + (1 - alpha) * latency`.
    """

    compute: np.ndarray
    latency: np.ndarray
    gen_cost: np.ndarray


def gen_cost(compute: Any, latency: Any, alpha: float) -> np.ndarray:
    """`alpha * compute + (1 - alpha) * latency`, element by element.

    Raises:
      UsageError: alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise UsageError(
            f"alpha={alpha}", "it weighs compute against latency", "use a number in [0, 1]"
        )
    return alpha * np.asarray(compute, np.float64) + (1 - alpha) * np.asarray(latency, np.float64)


def normalised_cost(tokens: Any, serial_steps: Any, mean_length: Any, alpha: float) -> Cost:
    """Cost of each prompt.

    Args:
      tokens: `[P]` generated tokens.
      serial_steps: `[P]` decode steps in which at least one prefix of the prompt was live.
      mean_length: `[P]` mean tokens of one full sample of the prompt, from the fixed pool.
      alpha: in [0, 1].

    Raises:
      UsageError: a mean length that is not positive (nothing to normalise by), or alpha outside [0,
        1].
      ValueError: the shapes differ.
    """
    tokens, steps, mean = (np.asarray(x, np.float64) for x in (tokens, serial_steps, mean_length))
    if not tokens.shape == steps.shape == mean.shape:
        raise ValueError(
            f"one entry per prompt in each; got shapes {tokens.shape}, {steps.shape}, {mean.shape}"
        )
    if not np.all(mean > 0):
        raise UsageError(
            f"mean_length={mean.min()}",
            "cost is measured in mean samples of the prompt",
            "use samples of at least one token",
        )
    return Cost(tokens / mean, steps / mean, gen_cost(tokens / mean, steps / mean, alpha))


@dataclasses.dataclass(frozen=True)
class OnlineRun:
    """One decode of all P prompts with one setting.

    Arrays are float64 `[P]`, prompts in the order of the pool.

    Attributes:
      name: unique among the runs of one report.
      alpha, beta: prices that the search optimised; NaN for strategies that have none.
      candidates: candidate set of the search ("" for strategies that have none).
      strategy: see `DecodeConfig`.
      correct_by_value, correct_by_vote: reward of the answer chosen by value, and by weighted vote.
      correct_by_majority: expected reward of the majority answer of the finished prefixes, which no
        value decides.
      tokens: generated tokens, a shared prefix counted once.
      serial_steps: decode steps in which a prefix of the prompt was live.
      n_started, n_finished: prefixes started (forks included), and those that reached their end.
      seconds: wall-clock of the whole run.
    """

    name: str
    alpha: float
    beta: float
    candidates: str
    strategy: str
    correct_by_value: np.ndarray
    correct_by_vote: np.ndarray
    correct_by_majority: np.ndarray
    tokens: np.ndarray
    serial_steps: np.ndarray
    n_started: np.ndarray
    n_finished: np.ndarray
    seconds: float

    def __post_init__(self) -> None:
        for field in (
            "correct_by_value",
            "correct_by_vote",
            "correct_by_majority",
            "tokens",
            "serial_steps",
            "n_started",
            "n_finished",
        ):
            object.__setattr__(self, field, np.asarray(getattr(self, field), np.float64))
            shape = getattr(self, field).shape
            if shape != self.tokens.shape or len(shape) != 1:
                raise ValueError(
                    f"run {self.name!r}: {field} has shape {shape}, not one entry per prompt"
                )

    @classmethod
    def from_results(
        cls,
        results: Sequence[Result],
        correct_by_value: Any,
        correct_by_vote: Any,
        correct_by_majority: Any,
        *,
        name: str,
        alpha: float,
        beta: float,
        candidates: str,
        strategy: str,
        seconds: float,
    ) -> OnlineRun:
        """Collects the cost of `P` results; their texts are graded by the caller (`value_text`,
        `vote_text`, and all by majority)."""
        return cls(
            name=name,
            alpha=alpha,
            beta=beta,
            candidates=candidates,
            strategy=strategy,
            correct_by_value=correct_by_value,
            correct_by_vote=correct_by_vote,
            correct_by_majority=correct_by_majority,
            tokens=np.array([r.usage.tokens for r in results]),
            serial_steps=np.array([r.usage.serial_steps for r in results]),
            n_started=np.array([sum(bool(p.token_ids) for p in r.prefixes) for r in results]),
            n_finished=np.array([sum(p.state == "finished" for p in r.prefixes) for r in results]),
            seconds=seconds,
        )

    @property
    def adaptive(self) -> bool:
        """Whether alpha and beta shaped the run; the other strategies are one point under every
        alpha."""
        return self.strategy == "zip_rc"

    def correct(self, answer: str) -> np.ndarray:
        """`[P]` reward of the answer chosen by "value" or by "vote".

        Raises:
          UsageError: another kind of answer.
        """
        if answer not in ANSWERS:
            raise UsageError(
                f"answer={answer!r}",
                f"answers are chosen by one of {', '.join(ANSWERS)}",
                "use one of them",
            )
        return self.correct_by_value if answer == "value" else self.correct_by_vote

    def cost(self, mean_length: Any, alpha: float) -> Cost:
        """See `normalised_cost`."""
        return normalised_cost(self.tokens, self.serial_steps, mean_length, alpha)
